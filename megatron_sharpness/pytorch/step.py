"""One training step, observed while it is made and evaluated again along its update."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from megatron_sharpness.meter import ProbeError, Step
from megatron_sharpness.products import StepProducts
from megatron_sharpness.pytorch.shards import ModelOnLines, ObservedOptimizer, largest_rates
from megatron_sharpness.replay import (
    Buffers,
    RandomStates,
    all_max,
    all_sum,
    first_error,
    reduce_loss,
)

#: A sum of losses in nats and the number of tokens that it was summed over.
LossSum = tuple[Tensor | float, Tensor | float]

#: Gives them at the model's weights.
Evaluate = Callable[[], LossSum]

#: The mean loss and the number of tokens of all ranks at θ_t + fraction·(θ_{t+1} − θ_t).
LossAt = Callable[[float], tuple[float, int]]

#: The same of the losses of these names.
LossesAt = Callable[[float, Sequence[str]], dict[str, tuple[float, int]]]


class ObservedStep:
    """Watches a model and its optimizers through the next step.

    Attributes:
        error: why the step cannot be measured, if that is known from without.
    """

    def __init__(self, model: nn.Module, optimizers: Sequence[Optimizer], *, offload: bool) -> None:
        self.error: Exception | None = None
        self._model = model
        self._passes = RecordedPasses(model)
        self._optimizers = [
            ObservedOptimizer(entry, lambda: self._passes.read_in, offload=offload)
            for entry in optimizers
        ]

    @property
    def passes_seen(self) -> int:
        """How often the training step has called the model so far."""
        return len(self._passes.states)

    @property
    def failure(self) -> Exception | None:
        """Why the step could not be observed, if so."""
        return self.error or next((seen.error for seen in self._optimizers if seen.error), None)

    def release(self) -> None:
        """Take all hooks off and give the copies back."""
        self._passes.release()
        for optimizer in self._optimizers:
            optimizer.release()

    @contextlib.contextmanager
    def replaying(
        self, evaluate: Evaluate, others: Mapping[str, Evaluate], *, eval_mode: bool, frozen: bool
    ) -> Iterator[tuple[LossAt, LossesAt]]:
        """The loss along the update, and those on other data; in the end all is as it was.

        Args:
            evaluate: the step's own micro-batches through the model.
            others: other data through it, by name; in evaluation mode.
            eval_mode: whether ``evaluate`` is called in evaluation mode, too.
            frozen: end at θ_t and not at θ_{t+1}, with the buffers from before the step.
        """
        states, buffers = RandomStates(), Buffers([self._model])
        if frozen and self._passes.buffers is not None:
            buffers = self._passes.buffers
        training = [(module, module.training) for module in self._model.modules()]
        lines = ModelOnLines(self._model, self._optimizers)
        moved = frozen

        def set_modes(*, as_trained: bool) -> None:
            for module, flag in training:
                module.training = flag and as_trained

        def move(fraction: float) -> Exception | None:
            nonlocal moved
            moved = True
            error: Exception | None = None
            try:
                lines.move(fraction)
            except Exception as caught:
                error = caught
            lines.sync()
            return error

        def reduced(function: Evaluate, error: Exception | None) -> tuple[float, int]:
            loss: Tensor | float = 0.0
            tokens: Tensor | float = 0.0
            try:  # whatever failed before: the other ranks wait in the model's collectives
                with torch.no_grad():
                    loss, tokens = _sums(function())
            except Exception as caught:
                error = error or caught
            return reduce_loss(loss, tokens, error, collective_device())

        def loss_at(fraction: float) -> tuple[float, int]:
            error = move(fraction)
            set_modes(as_trained=not eval_mode)
            with self._passes.replaying():
                return reduced(evaluate, error)

        def losses_at(fraction: float, names: Sequence[str]) -> dict[str, tuple[float, int]]:
            error = move(fraction)
            set_modes(as_trained=False)
            found = {}
            for name in names:
                buffers.restore()
                states.restore()
                torch.clear_autocast_cache()
                found[name] = reduced(others[name], error)
            return found

        try:
            yield loss_at, losses_at
        finally:
            if moved:
                lines.move(0.0 if frozen else 1.0)
                lines.sync()
            set_modes(as_trained=True)
            buffers.restore()
            states.restore()

    def agree(
        self,
        number: int,
        *,
        trained: bool,
        loss: LossSum | None,
        grad_norm: Tensor | float | None,
        consumed_samples: int | None,
    ) -> Step:
        """The step as all ranks see it. Collective.

        Args:
            number: of the step.
            trained: whether the probes evaluate the loss that was differentiated.
            loss: this rank's part of the training loss, as ``evaluate`` would return it.
            grad_norm: of all gradients, before they were clipped.
            consumed_samples: for the record.
        """
        started = time.perf_counter()
        error = self.failure
        stepped = [seen for seen in self._optimizers if seen.stepped]
        rates = [(seen.lr, seen.weight_decay) for seen in stepped] or [
            largest_rates(seen.optimizer) for seen in self._optimizers
        ]
        flags = torch.tensor(
            [
                error is not None,
                not stepped,
                self._passes.coarse,
                *(max(rate) for rate in zip(*rates, strict=True)),
            ],
            dtype=torch.float64,
        )
        failed, skipped, coarse, lr, decay = all_max(flags, collective_device()).tolist()
        seen = Step(
            iteration=number,
            consumed_samples=consumed_samples,
            lr=lr,
            weight_decay=decay,
            beta1=_beta1([seen.optimizer for seen in self._optimizers]),
            trained=trained,
            coarse=bool(coarse),
            skipped=bool(skipped),
            failed=first_error(error) if failed else None,
            started=started,
        )
        if failed or skipped or lr == 0.0:
            return seen
        sums = torch.stack([seen.products.cpu() for seen in stepped]).sum(dim=0)
        products = StepProducts(*all_sum(sums, collective_device()).tolist())
        # A fused optimizer under loss scaling decides on the device whether it steps.
        if products.squared_update == 0.0:
            return dataclasses.replace(seen, skipped=True)
        clip = 1.0
        if grad_norm is not None and 0.0 < (norm := float(_whole(grad_norm))) < math.inf:
            clip = math.sqrt(products.squared_gradient) / norm
        try:
            training_loss = _training_loss(loss) if trained else None
        except ProbeError as caught:
            return dataclasses.replace(seen, failed=str(caught))
        return dataclasses.replace(
            seen,
            training_loss=training_loss,
            slope=products.decrease / lr / clip if clip else 0.0,
            noise=products.noise(clip) if clip else 0.0,
            resolution=products.resolution(lr),
            update_norm=math.sqrt(products.squared_update) / lr,
        )


class RecordedPasses:
    """The random states of a step's forward passes, and the buffers before the first of them.

    Attributes:
        states: of each pass, in order.
        buffers: None before the first pass.
        read_in: the narrowest type that a pass has read weights in, None before the first pass.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.states: list[RandomStates] = []
        self.buffers: Buffers | None = None
        self.read_in: torch.dtype | None = None
        self._handles = [model.register_forward_pre_hook(self._record)]

    @property
    def coarse(self) -> bool:
        """Whether a pass has read weights in 16 bits, or may have done so out of sight."""
        if self.read_in is None or torch.finfo(self.read_in).bits < 32:
            return True
        return any(_is_compiled(module) for module in self._model.modules())

    def release(self) -> None:
        """Record no further passes."""
        for handle in self._handles:
            handle.remove()

    @contextlib.contextmanager
    def replaying(self) -> Iterator[None]:
        """Within it the passes draw what they have drawn in training."""
        if self.buffers is None:
            # The loop calls the model in another way than through the module that was given.
            self.states, self.buffers = [RandomStates()], Buffers([self._model])
        self.buffers.restore()
        self.states[0].restore()
        torch.clear_autocast_cache()  # it may hold casts of other weights
        states = iter(self.states)

        def set_random_states(*_: Any) -> None:
            if (recorded := next(states, None)) is not None:
                recorded.restore()

        self.release()
        handle = self._model.register_forward_pre_hook(set_random_states)
        try:
            yield
        finally:
            handle.remove()

    def _record(self, *_: Any) -> None:
        if not torch.is_grad_enabled():  # an evaluation between the steps
            return
        if self.buffers is None:
            self.buffers = Buffers([self._model])
            self._note_type(self._model)
            for module in _eager_owners(self._model):
                self._note_type_once(module)
        self.states.append(RandomStates())

    def _note_type_once(self, module: nn.Module) -> None:
        """Note the type in which a module reads its weights at its next call."""

        def note(*_: Any) -> None:
            handle.remove()
            self._note_type(module)

        handle = module.register_forward_pre_hook(note)
        self._handles.append(handle)

    def _note_type(self, module: nn.Module) -> None:
        weights = [p for p in module.parameters(recurse=False) if p.is_floating_point()]
        kinds = {p.device.type for p in weights} or {"cpu", collective_device().type}
        types = [p.dtype for p in weights]
        types += [torch.get_autocast_dtype(k) for k in kinds if torch.is_autocast_enabled(k)]
        if self.read_in is not None:
            types.append(self.read_in)
        self.read_in = max(types, key=lambda dtype: torch.finfo(dtype).eps, default=None)


