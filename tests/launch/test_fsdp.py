"""``launch/fsdp/train.py``: on two processes, resumed, with a Hugging Face model, refused."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_sharpness.core.errors import InputError
from megatron_sharpness.sweeps.runs import REPORT
from tests.domains import write_domains
from tests.megatron.harness import other_data, training_lines
from tests.processes import ROOT, Rendezvous, start_ranks
from tests.trainers.harness import require

sys.path.insert(0, str(ROOT / "launch"))

from fsdp import checkpoint, data, train
from fsdp.arguments import parse_arguments
from fsdp.gpt import GPT, GPTConfig
from fsdp.schedule import changed_schedule, learning_rate

TEXT = f"--text {ROOT / 'README.md'}"
GPT_FLAGS = "--num-layers 2 --hidden-size 32 --num-attention-heads 4"
TRAINING = f"""{TEXT} --seq-length 32 --micro-batch-size 2 --global-batch-size 8 --train-iters 6
--lr 1e-2 --min-lr 1e-3 --lr-decay-style cosine --lr-warmup-iters 1 --weight-decay 0.1
--log-interval 1"""
#: Gradient accumulation, bf16, dropout and flash attention.
RUN = f"{GPT_FLAGS} {TRAINING} --bf16 --hidden-dropout 0.2 --attention-dropout 0"
RUN += " --attention-backend flash --save-interval 3"
#: fp32 without dropout, which any number of processes trains alike.
PLAIN = f"{GPT_FLAGS} {TRAINING} --hidden-dropout 0 --attention-dropout 0"
PLAIN += " --position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear"
PLAIN += " --untie-embeddings-and-output-weights"
EVERY = "--measure-critical-sharpness-every"


class Run:
    """What a run left behind."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def output(self) -> str:
        return (self.folder / "output0.txt").read_text()

    @property
    def losses(self) -> list[float]:
        return [float(loss) for loss in re.findall(r"lm loss: (\S+)", self.output)]

    @property
    def training_lines(self) -> list[str]:
        return training_lines(self.output)

    @property
    def all_records(self) -> list[dict[str, Any]]:
        lines = (self.folder / "tensorboard/critical_sharpness.jsonl").read_text().splitlines()
        return [{**json.loads(line), "seconds": None} for line in lines]

    @property
    def records(self) -> list[dict[str, Any]]:
        """Those of the step's own batch."""
        return [record for record in self.all_records if record["batch"] == "train"]

    def checkpoint(self, iteration: int) -> dict[str, Any]:
        whole = self.folder / f"whole{iteration}.pt"
        if not whole.exists():
            dcp_to_torch_save(self.folder / f"checkpoints/iter_{iteration:07d}", whole)
        loaded: dict[str, Any] = torch.load(whole, weights_only=False)
        return loaded


def differing(left: Any, right: Any, path: str = "") -> list[str]:
    """Where two nested states are not bit for bit the same."""
    if isinstance(left, dict) and isinstance(right, dict):
        if left.keys() != right.keys():
            return [f"{path}: {left.keys() ^ right.keys()}"]
        return [
            found for key in left for found in differing(left[key], right[key], f"{path}/{key}")
        ]
    if isinstance(left, torch.Tensor):
        return [] if torch.equal(left, right) else [path]
    return [] if left == right else [path]


def installed(package: str, *names: str) -> list[str] | None:
    """The paths to import ``package`` from, one of these frameworks'; None where it is in none."""
    for name in names:
        with contextlib.suppress(pytest.skip.Exception):
            return require(name, package)
    return None


TRANSFORMERS = installed("transformers", "hf")


