"""What is said of a run, on runs whose story is known."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_sharpness import cli
from megatron_sharpness.core.measurement import Measurement
from megatron_sharpness.report.phases import DECAY, STABLE, WARM_UP, phases_of, stable_phase
from megatron_sharpness.report.records import Curve, Logged, Run
from megatron_sharpness.report.verdict import (
    ABOVE,
    AT_THE_EDGE,
    DIVERGED,
    FAR_TOO_LOW,
    HIGH,
    LEAST,
    LEAST_RATIO,
    LOW,
    RULE,
    RULES,
    TOO_FEW,
    TOO_HIGH,
    USUAL,
    last_loss,
    log_verdict,
    verdict_of,
)
from megatron_sharpness.sinks import ConsoleSink, JsonLinesSink
from tests.processes import ROOT

from .test_report import record, write

LR = 1e-3


def run(
    ratios: Any, losses: Any = None, rates: Any = None, status: Any = None, **fields: Any
) -> Run:
    """Measured every 10 iterations, with these η/η_c, losses and learning rates."""
    n = len(ratios)
    losses = np.geomspace(6.0, 2.0, n) if losses is None else losses
    rates = np.full(n, LR) if rates is None else rates
    status = ["found"] * n if status is None else status
    return Run(
        "run",
        [
            record(
                10 * (i + 1), s, lr=float(lr), loss=None if loss is None else float(loss),
                **({"lr_over_critical": r, "critical_lr": lr / r, "critical_sharpness": 2 * r / lr}
                   if s == "found" else {}),
                **fields,
            )
            for i, (r, loss, lr, s) in enumerate(zip(ratios, losses, rates, status, strict=True))
        ],
    )  # fmt: skip


def wsd() -> Run:
    """Ten measurements of warm-up, forty at the peak, ten of decay."""
    rates = LR * np.concatenate(
        [np.arange(1, 11) / 12, np.ones(40), np.linspace(0.85, 0.05, 10)]
    )
    ratios = np.concatenate([np.full(10, 0.02), np.full(40, 0.25), np.full(10, 0.125)])
    ratios[[3, 20]] = 1.5, 1.2
    return run(ratios, rates=rates, tokens=1e6)


def test_the_phases_of_a_schedule_are_told_apart() -> None:
    phases = phases_of(wsd())
    assert [(p.name, p.first, p.last) for p in phases] == [
        (WARM_UP, 10, 100), (STABLE, 110, 500), (DECAY, 510, 600)
    ]  # fmt: skip
    assert [p.median for p in phases] == [0.02, 0.25, 0.125]
    assert [p.raised for p in phases] == [1, 1, 0]
    assert phases[1].last_sharpness == 2 * 0.25 / LR
    constant = phases_of(run([0.2] * 5))
    assert [(p.name, p.first, p.last) for p in constant] == [(STABLE, 10, 50)]
    cosine = phases_of(run([0.2] * 50, rates=LR * np.cos(np.linspace(0, 1.5, 50))))
    assert [p.name for p in cosine] == [STABLE, DECAY]
    comes_back = np.tile([LR, LR / 3], 10)  # to its peak
    stable, _ = phases_of(run(np.tile([0.3, 0.1], 10), rates=comes_back))
    assert (stable.median, len(stable.records)) == (0.3, 10)
    assert phases_of(run([None], rates=[0.0], status=["zero_lr"])) == []


def test_the_schedule_as_it_was_logged_counts_where_that_is_denser() -> None:
    measured = wsd()
    at = np.arange(1, 601)
    lr = Curve(at, np.where(at < 105, LR / 2, np.where(at <= 301, LR, LR / 10)))
    logged = Run("run", measured.records, Logged({"lr": lr}))
    assert (stable_phase(logged).first, stable_phase(logged).last) == (110, 300)  # type: ignore[union-attr]


def test_what_was_in_each_phase_is_said() -> None:
    said = str(verdict_of(wsd()))
    assert said.startswith(f"verdict: {USUAL}\n")
    for sentence in (
        "warm-up (iterations 10 to 100): η/η_c is 0.02 in the median, 1.5 at most; one step could "
        "have been 50 times as long; 1 of 10 measured steps raised the loss of their own batch",
        "stable phase (iterations 110 to 500): η/η_c is 0.25 in the median, 1.2 at most; one step "
        "could have been 4 times as long; 1 of 40 measured steps raised",
        "decay (iterations 510 to 600): η/η_c is 0.125 in the median, 0.125 at most",
    ):
        assert sentence in said
    assert "few" not in said and "trust" not in said


@pytest.mark.parametrize("name", LEAST_RATIO)
def test_the_median_in_the_stable_phase_names_the_verdict(name: str) -> None:
    least = LEAST_RATIO[name]
    assert verdict_of(run([least + 1e-9] * 20)).name == name
    if least:
        assert verdict_of(run([least - 1e-3] * 20)).name != name
    odd = [least + 0.01] * 20
    odd[::5] = [9.0] * 4  # a value here and there decides nothing
    assert verdict_of(run(odd)).name == name


def test_steps_that_raise_the_loss_at_once_count_as_the_largest_and_never_as_the_least() -> None:
    status = ["found"] * 4 + ["not_descent"] * 6
    assert verdict_of(run([0.2] * 10, status=status)).name == ABOVE
    said = str(verdict_of(run([0.2] * 10, status=["found"] * 8 + ["no_lower"] * 2)))
    assert "infinite at most" in said and "2 of 10 measured steps raised" in said
    never = verdict_of(run([0.2] * 10, status=["found"] * 4 + ["no_upper"] * 6))
    assert never.name == FAR_TOO_LOW
    assert "along 6 of 10 updates the loss never rises" in str(never)


FALLS = np.geomspace(6.0, 2.0, 30)


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        (np.append(FALLS, [3.0, 8.0, 90.0, 80.0, 93.0]), "to 93 by iteration 350"),
        (np.append(FALLS, [3.0, 8.0, 20.0, 9.0, *[3.0] * 10]), "in the end it is 3"),  # comes back
        (np.concatenate([[6.0, 17.0, 40.0, 50.0, 30.0], FALLS]), "from 6 to 40"),  # at the start
        (np.append(FALLS, [9.0]), "to 9 by iteration 310"),  # and there it ended
        (np.concatenate([np.geomspace(11, 6, 30), np.full(10, 10.8)]), "from 6.1"),  # not twofold
        (np.append(np.linspace(1.0, -5.0, 30), [-1.0] * 5), "to -1 by"),  # below zero
    ],
)
def test_a_loss_that_was_lost_is_named_first(losses: Any, said: str) -> None:
    verdict = verdict_of(run([0.2] * len(losses), losses))
    assert verdict.name == DIVERGED
    assert said in verdict.sentences[0]


@pytest.mark.parametrize(
    "losses",
    [
        FALLS,
        np.where(np.arange(30) == 15, 9.0, FALLS),  # a spike of one measurement
        np.append(FALLS, [2.5, 3.0, 3.5, 3.9, 3.5, 3.0]),  # rises, but not twofold
        np.append(np.geomspace(2.0, 1e-4, 30), [5e-4] * 5),  # of next to nothing
        [6.0, 5.9, 6.1, 5.8, 6.0],
        np.append(np.linspace(1.0, -5.0, 30), [-3.0] * 5),  # of a loss that may be negative
        np.append(np.geomspace(1.5, 1.2, 30), [1.4] * 5),  # of a fall that was small
        np.append(np.linspace(3.0, 2.0, 30), 2.5 + 0.5 * (-1.0) ** np.arange(40)),  # in its scatter
    ],
)
def test_what_is_no_divergence(losses: Any) -> None:
    assert verdict_of(run([0.2] * len(losses), losses)).name == USUAL


def test_a_loss_that_is_not_finite_has_diverged() -> None:
    status = ["found"] * 9 + ["non_finite"]
    ended = run([0.2] * 10, [*FALLS[:9], None], status=status)
    assert verdict_of(ended).name == DIVERGED
    assert verdict_of(ended).sentences[0] == (
        "the loss was not finite at 1 of 10 measurements, first at iteration 100"
    )
    then_failed = run([0.2] * 10, status=["found"] * 8 + ["non_finite", "failed"])
    assert verdict_of(then_failed).name == DIVERGED
    for number, name in ((3, DIVERGED), (1, USUAL)):  # it comes back
        status = ["found"] * 5 + ["non_finite"] * number + ["found"] * (5 - number)
        verdict = verdict_of(run([0.2] * 10, status=status))
        assert verdict.name == name and "raised the loss" not in str(verdict)
    loss = Curve(np.arange(1.0, 121.0), np.append(np.full(119, 3.0), math.nan))
    logged = Run("run", run([0.2] * 10).records, Logged({"loss": loss}))
    assert verdict_of(logged).sentences[0] == "the loss is not finite at iteration 120"


def test_few_measurements_are_no_verdict() -> None:
    assert verdict_of(run([0.2] * LEAST)).name == USUAL
    assert verdict_of(run([0.2] * (LEAST - 1))).name == TOO_FEW
    in_decay = run([0.2] * 40, rates=np.append(np.full(4, LR), np.full(36, LR / 2)))
    assert verdict_of(in_decay).name == TOO_FEW
    assert "and there are 4: measure more often" in str(verdict_of(in_decay))
    assert verdict_of(run([0.2] * 9, status=["noise_limited"] * 9)).name == TOO_FEW


def test_a_median_that_is_not_well_known_may_be_the_other() -> None:
    noise = np.exp(np.random.default_rng(1).standard_normal(10))
    said = str(verdict_of(run(0.09 * noise / np.median(noise))))
    assert "it may as well be" in said and USUAL in said
    assert "it may as well be" not in str(verdict_of(run([0.09] * 10)))
    assert "it may as well be" not in str(verdict_of(run(0.2 * np.tile([0.9, 1.1], 20))))


def test_how_far_to_trust_it_is_said() -> None:
    status = ["found"] * 8 + ["noise_limited"] * 2
    hidden = run([0.2] * 10, status=status)
    assert "2 of 10 measurements ended noise_limited" in str(verdict_of(hidden))
    assert "a batch has 256 tokens" in str(verdict_of(run([0.2] * 10, tokens=256)))
    noise = np.random.default_rng(0).standard_normal(4000)
    said = str(verdict_of(run(0.2 * np.exp(0.5 * noise), np.full(4000, 2.0))))
    assert "off the median by a factor of 1.7" in said and "it would be about 1.3" in said


def test_runs_are_a_table_by_learning_rate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = {"high": (0.6, 3e-2), "low": (0.01, 1e-4), "right": (0.2, 3e-3)}
    paths = [
        write(tmp_path / f"{name}.jsonl", run([ratio] * 9, rates=np.full(9, lr)).records)
        for name, (ratio, lr) in runs.items()
    ]
    nothing = write(tmp_path / "nothing.jsonl", [record(10, "failed", loss=None)])
    assert cli.main(["report", *map(str, paths), str(nothing)]) == 0
    heading, *rows, end = capsys.readouterr().out.rstrip("\n").splitlines()
    names = ["run", "peak lr", "median lr/η_c", "largest", "λ_c", "loss", "verdict"]
    assert re.split("  +", heading.strip()) == names
    rows = [*rows, end]
    assert [row.split()[0] for row in rows] == ["low", "nothing", "right", "high"]
    loss = f"{last_loss(run([0.2] * 9)):.4f}"
    assert rows[0].split(maxsplit=6) == ["low", "0.0001", "0.01", "0.01", "200", loss, FAR_TOO_LOW]
    assert rows[1].split(maxsplit=6) == ["nothing", "0.001", "-", "-", "-", "-", TOO_FEW]
    assert rows[3].endswith(TOO_HIGH)


def measurement(iteration: int) -> Measurement:
    return Measurement(
        iteration, None, LR, "train", "found", loss=2.0, critical_lr=5 * LR, tokens=10_000,
        critical_sharpness=0.4 / LR, lr_over_critical=0.2,
    )  # fmt: skip


def test_a_training_ends_its_log_with_the_verdict(tmp_path: Path) -> None:
    said: list[str] = []
    console, lines = ConsoleSink(said.append), JsonLinesSink(tmp_path / "log.jsonl")
    log_verdict([console, lines])  # nothing was measured
    for sinks in ([], [console], [lines]):
        log_verdict(sinks)
    assert not said
    for iteration in range(10):
        lines.write(measurement(iteration))
    log_verdict([console, lines])
    assert said[0] == f" critical sharpness: verdict: {USUAL}"
    assert said[1].startswith(" critical sharpness:   stable phase (iterations 0 to 9): η/η_c is ")

    lines.path.write_text("{")  # somebody else's
    log_verdict([console, lines])
    assert said[-1].startswith(" critical sharpness: no verdict (InputError: RUN ")


def test_the_page_of_the_documentation_has_the_rules_as_they_are() -> None:
    page = re.sub(r"\s+", " ", (ROOT / "docs/report.md").read_text())
    for name, rule in RULES.items():
        assert f"**{name}**: {rule}" in page
    assert RULE in page


def test_the_names_are_in_order() -> None:
    assert list(LEAST_RATIO) == [FAR_TOO_LOW, LOW, USUAL, HIGH, TOO_HIGH, AT_THE_EDGE, ABOVE]
    assert list(LEAST_RATIO.values()) == sorted(LEAST_RATIO.values())


def test_the_page_shows_what_is_said_of_the_quick_start(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["report", str(ROOT / "benchmarks/results/quickstart.jsonl")])
    said = capsys.readouterr().out
    assert said[said.index("verdict:") :].strip() in (ROOT / "docs/report.md").read_text()
