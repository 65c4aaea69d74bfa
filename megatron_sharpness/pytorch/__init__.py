"""Critical sharpness of models that are trained with PyTorch itself.

Plain modules, DistributedDataParallel, FSDP2 (``fully_shard``), the package megatron-fsdp,
tensor-parallel DTensors, ZeroRedundancyOptimizer, pipelines. The trainers above PyTorch are in
:mod:`megatron_sharpness.trainers`.
"""

from megatron_sharpness.pytorch.critical_sharpness import CriticalSharpness

__all__ = ["CriticalSharpness"]