@pytest.fixture(scope="module")
def tiny_olmo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an OLMo-2 of two layers: a configuration and nothing else."""
    folder = tmp_path_factory.mktemp("olmo")
    config = {
        "model_type": "olmo2", "vocab_size": 257, "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64,
        "bos_token_id": None, "eos_token_id": 256, "pad_token_id": None,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_olmo: Path) -> Callable[[str], Run]:
    """All runs of two processes, by name; those that resume, of what those before have saved."""
    folder = tmp_path_factory.mktemp("runs")
    others = f"--critical-sharpness-eval-data sums={other_data(folder)}"
    olmo = f"--hf-model {tiny_olmo} {TRAINING} --bf16 --recompute-granularity full"
    olmo += " --attention-backend flash"
    flags = {
        "off": RUN,
        "on": f"{RUN} {EVERY} 2 {others}",
        "on, resumed": f"{RUN} {EVERY} 2 {others}",
        "on, resumed frozen": f"{RUN} {EVERY} 2 {others} --finetune --critical-sharpness-frozen 2",
        "off, resumed on": f"{RUN} {EVERY} 2",
        "on, resumed off": RUN,
        "off, resumed longer": f"{RUN} --train-iters 8 --exit-interval 4",
        "off, resumed at its end": f"{RUN} --train-iters 3",
        "plain": f"{PLAIN} {EVERY} 2",
        "offloaded": f"{PLAIN} {EVERY} 2 --fsdp-cpu-offload",
    }
    if importlib.util.find_spec("megatron"):
        write_domains(folder)
        mix = f"{PLAIN.replace(TEXT, '')} --data-path 1 {folder}/prose 3 {folder}/code"
        mix += f" --critical-sharpness-eval-data prose={folder}/prose code={folder}/code {EVERY} 1"
        mix += " --adaptive-mix prose code --adaptive-mix-every 3 --save-interval 3"
        flags |= {"mix": mix, "mix, resumed": mix}
    if TRANSFORMERS is not None:
        flags |= {"olmo off": olmo, "olmo on": f"{olmo} {EVERY} 2"}
    flags["lost"] = f"{PLAIN} {EVERY} 1 --lr 1e4 --lr-decay-style constant --clip-grad 0"
    meetings = {name: Rendezvous(2) for name in flags}
    cases = []
    for name, line in flags.items():
        own = folder / name
        own.mkdir()
        argv = line.split()
        if "frozen" not in line:
            argv += ["--save", f"{own}/checkpoints"]
        argv += ["--tensorboard-dir", f"{own}/tensorboard"]
        source = ""
        if "resumed" in name:
            source = f"{folder / name.split(',')[0]}/checkpoints"
            argv += ["--load", f"{own}/checkpoints"]
        cases.append((str(own), meetings[name].port, source, argv))
    (folder / "cases.json").write_text(json.dumps(cases))
    started = start_ranks(
        ["-m", "tests.launch.fsdp_worker", "train", str(folder / "cases.json")],
        folder,
        2,
        environment={"CUDA_VISIBLE_DEVICES": ""},
        pythonpath=TRANSFORMERS or (),
    )
    try:
        codes = [process.wait(timeout=200) for process in started]
    finally:
        for process in started:
            process.kill()
    assert codes == [0, 0], "\n".join(p.read_text()[-3000:] for p in folder.glob("output*.txt"))
    return lambda name: Run(folder / name)


def test_training_is_bit_for_bit_the_training_without_measurement(
    runs: Callable[[str], Run],
) -> None:
    off, on = runs("off"), runs("on")
    assert len(off.training_lines) == 6
    assert off.training_lines == on.training_lines
    for iteration in (3, 6):
        assert differing(off.checkpoint(iteration), on.checkpoint(iteration)) == []
    assert differing(off.checkpoint(3), off.checkpoint(6)) != []
    assert {"random_cpu_0", "random_cpu_1"} < off.checkpoint(6).keys()
    assert [record["iteration"] for record in on.records] == [2, 4, 6]
    assert {record["status"] for record in on.records} == {"found"}
    assert [record["tokens"] for record in on.records] == [8 * 32] * 3
    assert [record["consumed_samples"] for record in on.records] == [16, 32, 48]
    assert on.output.count(" critical sharpness at iteration") == 3
    assert on.output.count(" critical sharpness: verdict: too few measurements to tell") == 1
    others = [record for record in on.all_records if record["batch"] == "sums"]
    assert [record["iteration"] for record in others] == [2, 4, 6]
    assert {record["status"] for record in others} <= {"found", "not_descent"}
    assert len({record["tokens"] for record in others}) == 1 and others[0]["tokens"] < 8 * 20


def test_a_run_that_is_lost_ends_its_log_with_the_verdict(runs: Callable[[str], Run]) -> None:
    lost = runs("lost")
    assert 0 < len(lost.records) < 6
    assert lost.output.count(" critical sharpness: verdict: ") == 1


def test_a_frozen_run_of_loaded_weights_measures_and_trains_nothing(
    runs: Callable[[str], Run],
) -> None:
    frozen, trained = runs("on, resumed frozen"), runs("on")
    assert "loaded the weights of" in frozen.output
    assert REPORT.search(frozen.output)
    assert [record["iteration"] for record in frozen.all_records] == [4, 4, 6, 6]
    assert {record["status"] for record in frozen.records} == {"found"}
    sums = [record["loss"] for record in frozen.all_records if record["batch"] == "sums"]
    # Of the weights after iteration 3, at which the run that was saved measured its iteration 4.
    (before,) = [
        record["loss"]
        for record in trained.all_records
        if (record["batch"], record["iteration"]) == ("sums", 4)
    ]
    assert sums == [before, before]


@pytest.mark.parametrize("resumed", ["on, resumed", "off, resumed on", "on, resumed off"])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(
    resumed: str, runs: Callable[[str], Run]
) -> None:
    whole, rest = runs("on"), runs(resumed)
    assert rest.training_lines == whole.training_lines[3:]
    assert differing(whole.checkpoint(6), rest.checkpoint(6)) == []
    if resumed == "on, resumed":
        assert rest.all_records == whole.all_records[2:]  # the warm starts of both searches too
    elif resumed == "off, resumed on":  # its search starts cold
        assert [record["status"] for record in rest.records] == ["found"] * 2


def test_a_resumed_run_says_where_its_schedule_is_not_the_checkpoints(
    runs: Callable[[str], Run],
) -> None:
    whole, longer = runs("off"), runs("off, resumed longer")
    before, after = (
        re.findall(r"learning rate: (\S+)", line)[0]
        for line in (whole.training_lines[2], longer.training_lines[0])
    )
    assert (
        f"learning rate of iteration 4: {after} by these flags; iteration 3 had {before}. To go on "
        "with the checkpoint's schedule give --lr-decay-iters 6, or "
        "--use-checkpoint-opt_param-scheduler\n"
    ) in longer.output
    assert "by these flags" not in runs("on, resumed").output


def test_a_run_that_is_at_its_end_says_so(runs: Callable[[str], Run]) -> None:
    ended = runs("off, resumed at its end")
    assert "nothing to train: --train-iters 3, and that is reached" in ended.output
    assert ended.training_lines == []


@pytest.mark.parametrize("flags", ["--lr-decay-iters 6", "--use-checkpoint-opt_param-scheduler"])
def test_the_flags_that_are_named_keep_the_schedule(
    flags: str, runs: Callable[[str], Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = runs("off").folder / "checkpoints/iter_0000003/progress.json"
    progress = json.loads(saved.read_text())
    longer = f"{RUN} --train-iters 8 --lr 5e-3"
    said = changed_schedule(parse(monkeypatch, longer), progress)
    assert said is not None and "give --lr 0.01 --lr-decay-iters 6, or" in said
    args = parse(monkeypatch, f"{RUN} --train-iters 8 {flags}")
    if args.use_checkpoint_opt_param_scheduler:
        vars(args).update(progress["schedule"])
    assert changed_schedule(args, progress) is None


def test_a_mix_follows_the_measurements_also_when_resumed(runs: Callable[[str], Run]) -> None:
    pytest.importorskip("megatron.core", reason="needs megatron-core")
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard"
    )
    whole, rest = runs("mix"), runs("mix, resumed")
    adjusted = r"data mix after iteration +4 .* 0.2500 -> (\S+) \|"  # at 1 the rate is 0
    (share,) = map(float, re.findall(adjusted, whole.output))
    assert share != 0.25
    # Two of the three measurements lie before the checkpoint.
    assert rest.training_lines == whole.training_lines[3:]
    assert rest.all_records == whole.all_records[9:]
    assert re.findall(adjusted, rest.output) == [f"{share:.4f}"]
    events = event_accumulator.EventAccumulator(str(whole.folder / "tensorboard"))
    events.Reload()
    curve = [event.value for event in events.Scalars("data-mix-share")]
    assert curve == pytest.approx([0.25] * 4 + [share] * 2, abs=1e-4)


def test_the_number_of_processes_does_not_change_the_training(
    runs: Callable[[str], Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    two = runs("plain")
    rendezvous = Rendezvous(1)
    for name, value in {**rendezvous.environment(0), "CUDA_VISIBLE_DEVICES": ""}.items():
        monkeypatch.setenv(name, value)
    log = ["--critical-sharpness-log", str(tmp_path / "tensorboard/critical_sharpness.jsonl")]
    train.main([*PLAIN.split(), EVERY, "2", *log])
    (tmp_path / "output0.txt").write_text(capsys.readouterr().out)
    one = Run(tmp_path)
    assert one.losses == pytest.approx(two.losses, rel=1e-5)
    for alone, together in zip(one.records, two.records, strict=True):
        assert alone["critical_lr"] == pytest.approx(together["critical_lr"], rel=1e-2)
        assert alone["update_norm"] == pytest.approx(together["update_norm"], rel=1e-2)


def test_parameters_in_host_memory_train_and_measure_the_same(runs: Callable[[str], Run]) -> None:
    plain, offloaded = runs("plain"), runs("offloaded")
    assert offloaded.training_lines == plain.training_lines
    assert offloaded.all_records == plain.all_records
    assert differing(offloaded.checkpoint(6), plain.checkpoint(6)) == []


def test_tensorboard_has_megatrons_tags(runs: Callable[[str], Run]) -> None:
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard"
    )
    events = event_accumulator.EventAccumulator(str(runs("on").folder / "tensorboard"))
    events.Reload()
    curves = {"lm loss": 6, "learning-rate": 6, "grad-norm": 6}
    curves |= {"critical-sharpness": 3, "critical-learning-rate": 3, "edge-of-stability": 3}
    for tag, points in curves.items():
        assert len(events.Scalars(tag)) == points
        samples = [event.step for event in events.Scalars(f"{tag} vs samples")]
        assert samples == [48 // points * (i + 1) for i in range(points)]


def test_a_hugging_face_model_is_trained_and_measured(runs: Callable[[str], Run]) -> None:
    if TRANSFORMERS is None:
        pytest.skip('transformers is not installed: pip install ".[hf]"')
    off, on = runs("olmo off"), runs("olmo on")
    assert "Olmo2ForCausalLM of" in on.output
    assert off.training_lines == on.training_lines
    assert differing(off.checkpoint(6), on.checkpoint(6)) == []
    assert [record["status"] for record in on.records] == ["found"] * 3
    assert on.losses[-1] < on.losses[0]


def test_weights_and_tokenizer_of_a_hugging_face_folder_are_used(
    tiny_olmo: Path, tmp_path: Path
) -> None:
    if TRANSFORMERS is None:
        pytest.skip('transformers is not installed: pip install ".[hf]"')
    arguments = ["pretrained", str(tiny_olmo), str(tmp_path), *TRAINING.split()]
    hub = {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    ranks = start_ranks(
        ["-W", "ignore", "-m", "tests.launch.fsdp_worker", *arguments], tmp_path, 2,
        environment=hub, pythonpath=TRANSFORMERS,
    )  # fmt: skip
    codes = [rank.wait(timeout=120) for rank in ranks]
    assert codes == [0, 0], (tmp_path / "output0.txt").read_text()[-4000:]


class Operations(TorchDispatchMode):
    """Notes the names of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.__name__)
        return func(*args, **(kwargs or {}))


