"""The layouts of tests/pytorch on one GPU: CUDA's random states, fused kernels, inductor, flash
attention in bf16, and groups of one rank over NCCL. The same checks, the same tolerances."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.pytorch.layouts import DISTRIBUTED, GPU, SINGLE
from tests.pytorch.test_layouts import Ranks, check_number, check_training

if not torch.cuda.is_available():
    pytest.skip("needs a GPU; torch.cuda.is_available() is False", allow_module_level=True)

LAYOUTS = SINGLE | DISTRIBUTED | GPU


@pytest.fixture(scope="module")
def rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    started = Ranks(
        tmp_path_factory.mktemp("gpu"), 1,
        LAYOUT_DEVICE="cuda", CUBLAS_WORKSPACE_CONFIG=":4096:8",
    )  # fmt: skip
    yield started
    started.stop()


@pytest.mark.parametrize("name", LAYOUTS)
def test_on_a_gpu(name: str, rank: Ranks) -> None:
    (found,) = rank.wait(name)
    check_training(found)
    check_number(LAYOUTS[name], found)
