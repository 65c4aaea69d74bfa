"""A frozen run's proof that nothing has changed, and the runs that sweeps are made of."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch

from megatron_sharpness.core import frozen
from megatron_sharpness.core.errors import InputError
from megatron_sharpness.core.frozen import FrozenRun, fingerprint
from megatron_sharpness.sweeps.runs import REPORT, Frozen, RunFailed, add_arguments, check


def test_a_fingerprint_is_of_every_bit_and_of_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [torch.arange(6.0), torch.zeros(2, 0), torch.tensor(3), torch.ones(4).bfloat16()]
    whole = fingerprint(tensors)
    monkeypatch.setattr(frozen, "_CHUNK", 4)
    assert fingerprint(tensors) == whole
    assert fingerprint([t.clone() for t in tensors]) == whole
    assert fingerprint([*tensors[:3], tensors[3].float()]) == whole
    assert fingerprint([tensors[0].view(2, 3), *tensors[1:]]) != whole
    assert fingerprint([tensors[0].view(torch.int32), *tensors[1:]]) != whole
    tensors[0][3] = torch.nextafter(tensors[0][3], torch.tensor(9.0))
    assert fingerprint(tensors) != whole
    assert fingerprint([torch.tensor([0.0])]) != fingerprint([torch.tensor([-0.0])])


def test_a_run_that_has_left_all_as_it_was_says_so_and_another_one_raises() -> None:
    weights = torch.ones(3)
    run = FrozenRun(lambda: [weights])
    said: list[str] = []
    run.finish(said.append)
    report = REPORT.search(said[0])
    assert report is not None and report["sha256"] == fingerprint([weights])
    assert float(report["memory"]) > 1 and float(report["seconds"]) >= 0
    weights[0] += 1e-7
    with pytest.raises(RuntimeError, match="are not what they were: sha256"):
        run.finish(said.append)
    assert len(said) == 1


LINE = (
    f"critical sharpness, frozen: parameters and buffers are what they were, sha256 {'ab' * 32} | "
    "steps and measurements took 2.5 s | peak memory of a process: 100.0 MiB |"
)


def script(lines: int, said: str = LINE, code: int = 0) -> list[str]:
    """A command that writes so many records, and prints."""
    text = f"""
import sys
path = sys.argv[sys.argv.index("--critical-sharpness-log") + 1]
open(path, "w").write("{{}}\\n" * {lines})
print(sys.argv[1:])
print({said!r})
sys.exit({code})
"""
    return [sys.executable, "-c", text]


def test_a_run_is_the_training_command_with_flags(tmp_path: Path) -> None:
    plan = Frozen(script(6), accumulate=5, measure=3, eval_data=["a=b"], eval_samples=8)
    report = plan.run(["--load", "x"], tmp_path / "one.jsonl", "one", begin=40)
    assert (report.sha256, report.working, report.memory) == ("ab" * 32, 2.5, 100.0)
    assert report.seconds > 0
    assert (tmp_path / "one.jsonl").read_text() == "{}\n" * 6
    given = json.loads((tmp_path / "one.log").read_text().splitlines()[0].replace("'", '"'))
    for words in (
        ["--load", "x"], ["--train-iters", "48"], ["--critical-sharpness-frozen", "45"],
        ["--measure-critical-sharpness-every", "1"], ["--critical-sharpness-eval-samples", "8"],
        ["--critical-sharpness-eval-data", "a=b"],
    ):  # fmt: skip
        assert given[given.index(words[0]) :][: len(words)] == words


@pytest.mark.parametrize(
    "command",
    [
        script(3, code=3),
        script(2),  # a record is missing
        script(3, said="nothing of the parameters"),
        [sys.executable, "-c", "print('no such GPU')"],
    ],
)
def test_a_run_without_all_that_was_asked_of_it_fails(command: list[str], tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match=r"the training command ended with \d and \d of 3 batches"):
        Frozen(command, accumulate=0, measure=3).run([], tmp_path / "one.jsonl", "one")
    assert not (tmp_path / "one.jsonl").exists()


def test_the_error_is_shown_and_not_torchruns_report_of_it(tmp_path: Path) -> None:
    report = "E1125 torch/distributed/elastic/api.py:1] failed (exitcode: 1) local_rank: 0\n"
    said = "AssertionError: no such layer\n" + report + "further\n" * 50
    with pytest.raises(RunFailed, match="no such layer") as failed:
        Frozen(script(3, said, 1), accumulate=0, measure=3).run([], tmp_path / "one.jsonl", "one")
    assert "exitcode" not in str(failed.value) and "further" not in str(failed.value)


@pytest.mark.parametrize("flag", ["--save", "--save=x", "--train-samples", "--load", "--load=y"])
def test_flags_that_the_sweep_gives_are_refused(flag: str) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    start = ["--out", "out", "--", "torchrun"]
    check(parser.parse_args([*start, "--save-interval", "3", "--lr", "1"]), ["--load"])
    with pytest.raises(InputError, match=f"{flag.partition('=')[0]} in the training command"):
        check(parser.parse_args([*start, "script.py", flag]), ["--load"])
