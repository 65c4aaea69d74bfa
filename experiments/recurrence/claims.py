"""What is claimed of this experiment, and what its records say."""

from __future__ import annotations

import numpy as np

from experiments import training
from experiments.recurrence import analysis
from experiments.recurrence.run import JUMPS, RETROFIT, trained

#: Loop, curriculum and step of each jump, by name.
DOUBLED = {f"{2**k} → {2 ** (k + 1)}": ("doubled", jump) for k, jump in enumerate(JUMPS)}
GROWS = {
    f"{loop}, {name}": (loop, *at)
    for loop in ("injected", "bare")
    for name, at in (DOUBLED | {"1 → 8": ("retrofit", RETROFIT)}).items()
}
RETROFITS = {name: loop for name, (loop, curriculum, _) in GROWS.items() if curriculum != "doubled"}
#: Where nothing jumps: what is left is noise.
STAYS = {f"depth 8, step {jump}": ("injected", "8", jump) for jump in JUMPS}


def claims(runs: training.Runs) -> training.Found:
    known = trained(runs)
    yield from _of_sharpness(known)
    yield from _of_loss(known)


def _of_sharpness(runs: analysis.Runs) -> training.Found:
    """Whether λ_c jumps, and whether that is foretold. λ_c ∝ depth would be 2, and 8."""
    text = "λ_c does not jump where the depth of a loop does (ours): after / before, by plain GPT's"
    for name, (loop, curriculum, jump) in (GROWS | STAYS).items():
        found = [analysis.rise(*each, jump) for each in analysis.pairs(runs, loop, curriculum)]
        yield text, name, analysis.typical(found), 0.67, 1.5
    text = "and λ_c^{r→r'} along the updates before says so (ours): by their λ_c, mean of the seeds"
    for name, (loop, curriculum, jump) in GROWS.items():
        pairs = analysis.pairs(runs, loop, curriculum)
        found = [analysis.foretold(run, jump) for run, _ in pairs]
        yield text, name, analysis.typical(found), 0.67, 1.5
    text = "hardly a step from a jump on is beyond its edge (ours): share with η/η_c > 1"
    for loop in ("injected", "bare"):
        ratios = [
            analysis.edges(run, jump)
            for of, curriculum, jump in GROWS.values()
            if of == loop
            for run, _ in analysis.pairs(runs, loop, curriculum)
        ]
        beyond = float(np.mean(np.array(ratios) > 1.0))
        yield text, f"{loop}, {np.size(ratios)} steps", beyond, 0.0, 0.05
    text = "λ_c at depth 8 does not tell how it was come to (ours): curriculum's / constant depth's"
    late = {
        curriculum: [analysis.late(run) for run, _ in analysis.pairs(runs, "injected", curriculum)]
        for curriculum in ("8", "doubled")
    }
    ratio = analysis.typical(late["doubled"]) / analysis.typical(late["8"])
    yield text, "last 40 steps", ratio, 0.67, 1.5


def _of_loss(runs: analysis.Runs) -> training.Found:
    """What a jump does to the loss, and what depth brings for its cost."""
    text = "the loss jumps where λ_c does not (ours): mean of ten steps, after − before, in nats"
    for name, loop in RETROFITS.items():
        pairs = analysis.pairs(runs, loop, "retrofit")
        excess = np.mean([analysis.excess(*each, RETROFIT) for each in pairs])
        yield text, name, float(excess), 0.03, 3.0
    text = "most at its first step (ours): loss − plain GPT's of the same batch, in nats"
    for name, loop in RETROFITS.items():
        pairs = analysis.pairs(runs, loop, "retrofit")
        first = [each.loss[RETROFIT - 1] - plain.loss[RETROFIT - 1] for each, plain in pairs]
        yield text, name, float(np.mean(first)), 0.03, 3.0
    constant = [run for run, _ in analysis.pairs(runs, "injected", "8")]
    doubled = [run for run, _ in analysis.pairs(runs, "injected", "doubled")]
    cost, full = (analysis.cost(each[0])[-1] for each in (doubled, constant))
    text = "a curriculum preserves performance (retrofit paper): held-out loss − constant depth's"
    ours = np.mean([run.held[-1] for run in doubled])
    at_its_end = np.mean([run.held[-1] for run in constant])
    yield text, f"for {cost / full:.2f} of the blocks", float(ours - at_its_end), -1.0, 0.05
    at_our_cost = np.mean([analysis.held_at(run, cost) for run in constant])
    yield text, "for as many blocks", float(ours - at_our_cost), -3.0, 0.0
    text = (
        "a retrofit does not beat training on the plain GPT at one cost (retrofit paper: it does)"
    )
    for name, loop in RETROFITS.items():
        pairs = analysis.pairs(runs, loop, "retrofit")
        gain = np.mean([analysis.against_plain(*each) for each in pairs])
        yield text, name, float(gain), 0.0, 1.0
    text = "a warm-up anew at a jump does not help (ours): held-out loss with − without"
    helped = [
        anew.held[-1] - runs[f"bare-retrofit-same-{anew.case.seed}"].held[-1]
        for anew, _ in analysis.pairs(runs, "bare", "retrofit", "warm-up")
    ]
    yield text, f"bare, 1 → 8, {len(helped)} seeds", float(np.mean(helped)), -0.02, 0.5
