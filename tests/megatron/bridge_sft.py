"""Data that Megatron-Bridge finetunes on, and its losses without schedule, packing and line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.bridge.data.builders.gpt_sft import GPTSFTDatasetConfig, build_gpt_sft_split
from megatron.bridge.data.packing import PackedSequenceSpecs
from megatron.bridge.data.packing.offline import prepare_gpt_sft_packed_data
from megatron.bridge.training.config import TokenizerConfig
from megatron.bridge.training.tokenizers.tokenizer import build_tokenizer
from megatron.core import mpu
from megatron.core.utils import unwrap_model
from torch import Tensor
from transformers import ByT5Tokenizer

from megatron_sharpness.data import evaluation

#: Tokens of a packed sequence, and of an unpacked one at most.
LENGTH = 96


def tokenizer(folder: Path) -> TokenizerConfig:
    """A byte a token, in the format of Hugging Face."""
    path = folder / "tokenizer"
    if not path.is_dir():
        ByT5Tokenizer(extra_ids=0).save_pretrained(path)
    return TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(path))


def dataset(folder: Path, *, packed: bool) -> GPTSFTDatasetConfig:
    """Sums of which the results count, a few dozen tokens each, or those packed."""
    root, specs = folder / "sums", None
    if not root.is_dir():
        root.mkdir()
        lines = (
            {"input": f"{7**(i % 9)} plus {i}?", "output": f"it is {7**(i % 9) + i}."}
            for i in range(160)
        )
        (root / "training.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if packed:
        path = root / "packed.npy"
        if not path.is_file():
            prepare_gpt_sft_packed_data(
                root / "training.jsonl", path, root / "packed.json", LENGTH,
                build_tokenizer(tokenizer(folder)), LENGTH, dataset_builder=build_gpt_sft_split,
            )  # fmt: skip
        specs = PackedSequenceSpecs(
            packed_sequence_size=LENGTH, packed_train_data_path=path,
            packed_metadata_path=root / "packed.json",
        )  # fmt: skip
    return GPTSFTDatasetConfig(
        seq_length=LENGTH, dataset_root=root, enable_offline_packing=packed,
        offline_packing_specs=specs, do_validation=False, do_test=False, num_workers=0,
        persistent_workers=False, data_sharding=True,
    )  # fmt: skip


def samples(config: Any, name: str, path: Path) -> dict[str, Tensor]:
    """Other data, as one batch."""
    tokens = build_tokenizer(config.tokenizer)
    is_bytes = config.tokenizer.tokenizer_type == "NullTokenizer"
    read = evaluation.read(
        name, path, samples=config.train.global_batch_size, length=config.model.seq_length,
        seed=config.rng.seed, tokenize=evaluation.byte_tokens if is_bytes else tokens.tokenize,
        end=tokens.eod, vocabulary=config.model.vocab_size,
    )  # fmt: skip
    both = torch.from_numpy(read.tokens)
    return {"tokens": both[:, :-1], "labels": both[:, 1:], "loss_mask": torch.from_numpy(read.mask)}


def sequences(batch: dict[str, Any]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Tokens, labels and mask of each sequence of a micro-batch by itself, packed or not."""
    for row in range(len(batch["tokens"])):
        starts = batch.get("cu_seqlens_q")
        ends = [0, batch["tokens"].shape[1]] if starts is None else starts[row].tolist()
        for begin, end in pairwise(ends):
            if end > begin:
                part = slice(begin, end)
                yield tuple(batch[key][row, part] for key in ("tokens", "labels", "loss_mask"))


@torch.no_grad()
def sums(model: Any, batch: dict[str, Any]) -> tuple[float, float]:
    """Sum of the losses that count, and how many: one sequence after the other."""
    core = unwrap_model(model[0])
    total = count = 0.0
    for tokens, labels, mask in sequences(batch):
        losses = core(
            tokens[None], torch.arange(len(tokens))[None], None, labels=labels[None].contiguous()
        )
        total += float((losses[0].double() * mask).sum())
        count += float(mask.sum())
    return total, count


def of_all(value: float) -> float:
    """The sum over the data-parallel ranks."""
    tensor = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(tensor, group=mpu.get_data_parallel_group())
    return tensor.item()


def loss(model: Any, batches: Sequence[dict[str, Any]], *, per_token: bool) -> float:
    """Mean over all tokens that count, or over micro-batches of their means."""
    found = [sums(model, batch) for batch in batches]
    if not per_token:
        found = [(total / max(count, 1.0), 1.0) for total, count in found]
    return of_all(sum(total for total, _ in found)) / of_all(sum(count for _, count in found))
