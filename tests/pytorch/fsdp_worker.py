"""What the tests of ``launch/train_fsdp.py`` do in processes of their own.

The first argument names a function of this module, the others are its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import time
from pathlib import Path

import torch

from tests.processes import ROOT

sys.path.insert(0, str(ROOT / "launch"))

import fsdp_arguments
import fsdp_data
import train_fsdp


def train(cases: str) -> None:
    """One rank of the runs of a file, one after the other, each with a process group of its own.

    A case is folder, port, checkpoints to go on from, and command line.
    """
    rank = os.environ["RANK"]
    for own, port, source, argv in json.loads(Path(cases).read_text()):
        folder = Path(own)
        if source and rank == "0":
            copy_as_if_crashed(Path(source), folder / "checkpoints")
        while source and not (folder / "checkpoints").exists():
            time.sleep(0.01)
        os.environ["MASTER_PORT"] = port
        with (
            (folder / f"output{rank}.txt").open("w") as output,
            contextlib.redirect_stdout(output),
        ):
            train_fsdp.main(argv)


def copy_as_if_crashed(source: Path, target: Path) -> None:
    """Two checkpoints, as if a crash had struck while the second was saved."""
    partial = target.with_name("partial")
    shutil.copytree(source, partial)
    (partial / "latest_checkpointed_iteration.txt").write_text("3")
    for path in (partial / "iter_0000006").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    partial.rename(target)


def pretrained(configuration: str, folder: str, *flags: str) -> None:
    """A Hugging Face model that was saved in bf16 with a tokenizer of words is read again."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    config = transformers.AutoConfig.from_pretrained(configuration)
    saved = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    saved.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<end>": 1, "one": 2, "two": 3}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token="<end>"
    ).save_pretrained(folder)

    args = fsdp_arguments.parse_arguments(["--hf-model", folder, *flags])
    model, vocabulary, tokenize = train_fsdp.build_model(args)
    assert tokenize(b"two one three").tolist() == [3, 2, 0, 1]
    assert vocabulary == 257
    expected, weights = saved.state_dict(), model.state_dict()
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, expected[name].float()), name


def dataset(folder: str, out: str, *flags: str) -> None:
    """The samples of a Hugging Face dataset, from its files and as ``save_to_disk`` leaves it."""
    import datasets

    disk, splits = f"{out}/disk", f"{out}/splits"
    loaded = datasets.load_dataset(folder)
    loaded["train"].save_to_disk(disk)
    loaded.save_to_disk(splits)
    read = []
    for name in (folder, disk, splits):
        args = fsdp_arguments.parse_arguments([*flags, "--hf-dataset", name])
        args.seq_length, args.seed = 8, 1
        samples = fsdp_data.read_samples(args, fsdp_data.bytes_as_tokens)
        read.append([samples[i].tolist() for i in range(samples.count)])
    Path(out, "samples.json").write_text(json.dumps(read))


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
