"""Trains a small GPT with DeepSpeed, without and with measurement, and writes what it saw.

Started by ``test_deepspeed.py``, one process a rank: ``python -m tests.trainers.deepspeed_worker
FOLDER``.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from megatron_sharpness.core.errors import InputError
from megatron_sharpness.pytorch import CriticalSharpness
from megatron_sharpness.sinks import DeepSpeedSink
from tests.digest import hash_of, random_states
from tests.processes import ROOT
from tests.pytorch.gpt import ModularGPT, loss_sum, make_batch, make_gpt

warnings.simplefilter("ignore")
logging.disable(logging.WARNING)

LR, DECAY, LIMIT = 1e-2, 0.1, 0.5

#: torch's, for DeepSpeed's own would have to be compiled.
ADAMW = {"type": "AdamW", "params": {"lr": LR, "weight_decay": DECAY, "torch_adam": True}}


def groups(model: nn.Module) -> list[dict[str, Any]]:
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": DECAY},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]


def mean(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    loss, tokens = loss_sum(model, batch)
    return loss / tokens


def train(
    every: int = 2,
    *,
    dropout: float = 0.2,
    steps: int = 6,
    micro_batches: int = 1,
    checkpointed: bool = False,
    measured: dict[str, Any] | None = None,
    folder: Path | None = None,
    resume: bool = False,
    saved_at: int = 2,
    **configuration: Any,
) -> dict[str, Any]:
    """A few steps, measured where ``every`` is not 0; what is left of them on this rank.

    Args:
        measured: options of CriticalSharpness.
        folder: where a checkpoint is saved after step ``saved_at``, or training goes on from.
        configuration: of DeepSpeed.
    """
    torch.manual_seed(0)
    model = make_gpt(dropout, checkpointed=checkpointed, kind=ModularGPT)
    engine, optimizer, _, _ = deepspeed.initialize(
        model=model,
        model_parameters=groups(model),
        config={
            "train_micro_batch_size_per_gpu": 8,
            "gradient_accumulation_steps": micro_batches,
            "gradient_clipping": LIMIT,
            "optimizer": ADAMW,
            "steps_per_print": None,
            **configuration,
        },
    )
    rank = dist.get_rank()
    torch.manual_seed(100 + rank)
    sharpness = None
    if every:
        sharpness = CriticalSharpness(engine, optimizer, every, watch="always", **(measured or {}))
    begin = 0
    if resume:
        _, state = engine.load_checkpoint(folder)
        begin = saved_at + 1
        sharpness.load_state_dict(state["sharpness"])
        torch.set_rng_state(torch.load(folder / f"random{rank}.pt"))
    losses: list[Tensor] = []
    records = []
    for step in range(begin, steps):
        batches = [make_batch(step, i, rank) for i in range(micro_batches)]

        def evaluate() -> tuple[Tensor, int]:
            return torch.stack([mean(engine, b) for b in batches]).sum(), len(batches)  # noqa: B023

        total = torch.zeros(())
        for batch in batches:
            loss = mean(engine, batch)
            engine.backward(loss)
            engine.step()
            total = total + loss.detach()
        losses.append(total)
        if sharpness is not None:
            record = sharpness.after_step(
                step,
                evaluate,
                loss=(total, micro_batches),
                grad_norm=engine.get_global_grad_norm(),
            )
            records += [dataclasses.asdict(record)] if record is not None else []
        if folder is not None and not resume and step == saved_at:
            engine.save_checkpoint(folder, client_state={"sharpness": sharpness.state_dict()})
            torch.save(torch.get_rng_state(), folder / f"random{rank}.pt")  # which it saves none of
    result = {"training": digest(engine, optimizer, losses), "records": records}
    engine.destroy()
    return result


def digest(engine: Any, optimizer: Any, losses: list[Tensor]) -> dict[str, str]:
    """Hashes of what training ends with, on this rank."""
    inner = getattr(optimizer, "optimizer", optimizer)
    values = [v for state in inner.state.values() for _, v in sorted(state.items())]
    parameters = list(engine.module.parameters())
    return {
        "parameters": hash_of(parameters),
        "partitions": hash_of(getattr(p, "ds_tensor", p) for p in parameters),
        "stepped": hash_of(p for group in inner.param_groups for p in group["params"]),
        "buffers": hash_of(engine.module.buffers()),
        "optimizer": hash_of(value for value in values if isinstance(value, Tensor)),
        "random": random_states(),
        "losses": hash_of(losses),
    }


def train_under_ddp(steps: int = 6) -> list[dict[str, Any]]:
    """The records of the same training in PyTorch alone."""
    model = DistributedDataParallel(make_gpt(0.0, kind=ModularGPT))
    optimizer = AdamW(groups(model), lr=LR)
    sharpness = CriticalSharpness(model, optimizer, 2)
    records = []
    for step in range(steps):
        batch = make_batch(step, 0, dist.get_rank())
        loss = mean(model, batch)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), LIMIT)
        optimizer.step()
        optimizer.zero_grad()
        record = sharpness.after_step(
            step,
            lambda: (mean(model, batch), 1),  # noqa: B023
            loss=(loss.detach(), 1),
            grad_norm=norm,
        )
        records += [dataclasses.asdict(record)] if record is not None else []
    return records


def zero(stage: int, **options: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **options}}


BF16 = {"bf16": {"enabled": True}}
CPU = {"device": "cpu"}

FP32_STAGES = {f"fp32 {stage}": zero(stage) for stage in range(4)}

#: Trained without measurement and with it.
LAYOUTS: dict[str, dict[str, Any]] = {
    **FP32_STAGES,
    **{f"bf16 {stage}": {**BF16, **zero(stage)} for stage in range(4)},
    "bf16 1, gradients in fp32": {
        **BF16, **zero(1), "data_types": {"grad_accum_dtype": "fp32"}
    },
    "accumulated 1": {"micro_batches": 2, **zero(1)},
    "accumulated 2": {"micro_batches": 2, **BF16, **zero(2, overlap_comm=True)},
    "accumulated 3": {"micro_batches": 2, **zero(3)},
    "recomputed 3": {"checkpointed": True, **zero(3, stage3_param_persistence_threshold=0)},
    "sub-groups": zero(3, sub_group_size=4000, stage3_prefetch_bucket_size=3000),
    "offload 2": {
        **BF16, **zero(2, offload_optimizer=CPU), "zero_force_ds_cpu_optimizer": False
    },
    "offload 3": {
        **BF16, **zero(3, offload_optimizer=CPU, offload_param=CPU),
        "zero_force_ds_cpu_optimizer": False,
    },
    "copies on the host": {**zero(2), "measured": {"offload": "cpu"}},
    "autocast": {**zero(2), "torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
}  # fmt: skip


def without_and_with(options: dict[str, Any]) -> dict[str, Any]:
    return {"off": train(0, **options), "on": train(**options)}


def in_fp16() -> dict[str, Any]:
    """What DeepSpeed refuses on CPUs that do not compute in it."""
    scale = {"enabled": True, "initial_scale_power": 8}
    results: dict[str, Any] = {
        f"fp16 {stage}": without_and_with({"fp16": scale, **zero(stage)}) for stage in (0, 2, 3)
    }
    growing = {**scale, "loss_scale_window": 3, "hysteresis": 1}
    for stage in (2, 3):
        results[f"growing {stage}"] = train(1, dropout=0.0, fp16=growing, **zero(stage))["records"]
    overflowing = {**zero(2), "fp16": {**scale, "initial_scale_power": 20}}
    return results | {"overflow": without_and_with(overflowing)}


def refusals() -> dict[str, str]:
    """Of what the CPU cannot be asked for as well: the engine is told that it has it."""
    model = make_gpt(0.0, kind=ModularGPT)
    engine, optimizer, _, _ = deepspeed.initialize(
        model=model,
        model_parameters=groups(model),
        config={"train_micro_batch_size_per_gpu": 8, "optimizer": ADAMW, **zero(2)},
    )
    reasons = {}

    def refuse(name: str, *given: Any, **settings: Any) -> None:
        try:
            CriticalSharpness(*given, **settings)
        except InputError as error:
            reasons[name] = str(error)

    refuse("module", engine.module, optimizer)
    refuse("optimizer", engine, engine)
    refuse("inner", engine, optimizer.optimizer)
    refuse("parts", engine, optimizer, parts="groups")
    refuse("adam_snr", engine, optimizer, adam_snr=True)
    zero_config = engine._config.zero_config
    for owner, name, value in (
        (engine, "pipeline_parallelism", True),
        (engine, "has_moe_layers", True),
        (engine, "autotp_size", lambda: 2),
        (engine, "random_ltd_enabled", lambda: True),
        (engine._config.compile_config, "deepcompile", True),
        (zero_config, "zero_hpz_partition_size", 2),
        (zero_config, "zero_quantized_weights", True),
        (zero_config, "offload_optimizer", SimpleNamespace(device="nvme")),
    ):
        own = vars(owner).get(name)
        object.__setattr__(owner, name, value)
        refuse(name, engine, optimizer)
        object.__setattr__(owner, name, own)
        if own is None and name in ("autotp_size", "random_ltd_enabled"):
            object.__delattr__(owner, name)
    optimizer.__class__ = type("ZenFlowZeroOptimizer", (type(optimizer),), {})
    refuse("ZenFlow", engine, optimizer)
    return reasons


def logged(folder: Path) -> list[str]:
    """The lines of a file of DeepSpeed's monitor."""
    monitor = {"enabled": True, "output_path": str(folder), "job_name": "run"}
    made: list[Any] = []

    class Sink:
        """Made once there is an engine."""

        def write(self, measurement: Any) -> None:
            made[0].write(measurement)

    initialize = deepspeed.initialize

    def keep(**options: Any) -> Any:
        returned = initialize(**options)
        made.append(DeepSpeedSink(returned[0]))
        return returned

    deepspeed.initialize = keep
    train(**zero(1), csv_monitor=monitor, measured={"sinks": [Sink()]})
    deepspeed.initialize = initialize
    dist.barrier()
    path = folder / "run" / "Train_Samples_critical-sharpness.csv"
    return path.read_text().splitlines()


