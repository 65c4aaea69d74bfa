"""Trains a pipeline with and without measurement, as one rank of several.

Started by ``test_pipelines.py``: ``python -m tests.pytorch.pipelines_worker FOLDER``.
"""

from __future__ import annotations

import json
import os
import random
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)
from torch.distributed.pipelining.schedules import ScheduleDualPipeV
from torch.distributed.tensor import DTensor
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from megatron_sharpness.core.errors import InputError
from megatron_sharpness.pytorch import CriticalSharpness
from tests.digest import hash_of, random_states
from tests.pytorch.gpt import IGNORED, LENGTH, VOCABULARY, WIDTH, Block
from tests.pytorch.training import critical_fraction

STEPS, EVERY, BLOCKS, MICRO_BATCHES, LR = 3, 2, 4, 4, 1e-2
#: The step whose batch is the other data.
OTHER = 99


@dataclass(frozen=True)
class Kind:
    """How to train.

    Attributes:
        schedule: class of the schedule.
        stages: that each rank holds.
        v_shaped: whether the last stage is on the first rank.
        wrap: puts a stage under data parallelism.
        sums: the loss function returns a part of the batch's mean, so that nothing is scaled.
        clip: largest norm of the gradients of all stages.
        accumulated: how often the schedule steps before the optimizer does.
        checkpointed: whether activations are computed again in the backward pass.
        compiled: whether the stages are.
        with_parts: whether the parts of the model are measured, too.
        shaped: whether the schedule is told of which shape the outputs of stages are.
        options: of CriticalSharpness.
    """

    schedule: Callable[..., Any]
    stages: int = 1
    v_shaped: bool = False
    wrap: Callable[[nn.Module, DeviceMesh], nn.Module] = lambda module, mesh: module
    sums: bool = False
    clip: float = 0.0
    accumulated: int = 1
    checkpointed: bool = False
    compiled: bool = False
    with_parts: bool = False
    shaped: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def others(self) -> int:
        """Sequences in a micro-batch of the other data: more, where shapes are found out."""
        return 4 if self.shaped else 8

    def held(self, rank: int, ranks: int) -> list[int]:
        """The numbers of the stages of a rank."""
        if self.v_shaped:
            return [rank, 2 * ranks - 1 - rank]
        return list(range(rank, self.stages * ranks, ranks))


def ddp(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    return DistributedDataParallel(module, process_group=mesh.get_group())


def fsdp2(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    for block in module.blocks.values():
        fully_shard(block, mesh=mesh)
    return fully_shard(module, mesh=mesh)


#: Each on one data-parallel rank, on two processes.
PIPELINES = {
    "gpipe": Kind(ScheduleGPipe, clip=0.3),
    "gpipe, sums": Kind(ScheduleGPipe, sums=True),
    # Scaled, the gradients of the first step would be divided twice by PyTorch.
    "gpipe, accumulation": Kind(ScheduleGPipe, accumulated=2, sums=True),
    "gpipe, compiled": Kind(ScheduleGPipe, compiled=True),
    "1f1b": Kind(Schedule1F1B),
    "1f1b, checkpointing": Kind(Schedule1F1B, checkpointed=True, clip=0.3),
    "1f1b, eval": Kind(Schedule1F1B, options={"mode": "eval"}),
    "interleaved": Kind(ScheduleInterleaved1F1B, stages=2, with_parts=True),
    "interleaved zero bubble": Kind(ScheduleInterleavedZeroBubble, stages=2),
    "zero bubble V": Kind(ScheduleZBVZeroBubble, stages=2, v_shaped=True),
    "dual pipe V": Kind(ScheduleDualPipeV, stages=2, v_shaped=True),
}

#: On two data-parallel ranks, on four processes.
WITH_DATA_PARALLEL = {
    # Else PyTorch finds the shapes out with a backward pass, after which DDP (2.14) fails.
    "gpipe × ddp": Kind(ScheduleGPipe, wrap=ddp, shaped=True),
    "1f1b × fsdp2": Kind(Schedule1F1B, wrap=fsdp2, clip=0.3),
    "interleaved × fsdp2": Kind(ScheduleInterleaved1F1B, stages=2, wrap=fsdp2),
}


class Part(nn.Module):
    """The layers of one stage, named as in the whole model. Its passes change a buffer and an
    attribute, and read both."""

    passes: Tensor

    def __init__(self, index: int, stages: int, dropout: float, checkpointed: bool) -> None:
        super().__init__()
        first, last = index == 0, index == stages - 1
        self.embedding = nn.Embedding(VOCABULARY, WIDTH) if first else None
        share = BLOCKS // stages
        mine = range(index * share, (index + 1) * share)
        self.blocks = nn.ModuleDict({str(i): Block(dropout, checkpointed) for i in mine})
        self.norm = nn.LayerNorm(WIDTH) if last else None
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False) if last else None
        self.register_buffer("passes", torch.zeros(1))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.embedding is not None:
            x = self.embedding(x)
        x = x + 0.01 * self.passes + 0.01 * self.calls
        if self.training:
            self.passes += 1.0
            self.calls += 1
        for block in self.blocks.values():
            x = block(x)
        return self.head(self.norm(x)) if self.head is not None else x


def make_part(index: int, stages: int, dropout: float, checkpointed: bool = False) -> Part:
    torch.manual_seed(index)
    part = Part(index, stages, dropout, checkpointed)
    for parameter in part.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.1)
    return part