def test_forced_flash_attention_is_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    args = parse(monkeypatch, RUN)
    tokens = torch.arange(16)[None]
    with train.attention(args), Operations() as seen:
        GPT(args.gpt)(tokens).sum().backward()
    assert "_scaled_dot_product_flash_attention_for_cpu.default" in seen.names
    assert "_scaled_dot_product_flash_attention_for_cpu_backward.default" in seen.names
    dropout = GPT(GPTConfig(2, 32, 4, 16, attention_dropout=0.1))
    with train.attention(args), pytest.raises(RuntimeError, match="No available kernel"):
        dropout(tokens)


@pytest.mark.parametrize("rope", [True, False])
def test_the_gpt_is_causal_and_starts_at_the_uniform_distribution(rope: bool) -> None:
    torch.manual_seed(0)
    kind = "rope" if rope else "learned_absolute"
    model = GPT(GPTConfig(2, 64, 4, 16, position_embedding_type=kind, swiglu=rope)).eval()
    tokens = torch.randint(257, (2, 16))
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 257
    logits, after = model(tokens), model(changed)
    assert torch.equal(logits[:, :9], after[:, :9])
    assert (logits[:, 9:] != after[:, 9:]).any(dim=-1).all()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.roll(-1).flatten())
    assert loss.item() == pytest.approx(np.log(257), rel=0.02)


