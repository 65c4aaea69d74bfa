"""The parameters that PyTorch's optimizers step, as shards of an update line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import Optimizer

from megatron_sharpness.products import StepProducts
from megatron_sharpness.update_line import Shard, UpdateLine


def stepped(optimizer: Optimizer) -> list[Tensor]:
    """The parameters that the optimizer steps on this rank.

    They come from the optimizer: a model's own are the gathered ones after an FSDP2 forward pass,
    and what is written to those is lost.
    """
    owner = optimizer.optim if isinstance(optimizer, ZeroRedundancyOptimizer) else optimizer
    return [
        parameter
        for group in owner.param_groups
        for parameter in group["params"]
        if parameter.requires_grad
    ]


@torch.no_grad()
def local(tensor: Tensor) -> Tensor:
    """What this rank holds of ``tensor``."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def _shard(parameter: Tensor, optimizer: Optimizer) -> Shard:
    held = local(parameter)
    if isinstance(optimizer, ZeroRedundancyOptimizer):
        counted = 0 in dist.get_process_group_ranks(optimizer.process_group)
    else:
        counted = _holds_first_copy(parameter)
    return Shard(main=held, model=held, counted=counted)


def _holds_first_copy(parameter: Tensor) -> bool:
    """Whether, of the equal copies that several ranks hold, this rank's is the one to count."""
    if not dist.is_initialized():
        return True
    if not isinstance(parameter, DTensor):
        return dist.get_rank() == 0
    mesh = parameter.device_mesh
    coordinate = mesh.get_coordinate()
    return (
        coordinate is not None
        and bool((mesh.mesh == 0).any())  # outside of the mesh of rank 0 there are copies only
        and not any(
            index
            for index, placement in zip(coordinate, parameter.placements, strict=True)
            if isinstance(placement, Replicate)
        )
    )


def _gradient(parameter: Tensor) -> Tensor | None:
    """The gradient of what :func:`local` gives."""
    gradient = parameter.grad
    if isinstance(gradient, DTensor) and isinstance(parameter, DTensor):
        # Of a replicated parameter it may still be a partial sum, as under sequence parallelism.
        gradient = gradient.redistribute(parameter.device_mesh, parameter.placements)
    return None if gradient is None else local(gradient)


