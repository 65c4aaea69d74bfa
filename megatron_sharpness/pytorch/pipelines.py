"""Pipeline parallelism: the stages that this rank holds, called by a schedule of PyTorch."""

from __future__ import annotations

import contextlib
import functools
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

import torch.distributed as dist
from torch import Tensor, nn

from megatron_sharpness.core.errors import InputError, ProbeError
from megatron_sharpness.core.replay import of_all_ranks
from megatron_sharpness.core.state import State

if TYPE_CHECKING:
    from torch.distributed.pipelining.schedules import (
        PipelineScheduleMulti,
        PipelineScheduleSingle,
    )

#: The schedules of ``torch.distributed.pipelining``: GPipe, 1F1B, interleaved, zero bubble, …
Schedule: TypeAlias = "PipelineScheduleSingle | PipelineScheduleMulti"

#: Where a schedule notes that its stages are set up for passes, and for backward passes, too.
_FORWARD = ("_stage_forward_initialized", "_stages_forward_initialized")
_BACKWARD = ("_stage_backward_initialized", "_stages_backward_initialized")


def _kinds() -> tuple[Any, ...]:
    """The classes of schedules, if a loop has imported them: a quarter of a second for others."""
    module: Any = sys.modules.get("torch.distributed.pipelining.schedules")
    return () if module is None else (module.PipelineScheduleSingle, module.PipelineScheduleMulti)


def model_of(given: Any) -> nn.Module:
    """A module as it is, or the stages of a schedule. Collective there.

    Raises:
        InputError: it is neither.
    """
    if isinstance(given, nn.Module):
        return given
    if isinstance(given, _kinds()):
        return PipelinedModel(given)
    raise InputError(
        f"model: {type(given).__name__} is no torch.nn.Module, whose passes can be observed; give "
        "the model as the loop calls it, which under pipeline parallelism is the schedule"
    )


class PipelinedModel(nn.ModuleList):
    """The stages that this rank holds as one model. Its calls are those of a stage with a
    micro-batch, which a rank makes in the same order where the schedule steps and where it
    evaluates. Collective.

    What a schedule calls its stages for in its first step, to learn of which shape their outputs
    are, is no pass of a micro-batch.

    Attributes:
        first_rank: the lowest of the ranks that hold the same stages.

    Args:
        schedule: as the loop calls it.
    """

    def __init__(self, schedule: Schedule) -> None:
        single, _ = _kinds()
        of_schedule: Any = schedule
        several = not isinstance(schedule, single)
        stages = list(of_schedule._stages) if several else [of_schedule._stage]
        super().__init__(stage.submod for stage in stages)
        self._schedule, self._stages = schedule, stages
        self._watched: list[tuple[Any, Any]] = []
        held = of_all_ranks(sorted(stage.stage_index for stage in stages))
        self.first_rank: int = held.index(held[dist.get_rank()])

    def called_by_schedule(self) -> dict[str, object]:
        """The schedule and its stages, which keep between two steps how they are set up."""
        found: dict[str, object] = {"schedule": self._schedule}
        for stage in self._stages:
            name = f"stage {stage.stage_index}"
            found |= {name: stage, f"{name}'s shapes": vars(stage).get("_stage_meta")}
        return found

    def check(self, calls: int, tokens: Tensor | float) -> None:
        """Look at what an evaluation has done on this rank.

        Args:
            calls: how often it has called the stages.
            tokens: that it has returned.

        Raises:
            ProbeError: the rank has no loss, and says that it has tokens.
        """
        if len(self) and not calls:  # said now, since the other ranks may wait for this one
            warnings.warn(
                "critical sharpness: evaluate has called no stage of this rank, so that the others "
                "may wait for it without end; call schedule.eval on every rank, and return zeros "
                "after that where there is no loss",
                stacklevel=2,
            )
        if not any(stage.is_last for stage in self._stages) and float(tokens):
            raise ProbeError(
                f"evaluate has returned {float(tokens):g} tokens on a rank without the last stage, "
                "which has no loss; return (0.0, 0) there"
            )

    def attach(self) -> None:
        """Have the schedule call its stages through this."""
        for stage in self._stages:
            call = functools.partial(self._call, stage, stage.forward_one_chunk)
            self._watched.append((stage, vars(stage).get("forward_one_chunk")))
            stage.forward_one_chunk = call

    def detach(self) -> None:
        """Have the schedule call its stages itself."""
        while self._watched:
            stage, held = self._watched.pop()
            del stage.forward_one_chunk
            if held is not None:
                stage.forward_one_chunk = held

    @contextlib.contextmanager
    def forward_only(self, *, other_data: bool = False) -> Iterator[None]:
        """Within it the schedule can evaluate, and leaves gradients alone; in the end it is set up
        as it was.

        Args:
            other_data: micro-batches may be of another shape than in training.
        """
        # What they keep are activations and outputs, which are many and are not written to.
        state = State(
            self.called_by_schedule(), copied=lambda tensor: False, without=list(self.modules())
        )
        # Where stages are set up anew, PyTorch drops those of FSDP2.
        gradients = [(parameter, parameter.grad) for parameter in self.parameters()]
        # After an evaluation it would divide gradients by the number of micro-batches once more,
        self._schedule.scale_grads = False
        # and set up its stages, with a pass of each, for this and then for training.
        for name in (*_BACKWARD, *_FORWARD) if other_data else _BACKWARD:
            if hasattr(self._schedule, name):
                setattr(self._schedule, name, False)
        for stage in self._stages:  # Of two stages in a row it would hand gradients on.
            stage.get_local_bwd_output = stage.set_local_bwd_input = lambda *_: None
        try:
            yield
        finally:
            state.restore()
            for parameter, gradient in gradients:
                parameter.grad = gradient

    def forward(self, forward_one_chunk: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return forward_one_chunk(*args, **kwargs)

    def _call(self, stage: Any, *args: Any, **kwargs: Any) -> Any:
        self.training = stage.submod.training
        return self(*args, **kwargs)


def forward_only(model: nn.Module, **options: bool) -> contextlib.AbstractContextManager[None]:
    """:meth:`PipelinedModel.forward_only`, where it is one; else no schedule can evaluate."""
    if isinstance(model, PipelinedModel):
        return model.forward_only(**options)
    return _no_schedule()


@contextlib.contextmanager
def _no_schedule() -> Iterator[None]:
    """One that was not given would set its stages up anew in the next step, which draws numbers."""

    def refuse(*_: Any, **__: Any) -> None:
        raise ProbeError(
            "evaluate calls the schedule of a pipeline, and the model given is another module, so "
            "that the next training step would draw other random numbers; give the schedule as the "
            "model"
        )

    kinds = _kinds()
    own = [vars(kind).get("eval") for kind in kinds]
    for kind in kinds:
        kind.eval = refuse
    try:
        yield
    finally:
        for kind, method in zip(kinds, own, strict=True):
            if method is None:
                del kind.eval
            else:
                kind.eval = method
