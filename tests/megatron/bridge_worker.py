"""Runs of the real Megatron-Bridge ``pretrain`` on the CPU, each process a fork of this one.

``python -m tests.megatron.bridge_worker CASES.json``: a list of cases, each with its ``folder``,
its number of ``processes`` and changes to the GPT of :func:`configuration`. Importing Bridge takes
ten seconds; the cases run one after the other in processes that have it imported.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import os
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
from megatron.bridge.models.gpt_provider import GPTModelProvider  # noqa: E402
from megatron.bridge.training import config as bridge  # noqa: E402
from megatron.bridge.training import pretrain  # noqa: E402
from megatron.bridge.training.callbacks import Callback  # noqa: E402
from megatron.bridge.training.gpt_step import forward_step  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.transformer.enums import AttnBackend  # noqa: E402

from megatron_sharpness.megatron.bridge import CriticalSharpnessCallback  # noqa: E402
from tests.digest import hash_of  # noqa: E402
from tests.megatron import canonical  # noqa: E402
from tests.megatron.observed_pretrain import snapshot  # noqa: E402
from tests.processes import Rendezvous  # noqa: E402


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
) -> Any:
    """A GPT of width 32 on Bridge's mock data, in megatron-core's local layers."""
    return bridge.ConfigContainer(
        model=GPTModelProvider(
            transformer_layer_spec=lambda config, vp_stage=None: get_gpt_layer_local_spec(),
            attention_backend=AttnBackend.unfused,
            num_layers=layers,
            hidden_size=32,
            ffn_hidden_size=128,
            num_attention_heads=4,
            seq_length=32,
            vocab_size=256,
            hidden_dropout=dropout,
            attention_dropout=dropout,
            position_embedding_type="learned_absolute",
            share_embeddings_and_output_weights=True,
            gradient_accumulation_fusion=False,
            persist_layer_norm=False,
            masked_softmax_fusion=False,
            bias_activation_fusion=False,
            bias_dropout_fusion=False,
            apply_rope_fusion=False,
            **_dtypes(model or {}),
        ),
        train=bridge.TrainingConfig(
            train_iters=iterations,
            global_batch_size=8,
            micro_batch_size=2,
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
        dataset=bridge.MockGPTDatasetConfig(
            random_seed=1234, seq_length=32, split="100,0,0", reset_attention_mask=False,
            reset_position_ids=False, eod_mask_loss=False, num_dataset_builder_threads=1,
            data_sharding=True, dataloader_type="single", num_workers=0, persistent_workers=False,
            skip_getting_attention_mask_from_dataset=False,
        ),
        logger=bridge.LoggerConfig(log_interval=1, tensorboard_dir=str(folder / "tensorboard")),
        tokenizer=bridge.TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=255),
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

    def on_train_start(self, context: Any) -> None:
        if self.weights == "canonical":
            canonical.write_weights(context.model, context.optimizer)

    def on_train_step_end(self, context: Any) -> None:
        groups = [(group["lr"], group["weight_decay"]) for group in context.optimizer.param_groups]
        self.steps.append(
            hash_of(context.loss_dict, context.grad_norm, context.skipped_iter, groups)
        )


def train(
    folder: Path, rank: int, every: int = 0, weights: str = "", settings: Any = None, **options: Any
) -> None:
    """One process of a run. It leaves a hash of everything that training changed."""
    history = History(weights)
    if weights == "canonical":
        canonical.keep_batches()
    callbacks: list[Callback] = [history]
    if every:
        callbacks.insert(0, CriticalSharpnessCallback(every=every, **(settings or {})))
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
            (folder / f"rank{rank}.json").write_text(json.dumps(hashes))

    pretrain.train = observed
    pretrain.pretrain(configuration(folder, **options), forward_step, callbacks=callbacks)


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
