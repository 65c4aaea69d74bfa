"""Critical sharpness in the ``Trainer`` of Hugging Face transformers."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from megatron_sharpness.errors import InputError
from megatron_sharpness.measurement import Measurement
from megatron_sharpness.pytorch.critical_sharpness import CriticalSharpness
from megatron_sharpness.pytorch.passes import collective_device
from megatron_sharpness.replay import all_sum

try:
    from accelerate.optimizer import AcceleratedOptimizer
    from accelerate.utils import DistributedType
    from transformers import Trainer, TrainerCallback
except ImportError as error:
    raise ImportError(
        f"megatron_sharpness.pytorch.hf needs transformers and accelerate ({error}); "
        "pip install megatron-sharpness[hf]"
    ) from error

#: Under this name the state lies in ``trainer_state.json``. The callback is no ``ExportableState``:
#: those take down a run that goes on from a checkpoint without them (KeyError at its next save),
#: and are made anew from JSON alone, without trainer and sinks.
STATE = "critical_sharpness"


class CriticalSharpnessCallback(TrainerCallback):
    """Measures critical sharpness λ_c = 2/η_c (Def. 2.1) and logs it as the trainer logs its loss.

    ::

        trainer = Trainer(model, args, train_dataset=dataset)
        trainer.add_callback(CriticalSharpnessCallback(trainer, every=100))

    L is the loss that the model itself returns, over all micro-batches and ranks of the step, as
    the trainer weighs them; where it is not what the trainer differentiates, the record says so.
    The values are in ``state.log_history``, TensorBoard, W&B and wherever ``report_to`` says, at
    the step measured: ``critical_sharpness``, ``critical_learning_rate``, ….

    Args:
        trainer: the trainer that this callback is added to.
        every: measure after the steps that this number divides.
        settings: the other arguments of :class:`CriticalSharpness`, ``sinks`` among them.

    Raises:
        InputError: this trainer's loss cannot be evaluated again; the message says why.
    """

    def __init__(self, trainer: Trainer, every: int = 100, **settings: Any) -> None:
        _refuse_unsupported(trainer)
        self.trainer = trainer
        self._settings = {"every": every, **settings}
        self._sharpness: CriticalSharpness | None = None
        self._record: Measurement | None = None
        self._micro_batches: list[tuple[Any, Any]] = []
        self._losses: list[Tensor] = []
        self._grad_norm: Tensor | float | None = None
        self._watching = contextlib.ExitStack()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.on_train_end(args, state, control)  # of a training that an exception has ended
        optimizer = self.trainer.optimizer
        while isinstance(optimizer, AcceleratedOptimizer):
            optimizer = optimizer.optimizer
        self._sharpness = CriticalSharpness(self.trainer.model_wrapped, optimizer, **self._settings)
        self._sharpness.load_state_dict(state.stateful_callbacks.get(STATE, {}))

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._sharpness is not None and self._sharpness.armed:
            self._watch()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._sharpness is None:
            return
        self._watching.close()
        self._record = self._sharpness.after_step(
            state.global_step + 1,
            self._loss_sum_and_tokens,
            loss=(torch.stack(self._losses).sum(), 1.0) if self._losses else None,
            grad_norm=self._grad_norm,
        )
        self._micro_batches, self._losses, self._grad_norm = [], [], None

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._record is None or self._sharpness is None:
            return
        scalars = {tag.replace("-", "_"): value for tag, value in self._sharpness.scalars().items()}
        should_log = control.should_log
        # Not a subclass's log: those of TRL append their own averages and begin them anew.
        Trainer.log(self.trainer, scalars)
        control.should_log = should_log  # which log has cleared
        state.stateful_callbacks[STATE] = self._sharpness.state_dict()
        self._record = None

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._watching.close()
        self._micro_batches, self._losses, self._record = [], [], None
        if self._sharpness is not None:
            self._sharpness.close()
        self._sharpness = None

    def _watch(self) -> None:
        """Keep the step's micro-batches, losses and gradient norm, which no event passes."""
        self._micro_batches, self._losses = [], []
        accelerator = self.trainer.accelerator
        clip_grad_norm, backward = accelerator.clip_grad_norm_, accelerator.backward

        def keep(_: Any, args: Any, kwargs: Any) -> None:
            self._micro_batches.append((args, kwargs))

        def clip_and_keep(*args: Any, **kwargs: Any) -> Any:
            self._grad_norm = clip_grad_norm(*args, **kwargs)
            return self._grad_norm

        def keep_and_go_backward(loss: Tensor, *args: Any, **kwargs: Any) -> Any:
            self._losses.append(loss.detach().float())
            return backward(loss, *args, **kwargs)

        self._watching.enter_context(
            self.trainer.model_wrapped.register_forward_pre_hook(keep, with_kwargs=True)
        )
        for name, kept in (("clip_grad_norm_", clip_and_keep), ("backward", keep_and_go_backward)):
            setattr(accelerator, name, kept)
            self._watching.callback(vars(accelerator).pop, name, None)

    def _loss_sum_and_tokens(self) -> tuple[Tensor | float, Tensor | float]:
        if self._grad_norm is None and self.trainer.args.max_grad_norm > 0:
            raise RuntimeError("the gradients were clipped, and not by accelerator.clip_grad_norm_")
        total: Tensor | float = 0.0
        items: Tensor | float = 0.0
        for args, kwargs in self._micro_batches:
            if kwargs.get("num_items_in_batch") is None:
                raise RuntimeError(
                    "the model was called without num_items_in_batch, so that its loss is a mean "
                    "over each micro-batch; pass it on in compute_loss, as Trainer does"
                )
            outputs = self.trainer.model_wrapped(*args, **kwargs)
            total = total + (outputs["loss"] if isinstance(outputs, dict) else outputs[0])
            # The tokens of the whole step, by which each micro-batch's sum has been divided.
            items = kwargs["num_items_in_batch"]
        # Gradients are averaged over the ranks: all count alike, whatever their tokens.
        ranks = self.trainer.accelerator.num_processes
        if not self.trainer.args.average_tokens_across_devices:
            counts = torch.as_tensor(items, dtype=torch.float64).reshape(1)
            mean = all_sum(counts, collective_device()).item() / ranks
            return total * mean, mean
        return total * items, items / ranks


def _refuse_unsupported(trainer: Trainer) -> None:
    reasons = {
        "the model's forward takes no num_items_in_batch, so that its loss is no sum over tokens; "
        "give it **kwargs and divide the sum of losses by num_items_in_batch": (
            not trainer.model_accepts_loss_kwargs
        ),
        "compute_loss_func and label_smoothing_factor compute the loss outside of the model, where "
        "it cannot be evaluated again; compute it in the model's forward": (
            trainer.compute_loss_func is not None or trainer.label_smoother is not None
        ),
        "nn.DataParallel on several GPUs; launch one process a GPU, with torchrun": (
            trainer.args.n_gpu > 1
        ),
        "DeepSpeed steps its own copies of the parameters; train with DDP or FSDP2": (
            trainer.accelerator.distributed_type == DistributedType.DEEPSPEED
        ),
        "tensor, context or sequence parallelism has not been tried under this trainer; train with "
        "DDP or FSDP2": (trainer.get_tp_size() * trainer.get_cp_size() * trainer.get_sp_size() > 1),
    }
    for reason, applies in reasons.items():
        if applies:
            raise InputError(f"trainer: critical sharpness cannot be measured here: {reason}")
