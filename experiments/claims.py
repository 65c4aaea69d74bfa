"""``python -m experiments.claims``: the paper's claims beside what the committed records say."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from experiments import training
from experiments.adam_edge import run as adam_edge
from experiments.batch import run as batch
from experiments.checkpoints import run as checkpoints
from experiments.fcn import run as fcn
from experiments.foresight import tables as foresight
from experiments.foresight.analysis import RIVALS, alarms, foretold, within_runs
from experiments.foresight.run import trained
from experiments.gpt_wsd import run as gpt
from experiments.learning_rate import prediction as rates
from experiments.learning_rate import verdicts
from experiments.learning_rate.run import FIVE, Training
from experiments.mix import analysis as mix
from experiments.parts import run as parts
from experiments.tracking import run as tracking
from experiments.weight_decay import run as weight_decay
from megatron_sharpness.report.verdict import DIVERGED, FAR_TOO_LOW, verdict_of

HERE = Path(__file__).parent
Runs = dict[str, list[training.Row]]


#: What the paper says, the case that a number of ours is of, the number, and the range in which it
#: bears the claim out.
Found = Iterator[tuple[str, str, float, float, float]]

STAY_BELOW = "mini-batch training stays below 2/η: λ_c · η/2"
DECAY = "λ_c rises when the learning rate decays, and not without: λ_c at the end / stable phase"


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, and one number of ours that bears it out, or does not."""

    experiment: str
    text: str
    case: str
    measured: float
    lowest: float
    highest: float

    @property
    def holds(self) -> bool:
        return self.lowest <= self.measured <= self.highest


@functools.cache
def claims() -> tuple[Claim, ...]:
    """All claims, from ``experiments/*/records``."""
    return tuple(
        Claim(name, text, case, float(measured), lowest, highest)
        for name, function in CLAIMS.items()
        for text, case, measured, lowest, highest in function(training.read(HERE / name))
    )


def uv_claims(runs: Runs) -> Found:
    text = "early sharpness reduction where training starts above the edge: λ_c · η/2"
    reduced = training.column(runs["sharpness-reduction"], "critical_sharpness")
    line = runs["sharpness-reduction"][0]["edge_of_stability"]
    yield text, "at the start", reduced[0] / line, 1.0, 2.0
    yield text, "at the end", reduced[-1] / line, 0.0, 0.9
    sharpened = training.column(runs["progressive-sharpening"], "critical_sharpness")
    last = runs["progressive-sharpening"][-1]
    text = "λ_c sharpens progressively, to the λ_max of the minimum"
    yield text, "λ_c at the end / at the start", sharpened[-1] / sharpened[0], 2.0, np.inf
    ratio = last["critical_sharpness"] / last["hessian_sharpness"]
    yield text, "λ_c / λ_max at the end", ratio, 0.98, 1.02
    orbit = runs["edge-of-stability"][-16:]
    mean = np.average(
        training.column(orbit, "critical_sharpness"), weights=training.column(orbit, "slope")
    )
    text = "beyond the edge training oscillates about it: mean λ_c · η/2"
    yield text, "period two", mean * orbit[0]["lr"] / 2, 0.95, 1.05


def fcn_claims(runs: Runs) -> Found:
    full = runs["full-batch"]
    text = "full-batch descent settles at the edge of stability (Fig. 3): curvature · η/2"
    for label, field in (
        ("λ_c", "critical_sharpness"), ("λ_dir", "exact_directional_sharpness"),
        ("λ_max", "hessian_sharpness"),
    ):  # fmt: skip
        yield text, label, fcn.plateau(full, field), 0.95, 1.05
    for name in ("batch-100", "batch-25"):
        value = fcn.plateau(runs[name], "critical_sharpness")
        yield STAY_BELOW, name.replace("-", " of "), value, 0.1, 0.95
    everything = [row for rows in runs.values() for row in rows if "hessian_sharpness" in row]
    ratio = training.column(everything, "exact_directional_sharpness") / training.column(
        everything, "hessian_sharpness"
    )
    text = "λ_dir ≤ λ_max along the gradient (Result 2.1): λ_dir / λ_max"
    yield text, f"largest of {len(everything)} records", ratio.max(), 0.0, 1.0 + 1e-3


