"""Critical sharpness in the ``Trainer`` of Lightning."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from megatron_sharpness.core.errors import refuse
from megatron_sharpness.core.replay import all_sum
from megatron_sharpness.pytorch.critical_sharpness import CriticalSharpness
from megatron_sharpness.pytorch.passes import collective_device

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.strategies import DeepSpeedStrategy
except ImportError as error:
    raise ImportError(
        f"megatron_sharpness.trainers.lightning needs lightning ({error}); "
        'pip install ".[lightning]" in a clone of megatron_sharpness'
    ) from error

#: Gives the sum of a batch's losses in nats and the number of tokens that it was summed over.
LossSumAndTokens = Callable[[LightningModule, Any], tuple[Tensor | float, Tensor | float]]

#: As which method of the module its loss is evaluated: Lightning redirects methods by their names.
REDIRECTED = "_critical_sharpness_loss"


class CriticalSharpnessCallback(Callback):
    """Measures critical sharpness λ_c = 2/η_c (Def. 2.1) and writes it to the trainer's loggers.

    ::

        def loss_sum_and_tokens(module, batch):
            tokens, targets = batch
            logits = module.model(tokens).float()
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
            return loss, targets.numel()

        trainer = Trainer(callbacks=[CriticalSharpnessCallback(loss_sum_and_tokens, every=100)])

    L is the loss that was differentiated: the mean, over all micro-batches and ranks of the step,
    of the mean loss a token of each. A micro-batch whose ``training_step`` returned None adds 0.

    Args:
        loss_sum_and_tokens: the loss that ``training_step`` returns, as a sum over tokens and their
            number, computed by the same forward pass; it is called with the module and a batch, in
            the trainer's precision, without gradients. It must not log.
        every: measure after the optimizer steps that this number divides.
        settings: the other arguments of :class:`CriticalSharpness`, ``sinks`` among them.
    """

    def __init__(
        self, loss_sum_and_tokens: LossSumAndTokens, every: int = 100, **settings: Any
    ) -> None:
        self.loss_sum_and_tokens = loss_sum_and_tokens
        self._settings = {"every": every, **settings}
        self._sharpness: CriticalSharpness | None = None
        self._state: dict[str, Any] = {}
        self._batches: list[tuple[Any, Tensor | None]] = []
        self._grad_norm: Tensor | None = None
        self._steps = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _refuse_unsupported(trainer, pl_module)
        self._forward_pass = _ForwardPass(trainer.model)
        self._sharpness = CriticalSharpness(
            self._forward_pass, trainer.optimizers, **self._settings
        )
        self._sharpness.load_state_dict(self._state)
        self._batches, self._steps = [], trainer.global_step

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._sharpness is not None and self._sharpness.armed:
            self._forward_pass(lambda: None)  # has the random states recorded

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Any
    ) -> None:
        if self._sharpness is not None and self._sharpness.armed:  # clipping comes after this
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            self._grad_norm = get_total_norm([p.grad for p in parameters if p.grad is not None])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._sharpness is None:
            return
        if self._sharpness.armed:
            self._batches.append((batch, _loss_of(outputs)))
        if trainer.global_step == self._steps:
            return  # gradients are being accumulated
        self._steps = trainer.global_step

        losses = [loss for _, loss in self._batches if loss is not None]

        def evaluate() -> tuple[Tensor | float, Tensor | float]:
            sums = []
            with trainer.precision_plugin.train_step_context():
                for batch, loss in self._batches:
                    if loss is None:
                        self._forward_pass(lambda: None)  # a pass, that nothing came of
                    else:
                        sums.append(self._forward_pass(self._as_trained, trainer, batch))
            # Gradients are averaged over micro-batches and ranks: all count alike.
            mean = sum(loss / tokens for loss, tokens in sums) / trainer.accumulate_grad_batches
            counts = torch.tensor([float(sum(tokens for _, tokens in sums))], dtype=torch.float64)
            tokens = all_sum(counts, collective_device()).item() / trainer.world_size
            return mean * tokens, tokens

        record = self._sharpness.after_step(
            self._steps,
            evaluate,
            loss=(torch.stack(losses).sum(), 1.0) if losses else None,
            grad_norm=self._grad_norm,
        )
        self._batches, self._grad_norm = [], None
        if record is not None:
            scalars = {
                tag.replace("-", "_"): value for tag, value in self._sharpness.scalars().items()
            }
            for logger in trainer.loggers:
                # Not pl_module.log: it drops what falls between two log_every_n_steps, and repeats
                # the last value at each of them. Lightning's curves count steps from 0.
                logger.log_metrics(scalars, step=self._steps - 1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._batches = []
        self._state = self.state_dict()
        if self._sharpness is not None:
            self._sharpness.close()
        self._sharpness = None

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self.on_train_end(trainer, pl_module)

    def _as_trained(self, trainer: Trainer, batch: Any) -> tuple[Tensor | float, Tensor | float]:
        """The batch's loss, through what wraps the module, as ``Strategy.training_step`` does it:
        DDP broadcasts buffers before a pass."""
        module = trainer.lightning_module
        if trainer.model is module:
            return self.loss_sum_and_tokens(module, batch)
        setattr(module, REDIRECTED, functools.partial(self.loss_sum_and_tokens, module))
        try:
            redirected: Any = trainer.strategy._forward_redirection
            sum_and_tokens: tuple[Tensor | float, Tensor | float] = redirected(
                trainer.model, module, REDIRECTED, batch
            )
            return sum_and_tokens
        finally:
            delattr(module, REDIRECTED)

    def state_dict(self) -> dict[str, Any]:
        return self._state if self._sharpness is None else self._sharpness.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state = state_dict


def _loss_of(outputs: Any) -> Tensor | None:
    """The loss that ``training_step`` has returned, divided by ``accumulate_grad_batches``."""
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    return loss.detach().float() if isinstance(loss, Tensor) else None


class _ForwardPass(nn.Module):
    """What is called once a training step: Lightning's own steps may call any part of a module."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)


def _refuse_unsupported(trainer: Trainer, pl_module: LightningModule) -> None:
    clips_values = trainer.gradient_clip_val and trainer.gradient_clip_algorithm == "value"
    refuse(
        {
            "automatic_optimization=False: which batches belong to an optimizer step is then known "
            "to training_step alone; call megatron_sharpness.pytorch.CriticalSharpness in it": (
                not pl_module.automatic_optimization
            ),
            "DeepSpeedStrategy: it steps copies of the parameters that cannot be observed; use DDP "
            "or ModelParallelStrategy": isinstance(trainer.strategy, DeepSpeedStrategy),
            "gradient_clip_algorithm='value': the update no longer follows from the gradient's "
            "direction, and the slope ⟨g, Δθ⟩ is taken with the clipped one; clip by norm": bool(
                clips_values
            ),
        }
    )
