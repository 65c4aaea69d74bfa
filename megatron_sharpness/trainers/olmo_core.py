"""Critical sharpness in the ``Trainer`` of OLMo-core."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

import torch

from megatron_sharpness.core.alarm import Alarm
from megatron_sharpness.core.errors import InputError, refuse
from megatron_sharpness.core.settings import Settings
from megatron_sharpness.pytorch.critical_sharpness import CriticalSharpness
from megatron_sharpness.sinks import ConsoleSink, JsonLinesSink

try:
    from olmo_core.distributed.utils import all_reduce_value, get_local_tensor, get_world_size
    from olmo_core.nn.transformer import Transformer
    from olmo_core.train.callbacks import Callback
    from olmo_core.train.common import OPTIM_GRAD_NORM_METRIC, TRAIN_CE_LOSS_METRIC
    from olmo_core.train.train_module import TransformerTrainModule
except ImportError as error:
    raise ImportError(
        f"megatron_sharpness.trainers.olmo_core needs OLMo-core ({error}); "
        'pip install ".[olmo-core]" in a clone of megatron_sharpness'
    ) from error

log = logging.getLogger(__name__)

#: The arguments of the callback that are settings of every measurement.
SETTINGS = tuple(setting.name for setting in fields(Settings) if setting.name != "every")


@dataclass
class CriticalSharpnessCallback(Callback):
    """Measures critical sharpness λ_c = 2/η_c (Def. 2.1) and logs it with the trainer's metrics.

    ::

        trainer_config.with_callback("critical_sharpness", CriticalSharpnessCallback(every=100))

    L is ``train/CE loss``. Metrics are named ``optim/critical sharpness``,
    ``optim/critical learning rate``, …; the records go to ``critical_sharpness.jsonl`` in the
    trainer's ``work_dir``.

    Attributes:
        every: measure after the steps that this number divides; 0 is off.
        mode: ``train`` with the step's own dropout masks, or ``eval``: without dropout.
        offload: ``cpu`` keeps the copies of the parameters in host memory.

    The other ones are those of :class:`~megatron_sharpness.core.settings.Settings`.
    """

    #: Before the checkpointer, so that a step's checkpoint holds what its measurement found.
    priority: ClassVar[int] = 2

    every: int = 100
    mode: Literal["train", "eval"] = "train"
    offload: Literal["none", "cpu"] = "none"
    method: Literal["certified", "bisection"] = "certified"
    tolerance: float | None = None
    initial_guess: float | None = None
    max_evaluations: int = 40
    on_error: Literal["warn", "raise"] = "warn"
    watch: Literal["first", "always"] = "first"
    parts: str | Mapping[str, str] | None = None
    parts_every: int | None = None
    adam_snr: bool = False
    alarm: float | None = None
    alarm_after: int = 2
    alarm_every: int | None = None
    on_alarm: Callable[[Alarm], object] | None = None

    _sharpness: CriticalSharpness | None = field(default=None, init=False, repr=False)
    _state: dict[str, Any] = field(default_factory=dict, init=False, repr=False)
    _passes: list[tuple[Any, Any]] = field(default_factory=list, init=False, repr=False)
    _watching: Any = field(default=None, init=False, repr=False)

    def state_dict(self) -> dict[str, Any]:
        return self._state if self._sharpness is None else self._sharpness.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state = state_dict
        if self._sharpness is not None:
            self._sharpness.load_state_dict(state_dict)

    def pre_train(self) -> None:
        if self.every:
            _refuse_unsupported(self.trainer.train_module)

    def pre_epoch(self) -> None:
        if not self.every or self._sharpness is not None:
            return
        # Not earlier: the trainer's dry run is no pass of the first step.
        self._sharpness = CriticalSharpness(
            self.trainer.train_module.model,
            self.trainer.train_module.optim,
            self.every,
            [
                ConsoleSink(log.info),
                JsonLinesSink(self.trainer.work_dir / "critical_sharpness.jsonl"),
            ],
            mode=self.mode,
            offload=self.offload,
            **{name: getattr(self, name) for name in SETTINGS},
        )
        self._sharpness.load_state_dict(self._state)

    def pre_step(self, batch: dict[str, Any]) -> None:
        if self._sharpness is not None and self._sharpness.armed:
            # First of all hooks: those of tensor parallelism change what is passed.
            self._watching = self.trainer.train_module.model.register_forward_pre_hook(
                lambda _, args, kwargs: self._passes.append((args, kwargs)),
                prepend=True,
                with_kwargs=True,
            )

    def post_train_batch(self) -> None:
        if self._sharpness is None:
            return
        if self._watching is not None:
            self._watching.remove()
        loss = self.trainer.get_metric(TRAIN_CE_LOSS_METRIC)
        record = self._sharpness.after_step(
            self.step,
            self._loss_sum_and_tokens,
            loss=None if loss is None else (loss, 1.0),  # a mean, whose ranks count alike
            grad_norm=self.trainer.get_metric(OPTIM_GRAD_NORM_METRIC),
        )
        self._watching, self._passes = None, []
        for tag, value in self._sharpness.scalars().items() if record is not None else ():
            self.trainer.record_metric(tag.replace("-", " "), value, namespace="optim")

    def close(self) -> None:
        if self._sharpness is not None:
            self._state = self.state_dict()
            self._sharpness.close()
            self._sharpness = None

    def _loss_sum_and_tokens(self) -> tuple[torch.Tensor, float]:
        """The trainer's loss is the mean of all ranks' own means, so all count as many tokens."""
        module = self.trainer.train_module
        losses = [
            get_local_tensor(module.model_forward(*args, **kwargs).ce_loss).double()
            for args, kwargs in self._passes
        ]
        tokens = float(self._passes[0][1]["loss_div_factor"])
        tokens = all_reduce_value(tokens, module.device, group=module.dp_process_group)
        tokens /= get_world_size()
        return torch.stack(losses).sum() * tokens, tokens


def _refuse_unsupported(train_module: Any) -> None:
    if not isinstance(train_module, TransformerTrainModule):
        raise InputError(
            f"train_module: {type(train_module).__name__} runs its forward passes in a way that "
            "has not been made to replay (a pipeline, or parameters of its own); train with "
            "TransformerTrainModule, or without CriticalSharpnessCallback"
        )
    model = train_module.model
    refuse(
        {
            f"model: {type(model).__name__} changes its weights after the optimizer's step, so "
            "that they lie off the optimizer's update; train without CriticalSharpnessCallback": (
                type(model).post_optim_step is not Transformer.post_optim_step
            ),
            "float8_config: it has not been tried with float8 weights, whose scales each move "
            "changes; leave float8_config out, or the callback": model.fp8_enabled,
        }
    )
