"""What NeMo AutoModel 0.7 asks of CUDA, answered for a CPU. Import it before its recipes."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

# Its RMSNorm is compiled when it is first called, which takes minutes here.
os.environ["TORCHDYNAMO_DISABLE"] = "1"

import torch

torch.cuda.reset_peak_memory_stats = lambda *_: None

import nemo_automodel._transformers.auto_model as auto_model  # noqa: E402


class _OnCPU:
    """The module ``torch`` for one that names the current CUDA device."""

    cuda = SimpleNamespace(current_device=lambda: torch.device("cpu"))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def device(self, *_: Any) -> torch.device:
        return torch.device("cpu")


auto_model.torch = _OnCPU()
