"""The step whose update is measured, and what a search along it says as a record."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_sharpness.core.directional import estimate_directional_sharpness
from megatron_sharpness.core.measurement import (
    TRAIN,
    Measurement,
    edge_of_stability,
    edge_of_stability_preconditioned,
)
from megatron_sharpness.core.products import StepProducts
from megatron_sharpness.core.search import SearchResult

#: η ↦ L(θ − ηΔθ) and the number of tokens, the same numbers on every rank. The loss may be NaN or
#: Inf; :class:`ProbeError` is raised, on all ranks, where there is no number.
LossAt = Callable[[float], tuple[float, int]]

#: The same of the losses on other data of these names.
LossesAt = Callable[[float, Sequence[str]], Mapping[str, tuple[float, int]]]


#: The same as :data:`LossAt` along the update of one part alone, by its name.
PartLossAt = Callable[[str, float], tuple[float, int]]


@dataclass(frozen=True)
class Step:
    """An optimizer step that has been made, and whose update is to be measured.

    Attributes:
        trained: whether the probes evaluate the loss that was differentiated: not in mode ``eval``.
        training_loss: L(θ) of the training pass, where it is known.
        terms: how many losses it was summed from: micro-batches of all ranks.
        noise: root-mean-square error of a loss from rounding the weights, in nats
            (:mod:`megatron_sharpness.core.products`).
        resolution: η below which rounded weights do not follow the line; 0 if none.
        coarse: whether the forward pass computes in 16 bits, or may do so.
        skipped: why there is no update to measure, or not yet, if so.
        failed: why the step could not be observed, if so.
        started: ``time.perf_counter()`` when the measurement began.
        part: whose update alone this is, the whole model's if empty. Then ``slope``, ``noise``,
            ``resolution`` and ``update_norm`` are of that.
        parts: the step again for each part that is to be measured.
        adam_snr: of the record of the step's own batch.

    The other fields are those of :class:`~megatron_sharpness.core.measurement.Measurement`.
    """

    iteration: int
    lr: float
    consumed_samples: int | None = None
    weight_decay: float = 0.0
    beta1: float | None = None
    trained: bool = True
    training_loss: float | None = None
    terms: int = 1
    slope: float | None = None
    noise: float = 0.0
    resolution: float = 0.0
    update_norm: float | None = None
    coarse: bool = True
    skipped: str | None = None
    failed: str | None = None
    started: float = field(default_factory=time.perf_counter)
    part: str = ""
    parts: Sequence[Step] = ()
    adam_snr: Mapping[str, Mapping[str, Any]] | None = None

    @property
    def has_moved(self) -> bool:
        """Whether there is an update."""
        return not (self.failed or self.skipped or self.lr == 0.0)

    def with_parts(self, names: Iterable[str]) -> Step:
        """The same with a step of each part, of which nothing else is known."""
        return replace(self, parts=[replace(self, part=name) for name in names])

    def along(self, products: Sequence[StepProducts], clip: float) -> Step:
        """The same with what its products say.

        Args:
            products: of the whole update, and of each of ``parts``.
            clip: what the gradients were multiplied by; 0 where they vanish.
        """
        whole, *of_parts = products
        parts = [part._with(found, clip) for part, found in zip(self.parts, of_parts, strict=True)]
        return replace(self, parts=parts)._with(whole, clip)

    def without_slope(self) -> Step:
        """The same where the gradient at θ is not known."""
        return replace(self, slope=None, parts=[replace(p, slope=None) for p in self.parts])

    def _with(self, products: StepProducts, clip: float) -> Step:
        return replace(
            self,
            slope=products.decrease / self.lr / clip if clip else 0.0,
            noise=products.noise(clip) if clip else 0.0,
            resolution=products.resolution(self.lr),
            update_norm=math.sqrt(products.squared_update) / self.lr,
        )

    @property
    def is_finite(self) -> bool:
        """Whether gradient and update are, as far as they are known."""
        known = (self.slope, self.noise, self.update_norm)
        return all(math.isfinite(value) for value in known if value is not None)

    def blank(self, name: str) -> Measurement:
        """The record of a step before anything was evaluated."""
        record = Measurement(
            iteration=self.iteration,
            consumed_samples=self.consumed_samples,
            lr=self.lr,
            batch=name,
            part=self.part or None,
            status="failed",
            slope=self.slope if name == TRAIN else None,
            update_norm=self.update_norm,
            adam_snr=self.adam_snr if name == TRAIN and not self.part else None,
        )
        if self.lr == 0.0:
            return record
        line = edge_of_stability(self.lr, self.weight_decay)
        if self.beta1 is None:
            return replace(record, edge_of_stability=line)
        other = edge_of_stability_preconditioned(self.lr, self.weight_decay, self.beta1)
        return replace(record, edge_of_stability=line, edge_of_stability_preconditioned=other)

    def read(self, record: Measurement, search: SearchResult) -> Measurement:
        """The record with what the search has found."""
        assert record.loss is not None and record.noise is not None
        record = replace(
            record,
            status=search.status,
            reason=search.reason,
            non_monotone=search.non_monotone,
            critical_lr_lower=search.lower,
            critical_lr_upper=search.upper,
            directional_sharpness=estimate_directional_sharpness(
                record.loss,
                record.slope,
                search.probes,
                critical_lr=search.eta,
                noise=record.noise,
                resolution=self.resolution,
            ),
        )
        if search.status == "noise_limited":
            return replace(record, reason=self._hidden(record))
        if search.eta is None:
            return record
        return replace(
            record,
            critical_lr=search.eta,
            critical_lr_error=search.error,
            critical_sharpness=2.0 / search.eta,
            lr_over_critical=self.lr / search.eta,
        )

    def _hidden(self, record: Measurement) -> str:
        """What hides η_c, and what would help."""
        assert record.noise is not None
        bracketed = record.critical_lr_lower is not None and record.critical_lr_upper is not None
        where = "as narrow a bracket as was asked for" if bracketed else "where it falls below L(θ)"
        if 2 * self.noise**2 > record.noise**2:
            source = "of rounding the weights to 16 bits"
            remedy = "fp32 weights in the forward pass"
        else:
            source, remedy = "of evaluating it again", "kernels that repeat, or fp32"
        return (
            f"the noise of the loss, {record.noise:.2g} nat {source}, hides {where}; what would "
            f"help: {remedy}, more tokens in the batch, a higher learning rate"
            + (", or a wider tolerance" if bracketed else "")
        )
