"""Real Megatron on the CPU: PyTorch's CUDA surface mapped to the host, collectives over gloo.

Megatron asks for CUDA in many small ways (``device="cuda"``, ``.cuda()``, streams, CUDA random
states, NCCL). Each is answered here with its CPU twin, so that an unmodified training script runs,
demonstrates and is tested on any machine. Nothing that runs on a GPU imports this file.

Not to be had this way, because they need Transformer Engine: context parallelism, fp8 and the
precision-aware optimizer.
"""

from __future__ import annotations

import copy
import inspect
import logging
import os
import socket
from collections.abc import Callable
from typing import Any

# Compiled helpers of Megatron would need a compiler and gain nothing on a small CPU model.
os.environ["TORCHDYNAMO_DISABLE"] = "1"

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

#: What Megatron must be told when it runs without a GPU: the local layers instead of Transformer
#: Engine's, gloo instead of NCCL, and none of the fused CUDA kernels.
REQUIRED_FLAGS: tuple[tuple[str, ...], ...] = (
    ("--transformer-impl", "local"),
    ("--distributed-backend", "gloo"),
    ("--no-gradient-accumulation-fusion",),
    ("--no-persist-layer-norm",),
    ("--no-masked-softmax-fusion",),
    ("--no-bias-gelu-fusion",),
    ("--no-bias-swiglu-fusion",),
    ("--no-bias-dropout-fusion",),
    ("--no-rope-fusion",),
    ("--attention-backend", "unfused"),
    ("--num-workers", "0"),
)

_CPU = torch.device("cpu")


def add_required_flags(argv: list[str]) -> list[str]:
    """``argv`` with every flag of :data:`REQUIRED_FLAGS` that it does not set itself."""
    given = {arg.split("=", 1)[0] for arg in argv}
    return argv + [part for flag in REQUIRED_FLAGS if flag[0] not in given for part in flag]


def install() -> None:
    """Map CUDA to the CPU in this process. Call it before anything of Megatron is imported."""
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron insists, for CUDA's sake
    _single_process_rendezvous()
    _map_cuda_module()
    _map_distributed()
    mode: Any = _CudaOnCpu()
    mode.__enter__()  # stays for the life of the process
    _map_megatron()


class _CudaOnCpu(TorchFunctionMode):
    """Every torch call with a CUDA device in its arguments is made with the CPU instead."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.Tensor.cuda or func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(args[0]).replace("torch.", "torch.cuda.", 1)
        if kwargs:
            if "device" in kwargs:
                kwargs = {**kwargs, "device": _to_cpu(kwargs["device"], integers=True)}
            if kwargs.get("pin_memory"):
                kwargs = {**kwargs, "pin_memory": False}
        if len(args) > 1:
            to = func is torch.Tensor.to
            args = (args[0], *(_to_cpu(arg, integers=to) for arg in args[1:]))
        return func(*args, **(kwargs or {}))


def _to_cpu(device: Any, *, integers: bool) -> Any:
    if isinstance(device, torch.device) and device.type == "cuda":
        return _CPU
    if isinstance(device, str) and device.startswith("cuda"):
        return _CPU
    if integers and isinstance(device, int) and not isinstance(device, bool):
        return _CPU
    return device


class _Stream:
    """A stream, event or device context that has nothing to wait for."""

    cuda_stream = 0
    stream_id = 0
    device_index = 0
    device = _CPU

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        pass

    synchronize = wait = wait_stream = wait_event = record = _nothing

    def record_event(self, *args: Any) -> _Stream:
        return self

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: object) -> float:
        return 0.0


class _HostGenerators:
    """``torch.cuda.default_generators``: the host's generator under every index."""

    def __getitem__(self, index: object) -> torch.Generator:
        return torch.default_generator


class _Properties:
    name = "cpu"
    major, minor = 8, 0
    multi_processor_count = 1
    total_memory = 0


def _map_cuda_module() -> None:
    cuda: Any = torch.cuda

    def answer(value: Any) -> Callable[..., Any]:
        return lambda *args, **kwargs: value

    for name, value in {
        "is_available": True,
        "is_initialized": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_name": "cpu",
        "get_device_capability": (8, 0),
        "get_device_properties": _Properties(),
        "current_stream": _Stream(),
        "default_stream": _Stream(),
        "is_current_stream_capturing": False,
        "is_bf16_supported": True,
        "memory_allocated": 0,
        "max_memory_allocated": 0,
        "memory_reserved": 0,
        "max_memory_reserved": 0,
        "memory_stats": {},
        "mem_get_info": (0, 0),
    }.items():
        setattr(cuda, name, answer(value))
    for name in (
        "_lazy_init", "init", "set_device", "set_stream", "synchronize", "empty_cache",
        "reset_peak_memory_stats", "ipc_collect",
    ):  # fmt: skip
        setattr(cuda, name, answer(None))
    for name in ("Stream", "Event", "stream", "device", "StreamContext", "ExternalStream"):
        setattr(cuda, name, _Stream)
    cuda._lazy_call = lambda function, **kwargs: function()

    def get_rng_state(device: object = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(state: torch.Tensor, device: object = None) -> None:
        torch.set_rng_state(state)

    def manual_seed(seed: int) -> None:
        torch.default_generator.manual_seed(int(seed))

    for module in (cuda, cuda.random):
        module.get_rng_state = get_rng_state
        module.set_rng_state = set_rng_state
        module.manual_seed = module.manual_seed_all = manual_seed
    cuda.default_generators = _HostGenerators()
    for kind in ("Float", "Half", "BFloat16", "Double", "Int", "Long", "Byte", "Bool"):
        setattr(cuda, f"{kind}Tensor", getattr(torch, f"{kind}Tensor"))
    torch.Tensor.is_cuda = property(lambda tensor: True)  # type: ignore[assignment]
    if hasattr(torch, "accelerator"):
        torch.accelerator.is_available = answer(False)


def _map_distributed() -> None:
    """Every process group is gloo's, without the options that only NCCL knows."""
    for name in ("init_process_group", "new_group"):
        mapped = _as_gloo(getattr(dist, name))
        setattr(dist, name, mapped)
        setattr(dist.distributed_c10d, name, mapped)


def _as_gloo(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    def call(*args: Any, **kwargs: Any) -> Any:
        arguments = signature.bind(*args, **kwargs).arguments
        for option in ("device_id", "pg_options"):
            arguments.pop(option, None)
        return original(**{**arguments, "backend": "gloo"})

    return call


def _map_megatron() -> None:
    import megatron.core.datasets.utils as dataset_utils
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    # The host's random state is the device's here, so it does change where Megatron warns of it.
    logging.getLogger("megatron.core.tensor_parallel.random").setLevel(logging.ERROR)
    # The wheel ships the compiled helper, but not the Makefile that this would call.
    try:
        import megatron.core.datasets.helpers_cpp  # noqa: F401
    except ImportError:
        pass
    else:
        dataset_utils.compile_helpers = lambda: None

    build_norm = WrappedTorchNorm.__new__

    def build_sequence_parallel_norm(cls: type, config: Any, *args: Any, **kwargs: Any) -> Any:
        # PyTorch's norm is right under sequence parallelism as long as its gradients are summed
        # over the tensor-parallel ranks, which Megatron does for parameters that carry this mark.
        plain = copy.copy(config)
        plain.sequence_parallel = False
        norm = build_norm(cls, plain, *args, **kwargs)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm

    WrappedTorchNorm.__new__ = build_sequence_parallel_norm


def _single_process_rendezvous() -> None:
    """A script that is started without torchrun is a world of one process."""
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(
        RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
