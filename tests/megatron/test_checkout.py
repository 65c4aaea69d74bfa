"""A Megatron-LM checkout's unmodified pretrain_gpt.py, hooked at run time and by the patch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from megatron_sharpness.sweeps.runs import REPORT
from tests.megatron.harness import MODEL, ROOT, Run, finish, other_data, run, start
from tests.megatron.test_adaptive_mix import data, shares, train
from tests.megatron.test_bitwise import (
    ACTIVATIONS,
    AWARE,
    EXPERTS,
    FSDP2,
    FULLY,
    MTP,
    ON_HOST,
    OVERLAP,
    SHARDED,
)

__all__ = ["data"]  # a fixture

LAUNCH = ROOT / "launch" / "pretrain_gpt.py"

CHECKOUT = os.environ.get("MEGATRON_LM")
pytestmark = pytest.mark.skipif(
    CHECKOUT is None, reason="MEGATRON_LM does not name a Megatron-LM checkout"
)

FLAGS = "--tensor-model-parallel-size 2 --sequence-parallel --bf16 --use-distributed-optimizer"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, in which the compiled data helper is built once."""
    assert CHECKOUT is not None
    copy = tmp_path_factory.mktemp("checkout") / "Megatron-LM"
    shutil.copytree(CHECKOUT, copy, ignore=shutil.ignore_patterns(".git", "__pycache__"))
    helpers = copy / "megatron" / "core" / "datasets"
    if not list(helpers.glob("helpers_cpp*.so")):
        subprocess.run(["make", "-C", str(helpers)], check=True, capture_output=True)
    return copy


@pytest.fixture(scope="module")
def at_run_time(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Run]:
    folder = tmp_path_factory.mktemp("run-time")
    script = checkout / "pretrain_gpt.py"
    others = f" --critical-sharpness-eval-data sums={other_data(folder)}"
    plain, measured = (
        run(folder / str(every), FLAGS + others * bool(every), processes=2, every=every,
            script=script, pythonpath=[str(checkout)]).expect_success()
        for every in (0, 2)
    )  # fmt: skip
    return plain, measured


def test_the_unmodified_script_is_measured(at_run_time: tuple[Run, Run]) -> None:
    plain, measured = at_run_time
    assert measured.training_lines == plain.training_lines
    assert [record["status"] for record in measured.records] == ["found"] * 3
    # The script's own micro-batches can be made of other data. Its loss can rise at once, or nearly
    # so for 16 bits: expected answers.
    answers = {"found", "not_descent", "noise_limited"}
    assert {record["status"] for record in measured.relative_records} <= answers


def version(checkout: Path) -> tuple[int, int]:
    text = (checkout / "megatron" / "core" / "package_info.py").read_text()
    numbers = dict(re.findall(r"^(MAJOR|MINOR) = (\d+)", text, re.MULTILINE))
    return int(numbers["MAJOR"]), int(numbers["MINOR"])


SECOND = (
    "--use-megatron-fsdp --megatron-fsdp-version 2 --ckpt-format fsdp_dtensor "
    "--data-parallel-sharding-strategy optim_grads_params"
)

#: Mode → the first version that trains with it, and flags.
MODES = {
    "Megatron-FSDP": ((0, 16), f"{FULLY} --bf16"),
    "Megatron-FSDP, overlap": ((0, 16), f"{FULLY} {OVERLAP}"),
    "Megatron-FSDP, optim": ((0, 16), f"{SHARDED} optim --bf16"),
    "Megatron-FSDP v2, fp32": ((0, 20), SECOND),
    "Megatron-FSDP v2": ((0, 20), f"{SECOND} --bf16"),
    "FSDP2": ((0, 19), f"{FSDP2} --bf16"),
    "context parallelism": ((0, 16), "--context-parallel-size 2 --bf16"),
    "MTP": ((0, 16), f"{MTP} --bf16"),
    "MTP, pipeline": ((0, 16), f"{MTP} --pipeline-model-parallel-size 2 --bf16"),
    "masters in the optimizer": ((0, 16), AWARE),
    "masters in fp16": ((0, 16), f"{AWARE} --main-params-dtype fp16"),
    "optimizer on the host": ((0, 16), f"{ON_HOST} --optimizer-offload-fraction 0.5"),
    "experts, overlap": ((0, 16), f"{EXPERTS} --moe-token-dispatcher-type alltoall --bf16 "
                                  "--overlap-moe-expert-parallel-comm"),
    "activations on the host": ((0, 16), f"{ACTIVATIONS} --bf16"),
    "clipped logits": ((0, 16), "--bf16 --qk-clip --qk-clip-threshold 0.02"),
}


