"""Runs of the real Megatron-Bridge's ``pretrain`` and ``finetune`` on the CPU, each process a fork
of this one.

``python -m tests.megatron.bridge_worker CASES.json``: a list of cases, each with its ``folder``,
its number of ``processes`` and changes to the GPT of :func:`configuration`. Importing Bridge takes
ten seconds; the cases run one after the other in processes that have it imported.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.abc
import importlib.machinery
import json
import os
import re
import sys
import traceback
from pathlib import Path
from typing import Any
from unittest import mock

from megatron_sharpness.megatron import cpu

cpu.install()

#: Imported by Bridge for LoRA, multimodal data and Hugging Face's data sets, and never called by a
#: GPT on mock data. Where they are not installed (Transformer Engine needs CUDA) an empty module
#: stands in.
STAND_INS = ("transformer_engine", "megatron.energon", "datasets")


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name in STAND_INS or name.startswith(tuple(f"{module}." for module in STAND_INS)):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> Any:
        module = mock.MagicMock(name=spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module: Any) -> None:
        pass


# megatron-core looks for Transformer Engine itself, and is to find that it is not there.
import megatron.training.training  # noqa: E402, F401

sys.meta_path.append(StandIns())

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.bridge.models import gpt_provider  # noqa: E402
from megatron.bridge.models.gpt_provider import GPTModelProvider  # noqa: E402
from megatron.bridge.peft import utils as peft  # noqa: E402
from megatron.bridge.peft.lora import LoRA  # noqa: E402
from megatron.bridge.training import config as bridge  # noqa: E402
from megatron.bridge.training import finetune, optim, pretrain  # noqa: E402
from megatron.bridge.training.callbacks import Callback  # noqa: E402
from megatron.bridge.training.gpt_step import forward_step  # noqa: E402
from megatron.bridge.training.state import GlobalState  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.num_microbatches_calculator import get_num_microbatches  # noqa: E402
from megatron.core.transformer.enums import AttnBackend  # noqa: E402

from megatron_sharpness.core.errors import InputError  # noqa: E402
from megatron_sharpness.megatron.bridge import CriticalSharpnessCallback  # noqa: E402
from tests.digest import hash_of  # noqa: E402
from tests.megatron import bridge_sft, canonical  # noqa: E402
from tests.megatron.observed_pretrain import snapshot  # noqa: E402
from tests.processes import Rendezvous  # noqa: E402

# What stands in for Transformer Engine has no layers and no optimizer to be told apart.
peft.HAVE_TE = False
optim._get_te_fused_adam_class = lambda: None

#: Those of megatron-core, without Transformer Engine and fused kernels.
LAYERS = {
    "transformer_layer_spec": lambda config, vp_stage=None: get_gpt_layer_local_spec(),
    "attention_backend": AttnBackend.unfused,
    "gradient_accumulation_fusion": False,
    "persist_layer_norm": False,
    "masked_softmax_fusion": False,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "apply_rope_fusion": False,
}


def configuration(
    folder: Path,
    iterations: int = 6,
    layers: int = 2,
    dropout: float = 0.1,
    warmup: int = 2,
    decay: str = "cosine",
    model: dict[str, Any] | None = None,
    optimizer: dict[str, Any] | None = None,
    ddp: dict[str, Any] | None = None,
    precision: dict[str, Any] | None = None,
    checkpoint: dict[str, Any] | None = None,
    exit_interval: int | None = None,
    documents: int | None = None,
    sft: bool = False,
    packed: bool = False,
    lora: dict[str, Any] | None = None,
) -> Any:
    """A GPT of width 32 in megatron-core's local layers, on Bridge's mock data, or on sums as
    finetuning reads them. With ``documents``, of so many tokens, attention does not leave them."""
    length = bridge_sft.LENGTH if sft else 32
    return bridge.ConfigContainer(
        model=GPTModelProvider(
            **LAYERS,
            num_layers=layers,
            hidden_size=32,
            ffn_hidden_size=128,
            num_attention_heads=4,
            seq_length=length,
            vocab_size=320 if sft else 256,
            hidden_dropout=dropout,
            attention_dropout=dropout,
            position_embedding_type="learned_absolute",
            share_embeddings_and_output_weights=True,
            **_dtypes(model or {}),
        ),
        train=bridge.TrainingConfig(
            train_iters=iterations,
            global_batch_size=8,
            micro_batch_size=1 if packed else 2,
            exit_interval=exit_interval,
        ),
        validation=bridge.ValidationConfig(eval_interval=1000, eval_iters=0),
        optimizer=bridge.OptimizerConfig(
            **{
                "optimizer": "adam", "lr": 1e-2, "min_lr": 1e-3, "weight_decay": 0.1,
                "clip_grad": 1.0, **_dtypes(precision or {}), **(optimizer or {}),
            }
        ),
        scheduler=bridge.SchedulerConfig(
            lr_decay_style=decay, lr_warmup_iters=warmup, lr_decay_iters=iterations,
            start_weight_decay=0.1, end_weight_decay=0.1, weight_decay_incr_style="constant",
        ),
        ddp=bridge.DistributedDataParallelConfig(
            **{"use_distributed_optimizer": False, **(ddp or {})}
        ),
        dataset=bridge_sft.dataset(folder.parent, packed=packed)
        if sft
        else bridge.MockGPTDatasetConfig(
            random_seed=1234, seq_length=32, split="100,0,0", eod_mask_loss=False,
            reset_attention_mask=documents is not None, reset_position_ids=False,
            num_dataset_builder_threads=1, data_sharding=True, dataloader_type="single",
            num_workers=0, persistent_workers=False,
            skip_getting_attention_mask_from_dataset=False,
        ),
        logger=bridge.LoggerConfig(log_interval=1, tensorboard_dir=str(folder / "tensorboard")),
        tokenizer=bridge_sft.tokenizer(folder.parent)
        if sft
        else bridge.TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=documents or 255),
        peft=None if lora is None else LoRA(**lora),
        checkpoint=bridge.CheckpointConfig(**(checkpoint or {})),
        rng=bridge.RNGConfig(seed=1234),
        dist=bridge.DistributedInitConfig(distributed_backend="gloo"),
    )  # fmt: skip


def _dtypes(options: dict[str, Any]) -> dict[str, Any]:
    """JSON's "bfloat16" is ``torch.bfloat16``."""
    return {key: getattr(torch, value) if key.endswith("dtype") else value
            for key, value in options.items()}  # fmt: skip