def run_page() -> None:
    """The loop that docs/deepspeed.md begins with."""
    text = (ROOT / "docs" / "deepspeed.md").read_text()
    snippet = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert snippet is not None
    exec(snippet[1], {"__name__": "__main__"})


def main(folder: Path) -> None:
    # Sums of gloo, not DeepSpeed's own in shared memory, which would have to be compiled.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    rank = dist.get_rank()
    results: dict[str, Any] = {
        "ddp": train_under_ddp(),
        "number": {
            name: train(dropout=0.0, **options)["records"] for name, options in FP32_STAGES.items()
        },
    }
    for name, options in LAYOUTS.items():
        results[name] = without_and_with(options)
        print(name, flush=True)
    if get_accelerator().is_fp16_supported():
        results |= in_fp16()
    results["frozen"] = {
        "begin": train(0, steps=0, **BF16, **zero(2)),
        "end": train(measured={"frozen": 0}, **BF16, **zero(2)),
    }
    for stage in (2, 3):
        where = folder / f"checkpoint {stage}"
        results[f"resumed {stage}"] = {
            "whole": train(folder=where, **zero(stage)),
            "resumed": train(folder=where, resume=True, **zero(stage)),
        }
    results["refusals"] = refusals()
    results["logged"] = logged(folder / "monitor")
    run_page()
    dist.barrier()
    lines = Path("runs", "loop", "critical_sharpness.jsonl").read_text().splitlines()
    results["page"] = [json.loads(line) for line in lines]
    (folder / f"rank{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
