"""A loop with accelerate's ``Accelerator``, FSDP2 and accumulation, without and with measurement.

Started by ``test_accelerate.py``, one process a rank:
``python -m tests.trainers.accelerate_worker FOLDER``.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from torch.utils.data import DataLoader, TensorDataset
from transformers import Olmo2ForCausalLM

from . import accelerate_cpu  # noqa: F401  isort: skip

from megatron_sharpness.pytorch import CriticalSharpness
from tests.digest import hash_of, random_states
from tests.trainers.hf_worker import (
    CONFIG,
    Records,
    dataset,
    inner,
    losses_anew,
    summed,
    whole,
)

STEPS = 6

#: Tokens of a micro-batch that are predicted.
LABELS = 4 * 15


def train(
    folder: Path,
    every: int,
    *,
    save_at: int = 0,
    start: int = 0,
    witness: bool = False,
) -> dict[str, Any]:
    """Ends after :data:`STEPS` steps.

    Args:
        folder: of the checkpoint.
        every: measure after the steps that this number divides; 0 measures none.
        save_at: save a checkpoint after this step.
        start: go on from the checkpoint after this step.
        witness: compute anew what was measured.
    """
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, transformer_cls_names_to_wrap=["Olmo2DecoderLayer"]
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin, gradient_accumulation_steps=2)
    torch.manual_seed(0)
    model = Olmo2ForCausalLM(copy.deepcopy(CONFIG)).train()
    tokens = torch.stack([example["input_ids"] for example in dataset()])
    loader = DataLoader(TensorDataset(tokens), batch_size=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    records = Records()
    sharpness = CriticalSharpness(model, optimizer, every=every, sinks=[records])
    accelerator.register_for_checkpointing(sharpness)
    batches = itertools.islice(loader, 2 * start, 2 * STEPS)
    first = next(batches)  # for which the loader draws a seed
    if start:
        accelerator.load_state(str(folder))
    steps: dict[int, Any] = {}
    losses: list[float] = []
    step, kept, passes, total = start, [], [], torch.zeros(())

    def loss_sum_and_tokens() -> tuple[Any, int]:
        return sum(summed(model(input_ids=ids).logits, ids) for ids in kept), LABELS * len(kept)

    for (ids,) in itertools.chain([first], batches):
        with accelerator.accumulate(model):
            kept.append(ids)
            passes.append((ids, ids, torch.get_rng_state()))
            loss = summed(model(input_ids=ids).logits, ids)
            total += loss.detach()
            accelerator.backward(loss / LABELS)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(model.parameters(), 0.5)
                before = whole(model)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            step += 1
            steps[step] = {"before": before, "after": whole(model), "lr": 3e-3, "passes": passes}
            sharpness.after_step(
                step, loss_sum_and_tokens, loss=(total, LABELS * len(kept)), grad_norm=norm
            )
            losses.append(total.item())
            kept, passes, total = [], [], torch.zeros(())
            if step == save_at:
                accelerator.save_state(str(folder))
    sharpness.close()
    stepped = inner(optimizer)
    result = {
        "digest": {
            "parameters": hash_of(p for group in stepped.param_groups for p in group["params"]),
            "optimizer": hash_of(stepped.state_dict()["state"]),
            "random": random_states(),
        },
        "losses": losses,
        "records": [dataclasses.asdict(record) for record in records],
    }
    if witness:
        gathered = [result["records"]]
        dist.broadcast_object_list(gathered)
        result["anew"] = [losses_anew(steps[r["iteration"]], r) for r in gathered[0]]
    return result


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    state = folder / "state"
    results = {
        "off": train(state, 0),
        "on": train(state, 2, save_at=3, witness=True),
        "resumed": train(state, 2, start=3),
    }
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
