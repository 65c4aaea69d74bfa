"""Critical sharpness of models that are trained with PyTorch itself.

Plain modules, DistributedDataParallel, FSDP2 (``fully_shard``), tensor-parallel DTensors,
ZeroRedundancyOptimizer. The trainers above PyTorch have a module each, which is imported only when
asked for: :mod:`~megatron_sharpness.pytorch.hf`, :mod:`~megatron_sharpness.pytorch.lightning`,
:mod:`~megatron_sharpness.pytorch.olmo_core`, :mod:`~megatron_sharpness.pytorch.torchtitan`.
"""

from megatron_sharpness.pytorch.critical_sharpness import CriticalSharpness

__all__ = ["CriticalSharpness"]