@pytest.mark.parametrize("style", ["constant", "linear", "cosine", "exponential", "minus_sqrt"])
def test_the_schedule_is_megatrons(style: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = pytest.importorskip(
        "megatron.core.optimizer_param_scheduler", reason="needs megatron-core"
    ).OptimizerParamScheduler
    plain = style in ("constant", "linear")
    names = f"--lr-decay-style {style if plain else 'WSD'}"
    names += "" if plain else f" --lr-wsd-decay-style {style} --lr-wsd-decay-iters 5"
    args = parse(monkeypatch, f"{PLAIN} --lr-warmup-iters 4 --lr-decay-iters 20 {names}")
    group = {"lr": 0.0, "weight_decay": 0.0, "params": []}
    theirs = scheduler(
        optimizer=argparse.Namespace(param_groups=[group]), init_lr=0.0, max_lr=1e-2, min_lr=1e-3,
        lr_warmup_steps=4, lr_decay_steps=20, lr_decay_style=args.lr_decay_style, start_wd=0.0,
        end_wd=0.0, wd_incr_steps=20, wd_incr_style="constant", wsd_decay_steps=5,
        lr_wsd_decay_style=None if plain else style, use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=False,
    )  # fmt: skip
    for iteration in range(1, 25):
        assert learning_rate(args, iteration) == pytest.approx(group["lr"], rel=1e-12)
        theirs.step(1)


def parse(monkeypatch: pytest.MonkeyPatch, flags: str) -> argparse.Namespace:
    """The flags as rank 0 of 2 understands them."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    return parse_arguments(flags.split())


REFUSED = {
    f"{TRAINING}": ["--num-layers: missing", "--hf-model"],
    f"{RUN} --hf-model folder": ["--num-layers 2", "--hf-model has a configuration of its own"],
    f"{RUN} --global-batch-size 6": ["--global-batch-size 6", "2 processes", "give 4"],
    f"{RUN} --micro-batch-size 0": ["--micro-batch-size 0", "at least 1"],
    f"{RUN} --num-attention-heads 5": ["--hidden-size 32", "--num-attention-heads 5"],
    f"{RUN} --max-position-embeddings 16": ["--seq-length 32", "16 positions"],
    f"{RUN} --attention-dropout 0.1": [
        "--attention-backend flash", "no dropout", "give --attention-dropout 0",
    ],
    f"{RUN} --lr-decay-style WSD": ["--lr-decay-style WSD", "--lr-wsd-decay-iters"],
    f"{RUN} --lr-warmup-iters 6": ["--lr-warmup-iters 6", "less than --lr-decay-iters 6"],
    f"{RUN} --data-path prefix": ["--data-path and --python-docs, --text or --jsonl", "one"],
    f"{RUN.replace(TEXT, '')}": ["no data", "--data-path", "--hf-dataset"],
    f"{RUN.replace(TEXT, '--data-path none')}": ["--data-path none", "none.bin"],
    f"{RUN} --fp8": ["unrecognized arguments: --fp8"],
    f"{RUN} --train-iters x": ["--train-iters", "invalid int value", "'x'"],
    f"{RUN} {EVERY} -5": [f"{EVERY} -5", "give 100"],
    f"{RUN} {EVERY} 5 --critical-sharpness-log /proc/none/log": [
        "--critical-sharpness-log /proc/none/log", "rank 0",
    ],
}  # fmt: skip


@pytest.mark.parametrize("flags", REFUSED)
def test_bad_input_is_refused_by_name(flags: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError) as refused:
        parse(monkeypatch, flags)
    for part in REFUSED[flags]:
        assert part in str(refused.value)


def test_other_checkpoints_are_neither_overwritten_nor_loaded(
    runs: Callable[[str], Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = runs("on").folder / "checkpoints"
    with pytest.raises(InputError, match=r"--save .*iter_0000006.*--load"):
        train.check_folders(parse(monkeypatch, f"{RUN} --save {held}"))
    train.check_folders(parse(monkeypatch, f"{RUN} --save {held} --load {held}"))
    train.check_folders(parse(monkeypatch, f"{RUN} --save {tmp_path} --load {held}"))
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("100")
    with pytest.raises(InputError, match="iter_0000100, which is no checkpoint of"):
        train.check_folders(parse(monkeypatch, f"{RUN} --load {tmp_path}"))


def test_a_crash_while_saving_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(tensors: Any, checkpoint_id: Path) -> None:
        checkpoint_id.mkdir()
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint, "get_state_dict", lambda model, optimizer: ({}, {}))
    monkeypatch.setattr(checkpoint.state_dict_saver, "save", crash)
    (tmp_path / "iter_0000003").mkdir()
    (tmp_path / "iter_0000003/progress.json").write_text("{}")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
    args = parse(monkeypatch, f"{RUN} --save {tmp_path} --load {tmp_path}")
    model: Any = None
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save_checkpoint(args, model, model, None, None, iteration=6, consumed=48)
    assert (tmp_path / "iter_0000006").exists()
    assert checkpoint.latest_checkpoint("--load", str(tmp_path)) == tmp_path / "iter_0000003"


def test_a_token_outside_of_the_vocabulary_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    args = parse(monkeypatch, f"{RUN} --vocab-size 100")
    samples = data.Samples([np.full(100, 122)], np.array([100]), 32, seed=0)
    with pytest.raises(InputError, match=r"--vocab-size 100: the data holds token 122"):
        next(train.micro_batches(args, samples, 0, 100))
