"""Faults of a measurement, planted by name: ``verify`` has to find each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_sharpness.core.state import State
from megatron_sharpness.core.watch import Watch

#: ``setattr``, or pytest's, which takes it back.
Replace = Callable[[Any, str, Any], object]


def blind(replace: Replace = setattr) -> None:
    """The run's own watch sees nothing, so that the comparison has to."""
    replace(Watch, "changes", lambda self, device: [])


def restore_left_out(replace: Replace = setattr) -> None:
    """In Megatron the weights stay where the last probe has left them."""
    from megatron_sharpness.megatron.line import MegatronLine

    def leave_there(line: MegatronLine, *, frozen: bool = False) -> None:
        if line.is_open:
            line.gathers.sync()
            line.gathers.end()
            line.release()

    replace(MegatronLine, "restore", leave_there)


def buffer_left_changed(replace: Replace = setattr) -> None:
    """In Megatron what probes have changed of the model's buffers is not put back in the end."""
    from megatron_sharpness.megatron import quiet

    replace(quiet, "state_of", lambda model: State({}))


def stale_weights(replace: Replace = setattr) -> None:
    """In Megatron the last rank's weights do not reach the forward passes of probes."""
    import torch.distributed as dist

    from megatron_sharpness.megatron.line import MegatronLine

    move = MegatronLine.move

    def move_not_all(line: MegatronLine, fraction: float, part: int | None = None) -> None:
        move(line, 1.0 if dist.get_rank() == dist.get_world_size() - 1 else fraction, part)

    replace(MegatronLine, "move", move_not_all)


def wrong_reduction(replace: Replace = setattr) -> None:
    """The loss of a probe is rank 0's, and not summed over the ranks."""
    import torch.distributed as dist

    from megatron_sharpness.core import replay

    def first_alone(values: Tensor, device: torch.device) -> Tensor:
        values = values.to(device)
        dist.broadcast(values, src=0)
        return values

    replace(replay, "all_sum", first_alone)