def make_batch(step: int, data_rank: int, sequences: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(10 * step + data_rank)
    text = torch.randint(VOCABULARY, (sequences * MICRO_BATCHES, LENGTH), generator=generator)
    targets = (7 * text + 3) % VOCABULARY
    for i in range(len(text)):
        targets[i, : 1 + i % 5 + data_rank] = IGNORED
    return text, targets


def tokens_of(targets: Tensor) -> int:
    return int(targets.ne(IGNORED).sum())


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


@dataclass
class Witness:
    """What it takes to evaluate a step anew, of this rank.

    Attributes:
        states: by stage, the random states before the passes of its micro-batches.
        starts, ends: by stage, parameters and buffers before the step's passes, and after the step.
        calls: by stage, the attribute that passes change, before them.
    """

    states: dict[int, list[Tensor]] = field(default_factory=dict)
    starts: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    ends: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    calls: dict[int, int] = field(default_factory=dict)


class Training:
    """A pipeline in training, on this rank.

    Attributes:
        witnesses: of the steps.
    """

    def __init__(self, kind: Kind, every: int, *, dropout: float, **options: Any) -> None:
        random.seed(1), np.random.seed(1)
        self.kind = kind
        self.mesh = init_device_mesh(
            "cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("pp", "dp")
        )
        ranks, rank = self.mesh["pp"].size(), self.mesh.get_local_rank("pp")
        self.data_rank, self.data_size = self.mesh.get_local_rank("dp"), self.mesh["dp"].size()
        self.held, self.stages = kind.held(rank, ranks), kind.stages * ranks
        self.parts = [make_part(i, self.stages, dropout, kind.checkpointed) for i in self.held]
        self.called = [kind.wrap(part, self.mesh["dp"]) for part in self.parts]
        if kind.compiled:
            self.called = [torch.compile(part, backend="aot_eager") for part in self.called]
        stages = [
            PipelineStage(
                module, i, self.stages, torch.device("cpu"), group=self.mesh.get_group("pp"),
                **self.shapes(i) if kind.shaped else {},
            )
            for i, module in zip(self.held, self.called, strict=True)
        ]  # fmt: skip
        self.total = 1
        self.schedule = kind.schedule(
            stages if kind.stages > 1 else stages[0],
            MICRO_BATCHES,
            loss_fn=self.part_of_mean if kind.sums else mean_loss,
            scale_grads=not kind.sums,
        )
        parameters = [p for module in self.called for p in module.parameters()]
        self.optimizer = AdamW(parameters, lr=LR, weight_decay=0.1)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: 1.0 / (1.0 + 0.3 * step)
        )
        torch.manual_seed(100 + dist.get_rank())
        self.sharpness = None
        if every:
            self.sharpness = CriticalSharpness(
                self.schedule, self.optimizer, every, losses={"other": self.other},
                watch="always", **{**kind.options, **options},
            )  # fmt: skip
        self.history: list[Any] = []
        self.records: list[dict[str, Any]] = []
        self.witnesses: dict[int, Witness] = {}

    def shapes(self, index: int) -> dict[str, Tensor]:
        """What a stage takes and gives, where the schedule is not to find out."""
        between = torch.zeros(4, LENGTH, WIDTH, requires_grad=True)
        logits = torch.zeros(4, LENGTH, VOCABULARY, requires_grad=True)
        return {
            "input_args": between if index else torch.zeros(4, LENGTH, dtype=torch.int64),
            "output_args": between if index < self.stages - 1 else logits,
        }

    def part_of_mean(self, logits: Tensor, targets: Tensor) -> Tensor:
        return mean_loss(logits, targets) * tokens_of(targets) / self.total

    def loss_sum_and_tokens(self, losses: list[Tensor]) -> tuple[Any, int]:
        if not losses:
            return 0.0, 0
        if self.kind.sums:
            return torch.stack(losses).sum().detach() * self.total, self.total
        return torch.stack(losses).sum().detach(), len(losses)

    def batches(self, step: int) -> list[tuple[Tensor, Tensor]]:
        if step == OTHER:
            return [make_batch(step, self.data_rank, self.kind.others)]
        return [
            make_batch(step * self.kind.accumulated + i, self.data_rank)
            for i in range(self.kind.accumulated)
        ]

    def evaluate(self, step: int) -> tuple[Any, int]:
        found: list[Tensor] = []
        self.total = sum(tokens_of(targets) for _, targets in self.batches(step))
        for inputs, targets in self.batches(step):
            losses: list[Tensor] = []
            self.schedule.eval(inputs, target=targets, losses=losses)
            found += losses
        return self.loss_sum_and_tokens(found)

    def other(self) -> tuple[Any, int]:
        return self.evaluate(OTHER)

    def step(self, step: int, *, witnessed: bool = False) -> None:
        handles = self.witness(step) if witnessed else []
        self.optimizer.zero_grad()  # here, so that gradients are there while it is measured
        found: list[Tensor] = []
        self.total = sum(tokens_of(targets) for _, targets in self.batches(step))
        for inputs, targets in self.batches(step):
            losses: list[Tensor] = []
            self.schedule.step(inputs, target=targets, losses=losses)
            found += losses
            torch.rand(1)
        norm = self.clip() if self.kind.clip else None
        self.optimizer.step()
        self.scheduler.step()
        for handle in handles:
            handle.remove()
        if witnessed:
            self.witnesses[step].ends = dict(zip(self.held, map(whole, self.parts), strict=True))
        if self.sharpness is not None:
            record = self.sharpness.after_step(
                step,
                lambda: self.evaluate(step),
                loss=self.loss_sum_and_tokens(found),
                grad_norm=norm,
            )
            if record is not None:
                self.records += [asdict(r) for r in self.sharpness.records.values()]
        self.history.append(self.state(found, norm))

    def clip(self) -> Tensor:
        """By the norm of the gradients of all stages, as the loop of a pipeline has to."""
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"]]
        gradients = [g for g in gradients if g is not None]
        norm = nn.utils.get_total_norm(gradients)
        squared = (norm.full_tensor() if isinstance(norm, DTensor) else norm).square()
        dist.all_reduce(squared, group=self.mesh.get_group("pp"))
        norm = squared.sqrt()
        for gradient in gradients:
            gradient.mul_(min(1.0, self.kind.clip / float(norm)))
        return norm

    def state(self, losses: list[Tensor], norm: Tensor | None) -> str:
        """A hash of all that training goes on from, and of its log."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        return hash_of(
            losses,
            norm,
            parameters,
            [parameter.grad for parameter in parameters],
            [part.passes for part in self.parts],
            [(part.calls, part.training) for part in self.parts],
            self.optimizer.state_dict(),
            random_states(),
        )

    def witness(self, step: int) -> list[Any]:
        seen = self.witnesses[step] = Witness()
        handles = []
        for index, part in zip(self.held, self.parts, strict=True):
            seen.starts[index], seen.states[index] = whole(part), []

            def note(part: Part, _: Any, index: int = index) -> None:
                states = seen.states[index]
                if torch._C._current_graph_task_id() != -1:
                    return
                if step == 0 and index not in seen.calls and not self.kind.shaped:
                    seen.calls[index] = -1  # the schedule calls each stage to learn of shapes
                    return
                if not states:
                    seen.calls[index] = part.calls
                states.append(torch.get_rng_state())

            handles.append(part.register_forward_pre_hook(note))
        return handles


def whole(part: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, whole, on every rank."""
    tensors = [*part.named_parameters(), *part.named_buffers()]
    return {
        name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()
        for name, t in tensors
    }


