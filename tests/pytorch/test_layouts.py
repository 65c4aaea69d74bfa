"""Bit for bit the training without it, and the right number, under every way to train."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.processes import start_ranks

from .layouts import DISTRIBUTED, SINGLE, Layout
from .training import PARTS, compare


class Ranks:
    """Processes that go through all layouts once, and what they have found so far."""

    def __init__(self, folder: Path, world: int, **environment: str) -> None:
        self.folder, self.world = folder, world
        self.processes = start_ranks(
            ["-m", "tests.pytorch.training", str(folder)], folder, world, environment=environment
        )

    def wait(self, name: str) -> list[dict[str, Any]]:
        """What each rank found for that layout."""
        paths = [self.folder / f"{name} {rank}.json" for rank in range(self.world)]
        while not all(path.exists() for path in paths):
            codes = [process.poll() for process in self.processes]
            # After the last layout a rank may be through while another still computes.
            ended = any(codes) or None not in codes
            if ended and not all(path.exists() for path in paths):
                outputs = [p.read_text()[-2000:] for p in sorted(self.folder.glob("output*.txt"))]
                pytest.fail(f"a rank has ended before {name!r}:\n" + "\n".join(outputs))
            time.sleep(0.05)
        found = [json.loads(path.read_text()) for path in paths]
        for result in found:
            assert "error" not in result, result["error"]
        return found

    def stop(self) -> None:
        for process in self.processes:
            process.terminate()
            process.wait()


@pytest.fixture(scope="module", params=[2, 4])
def ranks(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Ranks]:
    started = Ranks(tmp_path_factory.mktemp("ranks"), request.param)
    yield started
    started.stop()


def check_training(layout: Layout, found: dict[str, Any]) -> None:
    assert found["on"] == found["off"]
    assert [record["status"] for record in found["records"]] == ["found", "found"]
    others = {"found", "not_descent"}  # what an update does to other data
    if layout.computes_in_low_precision:
        others.add("noise_limited")
    assert {record["status"] for record in found["others"]} <= others
    parts = found["parts while training"]
    assert len(parts) == 2 * len(PARTS)
    # Before a normalization weights may grow without end.
    assert {record["status"] for record in parts} <= others | {"no_upper"}


def check_number(layout: Layout, found: dict[str, Any]) -> None:
    record, reference = found["record"], found["reference"]
    low = layout.computes_in_low_precision
    # In fp32 the fp64 reference is met to rounding. In bf16 and fp16 the bracket is as wide as by
    # default, and the loss has noise, which moves the root: as far as the record says.
    precision = {
        "loss": 5e-4 if low else 1e-6,
        "slope": 5e-3 if low else 1e-6,
        "update_norm": 1e-6,
        "critical_lr": 2 * record["critical_lr_error"] if low else 1e-5,
    }
    assert record["critical_lr_error"] < (2e-2 if low else 1e-3)
    if layout.options.get("method") == "bisection":
        precision["critical_lr"] = 1e-3  # the middle of its bracket
    for name, rel in precision.items():
        assert record[name] == pytest.approx(reference[name], rel=rel), name
    if not low:
        lower, upper = record["critical_lr_lower"], record["critical_lr_upper"]
        assert lower <= reference["critical_lr"] < upper
    assert (record["noise"] > 1e-5) == low, "the precision that the weights are read in"
    assert record["tokens"] == found["tokens"]
    if layout.options.get("mode") == "eval":
        assert record["replay_error"] is None
    else:  # the loss that is replayed is the one that was trained on
        assert record["replay_error"] <= 2e-6
    check_moments(record["adam_snr"], found["adam_snr"])
    check_relative(layout, found["other"], reference["relative_critical_lr"])
    assert [part["part"] for part in found["parts"]] == list(reference["parts"])
    for part, (slope, critical_lr) in zip(
        found["parts"], reference["parts"].values(), strict=True
    ):
        # Gradients in 16 bits: a part has fewer of them, and their errors even out less.
        relative = 2e-2 if low else 1e-6
        assert part["slope"] == pytest.approx(slope, rel=relative, abs=1e-9), part
        check_relative(layout, part, critical_lr)


def check_moments(
    measured: dict[str, Any] | None, expected: dict[str, dict[str, float]] | None
) -> None:
    """The signal-to-noise ratios of all ranks' second moments together; none without Adam's."""
    assert (measured is None) == (expected is None)
    for kind, ratios in (expected or {}).items():
        assert {k: measured[kind][k] for k in ratios} == pytest.approx(ratios, rel=1e-6), kind
    assert set(measured or ()) == set(expected or ())


def check_relative(layout: Layout, other: dict[str, Any], critical_lr: float) -> None:
    """The same number of other data, whose noise is that of the loss too."""
    low = layout.computes_in_low_precision
    if critical_lr == 0.0 or (low and other["status"] == "noise_limited"):
        assert other["status"] in ("not_descent", "noise_limited")
        return
    if critical_lr == math.inf:
        assert other["status"] == "no_upper"
        return
    assert other["status"] == "found"
    precision = max(2e-2 if low else 1e-5, 2 * other["critical_lr_error"])
    if layout.options.get("method") == "bisection":
        precision = 1e-3
    assert other["critical_lr"] == pytest.approx(critical_lr, rel=precision)


@pytest.mark.parametrize("name", SINGLE)
def test_on_one_process(name: str) -> None:
    found = compare(SINGLE[name])
    check_training(SINGLE[name], found)
    check_number(SINGLE[name], found)


@pytest.mark.parametrize("name", DISTRIBUTED)
def test_on_several_processes(name: str, ranks: Ranks) -> None:
    results = ranks.wait(name)
    layout = DISTRIBUTED[name]
    check_number(layout, results[0])
    for found in results:
        check_training(layout, found)
        for name in ("record", "other"):
            assert found[name] | {"seconds": 0} == results[0][name] | {"seconds": 0}
        for part, first in zip(found["parts"], results[0]["parts"], strict=True):
            assert part | {"seconds": 0} == first | {"seconds": 0}
