"""Critical sharpness in the ``Trainer`` of torchtitan."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch

from megatron_sharpness.core.errors import refuse
from megatron_sharpness.pytorch.critical_sharpness import CriticalSharpness
from megatron_sharpness.sinks import ConsoleSink, JsonLinesSink

try:
    from torchtitan.distributed import utils as dist_utils
    from torchtitan.tools.logging import logger
    from torchtitan.trainer import Trainer
except ImportError as error:
    raise ImportError(
        f"megatron_sharpness.trainers.torchtitan needs torchtitan ({error}); "
        'pip install ".[torchtitan]" in a clone of megatron_sharpness'
    ) from error


@dataclass(kw_only=True, slots=True)
class CriticalSharpnessConfig:
    """What to measure, and how; see :class:`~megatron_sharpness.core.settings.Settings`."""

    every: int = 0
    """Measure after the steps that this number divides. 0 means off."""

    mode: Literal["train", "eval"] = "train"
    """With the step's own dropout masks, or without dropout."""

    offload: Literal["none", "cpu"] = "none"
    """Whether the copies of the parameters are kept in host memory."""

    method: Literal["certified", "bisection"] = "certified"
    """The line search; ``bisection`` is the paper's."""

    tolerance: float | None = None
    """Width |1 - lower/upper| of the bracket around the critical learning rate; by default 1/4, and
    1/16 with ``bisection``."""

    initial_guess: float | None = None
    """Where the very first search starts. By default the step's own learning rate."""

    max_evaluations: int = 40
    """Most forward passes that one search may spend."""

    on_error: Literal["warn", "raise"] = "warn"
    """What a failed measurement does to the run."""

    watch: Literal["first", "always"] = "first"
    """Which measurements are watched, whether they leave what training reads later as it was."""

    parts: Literal["modules", "groups", "layers"] | None = None
    """Which parts of the model are measured by themselves, too. By default none."""

    parts_every: int | None = None
    """At which steps: a multiple of ``every``. By default each time."""

    adam_snr: bool = False
    """Whether the signal-to-noise ratios of Adam's second moments are measured, too."""

    alarm: float | None = None
    """Learning rate over the critical one above which the alarm rings. By default never."""

    alarm_after: int = 2
    """How many measurements in a row begin the alarm, and end it."""

    alarm_every: int | None = None
    """Measure after the steps that this number divides, too, while the alarm rings."""


