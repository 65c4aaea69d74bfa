"""What a Megatron training step reads, for the watch."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from megatron_sharpness.core.watch import Watch
from megatron_sharpness.megatron import graphs
from megatron_sharpness.megatron.line import MegatronLine
from megatron_sharpness.megatron.states import MegatronRandomStates

#: Packages whose objects are looked into, and whose globals and class attributes are compared.
PACKAGES = ("megatron", "transformer_engine", "apex", "emerging_optimizers")

#: Scratch memory, clocks and counters of the run itself, which no later step reads.
SCRATCH = (
    "token_dispatcher",
    "_GLOBAL_MEMORY_BUFFER",
    "_GLOBAL_TIMERS",
    "_timers",
)


def watch_over(line: MegatronLine, optimizer: Any) -> Watch:
    """Fingerprints of the model chunks, the optimizer, random states, and all that is global.

    Collective, here and when it is compared: under ``--overlap-param-gather`` the shards of other
    ranks are what no one reads until the next pass gathers them.
    """

    def roots() -> dict[str, object]:
        line.gather()
        return {
            **{f"model {i}" if i else "model": chunk for i, chunk in enumerate(line.model)},
            "optimizer": optimizer,
            "random states": MegatronRandomStates().values(),
            **dict(_globals()),
        }

    without = [*line.gathers.scratch(), *graphs.holders(line.model)]
    return Watch(roots, opened=PACKAGES, ignored=SCRATCH, without=without)


def _globals() -> Iterator[tuple[str, object]]:
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] not in PACKAGES or module is None:
            continue
        yield name, module
        for key, value in list(vars(module).items()):
            if isinstance(value, type) and value.__module__ == name:
                yield f"{name}.{key}", value