class Reference:
    """A step's loss along its update on one process, from the equations.

    Args:
        training: on this rank.
        step: that was witnessed.
        dtype: to compute in.
    """

    def __init__(self, training: Training, step: int, dtype: torch.dtype) -> None:
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(
            gathered, (training.data_rank, training.witnesses[step])
        )
        self.kind, self.step, self.stages = training.kind, step, training.stages
        self.data_size, self.batches_of = training.data_size, training.kind.accumulated
        self.starts, self.ends, self.states, self.calls = {}, {}, {}, {}
        for data_rank, seen in gathered:
            self.starts |= {i: cast(t, dtype) for i, t in seen.starts.items()}
            self.ends |= {i: cast(t, dtype) for i, t in seen.ends.items()}
            for index, states in seen.states.items():
                self.states[data_rank, index] = states
                self.calls[index] = seen.calls[index]
        dropout = training.parts[0].blocks[next(iter(training.parts[0].blocks))].dropout.p
        self.parts = [make_part(i, self.stages, dropout).to(dtype) for i in range(self.stages)]
        self.lr = LR / (1.0 + 0.3 * step)

    def loss(self, fraction: Tensor, of: str = "train", part: str = "") -> Tensor:
        saved = torch.get_rng_state()
        losses, count = [], 0
        other = of == "other"
        evaluated = other or self.kind.options.get("mode") == "eval"
        for data_rank in range(self.data_size):
            weights = [self.at(i, fraction, part, after=other) for i in range(self.stages)]
            for i, module in enumerate(self.parts):
                module.train(not evaluated)
                module.calls = self.calls[i]
                if other:
                    module.calls += MICRO_BATCHES * self.batches_of
            numbers = [OTHER] if other else [
                self.step * self.batches_of + i for i in range(self.batches_of)
            ]  # fmt: skip
            passes = 0
            for number in numbers:
                sequences = self.kind.others if other else 4
                inputs, targets = make_batch(number, data_rank, sequences)
                pairs = zip(inputs.chunk(MICRO_BATCHES), targets.chunk(MICRO_BATCHES), strict=True)
                for x, y in pairs:
                    for i, module in enumerate(self.parts):
                        if not evaluated:
                            torch.set_rng_state(self.states[data_rank, i][passes])
                        x = functional_call(module, weights[i], (x,))
                    tokens = tokens_of(y) if self.kind.sums else 1
                    losses.append(mean_loss(x, y) * tokens)
                    count += tokens
                    passes += 1
        torch.set_rng_state(saved)
        return torch.stack(losses).sum() / count

    def at(
        self, index: int, fraction: Tensor, part: str, *, after: bool
    ) -> dict[str, Tensor]:
        start, end = self.starts[index], self.ends[index]
        found = {
            name: torch.lerp(value, end[name], fraction) if part in part_of(name) else value
            for name, value in start.items()
        }
        return found | {"passes": (end if after else start)["passes"].clone()}

    def slope(self, part: str = "") -> float:
        zero = torch.zeros((), dtype=self.starts[0]["passes"].dtype, requires_grad=True)
        (derivative,) = torch.autograd.grad(self.loss(zero, part=part), zero)
        return -derivative.item() / self.lr

    def critical_lr(self, of: str = "train", part: str = "") -> float:
        return self.lr * critical_fraction(lambda fraction: self.loss(fraction, of, part))

    def at_rate(self, eta: float) -> float:
        dtype = self.starts[0]["passes"].dtype
        with torch.no_grad():
            return self.loss(torch.tensor(eta / self.lr, dtype=dtype)).item()


