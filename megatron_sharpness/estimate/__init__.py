"""What measuring would cost a Megatron run, before it is made."""

from megatron_sharpness.estimate.configuration import (
    Run,
    count_parameters,
    parse_flags,
    plan,
    split,
)
from megatron_sharpness.estimate.model import (
    Cost,
    cost,
    exposed_gather,
    forward_seconds,
    iteration_seconds,
)

__all__ = [
    "Cost",
    "Run",
    "cost",
    "count_parameters",
    "exposed_gather",
    "forward_seconds",
    "iteration_seconds",
    "parse_flags",
    "plan",
    "split",
]