def adam_claims(runs: Runs) -> Found:
    found = {b: adam_edge.plateau(runs[f"beta1-{b:g}"]) for b in adam_edge.RATES}
    text = "under Adam λ_c settles at 2/η whatever β₁ is: λ_c · η/2"
    for beta1, values in found.items():
        yield text, f"β₁ = {beta1:g}", values["critical_sharpness"], 0.95, 1.05
    text = "and λ_max^PH at (2/η)(1 + β₁)/(1 − β₁) (Result 3.1): the ratio of the two"
    for beta1, values in found.items():
        # The oscillation raises the curvature that it is seen at: 10 %.
        yield text, f"β₁ = {beta1:g}", values["preconditioned_sharpness"], 0.9, 1.1


def decay_claims(runs: Runs) -> Found:
    text = "weight decay moves the edge of λ_max to 2/η − γ (Result 3.1): λ_max / (2/η − γ)"
    for decay in weight_decay.DECAYS[1:]:
        found = weight_decay.edges(runs[f"decay-{decay:g}"])
        ratio = found["hessian_sharpness"] / found["2/lr - decay"]
        yield text, f"γ = {decay:g}", ratio, 0.99, 1.01


def tracking_claims(runs: Runs) -> Found:
    text = "λ_c follows λ_max^PH along a mini-batch run: rank correlation"
    yield text, "batch of 250, η = 0.01", tracking.correlation(runs["batch-250-0.01"]), 0.4, 1.0
    text = "and does not with the full batch below the edge (ours)"
    for peak in ("0.01", "0.003"):
        yield text, f"η = {peak}", tracking.correlation(runs[f"full-batch-{peak}"]), -1.0, 0.0


def gpt_claims(runs: Runs) -> Found:
    for peak in gpt.RATES:
        rows = [row for row in runs[f"wsd-{peak:g}"] if row["iteration"] > 2 * gpt.WARMUP]
        share = np.nanmax(training.column(rows, "lr_over_critical"))
        yield f"{STAY_BELOW}, at most", f"GPT, η = {peak:g}", share, 0.1, 0.95
    for schedule, lowest, highest in (("wsd", 1.3, np.inf), ("constant", 0.6, 1.2)):
        for peak in gpt.RATES:
            ratio = rise(runs[f"{schedule}-{peak:g}"])
            yield DECAY, f"{schedule}, η = {peak:g}", ratio, lowest, highest
    everything = [
        row
        for name, rows in runs.items()
        for row in rows
        # until the decay both schedules are one run
        if "preconditioned_sharpness" in row
        and ("wsd" in name or row["iteration"] > gpt.STEPS - gpt.DECAY)
    ]
    correlation = spearmanr(
        training.column(everything, "critical_sharpness"),
        training.column(everything, "preconditioned_sharpness"),
    ).statistic
    text = "λ_c and λ_max^PH order runs and phases alike (Fig. 1): rank correlation"
    yield text, f"{len(everything)} records of six runs", correlation, 0.7, 1.0


def rise(rows: list[training.Row]) -> float:
    """Median λ_c in the last 20 steps over that in the 100 steps before a decay would begin."""
    steps, values = training.column(rows, "iteration"), training.column(rows, "critical_sharpness")
    decay = gpt.STEPS - gpt.DECAY
    stable = np.nanmedian(values[(steps > decay - 100) & (steps <= decay)])
    return float(np.nanmedian(values[steps > gpt.STEPS - 20]) / stable)


def batch_claims(runs: Runs) -> Found:
    own, other = (
        [np.median(batch.sharpness_of(rows, name)) for rows in runs.values()]
        for name in batch.BATCHES
    )
    sizes = [size * gpt.LENGTH for size in batch.SIZES]
    text = "λ_c grows with the size of the step's own batch (ours)"
    yield text, f"{sizes[-1]} tokens / {sizes[0]} tokens", own[-1] / own[0], 1.0, np.inf
    text = "and reads higher on another batch: λ_c there / on the step's own (ours)"
    for position in (0, -1):
        ratio = other[position] / own[position]
        yield text, f"{sizes[position]} tokens", ratio, 1.0, np.inf
    text = "four times the tokens about halve the scatter of log λ_c (ours)"
    scatter = [
        np.log(batch.sharpness_of(rows, batch.BATCHES[0])).std(ddof=1) for rows in runs.values()
    ]
    exponent, _ = np.polyfit(np.log(sizes), np.log(scatter), 1)
    yield text, "its factor for each", 4.0**exponent, 0.4, 0.65