class ObservedOptimizer:
    """One optimizer's next step seen from both sides: θ_t, θ_{t+1} and their products with g.

    The products are taken right after the step, since the loop may then clear the gradients. An
    error costs the measurement, never the step.

    Attributes:
        stepped: whether the optimizer has stepped.
        error: what went wrong while watching.
        lr: the largest learning rate of its parameter groups, as the step used it.
        weight_decay: the largest weight decay.
        products: this rank's part of :class:`StepProducts`; fp64.

    Args:
        optimizer: to be watched.
        read_in: gives, once the forward passes are over, the narrowest type that they read weights
            in.
        offload: keep the copies in host memory.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        read_in: Callable[[], torch.dtype | None],
        *,
        offload: bool,
    ) -> None:
        self.optimizer = optimizer
        self._read_in = read_in
        self.stepped = False
        self.error: Exception | None = None
        self.lr = 0.0
        self.weight_decay = 0.0
        self.products = torch.zeros(StepProducts.COUNT, dtype=torch.float64)
        self._offload = offload
        self._line = UpdateLine([])
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def move(self, fraction: float) -> None:
        """Write θ_t + fraction·(θ_{t+1} − θ_t) to this rank's shards; nothing without a step."""
        self._line.move(fraction)

    def release(self) -> None:
        """Take the hooks off and give the copies back."""
        for handle in self._handles:
            handle.remove()
        self._line = UpdateLine([])

    def _before(
        self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        optimizer, *rest = args
        closure = rest[0] if rest else kwargs.get("closure")
        if not callable(closure):
            self._begin()
            return None

        def closure_then_begin() -> Any:
            # It holds the backward pass, beside whose activations no copy should lie.
            result = closure()
            self._begin()
            return result

        if rest:
            return (optimizer, closure_then_begin, *rest[1:]), kwargs
        return args, {**kwargs, "closure": closure_then_begin}

    def _begin(self) -> None:
        try:
            self.lr, self.weight_decay = largest_rates(self.optimizer)
            self._line = UpdateLine(
                [_shard(parameter, self.optimizer) for parameter in stepped(self.optimizer)],
                offload=self._offload,
            )
            self._line.begin()
        except Exception as caught:  # out of memory, say
            self._fail(caught)

    def _after(self, *_: Any) -> None:
        self.stepped = True
        try:
            # Collective for partial sums, and so made on a rank that failed before, too.
            gradients = [_gradient(parameter) for parameter in stepped(self.optimizer)]
            if self.error is None:
                self._line.end()
                self.products = torch.zeros_like(self.products, device=self._line.device)
                self._line.products(gradients, self.products, self._read_in())
        except Exception as caught:
            self._fail(caught)

    def _fail(self, error: Exception) -> None:
        self.error = error
        self._line = UpdateLine([])


def largest_rates(optimizer: Optimizer) -> tuple[float, float]:
    """The largest learning rate and the largest weight decay of the parameter groups."""
    groups = [group for group in optimizer.param_groups if group["params"]]
    return (
        max((float(group["lr"]) for group in groups), default=0.0),
        max((float(group.get("weight_decay", 0.0)) for group in groups), default=0.0),
    )


class ModelOnLines:
    """A model between the two ends of the update of all its optimizers.

    Args:
        model: as it is called in training.
        optimizers: those that were watched.
    """

    def __init__(self, model: nn.Module, optimizers: Sequence[ObservedOptimizer]) -> None:
        self.optimizers = optimizers
        self._roots: list[FSDPModule] = []
        inner: set[nn.Module] = set()
        for module in model.modules():
            if isinstance(module, FSDPModule) and module not in inner:
                self._roots.append(module)
                inner.update(module.modules())
        self._broadcasts = [
            broadcast
            for seen in optimizers
            if isinstance(seen.optimizer, ZeroRedundancyOptimizer)
            for broadcast in _broadcasts(seen.optimizer)
        ]

    def move(self, fraction: float) -> None:
        """Write θ(fraction) to this rank's shards. :meth:`sync` must follow on all ranks."""
        for optimizer in self.optimizers:
            optimizer.move(fraction)

    def sync(self) -> None:
        """Have the next forward pass see the shards of all ranks. Collective."""
        for parameter, owner, group in self._broadcasts:
            dist.broadcast(parameter, group=group, group_src=owner)
        for root in self._roots:
            _reshard(root)
            if (stream := _stream(root)) is not None:
                # Where a loop has set such an event, gathers wait for it and for nothing else.
                root.set_post_optim_event(stream.record_event())


def _reshard(root: FSDPModule) -> None:
    """Have the next forward pass gather all weights anew.

    After a pass without gradients a root keeps those that it gathered.
    """
    if hasattr(root, "reset_iter_state"):  # from torch 2.13 on
        # Forgets a gather in flight too, and where in the pass an exception struck.
        root.reset_iter_state()
        return
    assert isinstance(root, nn.Module)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _broadcasts(optimizer: ZeroRedundancyOptimizer) -> list[tuple[Tensor, int, Any]]:
    """Each parameter, the rank in the group that steps it, and the group. Collective."""
    group = optimizer.process_group
    stepped_here = {id(parameter) for parameter in stepped(optimizer)}
    everything = [parameter for entry in optimizer.param_groups for parameter in entry["params"]]
    indices: list[Any] = [None] * dist.get_world_size(group)
    mine = [i for i, parameter in enumerate(everything) if id(parameter) in stepped_here]
    dist.all_gather_object(indices, mine, group=group)
    return [
        (everything[i].detach(), rank, group) for rank, owned in enumerate(indices) for i in owned
    ]


def _stream(root: FSDPModule) -> Any:
    """The stream on which the shards of an FSDP2 module are written, or None on the CPU."""
    assert isinstance(root, nn.Module)
    parameter = next((p for p in root.parameters() if isinstance(p, DTensor)), None)
    if parameter is None or parameter.device_mesh.device_type == "cpu":
        return None
    return torch.get_device_module(parameter.device_mesh.device_type).current_stream()
