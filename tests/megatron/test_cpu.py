"""What Megatron asks of a GPU and its own kernels, the CPU backend answers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tests.digest import hash_of
from tests.megatron.harness import MODEL, ROOT, finish, run
from tests.processes import start_ranks

#: What is asked → (processes, flags).
ASKED = {
    "memory": (1, "--log-memory-to-tensorboard --log-device-memory-used "
                  "--tensorboard-log-interval 1 --record-memory-history"),
    "profiler": (1, "--profile --nvtx-ranges --profile-step-start 2 --profile-step-end 3"),
    "streams of tensors": (2, "--num-experts 4 --expert-model-parallel-size 2 --bf16 "
                              "--moe-token-dispatcher-type alltoall --disable-bias-linear "
                              "--moe-shared-expert-intermediate-size 32 "
                              "--moe-shared-expert-overlap"),
}  # fmt: skip


@pytest.mark.parametrize("asked", ASKED)
def test_megatron_trains_with_what_it_asks_of_a_gpu(asked: str, tmp_path: Path) -> None:
    processes, flags = ASKED[asked]
    result = run(tmp_path, flags, processes=processes).expect_success()
    assert len(result.training_lines) == 6


UNEVEN = """
from megatron_sharpness.megatron import cpu
cpu.install()
import torch
import torch.distributed as dist

dist.init_process_group()
rank = dist.get_rank()
parts = [torch.empty(2, 3), torch.empty(1, 3)]
dist.all_gather(parts, torch.full((2 - rank, 3), float(rank)))
assert [part.tolist() for part in parts] == [[[0.0] * 3] * 2, [[1.0] * 3]]
"""


def test_parts_of_other_sizes_are_gathered(tmp_path: Path) -> None:
    processes = start_ranks(["-c", UNEVEN], tmp_path, 2)
    finish(processes, tmp_path, timeout=120.0).expect_success()


PRODUCTS = """
import torch
torch.backends.mkldnn.enabled = False  # as on a CPU that has no kernels for 16 bits
from megatron_sharpness.megatron import cpu
cpu.install()
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode

class Seen(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "mm" in func.__name__:
            products.append((func.__name__, args[-1].dtype))
        return func(*args, **(kwargs or {}))

class Product(torch.autograd.Function):  # as Megatron's linear layers
    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return a @ b

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        return grad @ b.transpose(1, 2), a.transpose(1, 2) @ grad

for dtype in (torch.bfloat16, torch.float16):
    products = []
    a, b, c = (torch.randn(3, 4, 4).to(dtype).requires_grad_() for _ in range(3))
    wide = [x.detach().float().requires_grad_() for x in (a, b, c)]
    with Seen():
        for product in (
            lambda a, b, c: a @ b, lambda a, b, c: linear(a, b[0], c[0, 0]),
            lambda a, b, c: torch.einsum("bij,bjk->bik", a, b),
            lambda a, b, c: torch.baddbmm(c, a, b, beta=0.5, alpha=2.0),
            lambda a, b, c: c[0].addmm(a[0], b[0]),
            lambda a, b, c: Product.apply(a, b),
        ):
            found, expected = product(a, b, c), product(*wide)
            assert found.dtype == dtype and torch.equal(found, expected.to(dtype))
            found.sum().backward()
            expected.sum().backward()
            assert torch.equal(a.grad, wide[0].grad.to(dtype)) and a.grad.dtype == dtype
            for x in (a, b, c, *wide):
                x.grad = None
        assert len(products) >= 30 and {dtype for _, dtype in products} == {torch.float32}, products
        out = torch.empty(3, 4, 4, dtype=dtype)
        torch.bmm(a.detach(), b.detach(), out=out)  # as PyTorch does it
        assert products[-1][1] == dtype
    torch.testing.assert_close(out, (a @ b).detach())
"""


def test_products_that_the_cpu_has_no_kernel_for_are_made_in_fp32() -> None:
    command = [sys.executable, "-W", "ignore", "-c", PRODUCTS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]


BERT = """
import sys
from megatron_sharpness.megatron import cpu
cpu.install()
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
from megatron.core.models.bert.bert_model import BertModel
from megatron.training.arguments import (
    core_transformer_config_from_args, parse_args, validate_args,
)

sys.argv = ["pretrain_bert.py", *cpu.add_required_flags(sys.argv[1:])]
args = parse_args()
validate_args(args)
torch.distributed.init_process_group()
parallel_state.initialize_model_parallel()
tensor_parallel.model_parallel_cuda_manual_seed(1)
model = BertModel(core_transformer_config_from_args(args), 2, bert_layer_local_spec, 256, 32)
tokens = torch.arange(64, device="cuda").view(2, 32)
output, _ = model(tokens, torch.ones_like(tokens), torch.zeros_like(tokens))
print("output", tuple(output.shape))
"""


@pytest.mark.parametrize("backend", ["", "--spec local --attention-backend local"])
def test_bert_has_the_attention_that_it_wants(backend: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BERT, *MODEL.split(), *backend.split()],
        capture_output=True, text=True, cwd=ROOT, timeout=120,
    )  # fmt: skip
    assert "output (2, 32, 256)" in done.stdout, done.stderr[-3000:]


def checkpoint(folder: Path, iteration: int) -> dict[str, Any]:
    """A checkpoint's parts by name, but for the one that holds the run's own flags."""
    saved = folder / "checkpoints" / f"iter_{iteration:07}"
    dcp_to_torch_save(saved, folder / "whole.pt")
    parts = torch.load(folder / "whole.pt", weights_only=False)
    return {name: part for name, part in parts.items() if not name.startswith("common_state")}


@pytest.mark.parametrize("worker", ["", "--use-persistent-ckpt-worker"])
def test_a_checkpoint_written_beside_the_training_is_that_of_its_step(
    worker: str, tmp_path: Path
) -> None:
    together, beside = tmp_path / "together", tmp_path / "beside"
    flags = "--bf16 --ckpt-format torch_dist --save-interval 4 --save"
    plain = run(together, f"{flags} {together}/checkpoints", processes=2).expect_success()
    # The writer takes longer than the steps that follow.
    saved = run(
        beside, f"{flags} {beside}/checkpoints --async-save --async-strategy mcore {worker}",
        processes=2, environment={"OBSERVED_SITUATION": "a_slow_checkpoint_writer"},
    ).expect_success()  # fmt: skip
    assert saved.hashes == plain.hashes
    for iteration in (4, 6):
        expected = checkpoint(together, iteration)
        assert len(expected) > 10
        assert hash_of(checkpoint(beside, iteration)) == hash_of(expected)
    resumed = run(
        tmp_path / "resumed", f"{flags} {tmp_path}/none --load {beside}/checkpoints --ckpt-step 4",
        processes=2,
    ).expect_success()  # fmt: skip
    assert len(resumed.training_lines) == 2
