"""A measurement takes the memory that the design promises: 4 bytes for each parameter that a rank
owns where the model is in 16 bits, 8 where the optimizer steps the model itself."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from benchmarks import memory

#: Beside the copies there are the pieces that a probe is written in, 4 MiB each, and what the
#: allocator rounds up: under half a byte for each of 57 million parameters.
BESIDE = 0.5


@pytest.mark.parametrize(
    "case", ["Megatron, bf16, DP2", "Megatron, fp32", "PyTorch, fp32", "FSDP2, 2 ranks"]
)
def test_a_measurement_takes_what_is_promised(case: str) -> None:
    if case.startswith("Megatron") and importlib.util.find_spec("megatron") is None:
        pytest.skip("megatron-core is not installed")
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        pytest.skip(f"this system does not reset the peak of resident memory ({error})")
    promised = memory.CASES[case][3]
    assert promised - BESIDE < memory.extra(case) < promised + BESIDE