def mix_claims(runs: Runs) -> Found:
    both = {
        "prose": ("prose", "code", runs),
        "WikiText-2": ("WikiText-2", "GSM8K", training.read(HERE / "mix" / "text")),
    }
    text = "the tasks' λ_c^{1→2} cross at a share of the old data (Fig. 6 a)"
    for first, (_, second, found) in both.items():
        crossing = mix.advice_of(found).crossing
        yield text, f"{first} with {second}", np.nan if crossing is None else crossing, 0.5, 0.95
    one = "one step raises a held-out loss where η > 2/λ_c^{1→2}: agreement over shares and η"
    for steps, text, lowest in (
        (1, one, 0.9), (100, "and 100 steps of training do, less clearly (Fig. 6 b, c)", 0.7),
    ):  # fmt: skip
        for *names, found in both.values():
            for task, name in zip(mix.TASKS, names, strict=True):
                agreed, constant = mix.agreement(found, task, steps)
                yield text, f"{name} (one answer for all: {constant:.2f})", agreed, lowest, 1.0


def checkpoints_claims(runs: Runs) -> Found:
    pairs = {
        beta1: (runs[f"in-run-{beta1:g}"], runs[f"own-moments-{beta1:g}"])
        for beta1 in (checkpoints.BETA1, *reversed(checkpoints.OTHERS))
    }
    ratios = np.concatenate([checkpoints.reproduction(*pair) for pair in pairs.values()])
    text = "from a checkpoint the first step measures what the training did: λ_c / its λ_c − 1"
    yield text, f"largest of {len(ratios)}", np.abs(ratios - 1).max(), 0.0, 1e-3
    text = "where nothing moves momentum raises λ_c (ours): steps 21 to 30 / in the run"
    for (beta1, pair), (lowest, highest) in zip(
        pairs.items(), ((2.0, 19.0), (1.5, 4.0), (0.7, 1.4)), strict=True
    ):
        late = np.median(checkpoints.drift(*pair)[20:])
        yield text, f"β₁ = {beta1:g}", late, lowest, highest
    own, warm = (
        checkpoints.medians(runs[f"{kind}-{checkpoints.BETA1:g}"])
        for kind in ("own-moments", "warm-moments")
    )
    there = checkpoints.in_run_medians(pairs[checkpoints.BETA1][0], own)
    text = "λ_c with warmed moments over checkpoints: rank correlation"
    for case, other, lowest in (("with own moments", own, 0.9), ("with the run's", there, 0.2)):
        correlation = spearmanr(list(warm.values()), list(other.values())).statistic
        yield text, case, correlation, lowest, 1.0


def parts_claims(runs: Runs) -> Found:
    text = "attention breaks first, alone (ours): its η/η_c / that of the part"
    for optimizer, others in (("AdamW", ("mlp", "embeddings", "norms")), ("Muon", ("mlp",))):
        rows = runs[f"{optimizer.lower()}-modules"]
        first = parts.stable_ratio(rows, "attention")
        for part in others:
            ratio = first / parts.stable_ratio(rows, part)
            yield text, f"{optimizer}, {part}", ratio, 1.05, np.inf
    rows = runs["muon-groups"]
    ratio = parts.stable_ratio(rows, "muon") / parts.stable_ratio(rows, "adamw")
    yield "Muon's group breaks before AdamW's (ours)", "at one learning rate", ratio, 1.05, np.inf
    text = "a part takes as many forward passes (ours)"
    for name, rows in runs.items():
        yield text, name.replace("-", ", "), parts.passes(rows), 2.0, 3.0


