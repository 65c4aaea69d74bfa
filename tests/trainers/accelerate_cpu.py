"""What accelerate 1.15 does on GPUs alone, and can do on a CPU: FSDP2 of its own, and the tensor
parallelism of a model that it is given. Import it before an ``Accelerator`` is made."""

from __future__ import annotations

from typing import Any

from accelerate import ParallelismConfig
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

_init = AcceleratorState.__init__


def _init_with_fsdp(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kw: Any) -> None:
    """Where a plugin is given it is used; accelerate asks first for one of a list of GPUs."""
    _init(self, *args, fsdp_plugin=fsdp_plugin, **kw)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.fsdp_plugin = fsdp_plugin
        self.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP


AcceleratorState.__init__ = _init_with_fsdp
ParallelismConfig._validate_accelerator = lambda *_: None  # refuses processes without GPUs
