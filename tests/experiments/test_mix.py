"""The experiment on data mixes: its analysis of known numbers, and one small run of it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

for package in ("hessian_eigenthings", "matplotlib"):
    pytest.importorskip(package, reason=f"needs {package}: pip install .[experiments]")

# ruff: noqa: E402
from experiments import training
from experiments.mix import __main__ as mix
from experiments.mix import analysis
from experiments.mix.run import NOTED, RATES, TRAINED, Setting, grid, pretrain, sweep, train_on
from tests.processes import ROOT

FOLDER = ROOT / "experiments" / "mix"
NAMES = {"first": "prose", "second": "code"}
TEXT_NAMES = {"first": "WikiText-2", "second": "GSM8K"}


def test_the_readme_has_the_numbers_of_the_records() -> None:
    page = (FOLDER / "README.md").read_text()
    assert analysis.tables(training.read(FOLDER), NAMES) in page
    assert analysis.tables(training.read(FOLDER / "text"), TEXT_NAMES) in page


def known() -> analysis.Runs:
    """η_c of the first loss is 1e-3·(1 + r), of the second 1e-3·(2 − r); it rises from 2η_c on."""

    def critical(share: float) -> dict[str, float]:
        return {"first": 1e-3 * (1 + share), "second": 1e-3 * (2 - share)}

    runs: analysis.Runs = {}
    for share in TRAINED:
        sharpness = {task: 2 / lr for task, lr in critical(share).items()}
        runs[f"sweep-{share:g}"] = [{"share": share, **sharpness}] * 3
        runs[f"grid-{share:g}"] = [
            {"share": share, "lr": lr, "steps": steps}
            | {f"change_{task}": math.log(lr / (2 * at)) for task, at in critical(share).items()}
            for lr in RATES
            for steps in NOTED
        ]
        runs[f"fixed-{share:g}"] = [{"share": share, "first": 2 - share, "second": 1 + share}]
    seen = {"sharpness_first": "inf", "sharpness_second": 10.0}
    runs["adaptive-1"] = [
        {"share": 0.5, "first": 1.5, "second": 1.6},
        {"share": 0.5, "first": 1.5, "second": 1.6} | seen,
    ]
    return runs


def test_the_analysis_of_known_numbers() -> None:
    runs = known()
    advice = analysis.advice_of(runs)
    assert (advice.share, advice.crossing) == (0.4, pytest.approx(0.5))
    for task in analysis.TASKS:
        assert analysis.threshold_ratio(runs, task, 1) == pytest.approx(2.0)
        wrong = sum(
            lr > (1e-3 * (1 + r if task == "first" else 2 - r)) and
            lr <= 2e-3 * (1 + r if task == "first" else 2 - r)
            for r in TRAINED for lr in RATES
        )  # fmt: skip
        agreed, baseline = analysis.agreement(runs, task, 1)
        assert agreed == pytest.approx(1 - wrong / (len(TRAINED) * len(RATES)))
        assert 0.5 <= baseline < 1
    share, lr = analysis.roomiest(runs, 100)
    assert (share, lr) == (0.4, pytest.approx(2e-3 * 1.4))
    assert analysis.regrets(runs)["fixed-0.4"] == pytest.approx(0.6)
    assert analysis.regrets(runs)["adaptive-1"] == pytest.approx(0.6)
    assert analysis.edges_of_adaptive(runs) == {"adaptive-1": (math.inf, 5.0 * advice.lr)}


def test_shares_at_which_all_learning_rates_raise_the_loss_have_no_room() -> None:
    runs = known()
    for row in runs["grid-0.4"]:
        row["change_first"] = 1.0
    for row in runs["grid-0.6"]:
        row["change_first"] = -1.0
    assert analysis.thresholds(runs, "first", 1)[0.4] == 0.0
    assert analysis.thresholds(runs, "first", 1)[0.6] == math.inf
    assert analysis.roomiest(runs, 1) == (0.6, pytest.approx(2e-3 * 1.4))  # of the second loss


def test_the_experiment_runs_from_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = Setting(
        layers=1, width=16, heads=2, length=16, sequences=4, held_out=8, base_steps=20,
        accumulate=3, measure=2, steps=10,
    )  # fmt: skip
    base = tmp_path / "base.pt"
    runs = {"base": pretrain(setting, base)}
    before = base.read_bytes()
    for share in TRAINED:
        runs[f"sweep-{share:g}"] = sweep(setting, base, share)
    assert [row["batch_number"] for row in runs["sweep-0"]] == [4, 5]
    monkeypatch.setattr("experiments.mix.run.NOTED", (1, 3))
    monkeypatch.setattr(analysis, "NOTED", (1, 3))
    monkeypatch.setattr(mix, "STEPS_SHOWN", 3)
    for share in TRAINED:
        runs[f"grid-{share:g}"] = grid(setting, base, share)
        runs[f"fixed-{share:g}"] = train_on(setting, base, share, 1e-3, False)
    for share in (0.2, 1.0):
        runs[f"adaptive-{share:g}"] = train_on(setting, base, share, 1e-3, True)
    assert base.read_bytes() == before
    training.write(tmp_path, runs)
    read = training.read(tmp_path)
    mix.draw(read, tmp_path / "figure.png", NAMES)
    assert (tmp_path / "figure.png").stat().st_size > 20_000
    assert "Recommended:" in analysis.tables(read, NAMES)
