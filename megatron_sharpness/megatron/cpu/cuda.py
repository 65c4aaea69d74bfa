"""PyTorch's CUDA surface, answered with the host's own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from megatron_sharpness.megatron.cpu.modes import Mode, stay_in

_CPU = torch.device("cpu")


def map_cuda() -> None:
    """Answer every call to CUDA in this process with the host's twin, to the end of its life."""
    _map_device()
    _map_memory()
    _map_streams()
    _map_random_states()
    _map_profilers()
    _map_tensors()
    stay_in(_CudaOnCpu())


class _CudaOnCpu(Mode):
    """Every torch call with a CUDA device in its arguments is made with the CPU instead."""

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is torch.Tensor.cuda or func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(args[0]).replace("torch.", "torch.cuda.", 1)
        if "device" in kwargs:
            kwargs = {**kwargs, "device": _to_cpu(kwargs["device"], integers=True)}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        if len(args) > 1:
            to = func is torch.Tensor.to
            args = (args[0], *(_to_cpu(arg, integers=to) for arg in args[1:]))
        return func(*args, **kwargs)


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

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return 0, 0


class _HostGenerators:
    """``torch.cuda.default_generators``: the host's generator under every index."""

    def __getitem__(self, index: object) -> torch.Generator:
        return torch.default_generator


class _Properties:
    name = "cpu"
    major, minor = 8, 0
    multi_processor_count = 1
    total_memory = 2**40  # --init-model-with-meta-device divides by it


class _Runtime:
    """``torch.cuda.cudart()``: CUDA's own library, asked only to start and stop its profiler."""

    def cudaProfilerStart(self) -> int:
        return 0

    def cudaProfilerStop(self) -> int:
        return 0


def _answers(module: Any, answers: dict[str, Any]) -> None:
    """Functions of ``module`` that say the same whatever they are asked."""

    def answer(value: Any) -> Callable[..., Any]:
        return lambda *args, **kwargs: value

    for name, value in answers.items():
        setattr(module, name, answer(value))


def _map_device() -> None:
    cuda: Any = torch.cuda
    _answers(
        cuda,
        {
            "is_available": True,
            "is_initialized": True,
            "device_count": 1,
            "current_device": 0,
            "get_device_name": "cpu",
            "get_device_capability": (8, 0),
            "get_device_properties": _Properties(),
            "is_bf16_supported": True,
            "_lazy_init": None,
            "init": None,
            "set_device": None,
            "ipc_collect": None,
            "check_error": None,
            # What NVIDIA's management library would measure.
            "temperature": 0,
            "power_draw": 0,
            "utilization": 0,
            "clock_rate": 0,
        },
    )
    cuda._lazy_call = lambda function, **kwargs: function()
    if hasattr(torch, "accelerator"):
        _answers(torch.accelerator, {"is_available": False})


def _map_memory() -> None:
    """No byte is the device's: every count is zero, and there is no history of them."""
    _answers(
        torch.cuda,
        {
            "memory_allocated": 0,
            "max_memory_allocated": 0,
            "memory_reserved": 0,
            "max_memory_reserved": 0,
            "device_memory_used": 0,
            "memory_stats": Counter(),
            "memory_snapshot": [],
            "mem_get_info": (0, 0),
            "empty_cache": None,
            "reset_peak_memory_stats": None,
        },
    )
    _answers(
        torch.cuda.memory,
        {"_record_memory_history": None, "_snapshot": {}, "_dump_snapshot": None},
    )


def _map_streams() -> None:
    cuda: Any = torch.cuda
    _answers(
        cuda,
        {
            "current_stream": _Stream(),
            "default_stream": _Stream(),
            "set_stream": None,
            "is_current_stream_capturing": False,
            "synchronize": None,
        },
    )
    for name in ("Stream", "Event", "stream", "device", "StreamContext", "ExternalStream"):
        setattr(cuda, name, _Stream)
    _answers(torch.Tensor, {"record_stream": None})


def _map_random_states() -> None:
    cuda: Any = torch.cuda

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
        module.initial_seed = torch.initial_seed
    cuda.default_generators = _HostGenerators()


def _map_profilers() -> None:
    """NVIDIA's profilers are told nothing; PyTorch's own works as it is."""
    _answers(torch.cuda, {"cudart": _Runtime()})
    _answers(torch.cuda.nvtx, {"range_push": 0, "range_pop": 0})


def _map_tensors() -> None:
    for kind in ("Float", "Half", "BFloat16", "Double", "Int", "Long", "Byte", "Bool"):
        setattr(torch.cuda, f"{kind}Tensor", getattr(torch, f"{kind}Tensor"))
    # But for what :class:`HostTensors` has marked, everything is on the device.
    torch.Tensor.is_cuda = property(  # type: ignore[assignment]
        lambda tensor: not getattr(tensor, "_on_host", False)
    )


class HostTensors(Mode):
    """Within it a tensor that is moved to the host, and what is made of it, is told from those on
    the device, for good."""

    _KEEPING = frozenset(
        {torch.Tensor.pin_memory, torch.Tensor.detach, torch.Tensor.clone, torch.Tensor.float}
    )

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = func(*args, **kwargs)
        if func is torch.Tensor.cpu:
            result = result.view(result.shape)  # another tensor than what it was made of
        elif func not in self._KEEPING or not getattr(args[0], "_on_host", False):
            return result
        result._on_host = True
        return result
