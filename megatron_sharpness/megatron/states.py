"""What Megatron's forward passes read and change beside the weights, kept to be put back."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import tensor_parallel
from torch.distributed.tensor import DTensor

from megatron_sharpness.core.replay import RandomStates
from megatron_sharpness.core.state import State
from megatron_sharpness.megatron import engine, graphs
from megatron_sharpness.megatron.shards import megatron_fsdp

_MTP = "megatron.core.transformer.multi_token_prediction"
_DSA = "megatron.core.transformer.experimental_attention_variant.dsa"

_MOE = "megatron.core.transformer.moe.moe_utils"

#: Classes, by module and name, that add up, over the forward passes of a step, losses for the log:
#: in a dictionary ``tracker``.
_TRACKERS = {
    "losses of further tokens": (_MTP, "MTPLossLoggingHelper"),
    "losses of the indexer": (_DSA, "DSAIndexerLossLoggingHelper"),
}

#: And those that scale the gradient of a loss beside the model's own. A forward pass sets it, by
#: the number of its micro-batches and by the loss scale, which both may be others in a probe.
_SCALERS = {
    "scale of the routers' loss": (_MOE, "MoEAuxLossAutoScaler"),
    "scale of the loss of further tokens": (_MTP, "MTPLossAutoScaler"),
    "scale of the indexer's loss": (_DSA, "DSAIndexerLossAutoScaler"),
}


class MegatronRandomStates(RandomStates):
    """All random states that Megatron's forward pass may draw from, as they are now."""

    def __init__(self) -> None:
        super().__init__()
        self._tracker = tensor_parallel.get_cuda_rng_tracker().get_states()
        # Transformer Engine's tracker holds generators, which move on in place.
        self._generators = {
            state: state.get_state()
            for state in self._tracker.values()
            if isinstance(state, torch.Generator)
        }

    def restore(self) -> None:
        super().restore()
        for generator, state in self._generators.items():
            generator.set_state(state)
        tensor_parallel.get_cuda_rng_tracker().set_states(dict(self._tracker))


def state_of(model: Sequence[Any]) -> State:
    """What the modules of this rank's model chunks keep beside their parameters."""
    roots = {f"model {i}": megatron_fsdp.unwrapped(chunk) for i, chunk in enumerate(model)}
    opened = (engine.LIBRARY,) if engine.quantizes(model) else ()
    weights = {place_of(weight) for chunk in model for weight in chunk.parameters()}
    return State(
        {**roots, **engine.shared_state(model)},
        copied=lambda tensor: place_of(tensor) not in weights,  # a probe moves weights
        opened=opened,
        without=graphs.holders(model),
    )


def place_of(tensor: torch.Tensor) -> int:
    """Where a tensor lies; what has no memory lies nowhere that another one does."""
    held = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    try:
        return held.untyped_storage().data_ptr() or -id(held)
    except RuntimeError:  # of a tensor that is made of others
        return -id(held)


def state_of_losses() -> State:
    """What forward passes add up for the log, and the scales that they set for the backward pass of
    losses beside the model's own, of the modules that are in use."""
    found = {name: getattr(_class_of(*row), "tracker", None) for name, row in _TRACKERS.items()}
    return State({**found, **{name: _class_of(*row) for name, row in _SCALERS.items()}})


def _class_of(module: str, name: str) -> Any:
    return getattr(sys.modules.get(module), name, None)
