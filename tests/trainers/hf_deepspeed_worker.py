"""Trains a tiny OLMo-2 with the ``Trainer`` on DeepSpeed, without and with measurement.

Started by ``test_deepspeed.py``, one process a rank: ``python -m
tests.trainers.hf_deepspeed_worker FOLDER``.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from torch import Tensor
from transformers import Olmo2ForCausalLM, Trainer, TrainingArguments

from megatron_sharpness.trainers.hf import CriticalSharpnessCallback
from tests.digest import hash_of, random_states
from tests.trainers.hf_worker import CONFIG, Records, dataset

AUTO = "auto"


def train(
    output: Path,
    every: int = 0,
    *,
    resume: Path | None = None,
    stage: int | None = None,
    accumulate: int = 1,
    **options: Any,
) -> dict[str, Any]:
    """Eight steps under a ZeRO, or under DDP."""
    torch.manual_seed(0)
    configuration = {
        "zero_optimization": {"stage": stage},
        "train_micro_batch_size_per_gpu": AUTO,
        "gradient_accumulation_steps": AUTO,
        "gradient_clipping": AUTO,
        "zero_allow_untested_optimizer": True,
        **options,
    }
    arguments = TrainingArguments(
        str(output),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=accumulate,
        max_steps=8,
        learning_rate=3e-3,
        weight_decay=0.1,
        max_grad_norm=0.5,
        logging_steps=1,
        report_to=[],
        save_strategy="steps" if output.name.startswith("saved") else "no",
        save_steps=4,
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
        bf16="bf16" in options,
        deepspeed=None if stage is None else configuration,
    )
    trainer = Trainer(Olmo2ForCausalLM(copy.deepcopy(CONFIG)), arguments, train_dataset=dataset())
    records = Records()
    if every:
        trainer.add_callback(CriticalSharpnessCallback(trainer, every=every, sinks=[records]))
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return {
        "training": None if stage is None else digest(trainer),
        "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line],
        "logged": [line for line in trainer.state.log_history if "critical_sharpness" in line],
        "records": [dataclasses.asdict(record) for record in records],
    }


def digest(trainer: Trainer) -> dict[str, str]:
    engine = trainer.model_wrapped
    inner = engine.basic_optimizer
    values = [v for state in inner.state.values() for _, v in sorted(state.items())]
    return {
        "parameters": hash_of(getattr(p, "ds_tensor", p) for p in engine.module.parameters()),
        "stepped": hash_of(p for group in inner.param_groups for p in group["params"]),
        "optimizer": hash_of(value for value in values if isinstance(value, Tensor)),
        "random": random_states(),
    }


def main(folder: Path) -> None:
    # Sums of gloo, not DeepSpeed's own in shared memory, which would have to be compiled.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    results: dict[str, Any] = {"ddp": train(folder / "out", 2)}
    AcceleratorState._reset_state(reset_partial_state=True)
    for name, options in {
        "2": {"stage": 2},
        "3": {"stage": 3},
        "2, bf16, accumulated": {"stage": 2, "bf16": {"enabled": True}, "accumulate": 2},
    }.items():
        off, on = (train(folder / "out", every, **options) for every in (0, 2))
        results[name] = {"off": off, "on": on}
        print(name, flush=True)
    results["whole"] = train(folder / "saved", 2, stage=2)
    results["resumed"] = train(folder / "out", 2, resume=folder / "saved" / "checkpoint-4", stage=2)
    rank = dist.get_rank()
    (folder / f"rank{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