class History(Callback):
    """What every step has come to, and the canonical weights where they are asked for."""

    def __init__(self, weights: str) -> None:
        self.weights = weights
        self.steps: list[str] = []
        self.before = ""

    def on_train_start(self, context: Any) -> None:
        if self.weights == "canonical":
            canonical.write_weights(context.model, context.optimizer)
        self.before = hash_of([p.data for chunk in context.model for p in chunk.parameters()])

    def on_train_step_end(self, context: Any) -> None:
        groups = [(group["lr"], group["weight_decay"]) for group in context.optimizer.param_groups]
        self.steps.append(
            hash_of(context.loss_dict, context.grad_norm, context.skipped_iter, groups)
        )


class Records:
    """A sink that keeps the last of each name."""

    def __init__(self) -> None:
        self.last: dict[str, dict[str, Any]] = {}

    def write(self, measurement: Any) -> None:
        self.last[measurement.batch] = dataclasses.asdict(measurement)


class Scan(Callback):
    """The losses of measured steps anew, from the definitions: at θ, and at both ends of the
    bracket on the line from θ_t to what the optimizer has made of it.

    Args:
        sink: gets the records.
        other: path of other data.
    """

    def __init__(self, folder: Path, sink: Records, other: str | None) -> None:
        self.folder, self.sink, self.other = folder, sink, other
        self.batches: list[dict[str, Any]] = []
        self.wanted = 0
        self.lines: list[dict[str, Any]] = []

    def forward_step(
        self, state: GlobalState, data_iterator: Any, model: Any, return_schedule_plan: bool = False
    ) -> Any:
        """Bridge's own, that keeps the micro-batches of the training pass."""
        if self.wanted and data_iterator is not None:
            batch = next(data_iterator)
            self.batches.append(dict(batch))
            self.wanted -= 1
            data_iterator = iter([batch])
        return forward_step(state, data_iterator, model, return_schedule_plan)

    def on_train_start(self, context: Any) -> None:
        step = context.optimizer.step

        def kept(*args: Any, **kwargs: Any) -> Any:
            result = step(*args, **kwargs)
            self.after = self.weights(context)
            return result

        context.optimizer.step = kept

    def on_train_step_start(self, context: Any) -> None:
        self.batches, self.wanted = [], get_num_microbatches()
        self.before = self.weights(context)

    def on_train_step_end(self, context: Any) -> None:
        found = [self.sink.last]
        dist.broadcast_object_list(found, src=dist.get_world_size() - 1)
        self.sink.last = {}
        left = self.weights(context)
        for name, record in found[0].items():
            losses = [
                self.loss(context, name, eta / record["lr"])
                for eta in (0.0, record["critical_lr_lower"] or 0.0, record["critical_lr_upper"])
            ]
            self.lines.append({"name": name, "record": record, "losses": losses})
        self.write(context, left)
        (self.folder / "scan.json").write_text(json.dumps(self.lines))

    def loss(self, context: Any, name: str, fraction: float) -> float:
        self.write(
            context,
            [(b + fraction * (a.double() - b.double())).to(b.dtype)
             for b, a in zip(self.before, self.after, strict=True)],
        )  # fmt: skip
        if name == "train":
            per_token = context.state.cfg.model.calculate_per_token_loss
            return bridge_sft.loss(context.model, self.batches, per_token=per_token)
        batch = bridge_sft.samples(context.state.cfg, name, Path(str(self.other)))
        total, count = bridge_sft.sums(context.model, batch)
        return total / count

    def weights(self, context: Any) -> list[Any]:
        return [p.detach().clone() for chunk in context.model for p in chunk.parameters()]

    def write(self, context: Any, weights: list[Any]) -> None:
        parameters = [p for chunk in context.model for p in chunk.parameters()]
        for parameter, value in zip(parameters, weights, strict=True):
            parameter.data.copy_(value)