class CriticalSharpnessTrainer(Trainer):
    """A ``Trainer`` that measures critical sharpness λ_c = 2/η_c (Def. 2.1).

    L is ``loss_metrics/global_avg_loss``. The curves are named
    ``sharpness_metrics/critical_sharpness``, …; the records go to ``critical_sharpness.jsonl`` in
    the ``dump_folder``. With ``every`` = 0 it trains as ``Trainer`` does, by the same code.

    Raises:
        InputError: the configuration cannot be measured with; the message names the flag.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):
        critical_sharpness: CriticalSharpnessConfig = field(default_factory=CriticalSharpnessConfig)

    def __init__(self, config: Config) -> None:
        if config.critical_sharpness.every:
            _refuse_unsupported(config)
        super().__init__(config)
        self.sharpness: CriticalSharpness | None = None
        self._passes: list[Any] = []  # what they were called with
        self._losses: list[torch.Tensor] = []
        self._grad_norm: torch.Tensor | None = None
        if not config.critical_sharpness.every:
            return
        log = os.path.join(config.dump_folder, "critical_sharpness.jsonl")
        self.sharpness = CriticalSharpness(
            self.pp_schedule if self.parallel_dims.pp_enabled else self.model_parts[0],
            self.optimizers.optimizers,
            sinks=[ConsoleSink(logger.info), JsonLinesSink(log)],
            **asdict(config.critical_sharpness),
        )
        if self.checkpointer.enable:
            self.checkpointer.states["critical_sharpness"] = self.sharpness

    def train_step(self, data_iterator: Iterator[Any]) -> None:
        if self.sharpness is None:
            super().train_step(data_iterator)
            return
        with self._keeping_grad_norm():
            super().train_step(data_iterator)
        record = self.sharpness.after_step(
            self.step,
            self._loss_sum_and_tokens,
            loss=self._summed(self._losses) if self._losses else None,
            grad_norm=self._grad_norm,
        )
        self._passes, self._losses, self._grad_norm = [], [], None
        if record is not None:
            self.metrics_processor.logger.log(
                {
                    f"sharpness_metrics/{tag.replace('-', '_')}": value
                    for tag, value in self.sharpness.scalars().items()
                },
                self.step,
            )

    def close(self) -> None:
        if self.sharpness is not None:
            self.sharpness.close()
        super().close()

    def _forward_backward_body(
        self, inputs: Any, labels: Any, global_valid_tokens: Any, extra_kwargs: dict[str, Any]
    ) -> Any:
        loss = super()._forward_backward_body(inputs, labels, global_valid_tokens, extra_kwargs)
        if self.sharpness is not None and self.sharpness.armed:
            self._passes.append((inputs, labels, global_valid_tokens, extra_kwargs))
            self._losses.append(loss.detach())
        return loss

    def pp_forward_backward_step(self, **batch: Any) -> torch.Tensor:
        loss: torch.Tensor
        if self.sharpness is None or not self.sharpness.armed:
            loss = super().pp_forward_backward_step(**batch)
            return loss
        schedule, step = self.pp_schedule, self.pp_schedule.step

        def step_and_keep(**given: Any) -> Any:
            self._passes.append(given)
            return step(**given)

        schedule.step = step_and_keep
        try:
            loss = super().pp_forward_backward_step(**batch)
        finally:
            del schedule.step
        self._losses.append(loss.detach() if self.pp_has_last_stage else torch.zeros(()))
        return loss

    @contextlib.contextmanager
    def _keeping_grad_norm(self) -> Iterator[None]:
        """``train_step`` hands the norm on at steps that are logged only."""
        clip_grad_norm = dist_utils.clip_grad_norm_

        def clip_and_keep(*args: Any, **kwargs: Any) -> Any:
            self._grad_norm = clip_grad_norm(*args, **kwargs)
            return self._grad_norm

        dist_utils.clip_grad_norm_ = clip_and_keep
        try:
            yield
        finally:
            dist_utils.clip_grad_norm_ = clip_grad_norm

    def _loss_sum_and_tokens(self) -> tuple[float, float]:
        """The forward passes of the step's micro-batches once more."""
        if self.parallel_dims.pp_enabled:
            return self._pipelined_loss_sum_and_tokens()
        losses = []  # as in the first half of _forward_backward_body
        for inputs, labels, global_valid_tokens, extra_kwargs in self._passes:
            with self.train_context():
                predictions = self.model_parts[0](inputs, **extra_kwargs)
                positions = {k: v for k, v in extra_kwargs.items() if k == "positions"}
                loss, _ = self.loss_fn(predictions, labels, global_valid_tokens, **positions)
            losses.append(loss)
        return self._summed(losses)

    def _pipelined_loss_sum_and_tokens(self) -> tuple[float, float]:
        losses: list[torch.Tensor] = []
        for given in self._passes:
            found: list[torch.Tensor] | None = None if given["losses"] is None else []
            with self.train_context():
                self.pp_schedule.eval(**{**given, "losses": found})
            losses += found or []
        return self._summed(losses)

    def _summed(self, losses: list[torch.Tensor]) -> tuple[float, float]:
        """This rank's part of the sum of losses, and of the tokens by which they were divided."""
        dims, first = self.parallel_dims, self._passes[0]
        pipelined = dims.pp_enabled
        tokens = float(first["loss_kwargs"]["global_valid_tokens"] if pipelined else first[2])
        loss = sum(dist_utils.dist_sum(part) for part in losses) * tokens
        if pipelined and not self.pp_has_last_stage:
            return 0.0, 0.0
        # Tensor-parallel ranks have the same loss, and each of them is added.
        ranks = dims.dp_replicate * dims.dp_shard * dims.cp * dims.pp
        return loss * ranks / dims.world_size, tokens * dims.pp / dims.world_size


def _refuse_unsupported(config: Any) -> None:
    reasons = {
        "--training.disable_cuda_graphs is not set: a replayed CUDA graph runs no hooks, which "
        "the measurement needs; set it": not config.training.disable_cuda_graphs,
        "--parallelism.context_parallel_degree: measuring under context parallelism has not been "
        "tried; set it to 1": config.parallelism.context_parallel_degree > 1,
    }
    refuse({f"{reason}, or --critical_sharpness.every 0": on for reason, on in reasons.items()})
