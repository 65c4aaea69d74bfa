"""Real Megatron on the CPU: PyTorch's CUDA surface mapped to the host, collectives over gloo.

Megatron asks for CUDA in many small ways (``device="cuda"``, ``.cuda()``, streams, CUDA random
states, NCCL). Each is answered here with its CPU twin, so that an unmodified training script runs,
demonstrates and is tested on any machine. Nothing that runs on a GPU imports this file.

Context parallelism and packed sequences have an attention of their own here, and the
precision-aware optimizer a stand-in of Transformer Engine's. Not to be had without the latter: fp8,
which Megatron leaves out then.
"""

from __future__ import annotations

import os
import sys

from megatron_sharpness.megatron.cpu import cuda, processes, products, stand_ins

#: What Megatron must be told when it runs without a GPU: the local layers instead of Transformer
#: Engine's, gloo instead of NCCL, and none of the fused CUDA kernels.
REQUIRED_FLAGS: tuple[tuple[str, ...], ...] = (
    ("--transformer-impl", "local"),
    ("--distributed-backend", "gloo"),
    ("--no-gradient-accumulation-fusion",),
    ("--no-gradient-reduce-div-fusion",),  # a sum that is multiplied before is NCCL's only
    ("--no-persist-layer-norm",),
    ("--no-masked-softmax-fusion",),
    ("--no-bias-gelu-fusion",),
    ("--no-bias-swiglu-fusion",),
    ("--no-bias-dropout-fusion",),
    ("--no-rope-fusion",),
    ("--num-workers", "0"),
)


def add_required_flags(argv: list[str]) -> list[str]:
    """``argv`` with every flag of :data:`REQUIRED_FLAGS` that it does not set itself.

    ``CUDA_DEVICE_MAX_CONNECTIONS``, too, is set to what Megatron insists on for CUDA's sake, unless
    it is set: 1, and with FSDP anything else.
    """
    given = {arg.split("=", 1)[0] for arg in argv}
    sharded = given & {"--use-megatron-fsdp", "--use-torch-fsdp2"}
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "8" if sharded else "1")
    return argv + [part for flag in REQUIRED_FLAGS if flag[0] not in given for part in flag]


def install() -> None:
    """Map CUDA to the CPU in this process. Call it before anything of Megatron is imported."""
    _compile_nothing()
    processes.single_process_rendezvous()
    processes.map_distributed()
    processes.fork_helpers()
    cuda.map_cuda()
    products.multiply_in_fp32()
    stand_ins.replace_parts()


def _compile_nothing() -> None:
    # Compiled helpers of Megatron would need a compiler and gain nothing on a small CPU model.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    if (dynamo := sys.modules.get("torch._dynamo")) is not None:
        dynamo.config.disable = True
