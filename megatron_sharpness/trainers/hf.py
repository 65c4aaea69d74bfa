"""Critical sharpness in the ``Trainer`` of Hugging Face transformers."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_sharpness.core.errors import refuse
from megatron_sharpness.core.measurement import Measurement
from megatron_sharpness.core.replay import all_sum
from megatron_sharpness.core.state import State
from megatron_sharpness.pytorch.critical_sharpness import CriticalSharpness
from megatron_sharpness.pytorch.passes import collective_device

try:
    from accelerate.optimizer import AcceleratedOptimizer
    from transformers import Trainer, TrainerCallback
except ImportError as error:
    raise ImportError(
        f"megatron_sharpness.trainers.hf needs transformers and accelerate ({error}); "
        'pip install ".[hf]" in a clone of megatron_sharpness'
    ) from error

#: Under this name the state lies in ``trainer_state.json``. The callback is no ``ExportableState``:
#: those take down a run that goes on from a checkpoint without them (KeyError at its next save),
#: and are made anew from JSON alone, without trainer and sinks.
STATE = "critical_sharpness"

#: What clips gradients where some lie on another device mesh than others, in accelerate's place.
OF_SEVERAL_MESHES = "_mixed_mesh_grad_norm"

#: Attributes of the trainer that no loss changes, and that may hold a whole corpus or grow.
NOT_CHANGED = {"train_dataset", "eval_dataset", "log_history"}


class CriticalSharpnessCallback(TrainerCallback):
    """Measures critical sharpness λ_c = 2/η_c (Def. 2.1) and logs it as the trainer logs its loss.

    ::

        trainer = Trainer(model, args, train_dataset=dataset)
        trainer.add_callback(CriticalSharpnessCallback(trainer, every=100))

    L is the loss that the trainer differentiates, computed by its own ``compute_loss``: the sum
    over the micro-batches of the step, and the mean over the ranks.
    The values are in ``state.log_history``, TensorBoard, W&B and wherever ``report_to`` says, at
    the step measured: ``critical_sharpness``, ``critical_learning_rate``, ….

    Args:
        trainer: the trainer that this callback is added to.
        every: measure after the steps that this number divides.
        settings: the other arguments of :class:`CriticalSharpness`, ``sinks`` among them.

    Raises:
        InputError: this trainer's steps cannot be measured; the message says why.
    """

    def __init__(self, trainer: Trainer, every: int = 100, **settings: Any) -> None:
        _refuse_unsupported(trainer)
        self.trainer = trainer
        self._settings = {"every": every, **settings}
        self._sharpness: CriticalSharpness | None = None
        self._record: Measurement | None = None
        self._calls: list[tuple[Any, ...]] = []
        self._returned: Any = None
        self._losses: list[Tensor] = []
        self._divided: list[bool] = []
        self._before = State({})
        self._grad_norms: list[Tensor | float | None] = []  # None where DeepSpeed keeps none
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
            grad_norm=self._grad_norms[-1] if self._grad_norms else None,
        )
        self._forget()

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
        self._forget()
        self._record = None
        if self._sharpness is not None:
            self._sharpness.close()
        self._sharpness = None

    def _forget(self) -> None:
        self._calls, self._losses, self._divided, self._grad_norms = [], [], [], []
        self._returned = None
        self._before = State({})

    def _watch(self) -> None:
        """Keep what the step's losses are computed from, which no event passes."""
        self._forget()
        self._before = self._state_of_trainer()
        trainer, accelerator = self.trainer, self.trainer.accelerator
        compute_loss, backward = trainer.compute_loss, accelerator.backward

        def keep_and_compute(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            # A copy, as compute_loss may take the labels out.
            self._calls.append((model, copy.copy(inputs), args, kwargs))
            returned = compute_loss(model, inputs, *args, **kwargs)
            self._returned = _loss_in(returned)
            return returned

        def keep_and_go_backward(loss: Tensor, *args: Any, **kwargs: Any) -> Any:
            self._losses.append(loss.detach().float())
            self._divided.append(loss is not self._returned)
            self._returned = None  # and with it the graph
            return backward(loss, *args, **kwargs)

        def clipping_kept(clip_grad_norm: Callable[..., Any]) -> Callable[..., Any]:
            def clip_and_keep(*args: Any, **kwargs: Any) -> Any:
                self._grad_norms.append(clip_grad_norm(*args, **kwargs))
                return self._grad_norms[-1]

            return clip_and_keep

        for owner, name, function in (
            (trainer, "compute_loss", keep_and_compute),
            (accelerator, "backward", keep_and_go_backward),
            *(
                (owner, name, clipping_kept(getattr(owner, name)))
                for owner, name in ((accelerator, "clip_grad_norm_"), (trainer, OF_SEVERAL_MESHES))
                if hasattr(owner, name)
            ),
        ):
            self._watching.enter_context(_replaced(owner, name, function))

    def _state_of_trainer(self) -> State:
        roots = {"trainer": self.trainer, "state": self.trainer.state}
        return State(roots, ignored=NOT_CHANGED)

    def _loss_sum_and_tokens(self) -> tuple[Tensor | float, Tensor | float]:
        tokens = self._tokens()  # collective: before anything that one rank alone may raise
        if not self._grad_norms and self.trainer.args.max_grad_norm > 0:
            raise RuntimeError("the gradients were clipped, and not by the trainer's own function")
        if len(self._calls) != len(self._losses):
            raise RuntimeError(
                f"the step made {len(self._losses)} calls of accelerator.backward and "
                f"{len(self._calls)} of compute_loss, so that the loss differentiated is not known;"
                " have training_step call both once for each micro-batch, as that of Trainer does"
            )
        now = self._state_of_trainer()
        try:
            self._before.restore()
            # What compute_loss logs has been logged.
            with _replaced(self.trainer, "log", lambda *_, **__: None):
                total = sum(self._losses_anew())
        finally:
            now.restore()
        # Gradients are averaged over the ranks: all count alike, whatever their tokens.
        return total * tokens, tokens

    def _losses_anew(self) -> Iterator[Tensor]:
        """The loss of each micro-batch as it was differentiated."""
        trainer = self.trainer
        for (model, inputs, args, kwargs), divided in zip(self._calls, self._divided, strict=True):
            with trainer.compute_loss_context_manager():
                loss = _loss_in(trainer.compute_loss(model, copy.copy(inputs), *args, **kwargs))
            yield loss / trainer.current_gradient_accumulation_steps if divided else loss

    def _tokens(self) -> float:
        """The number of tokens of the step, of samples where it is not known; a rank's mean."""
        ranks: int = self.trainer.accelerator.num_processes
        copies: int = self.trainer.get_tp_size()  # ranks that see the same samples
        items = next((kwargs.get("num_items_in_batch") for *_, kwargs in self._calls), None)
        if items is None:
            count = sum(_samples(inputs) for _, inputs, *_ in self._calls) / copies
        elif self.trainer.args.average_tokens_across_devices:
            count = float(items) / ranks  # which are those of all ranks
        else:
            count = float(items)
        counts = torch.tensor([count], dtype=torch.float64)
        return float(all_sum(counts, collective_device())) / ranks


def _loss_in(returned: Any) -> Any:
    """The loss in what ``compute_loss`` has returned, with the outputs or without."""
    return returned[0] if isinstance(returned, tuple) else returned


def _samples(inputs: Any) -> int:
    """How many samples a micro-batch has, by its first tensor."""
    values = inputs.values() if hasattr(inputs, "values") else ()
    return next((len(value) for value in values if isinstance(value, Tensor) and value.dim()), 1)


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Within it a method is another function. One set on the object itself is put back."""
    own = {name: vars(owner)[name]} if name in vars(owner) else {}
    setattr(owner, name, value)
    try:
        yield
    finally:
        vars(owner).pop(name, None)
        vars(owner).update(own)


def _refuse_unsupported(trainer: Trainer) -> None:
    tensor_parallel = trainer.get_tp_size()
    config = getattr(trainer.model, "config", None)
    loaded = getattr(config, "distributed_config", None)
    reasons = {
        "trainer: nn.DataParallel on several GPUs; launch one process a GPU, with torchrun": (
            trainer.args.n_gpu > 1
        ),
        "trainer: context and sequence parallelism split the sequence around compute_loss, which "
        "is called alone in a measurement; train with DDP, FSDP2 or tensor parallelism": (
            trainer.get_cp_size() * trainer.get_sp_size() > 1
        ),
        "trainer: tensor parallelism beside data parallelism has not been tried; make tp_size the "
        "number of processes, or train with DDP or FSDP2": (
            1 < tensor_parallel < trainer.accelerator.num_processes
        ),
        "trainer: pipeline and expert parallelism have not been tried; train with DDP, FSDP2 or "
        "tensor parallelism": any(getattr(loaded, name, 1) > 1 for name in ("pp_size", "ep_size")),
    }
    refuse(reasons)