def train(
    folder: Path,
    rank: int,
    every: int = 0,
    weights: str = "",
    settings: Any = None,
    scanned: bool = False,
    **options: Any,
) -> None:
    """One process of a run. It leaves a hash of everything that training changed."""
    settings = settings or {}
    history, step, sink = History(weights), forward_step, Records()
    if weights == "canonical":
        canonical.keep_batches()
    callbacks: list[Callback] = [history]
    if scanned:
        (other,) = settings.get("eval_data", {"": None}).values()
        scan = Scan(folder, sink, other)
        step = scan.forward_step
        callbacks.insert(0, scan)
    if every:
        callbacks.insert(0, CriticalSharpnessCallback(every, [sink], **settings))
    real_train = pretrain.train

    def observed(step: Any, model: Any, optimizer: Any, scheduler: Any, iterator: Any, *rest: Any,
                 **kwargs: Any) -> None:
        state = rest[1]
        try:
            real_train(step, model, optimizer, scheduler, iterator, *rest, **kwargs)
        finally:
            hashes = snapshot(model, optimizer, scheduler, iterator)
            hashes["history"] = hash_of(history.steps)
            hashes["train state"] = hash_of(vars(state.train_state))
            hashes["parameters before"] = history.before
            (folder / f"rank{rank}.json").write_text(json.dumps(hashes))

    pretrain.train = observed
    run = finetune.finetune if finetunes(options) else pretrain.pretrain
    run(configuration(folder, **options), step, callbacks=callbacks)


def finetunes(options: dict[str, Any]) -> bool:
    """Whether there is a checkpoint to begin with."""
    return bool({"pretrained_checkpoint", "load"} & options.get("checkpoint", {}).keys())


def refuse(settings: list[dict[str, Any]]) -> None:
    """Print why callbacks cannot be made, a line each."""
    for given in settings:
        try:
            CriticalSharpnessCallback(**given)
        except InputError as error:
            print(f"refused: {error}")


def run_snippets(page: Path, folder: Path) -> None:
    """The Python of a page, one after the other in ``folder``, with the layers that the CPU has."""
    os.chdir(folder)
    gpt_provider.GPTModelProvider = functools.partial(GPTModelProvider, **LAYERS)
    for snippet in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(snippet, {"__name__": "__main__"})


def fork(folder: str, processes: int = 1, **case: Any) -> None:
    Path(folder).mkdir(parents=True)
    rendezvous, children = Rendezvous(processes), []
    for rank in range(processes):
        if child := os.fork():
            children.append(child)
            continue
        code = 1
        try:
            os.environ.update(rendezvous.environment(rank), OBSERVED_OUT=folder)
            output = os.open(f"{folder}/output{rank}.txt", os.O_WRONLY | os.O_CREAT)
            os.dup2(output, 1)
            os.dup2(output, 2)
            if "snippets" in case:
                run_snippets(Path(case["snippets"]), Path(folder))
            elif "refused" in case:
                refuse(case["refused"])
            else:
                train(Path(folder), rank, **case)
            code = 0
        except SystemExit as end:  # how Bridge ends a run at its exit interval
            code = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    Path(folder, "returncode").write_text(str(max(codes, key=abs)))


if __name__ == "__main__":
    for case in json.loads(Path(sys.argv[1]).read_text()):
        fork(**case)
