"""What a Megatron training step reads, for the watch and for trials."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from megatron.core import tensor_parallel
from megatron.core.rerun_state_machine import get_rerun_state_machine
from torch import Tensor

from megatron_sharpness.core.recorder import Recorder
from megatron_sharpness.core.watch import Watch
from megatron_sharpness.megatron import graphs
from megatron_sharpness.megatron.line import MegatronLine
from megatron_sharpness.megatron.shards import gathers_of, leaves_of
from megatron_sharpness.megatron.states import MegatronRandomStates, place_of

#: Packages whose objects are looked into, and whose globals and class attributes are compared.
PACKAGES = ("megatron", "transformer_engine", "apex", "emerging_optimizers")

#: Scratch memory, clocks and counters of the run itself, which no later step reads.
SCRATCH = (
    "token_dispatcher",
    "_GLOBAL_MEMORY_BUFFER",
    "_GLOBAL_TIMERS",
    "_timers",
)


#: What the next step empties or waits for: gradients, whose memory a late gather may use, and a
#: gather in flight, which a measurement has waited for already.
_PENDING = ("grad_data", "param_gather_handle")

#: Megatron's arguments that say how a model lies on the ranks and what trains it.
LAYOUT = (
    "world_size", "tensor_model_parallel_size", "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size", "context_parallel_size",
    "expert_model_parallel_size", "expert_tensor_parallel_size", "data_parallel_size",
    "sequence_parallel", "use_distributed_optimizer", "use_megatron_fsdp", "use_torch_fsdp2",
    "data_parallel_sharding_strategy", "overlap_param_gather", "overlap_grad_reduce", "optimizer",
    "bf16", "fp16", "fp8", "transformer_impl", "attention_backend", "cuda_graph_impl",
    "recompute_granularity", "micro_batch_size", "global_batch_size", "seq_length", "num_layers",
    "hidden_size", "num_experts", "deterministic_mode",
)  # fmt: skip


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


def write_down(
    recorder: Recorder, number: int, model: Any, optimizer: Any, scheduler: Any
) -> None:
    """What a rank is after an iteration.

    Nothing is gathered for it: of the weights that train those are compared that the rank steps. A
    gather which is missing is not made up for, and what the next forward pass will gather anyway is
    as it may be.
    """
    gathers = gathers_of(model, optimizer)
    owned = dict(_owned(model, optimizer))
    trained = [p for chunk in model for p in chunk.parameters() if p.requires_grad]
    mine, gathered = set(map(id, owned.values())), set(map(place_of, [*owned.values(), *trained]))
    trackers = tensor_parallel.get_cuda_rng_tracker().get_states()
    recorder.iteration(
        number,
        {
            "weights": owned,
            **{f"model {i}" if i else "model": chunk for i, chunk in enumerate(model)},
            "optimizer": optimizer,
            "learning rate": scheduler,
            "random states of Megatron": trackers,
            "checks": get_rerun_state_machine(),
        },
        MegatronRandomStates(),
        left_out=lambda tensor: id(tensor) not in mine and place_of(tensor) in gathered,
        opened=PACKAGES,
        ignored=[*SCRATCH, *_PENDING],
        without=[*gathers.scratch(), *graphs.holders(model)],
    )


def _owned(model: Any, optimizer: Any) -> Iterator[tuple[str, Tensor]]:
    """What this rank steps, where forward passes read it, by the parameter's name."""
    names = {
        id(parameter): f"{i}.{name}" if i else name
        for i, chunk in enumerate(model)
        for name, parameter in chunk.named_parameters()
    }
    for leaf in leaves_of(optimizer):
        for number, each in enumerate(leaf.stepped()):
            weight = each.parameter if each.weight is None else each.weight
            yield names.get(id(weight), f"number {number}"), each.model
