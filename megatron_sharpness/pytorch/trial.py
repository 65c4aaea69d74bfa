"""A training loop of one's own as a trial: it writes down what it is after each step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from megatron_sharpness.core.errors import SettingError
from megatron_sharpness.core.measurement import Measurement
from megatron_sharpness.core.recorder import Recorder
from megatron_sharpness.core.replay import RandomStates
from megatron_sharpness.core.trial import Trial
from megatron_sharpness.pytorch.critical_sharpness import CriticalSharpness
from megatron_sharpness.pytorch.losses import Evaluate
from megatron_sharpness.pytorch.pipelines import Schedule
from megatron_sharpness.pytorch.shards import OF_PASSES, shards_of
from megatron_sharpness.sinks import JsonLinesSink

#: Where an optimizer keeps the hooks by which its coming step is observed.
_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")


class TrialSharpness(CriticalSharpness):
    """:class:`CriticalSharpness` that measures and logs as a trial asks.

    Args:
        trial: what is asked for. It goes before ``every`` and ``sinks``.
        model, optimizer, every, sinks, options: as for :class:`CriticalSharpness`.

    Raises:
        InputError: something here cannot be measured with; the message says why and what to do.
    """

    def __init__(
        self,
        trial: Trial,
        model: nn.Module | Schedule,
        optimizer: Optimizer | Sequence[Optimizer],
        every: int = 100,
        sinks: Sequence[Any] = (),
        **options: Any,
    ) -> None:
        if options.get("frozen") is not None:
            reason = "it trains nothing that could be compared; leave it out of what is verified"
            raise SettingError("frozen", options["frozen"], reason)
        super().__init__(model, optimizer, trial.every, [JsonLinesSink(trial.log)], **options)
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        self._recorder = Recorder(
            trial,
            rank=dist.get_rank() if dist.is_initialized() else 0,
            ranks=ranks,
            layout={
                "processes": ranks,
                "backend": dist.get_backend() if ranks > 1 else None,
                "model": type(model).__name__,
                "optimizer": ", ".join(type(entry).__name__ for entry in self._optimizers),
            },
        )
        self._meter.confirm = self._recorder.confirm
        self._write_down(-1)
        self._recorder.begin()

    def after_step(self, step: int, evaluate: Evaluate, **given: Any) -> Measurement | None:
        record = super().after_step(step, self._recorder.timed(evaluate), **given)
        self._write_down(step)
        self._recorder.begin()
        return record

    def _write_down(self, step: int) -> None:
        around = self._optimizers
        each = [o for entry in around for o in (entry, *shards_of(entry).inside())]
        optimizers = {f"optimizer {i}" if i else "optimizer": o for i, o in enumerate(each)}
        roots = {"model": self._model, **optimizers, **self._keep}
        ignored = (*OF_PASSES, *_HOOKS)
        self._recorder.iteration(step, roots, RandomStates(), ignored=ignored)
