"""What Megatron's forward passes do beside their loss, in modes that have something of the kind."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

#: Modules with a class that adds up, over the forward passes of a step, losses for the log: in a
#: dictionary ``tracker``.
_TRACKERS = {
    "megatron.core.transformer.multi_token_prediction": "MTPLossLoggingHelper",
    "megatron.core.transformer.experimental_attention_variant.dsa": "DSAIndexerLossLoggingHelper",
}

_OFFLOADING = "megatron.core.pipeline_parallel.fine_grained_activation_offload"


def logged_losses() -> dict[str, object]:
    """The dictionaries of losses for the log, by name, of the modules that are in use."""
    found = {
        name: getattr(getattr(sys.modules.get(module), name, None), "tracker", None)
        for module, name in _TRACKERS.items()
    }
    return {name: tracker for name, tracker in found.items() if tracker is not None}


@contextlib.contextmanager
def activations_stay() -> Iterator[None]:
    """Within it no activation is offloaded: the offloading counts on a backward pass."""
    manager = getattr(sys.modules.get(_OFFLOADING), "PipelineOffloadManager", None)
    offloading = getattr(manager, "OFFLOAD_MGR", None)
    if offloading is None or not offloading.do_offload:
        yield
        return
    offloading.disable_offload()
    try:
        yield
    finally:
        offloading.enable_offload()
