"""What the tests of ``launch/fsdp/train.py`` do in processes of their own.

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
import torch.distributed as dist

from tests.processes import ROOT

sys.path.insert(0, str(ROOT / "launch"))

from fsdp import train as script
from fsdp.arguments import parse_arguments
from fsdp.data import bytes_as_tokens, read_samples
from fsdp.model import build_model, shard
from megatron_sharpness.core.errors import InputError


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
        lost = folder.name == "lost"  # the last one
        with (
            (folder / f"output{rank}.txt").open("w") as output,
            contextlib.redirect_stdout(output),
            contextlib.suppress(RuntimeError) if lost else contextlib.nullcontext(),
        ):
            script.main(argv)


def copy_as_if_crashed(source: Path, target: Path) -> None:
    """Two checkpoints, as if a crash had struck while the second was saved."""
    partial = target.with_name("partial")
    shutil.copytree(source, partial)
    (partial / "latest_checkpointed_iteration.txt").write_text("3")
    for path in (partial / "iter_0000006").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    partial.rename(target)


def pretrained(configuration: str, out: str, *flags: str) -> None:
    """Hugging Face models that were saved in bf16 are read again, each rank its shards alone."""
    import transformers

    dist.init_process_group("gloo")
    torch.manual_seed(3)  # the same weights on both ranks
    cases = {"plain": {}, "tied": {"tie_word_embeddings": True}, "other names": {}}
    for name, options in cases.items():
        config = transformers.AutoConfig.from_pretrained(configuration, **options)
        saved = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
        folder = Path(out, "models--some--model", "snapshots", name.replace(" ", "-"))
        if dist.get_rank() == 0:
            saved.save_pretrained(folder)
            save_words(str(folder))
            if name == "other names":
                rename(folder / "model.safetensors")
        dist.barrier()
        args = parse_arguments(["--hf-model", str(folder), *flags])
        built = build_model(args)
        assert built.tokenize(b"two one three").tolist() == [3, 2, 0, 1]
        assert built.vocabulary == 257
        empty = {parameter.is_meta for parameter in built.model.parameters()}
        assert empty == {name != "other names"}, name  # whole only where it has to be
        model = shard(args, built, torch.device("cpu"))
        same_weights(model, saved.state_dict())
        rotary = type(saved.model.rotary_emb)(config)
        assert torch.equal(model.model.rotary_emb.inv_freq, rotary.inv_freq)
        if name == "tied":
            assert model.lm_head.weight is model.model.embed_tokens.weight
            held = model.lm_head.weight.full_tensor()

    # From the hub's cache, where a revision is a folder with the commit's name.
    refs = Path(out, "models--some--model", "refs")
    if dist.get_rank() == 0:
        refs.mkdir()
        (refs / "step1000").write_text("tied")
    dist.barrier()
    args = parse_arguments(
        ["--hf-model", "some/model", "--hf-revision", "step1000", *flags]
    )
    model = shard(args, build_model(args), torch.device("cpu"))
    assert torch.equal(model.lm_head.weight.full_tensor(), held)
    if dist.get_rank() == 0:
        (refs / "step3000").write_text("empty")
        (folder.parent / "empty").mkdir()
        (folder.parent / "empty" / "config.json").write_text("{}")
    dist.barrier()
    for revision, message in (("step2000", ""), ("step3000", "holds no weights")):
        try:
            args.hf_revision = revision
            build_model(args)
        except InputError as error:
            assert "--hf-model some/model: " in str(error) and message in str(error)
        else:
            raise AssertionError("weights that are not there")
    dist.destroy_process_group()
    time.sleep(0.1)  # see the end of train.main


def olmo(out: str) -> None:
    """Three OLMo-2 of two layers, with random weights."""
    import transformers

    config = transformers.AutoConfig.for_model(
        "olmo2", vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, bos_token_id=None, eos_token_id=256,
        pad_token_id=None,
    )  # fmt: skip
    for step in (1, 2, 3):
        torch.manual_seed(step)
        model = transformers.AutoModelForCausalLM.from_config(config)
        model.save_pretrained(Path(out, f"step{step}-tokens{2 * step}B"))


def same_weights(model: torch.nn.Module, expected: dict[str, torch.Tensor]) -> None:
    weights = model.state_dict()
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        assert weight.dtype == torch.float32
        assert len(weight.to_local()) <= -(-len(expected[name]) // 2)
        assert torch.equal(weight.full_tensor(), expected[name].float()), name


def save_words(folder: str) -> None:
    """A tokenizer of words."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"<unk>": 0, "<end>": 1, "one": 2, "two": 3}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token="<end>"
    ).save_pretrained(folder)


def rename(path: Path) -> None:
    """As saved from the model without its head's wrapper, which transformers reads too."""
    from safetensors.torch import load_file, save_file

    tensors = {name.removeprefix("model."): value for name, value in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def dataset(folder: str, out: str, *flags: str) -> None:
    """The samples of a Hugging Face dataset, from its files and as ``save_to_disk`` leaves it."""
    import datasets

    disk, splits = f"{out}/disk", f"{out}/splits"
    loaded = datasets.load_dataset(folder)
    loaded["train"].save_to_disk(disk)
    loaded.save_to_disk(splits)
    read = []
    for name in (folder, disk, splits):
        args = parse_arguments([*flags, "--hf-dataset", name])
        args.seq_length, args.seed = 8, 1
        samples = read_samples(args, bytes_as_tokens)
        read.append([samples[i].tolist() for i in range(samples.count)])
    # As streams: the documents' own order, one after the other, and again from the beginning.
    for name in (folder, disk):
        args = parse_arguments(
            [*flags, "--hf-dataset", name, "--hf-dataset-streaming"]
        )
        args.seq_length = 8
        stream = read_samples(args, bytes_as_tokens)
        read.append([stream[i].tolist() for i in range(samples.count + 2)])
        assert [stream[i].tolist() for i in (7, 2, 3)] == [read[-1][i] for i in (7, 2, 3)]
        args.json_key = "none"
        try:
            read_samples(args, bytes_as_tokens)
        except InputError as error:
            assert "--json-key none" in str(error) and "body" in str(error)
        else:
            raise AssertionError("a column that is not there")
    Path(out, "samples.json").write_text(json.dumps(read))


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
