"""Every random state that a forward pass may draw from is put back, generators included."""

from __future__ import annotations

import subprocess
import sys

from tests.megatron.harness import ROOT

CODE = """
from megatron_sharpness.megatron import cpu
cpu.install()
import random
import numpy as np
import torch
from megatron.core import tensor_parallel
from megatron_sharpness.megatron.states import MegatronRandomStates

generator = torch.Generator()  # what Transformer Engine's tracker holds: it moves on in place
tracker = tensor_parallel.get_cuda_rng_tracker()
tracker.set_states({"generator": generator, "tensor": torch.get_rng_state()})

def draw():
    with_tracker = torch.rand(1)
    tracker.get_states()["tensor"] = torch.get_rng_state()
    return (random.random(), np.random.rand(), float(with_tracker), float(torch.rand(1)),
            float(torch.rand(1, generator=generator)), float(tracker.states_["tensor"].sum()))

states = MegatronRandomStates()
first = draw()
tracker.states_["tensor"] = torch.zeros(3)
states.restore()
assert tracker.states_["tensor"].numel() > 3
assert draw() == first
assert draw() != first
print("restored")
"""


def test_what_was_drawn_is_drawn_again_after_a_restore() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CODE], capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout.strip().endswith("restored"), done.stderr[-3000:]
