"""The optimizers of a loop, each observed through its next step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from megatron_sharpness.core.errors import ProbeError
from megatron_sharpness.core.products import StepProducts
from megatron_sharpness.core.update_line import UpdateLine
from megatron_sharpness.core.watch import Checksums
from megatron_sharpness.pytorch.parts import PartsOfModel
from megatron_sharpness.pytorch.shards import FullyShardedModules, local, shards_of


class ObservedOptimizer:
    """One optimizer's next step seen from both sides: θ_t, θ_{t+1} and their products with g.

    θ_t is what the weights are when ``step`` is called, whatever it does before it calls its
    closure. The products are taken right after the step, since the loop may then clear the
    gradients. An error costs the measurement, never the step.

    Attributes:
        steps: how often the optimizer has stepped.
        idle: and how often with a learning rate of 0, as warm-ups do, and
            ``torch.distributed.checkpoint`` to make the optimizer's state.
        error: what went wrong while watching.
        lr: the largest learning rate of its parameter groups, as the step used it.
        weight_decay: the largest weight decay.
        products: this rank's part of :class:`StepProducts`, of the whole and of each part of the
            model; fp64, [1 + parts, fields].
        slope_known: whether they hold the gradient at θ_t of all parameters.
        shards: the parameters that it steps on this rank.

    Args:
        optimizer: to be watched.
        read_in: gives, once the forward passes are over, the narrowest type that they read weights
            in.
        offload: keep the copies in host memory.
        parts: of the model.
        first_rank: the lowest of the ranks that hold the same part of the model.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        read_in: Callable[[], torch.dtype | None],
        *,
        offload: bool,
        parts: PartsOfModel | None = None,
        first_rank: int = 0,
    ) -> None:
        self.optimizer = optimizer
        self.shards = shards_of(optimizer, first_rank)
        self._read_in = read_in
        self.steps = self.idle = 0
        self.error: Exception | None = None
        self.lr = 0.0
        self.weight_decay = 0.0
        self._parts = parts
        rows = 1 + len(parts.names) if parts else 1
        self.products = torch.zeros(rows, StepProducts.COUNT, dtype=torch.float64)
        self.slope_known = True
        self._offload = offload
        self._line = UpdateLine([])
        #: PyTorch's own optimizers call their closure before all else, and leave gradients alone.
        self._own = _is_torchs(optimizer)
        self._left = self._weights()
        self._used: Checksums | None = None
        self._depth = 0  # a step may call that of the class it was derived from
        self._inside = self.shards.inside()
        self._inner_steps = 0
        self._used_inside: Checksums | None = None
        self._releases = [on_step(optimizer, self._before, self._after)]
        for inner in self._inside:
            before = functools.partial(self._before_inside, inner)
            after = functools.partial(self._after_inside, inner)
            self._releases.append(on_step(inner, before, after))

    def move(self, fraction: float, part: int | None = None) -> None:
        """Write θ_t + fraction·(θ_{t+1} − θ_t) to this rank's shards, or to those of one part and
        θ_t to the others; nothing without a step."""
        self._line.move(fraction, part)

    def undo(self) -> None:
        """Write θ_t to what the optimizer steps, too, where forward passes read something else."""
        self._line.undo()

    def release(self) -> None:
        """Take the hooks off and give the copies back."""
        for release in self._releases:
            release()
        self._line = UpdateLine([])

    def inspect(self) -> Exception | None:
        """Why no update leads from the weights of before to those of now, if so."""
        if self.error is not None:
            return self.error
        name = type(self.optimizer).__name__
        if self.steps > 1:
            return ProbeError(
                f"{name}.step was called {self.steps} times since the last after_step, so that "
                "there is no one update; call after_step after each, with a number of its own"
            )
        if self._left == self._weights() or self.error is not None:
            return self.error
        if self.steps or self.idle:
            return ProbeError(
                f"the weights were changed between {name}.step and after_step (clamped, masked, "
                "averaged, or swapped by an optimizer around this one or by its own eval()), so "
                "that they lie off the update; they were left as they are. Call after_step right "
                "after the step, before they are changed, or give the outermost optimizer"
            )
        return ProbeError(
            f"the weights have changed, and not in {name}.step, which was not called; give the "
            "optimizer whose step the loop calls (of one that steps in two halves, such as SAM's "
            "first_step and second_step, the optimizer that it wraps)"
        )

    def _before(self, closure: Callable[[], Any] | None) -> Callable[[], Any] | None:
        """Called at the entry of ``step``; returns what is called in place of its closure."""
        self._depth += 1
        if self._depth > 1:
            return closure
        if closure is None:
            self._begin()
            return None

        def closure_then_begin() -> Any:
            result = closure()
            self._begin()
            return result

        def closure_anywhere() -> Any:
            # Of an optimizer that moves the weights first, as SAM does, the gradient is not θ_t's.
            self.slope_known &= self._left == self._weights()
            result = closure()
            self._used = self._gradients()
            return result

        if self._own:
            # The closure holds the backward pass, beside whose activations no copy should lie.
            return closure_then_begin
        self._begin()
        self._left = self._weights()
        return closure_anywhere

    def _begin(self) -> None:
        try:
            self.lr, self.weight_decay = largest_rates(self.shards.groups())
            self.shards.check()
            self._line = UpdateLine(self.shards.shards(), offload=self._offload)
            self._line.begin()
            self.products = torch.zeros_like(self.products, device=self._line.device)
            self._inner_steps = 0
            self._used = None if self._own or self._inside else self._gradients()
        except Exception as caught:  # out of memory, say
            self._fail(caught)

    def _after(self) -> None:
        self._depth -= 1
        if self._depth or (self._inside and not self._inner_steps):
            return  # within another one, or skipped by a loss scaler
        moves = self.lr != 0.0 or self.error is not None
        self.steps, self.idle = self.steps + moves, self.idle + (not moves)
        try:
            # Collective for partial sums, and so made on a rank that failed before, too.
            gradients = self.shards.gradients()
            if self._used is not None:  # some optimizers compute in the gradients' own memory
                self.slope_known &= self._used == self._gradients()
            if self.error is None:
                self._end()
                if not self._inside:
                    self._multiply(zip(range(len(self._line.shards)), gradients, strict=True))
                self._left = self._weights()
        except Exception as caught:
            self._fail(caught)

    def _before_inside(self, inner: Optimizer, closure: Any) -> Any:
        used = self.shards.gradients_in(inner)
        self._used_inside = None if _is_torchs(inner) else self._checksums(_dense(used.values()))
        return closure

    def _after_inside(self, inner: Optimizer) -> None:
        self._inner_steps += 1
        gradients = self.shards.gradients_in(inner)
        self.slope_known &= self.shards.steps_on_gradients
        if self._used_inside is not None:
            self.slope_known &= self._used_inside == self._checksums(_dense(gradients.values()))
        if self.error is not None:
            return
        try:
            self._end()
            self._multiply(gradients.items())
        except Exception as caught:
            self._fail(caught)

    def _end(self) -> None:
        self._line.end(self.shards.shards())
        if self._parts is not None:
            self._line.parts = [self._parts.of(p) for p in self.shards.parameters()]

    def _multiply(self, gradients: Iterable[tuple[int, Tensor | None]]) -> None:
        """Add the products of shards, by their number, with their gradients."""
        for number, gradient in gradients:
            if gradient is not None and gradient.layout != torch.strided:
                self.slope_known, gradient = False, None
            self._line.add_products(number, gradient, self.products, self._read_in())

    def _weights(self) -> Checksums:
        return self._checksums(self.shards.parameters())

    def _gradients(self) -> Checksums:
        return self._checksums(_dense(p.grad for p in self.shards.parameters()))

    def _checksums(self, tensors: Iterable[Tensor]) -> Checksums:
        try:
            return Checksums(local(tensor) for tensor in tensors)
        except Exception as caught:  # out of memory, say: the loop and its step go on
            self._fail(caught)
            return Checksums([])

    def _fail(self, error: Exception) -> None:
        self.error = error
        self._line = UpdateLine([])