#: What ``modules`` makes of this model.
PARTS = ("norms", "embeddings", "output", "attention", "mlp")


def part_of(name: str) -> str:
    """Written out here, from the model."""
    if name.startswith("embedding."):
        return "embeddings"
    if name.startswith("head."):
        return "output"
    if "norm" in name:
        return "norms"
    return "mlp" if ".up." in name or ".down." in name else "attention"


def cast(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def compare(kind: Kind) -> dict[str, Any]:
    """Training with dropout, off and on; the number with its masks, and, without, in fp64."""
    off = Training(kind, 0, dropout=0.2)
    for step in range(STEPS):
        off.step(step)
    on = Training(kind, EVERY, dropout=0.2)
    for step in range(STEPS):
        on.step(step, witnessed=step == EVERY)
    result: dict[str, Any] = {"off": off.history, "on": on.history, "records": on.records}
    record = next(r for r in on.records if r["iteration"] == EVERY and r["batch"] == "train")
    reference = Reference(on, EVERY, torch.float32)
    result["masked"] = {
        "record": record,
        "loss": reference.at_rate(0.0),
        "slope": reference.slope(),
        "lower": reference.at_rate(record["critical_lr_lower"]),
        "upper": reference.at_rate(record["critical_lr_upper"]),
    }
    parts = {"parts": "modules"} if kind.with_parts else {}
    exact = Training(kind, EVERY, dropout=0.0, tolerance=1e-3, **parts)
    exact.step(0, witnessed=True)
    reference = Reference(exact, 0, torch.float64)
    result["exact"] = {"records": exact.records}
    if dist.get_rank() == 0:
        result["exact"] |= {
            "loss": reference.at_rate(0.0),
            "slope": reference.slope(),
            "critical_lr": reference.critical_lr(),
            "other": reference.critical_lr("other"),
            "parts": {part: reference.slope(part) for part in PARTS if parts},
        }
    return result


def resumed(kind: Kind) -> dict[str, Any]:
    """Goes on from a checkpoint after the second step."""
    without = Training(kind, EVERY, dropout=0.2)
    for step in range(STEPS):
        without.step(step)
        if step == 1:
            saved = {
                "parts": [dict(part.state_dict()) for part in without.parts],
                "calls": [part.calls for part in without.parts],
                "optimizer": without.optimizer.state_dict(),
                "scheduler": without.scheduler.state_dict(),
                "sharpness": without.sharpness.state_dict(),
                "random": (random.getstate(), np.random.get_state(), torch.get_rng_state()),
            }
            saved = torch.load(copied(saved), weights_only=False)
    again = Training(kind, EVERY, dropout=0.2)
    for part, state, calls in zip(again.parts, saved["parts"], saved["calls"], strict=True):
        part.load_state_dict(state)
        part.calls = calls - 1  # the schedule calls each stage to learn of shapes
    again.optimizer.load_state_dict(saved["optimizer"])
    again.scheduler.load_state_dict(saved["scheduler"])
    again.sharpness.load_state_dict(saved["sharpness"])
    random.setstate(saved["random"][0])
    np.random.set_state(saved["random"][1])
    torch.set_rng_state(saved["random"][2])
    for step in range(2, STEPS):
        again.step(step)
    return {
        "without": [r for r in without.records if r["iteration"] >= 2],
        "again": again.records,
        "history": [without.history[2:], again.history],
    }


def copied(value: Any) -> Any:
    import io

    stream = io.BytesIO()
    torch.save(value, stream)
    stream.seek(0)
    return stream


def schedule_as_it_was() -> dict[str, Any]:
    """What a measurement leaves of the schedule and its stages; and the passes that it made."""
    training = Training(Kind(Schedule1F1B), 1, dropout=0.2)
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    training.step(0)
    stage = training.schedule._stage
    before = {key: str(value) for key, value in vars(training.schedule).items()}
    of_stage = {key: str(type(value)) for key, value in vars(stage).items()}
    cached = len(stage.fwd_cache), stage.has_backward
    handle = training.parts[0].register_forward_pre_hook(count)
    training.step(1)
    handle.remove()
    evaluations = sum(
        {"train": 1, "other": 1}.get(r["batch"], 0) * r["evaluations"]
        for r in training.records
        if r["iteration"] == 1
    )
    found = {
        "schedule": [before, {key: str(value) for key, value in vars(training.schedule).items()}],
        "stage": [of_stage, {key: str(type(value)) for key, value in vars(stage).items()}],
        "cached": [cached, (len(stage.fwd_cache), stage.has_backward)],
        "calls": calls,
        "evaluations": evaluations,
    }
    training.sharpness.close()
    return found | {"closed": "forward_one_chunk" not in vars(stage)}


def refusals() -> dict[str, str]:
    found = {}
    training = Training(Kind(ScheduleGPipe, clip=0.3), 0, dropout=0.0)
    try:
        CriticalSharpness(training.schedule._stage, training.optimizer)
    except InputError as error:
        found["a stage"] = str(error)
    training = Training(Kind(ScheduleGPipe, clip=0.3), 1, dropout=0.0)
    training.clip = lambda: nn.utils.clip_grad_norm_(  # type: ignore[method-assign]
        training.called[0].parameters(), 0.3
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        training.step(0)
    found["norms of ranks"] = training.records[0]["reason"]
    training = Training(Kind(ScheduleGPipe), 0, dropout=0.1)
    training.sharpness = CriticalSharpness(training.called[0], training.optimizer, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        training.step(0)
    found["a stage's module"] = training.records[0]["reason"]
    training.sharpness.close()
    training.sharpness = None
    training.step(1)  # and the schedule can evaluate again
    training.evaluate(1)
    training = Training(Kind(ScheduleGPipe), 1, dropout=0.0)
    loss_sum_and_tokens = training.loss_sum_and_tokens
    training.loss_sum_and_tokens = lambda losses: (  # type: ignore[method-assign]
        loss_sum_and_tokens(losses) if losses else (0.0, MICRO_BATCHES)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        training.step(0)
    found["tokens without a loss"] = training.records[0]["reason"]
    return found


def main(folder: Path) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    kinds = PIPELINES if dist.get_world_size() == 2 else WITH_DATA_PARALLEL
    names = os.environ.get("PIPELINES", "").split(";") if "PIPELINES" in os.environ else kinds
    results: dict[str, Any] = {name: compare(kinds[name]) for name in names}
    if dist.get_world_size() == 2:
        results["resumed"] = resumed(PIPELINES["interleaved"])
        results["schedule"] = schedule_as_it_was()
        results["refusals"] = refusals()
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
