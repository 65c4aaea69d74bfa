"""``PLANTED=FAULT,…`` plants faults of ``planted.py``, and launch/pretrain_gpt.py trains.

Run as a training script under ``python -m megatron_sharpness.megatron``. ``PLANTED=clock`` is no
fault of the measurement: one layer's weights begin with a random seed of the clock.
"""

from __future__ import annotations

import os
import runpy
import sys
import time
from typing import Any

from tests.processes import ROOT
from tests.verify import planted

LAUNCH = ROOT / "launch" / "pretrain_gpt.py"


def seed_a_layer_by_the_clock() -> None:
    """What does not repeat by itself."""
    import torch
    from megatron.core.models.gpt import GPTModel

    build = GPTModel.__init__

    def build_with_clock(model: Any, *args: Any, **kwargs: Any) -> None:
        build(model, *args, **kwargs)
        generator = torch.Generator().manual_seed(time.time_ns())
        with torch.no_grad():
            weight = model.decoder.layers[-1].mlp.linear_fc1.weight
            weight.copy_(torch.randn(weight.shape, generator=generator) / 50)

    GPTModel.__init__ = build_with_clock


if __name__ == "__main__":
    for name in filter(None, os.environ.get("PLANTED", "").split(",")):
        seed_a_layer_by_the_clock() if name == "clock" else getattr(planted, name)()
    sys.path[0] = str(LAUNCH.parent)
    runpy.run_path(str(LAUNCH), run_name="__main__")
