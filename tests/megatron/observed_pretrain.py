"""A training that at its end writes down a hash of everything that it changed.

It runs launch/pretrain_gpt.py, or the script that ``OBSERVED_SCRIPT`` names.

Run as a training script under ``python -m megatron_sharpness.megatron``. ``OBSERVED_OUT`` names the
folder for one file a rank; ``OBSERVED_FAULT`` a fault to inject, see ``faults.py``, and
``OBSERVED_SITUATION`` what a training does beside, see ``situations.py``.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.training import training

from tests.digest import hash_of, random_states

LAUNCH = Path(__file__).resolve().parents[2] / "launch" / "pretrain_gpt.py"
SCRIPT = os.environ.get("OBSERVED_SCRIPT", str(LAUNCH))


def leaves(optimizer: Any) -> list[Any]:
    chained = getattr(optimizer, "chained_optimizers", None)
    return [optimizer] if chained is None else [x for o in chained for x in leaves(o)]


def plain(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def weights(module: Any) -> list[Any]:
    """What the forward pass reads of the parameters, as far as this rank keeps it."""
    buffer = getattr(module, "param_and_grad_buffer", None)
    if buffer is None:
        return list(module.parameters())
    kept = []  # Megatron-FSDP: raw buffers have gaps, and memory that was given back
    for group in buffer.parameter_groups:
        held = group.model_weight_buffer
        for parameter in group.params:
            if held is None:
                kept.append(parameter)
            else:
                kept.append(held.get_item(held.param_idx[parameter], held.is_data_distributed))
    return kept


def snapshot(model: Any, optimizer: Any, scheduler: Any, iterator: Any) -> dict[str, str]:
    parameters = [p for chunk in model for p in weights(chunk.module)]
    stepped = [leaf for leaf in leaves(optimizer) if not leaf.is_stub_optimizer]
    mains = [p for leaf in stepped for p in leaf.get_parameters()]
    machine = get_rerun_state_machine()
    iterators = iterator if isinstance(iterator, list) else [iterator]
    result = {
        "parameters": hash_of([p.data for p in parameters]),
        "main parameters": hash_of([p.data for p in mains]),
        "gradients": hash_of([getattr(p, "main_grad", None) for p in parameters]),
        "buffers": hash_of([b for chunk in model for b in chunk.module.buffers()]),
        "optimizer": hash_of([leaf.optimizer.state.get(p) for leaf in stepped
                              for p in leaf.get_parameters()]),
        "groups": hash_of([plain(group) for group in optimizer.param_groups]),
        "scaler": hash_of(optimizer.get_loss_scale(),
                          [leaf.grad_scaler.state_dict() for leaf in stepped
                           if getattr(leaf, "grad_scaler", None)]),
        "scheduler": hash_of(scheduler.state_dict()),
        "random states": hash_of(random_states(), torch.cuda.get_rng_state(),
                                 tensor_parallel.get_cuda_rng_tracker().get_states()),
        "rerun machine": hash_of({k: str(v) for k, v in vars(machine).items()
                                  if isinstance(v, (bool, int, float, str)) or k in
                                  ("mode", "state")}),
        "gathers": hash_of([getattr(group, "param_gather_dispatched", None)
                            for chunk in model for group in getattr(chunk, "bucket_groups", [])]),
        "next batch": hash_of([next(i) for i in iterators if i is not None]),
    }
    return result


def observe(out: Path) -> None:
    history: list[str] = []
    real_log, real_train = training.training_log, training.train

    def training_log(loss_dict: Any, total: Any, lr: Any, iteration: Any, *rest: Any, **kw: Any):
        history.append(hash_of(loss_dict, lr, iteration, rest[0], rest[2:5]))
        return real_log(loss_dict, total, lr, iteration, *rest, **kw)

    def train(forward_step: Any, model: Any, optimizer: Any, scheduler: Any, iterator: Any,
              *rest: Any, **kw: Any):
        try:
            return real_train(forward_step, model, optimizer, scheduler, iterator, *rest, **kw)
        finally:
            rank = os.environ["RANK"]
            result = snapshot(model, optimizer, scheduler, iterator)
            result["history"] = hash_of(history)
            (out / f"rank{rank}.json").write_text(json.dumps(result))

    training.training_log, training.train = training_log, train


if __name__ == "__main__":
    observe(Path(os.environ["OBSERVED_OUT"]))
    if fault := os.environ.get("OBSERVED_FAULT"):
        from tests.megatron import faults

        getattr(faults, fault)()
    if situation := os.environ.get("OBSERVED_SITUATION"):
        from tests.megatron import situations

        getattr(situations, situation)()
    sys.path[0] = os.path.dirname(SCRIPT)
    runpy.run_path(SCRIPT, run_name="__main__")