@pytest.mark.parametrize("mode", MODES)
def test_the_unmodified_script_is_measured_in_each_mode(
    mode: str, checkout: Path, tmp_path: Path
) -> None:
    first, flags = MODES[mode]
    if version(checkout) < first:
        pytest.skip(f"megatron-core {version(checkout)} does not train with {mode}")
    plain, measured = (
        run(tmp_path / str(every), flags + " --critical-sharpness-watch always" * bool(every),
            processes=2, every=every, pythonpath=[str(checkout)],
            environment={"OBSERVED_SCRIPT": str(checkout / "pretrain_gpt.py")}).expect_success()
        for every in (0, 2)
    )  # fmt: skip
    assert measured.hashes == plain.hashes
    assert measured.training_lines == plain.training_lines
    assert [record["status"] for record in measured.records] == ["found"] * 3


def test_dist_muon_is_measured_as_it_was_before_0_18(checkout: Path, tmp_path: Path) -> None:
    if version(checkout) != (0, 17):
        pytest.skip("its older layout, with the emerging-optimizers that is installed, is 0.17's")
    for overlap in ("", "--overlap-grad-reduce --overlap-param-gather"):
        plain, measured = (
            run(tmp_path / f"{overlap[-6:]}{every}", f"--optimizer dist_muon --bf16 {overlap}",
                processes=2, every=every, pythonpath=[str(checkout)]).expect_success()
            for every in (0, 2)
        )  # fmt: skip
        assert measured.hashes == plain.hashes
        assert [record["status"] for record in measured.records] == ["found"] * 3


def test_our_script_follows_a_mix_and_takes_frozen_steps_back(
    checkout: Path, data: Path, tmp_path: Path
) -> None:
    options = {"script": LAUNCH, "pythonpath": [str(checkout)]}
    followed = train(tmp_path / "followed", data, processes=2, **options).expect_success()
    assert len(shares(followed)) == 3
    frozen = train(
        tmp_path / "frozen", data, "--critical-sharpness-frozen 2", prose=1, processes=2, **options
    ).expect_success()
    assert REPORT.search(frozen.output)
    assert [record["iteration"] for record in frozen.records] == [4, 6]


def test_the_patched_checkout_measures_the_same_without_our_launcher(
    checkout: Path, at_run_time: tuple[Run, Run], tmp_path: Path
) -> None:
    hooked = at_run_time[1]
    apply = [str(ROOT / "patches" / "apply.sh")]
    subprocess.run([*apply, str(checkout)], check=True)
    try:
        # Without a GPU the CPU backend is still needed, and is all that this script adds.
        script = tmp_path / "on_cpu.py"
        script.write_text(
            "import runpy, sys\n"
            "from megatron_sharpness.megatron import cpu\n"
            "cpu.install()\n"
            "sys.argv = [sys.argv[1], *cpu.add_required_flags(sys.argv[2:])]\n"
            f"sys.path[0] = {str(checkout)!r}\n"
            "runpy.run_path(sys.argv[0], run_name='__main__')\n"
        )
        processes = start(
            tmp_path, f"{FLAGS} --critical-sharpness-eval-data sums={other_data(tmp_path)}",
            processes=2, every=2, script=script, module=None,
            pythonpath=[str(checkout)], model=f"{checkout / 'pretrain_gpt.py'} {MODEL}",
        )  # fmt: skip
        patched = finish(processes, tmp_path, timeout=180.0).expect_success()
    finally:
        subprocess.run([*apply, "--reverse", str(checkout)], check=True)
    assert patched.timeless_records == hooked.timeless_records
    assert patched.training_lines == hooked.training_lines


def test_apply_refuses_what_it_does_not_know(checkout: Path, tmp_path: Path) -> None:
    apply = str(ROOT / "patches" / "apply.sh")
    info = tmp_path / "megatron" / "core" / "package_info.py"
    info.parent.mkdir(parents=True)
    info.write_text("MAJOR = 0\nMINOR = 99\nPATCH = 0\n")
    done = subprocess.run([apply, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode != 0
    assert "version 0.99" in done.stderr and "core_v0.19.0" in done.stderr
