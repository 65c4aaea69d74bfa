"""Exact curvature of small models, to hold λ_c against."""

from megatron_sharpness.reference.curvature import (
    ExactCurvature,
    adam_preconditioner,
    exact_curvature,
    largest_eigenvalue,
)

__all__ = ["ExactCurvature", "adam_preconditioner", "exact_curvature", "largest_eigenvalue"]