def learning_rate_claims(runs: Runs) -> Found:
    known = rates.sweeps(Training.from_row(row) for rows in runs.values() for row in rows)
    five = known.pop(FIVE)
    on, tried = rates.apart(known)
    text = (
        "at the best learning rate η/η_c is one value for an optimizer and a batch size (ours): "
        "largest / smallest"
    )
    groups = {
        f"{optimizer}, {sequences}": sweeps
        for (optimizer, sequences), sweeps in verdicts.by_optimizer_and_batch(known).items()
        if len(sweeps) > 1
    }
    for case, sweeps in groups.items():
        yield text, case, verdicts.spread(map(verdicts.at_best, sweeps)), 1.0, 2.0
    text = "while the best learning rates themselves differ (ours): largest / smallest"
    for case, sweeps in groups.items():
        yield text, case, verdicts.spread(map(rates.best, sweeps)), 1.0, np.inf
    found = rates.outcome(rates.by_ratio(rates.chosen_target(on)), tried)
    text = "three short trainings' η/η_c do not predict it (ours): share within a factor of 2"
    yield text, f"{len(tried)} sweeps", found.within / len(tried), 0.0, 0.89
    counted = verdicts.confusion(tried.values())
    text = "the verdict of a report is right (ours): share of trainings"
    yield text, f"all {sum(counted.values())}", verdicts.right(counted), 0.6, 1.0
    for name in (FAR_TOO_LOW, DIVERGED):
        yield text, name, verdicts.right(counted, [name]), 0.95, 1.0
    text = "five learning rates have five verdicts (ours)"
    yield text, "different ones", len({verdict_of(each.run).name for each in five}), 5, 5


def foresight_claims(runs: Runs) -> Found:
    known = trained(row for rows in runs.values() for row in rows)
    text = "η/η_c alone tells a spike no better than loss and gradient norm (ours): AUC − theirs"
    for ahead in (1, 5):
        areas = {name: np.mean(found) for name, found in within_runs(known, ahead).items()}
        rival = max(areas[name] for name in RIVALS)
        yield text, f"{ahead} ahead", areas["η/η_c"] - rival, -0.5, 0.02
    chosen, tried = foresight.apart(known)
    text = "beside them it adds (ours): AUC of all three − of the two, in other trainings"
    for ahead in (1, 5):
        two, three = (
            foretold(chosen, tried, ahead, foresight.COMBINED[name]).area
            for name in ("loss and gradient norm", "loss, gradient norm and η/η_c")
        )
        yield text, f"{ahead} ahead", three - two, 0.03, 1.0
    text = "above 1 twice in a row before the loss has doubled (ours): share of trainings"
    warned = next(each for each in alarms(known) if (each.threshold, each.after) == (1.0, 2))
    yield text, f"{warned.doubles} trainings", warned.before / warned.doubles, 0.85, 1.0


#: Folder → the claims about its records.
CLAIMS = {
    "uv": uv_claims,
    "fcn": fcn_claims,
    "adam_edge": adam_claims,
    "weight_decay": decay_claims,
    "tracking": tracking_claims,
    "gpt_wsd": gpt_claims,
    "batch": batch_claims,
    "mix": mix_claims,
    "checkpoints": checkpoints_claims,
    "parts": parts_claims,
    "learning_rate": learning_rate_claims,
    "foresight": foresight_claims,
}


def table() -> str:
    """All claims as a Markdown table, for the README of the experiments."""
    lines = ["| claim | measured | holds in | where |", "|---|---|---|---|"]
    for name in CLAIMS:
        lines += [f"{row} [{name}]({name}/README.md) |" for row in rows(name)]
    return "\n".join(lines)


def table_of(experiment: str) -> str:
    """The claims about one experiment, for its own README."""
    return "\n".join(["| claim | measured | holds in |", "|---|---|---|", *rows(experiment)])


def rows(experiment: str) -> Iterator[str]:
    """A row for each claim, all cases in it."""
    found = (claim for claim in claims() if claim.experiment == experiment)
    for text, group in itertools.groupby(found, key=lambda claim: claim.text):
        cases = list(group)
        measured = "; ".join(f"{claim.case}: {claim.measured:#.3g}" for claim in cases)
        ranges = "; ".join(dict.fromkeys(_range(claim) for claim in cases))
        yield f"| {text} | {measured} | {ranges} |"


def _range(claim: Claim) -> str:
    if claim.highest == np.inf:
        return f"> {claim.lowest:g}"
    return f"{claim.lowest:g} to {claim.highest:g}"


if __name__ == "__main__":
    print(table())
