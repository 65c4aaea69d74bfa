"""Critical sharpness, the curvature that training feels, measured inside real training runs."""

from megatron_sharpness.core.measurement import Measurement
from megatron_sharpness.core.search import SearchResult, find_critical_lr

__all__ = ["Measurement", "SearchResult", "find_critical_lr"]
