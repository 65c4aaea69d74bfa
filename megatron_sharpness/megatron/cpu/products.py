"""Matrix products in 16 bits where the CPU has no kernel for them: in fp32, rounded once.

PyTorch goes element by element there (x86 without AVX-512), many times slower than in fp32. Kernels
add up in fp32 and round once, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from megatron_sharpness.megatron.cpu.modes import Mode, stay_in

_PRODUCTS = frozenset({
    functional.linear, torch.einsum,
    torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm,
    torch.addmm, Tensor.addmm, torch.baddbmm, Tensor.baddbmm,
})  # fmt: skip


def multiply_in_fp32() -> None:
    """Have products that the CPU has no kernel for made in fp32, to the end of the process."""
    if without_kernel := _without_kernel():
        stay_in(_InFp32(without_kernel))


def _without_kernel() -> frozenset[torch.dtype]:
    onednn: Any = torch.backends.mkldnn
    used = onednn.is_available() and onednn.enabled
    kernels = torch.ops.mkldnn
    has = {
        torch.bfloat16: used and kernels._is_mkldnn_bf16_supported(),
        torch.float16: used and kernels._is_mkldnn_fp16_supported(),
    }
    return frozenset(dtype for dtype, there in has.items() if not there)


class _InFp32(Mode):
    """Makes the products of tensors of some dtypes, and their gradients', in fp32."""

    def __init__(self, dtypes: frozenset[torch.dtype]) -> None:
        super().__init__()
        self._dtypes = dtypes

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func not in _PRODUCTS or kwargs.get("out") is not None:
            return func(*args, **kwargs)
        dtypes = {value.dtype for value in (*args, *kwargs.values()) if isinstance(value, Tensor)}
        if len(dtypes) != 1 or not dtypes <= self._dtypes:
            return func(*args, **kwargs)
        wide = {key: _fp32(value) for key, value in kwargs.items()}
        return func(*map(_fp32, args), **wide).to(dtypes.pop())


def _fp32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) else value