def on_step(
    optimizer: Optimizer,
    before: Callable[[Callable[[], Any] | None], Callable[[], Any] | None],
    after: Callable[[], None],
) -> Callable[[], None]:
    """Have functions called before and after an optimizer's ``step``.

    Args:
        before: given the closure, or None; returns what is called in its place.

    Returns:
        What takes them off.
    """

    def replaced(arguments: Sequence[Any], named: dict[str, Any]) -> Any:
        given = arguments[0] if arguments else named.get("closure")
        closure = before(given if callable(given) else None)
        if closure is None:
            return tuple(arguments), named
        if arguments:
            return (closure, *arguments[1:]), named
        return (), {**named, "closure": closure}

    if getattr(type(optimizer).step, "hooked", False):

        def before_hook(_: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
            rest, named = replaced(arguments[1:], named)
            return (arguments[0], *rest), named

        handles = [
            optimizer.register_step_pre_hook(before_hook),
            optimizer.register_step_post_hook(lambda *_: after()),
        ]

        def remove() -> None:
            for handle in handles:
                handle.remove()

        return remove

    # A wrapper that was not made by Optimizer.__init__ runs no hooks.
    held, step, watching = vars(optimizer).get("step"), optimizer.step, True

    def watched_step(*arguments: Any, **named: Any) -> Any:
        if not watching:
            return step(*arguments, **named)
        arguments, named = replaced(arguments, named)
        result = step(*arguments, **named)
        after()
        return result

    def put_back() -> None:
        nonlocal watching
        watching = False
        if vars(optimizer).get("step") is not watched_step:
            return  # a scheduler has wrapped it
        del optimizer.step
        if held is not None:
            optimizer.step = held  # type: ignore[method-assign]

    optimizer.step = watched_step  # type: ignore[method-assign]
    return put_back


def largest_rates(groups: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """The largest learning rate and the largest weight decay of parameter groups."""
    return (
        max((float(group["lr"]) for group in groups), default=0.0),
        max((float(group.get("weight_decay", 0.0)) for group in groups), default=0.0),
    )


def _dense(gradients: Iterable[Tensor | None]) -> Iterator[Tensor]:
    return (g for g in gradients if g is not None and g.layout == torch.strided)


def _is_torchs(optimizer: Optimizer) -> bool:
    """Whether it leaves gradients as they are, and calls a closure before all else."""
    return type(optimizer).__module__.startswith("torch.optim.")


class ModelOnLines:
    """A model between the two ends of the update of all its optimizers.

    Args:
        model: as it is called in training.
        optimizers: those that were watched.
    """

    def __init__(self, model: nn.Module, optimizers: Sequence[ObservedOptimizer]) -> None:
        self.optimizers = optimizers
        self._modules = FullyShardedModules(model)

    def move(self, fraction: float, part: int | None = None) -> None:
        """Write θ(fraction) to this rank's shards, or that to one part alone, and θ_t elsewhere.
        :meth:`sync` must follow on all ranks."""
        for optimizer in self.optimizers:
            optimizer.shards.settle()
            optimizer.move(fraction, part)

    def undo(self) -> None:
        """Take the step back, with its optimizers' own copies of the parameters."""
        for optimizer in self.optimizers:
            optimizer.undo()

    def sync(self) -> None:
        """Have the next forward pass see the shards of all ranks. Collective."""
        for optimizer in self.optimizers:
            optimizer.shards.sync()
        self._modules.sync()