def _eager_owners(module: nn.Module) -> Iterator[nn.Module]:
    """The modules that hold matrices, but for those in compiled ones: a hook would compile anew."""
    if _is_compiled(module):
        return
    if any(p.is_floating_point() and p.dim() > 1 for p in module.parameters(recurse=False)):
        yield module
    for child in module.children():
        yield from _eager_owners(child)


def _is_compiled(module: nn.Module) -> bool:
    scripted = isinstance(module, torch.jit.ScriptModule)
    return scripted or isinstance(module, OptimizedModule) or module._compiled_call_impl is not None


def collective_device() -> torch.device:
    """Where the default process group reduces."""
    if not dist.is_initialized() or "cpu:" in dist.get_backend_config():
        return torch.device("cpu")
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def _whole(value: Tensor | float) -> Tensor | float:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _training_loss(loss: LossSum | None) -> float | None:
    """The mean of all ranks, or None where not every rank gives its part. Collective.

    Raises:
        ProbeError: a rank's part is none that can be compared.
    """
    given = torch.tensor([loss is None], dtype=torch.float64)
    if all_max(given, collective_device()).item():
        return None
    total: Tensor | float = 0.0
    tokens: Tensor | float = 0.0
    error: Exception | None = None
    try:
        total, tokens = _sums(loss, "loss")
    except Exception as caught:
        error = caught
    return reduce_loss(total, tokens, error, collective_device())[0]


def _sums(given: Any, name: str = "evaluate()") -> LossSum:
    """What ``evaluate`` returned, or the loop gave, checked."""
    if not isinstance(given, tuple) or len(given) != 2:
        raise TypeError(
            f"{name} is {type(given).__name__}; it is to be a tuple of this rank's sum of losses "
            "and number of tokens"
        )
    loss, tokens = given
    if isinstance(loss, Tensor) and loss.is_floating_point() and loss.dtype.itemsize < 4:
        raise TypeError(
            f"{name} has a loss in {loss.dtype}, too coarse to compare; compute the loss in fp32, "
            "from logits.float()"
        )
    return _whole(loss), _whole(tokens)


def _beta1(optimizers: Sequence[Optimizer]) -> float | None:
    """β₁ where all that steps is Adam with the same one."""
    if not all("Adam" in type(optimizer).__name__ for optimizer in optimizers):
        return None
    found = {
        float(group["betas"][0])
        for optimizer in optimizers
        for group in optimizer.param_groups
        if "betas" in group
    }
    return found.pop() if len(found) == 1 else None
