"""The record of one measurement of critical sharpness, and what its numbers mean.

Notation, after Kalra et al., "A Scalable Measure of Loss Landscape Curvature for Analyzing the
Training Dynamics of LLMs" (2026, arXiv 2601.16979): the optimizer has moved θ to θ − ηΔθ with the
learning rate η; L is the loss of the step's own batch.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, Protocol, get_args

#: How a measurement ended. The first seven are endings of the line search.
Status = Literal[
    "found",  # L(lower) ≤ L(θ) < L(upper), as far as the noise tells, and as narrow as asked for
    "not_descent",  # the slope is not positive and no decrease was found: η_c = 0
    "no_upper",  # the loss never rises along the update
    "no_lower",  # the loss never falls along the update
    "noise_limited",  # the noise of the loss hides where it crosses L(θ)
    "non_finite",  # L(θ) itself is NaN or infinite, or the gradient or the update
    "exhausted",  # the evaluations were spent
    "skipped_step",  # the optimizer skipped it (overflow under fp16 loss scaling), or see `reason`
    "zero_lr",  # the learning rate is zero: nothing has moved
    "failed",  # an error, or a loss that is not the one trained on; `reason` says which
]
STATUSES: tuple[str, ...] = get_args(Status)

#: Those that come without η_c and λ_c.
MISSED = tuple(status for status in STATUSES if status != "found")

#: λ_c^{1→2} where the loss rises at once, or never.
_ENDINGS: dict[str, float] = {"not_descent": math.inf, "no_lower": math.inf, "no_upper": 0.0}

#: Tag in TensorBoard and W&B → field of :class:`Measurement`.
TAGS = {
    "critical-sharpness": "critical_sharpness",
    "critical-learning-rate": "critical_lr",
    "learning-rate-over-critical": "lr_over_critical",
    "directional-sharpness": "directional_sharpness",
    "edge-of-stability": "edge_of_stability",
    "critical-sharpness-evaluations": "evaluations",
    "critical-sharpness-seconds": "seconds",
}

#: What the means of second moments are taken over: the columns of each row, the rows of each
#: column, or all (:mod:`megatron_sharpness.core.second_moments`).
OVER = ("fan_in", "fan_out", "both")
SNR_TAG = "adam-snr"


#: The name of the step's own batch, which a loss on other data cannot have.
TRAIN = "train"

#: Those that a loss on other data has too, under ``"<tag>/<its name>"``, and a part of the model,
#: under ``"<tag>/part/<its name>"``.
RELATIVE_TAGS = ("critical-sharpness", "critical-learning-rate", "learning-rate-over-critical")


#: Before the name of a part of the model in the name of its record.
PART = "part/"


def name_of(batch: str, part: str | None) -> str:
    """What a record is called among those of its step: the data, or ``part/NAME``."""
    return batch if part is None else f"{PART}{part}"


class Scalars(Protocol):
    """What a logger of curves draws: a :class:`Measurement`, or what else belongs beside it."""

    @property
    def iteration(self) -> int: ...
    @property
    def consumed_samples(self) -> int | None: ...
    def scalars(self) -> dict[str, float]: ...


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One measurement. A number that could not be had is ``None``, and ``status`` says why.

    Attributes:
        iteration: training iteration, as in the framework's own log.
        consumed_samples: samples trained on up to and with this iteration, where they are counted.
        lr: learning rate η that the step was made with; Megatron's log line shows the next one's.
        loss: L(θ), mean loss a token of the step's batch before the step, in nats.
        slope: s = ⟨g, Δθ⟩ with the unclipped gradient g, the first-order decrease for a unit of
            learning rate.
        critical_lr: η_c = min{η > 0 : L(θ − ηΔθ) > L(θ)} (Def. 2.1), interpolated in its bracket.
        critical_lr_error: relative standard uncertainty of η_c, and so of λ_c: of interpolating it
            (:func:`megatron_sharpness.core.search.interpolation.interpolate`), and of the noise.
        critical_lr_lower, critical_lr_upper: the bracket, L(lower) ≤ L(θ) < L(upper) by more than
            the noise; under other statuses than ``found`` the tightest one seen.
        critical_sharpness: λ_c = 2/η_c (Def. 2.1).
        directional_sharpness: λ_dir = ΔθᵀHΔθ / ⟨g, Δθ⟩ (Result 2.1), estimated from the probes as
            :mod:`megatron_sharpness.core.directional` says, where one stands out from the noise.
        edge_of_stability: 2/η − γ, the line for λ_max of the Hessian, γ being the decoupled weight
            decay, and for λ_c where γ is small beside 2/η. Along an update that holds the decay
            λ_c itself settles at 2/η (experiments/weight_decay).
        edge_of_stability_preconditioned: (2/η − γ)(1 + β₁)/(1 − β₁), the line for λ_max of the
            pre-conditioned Hessian under Adam (Result 3.1).
        lr_over_critical: η/η_c; the step alone would raise the loss where it is above 1.
        update_norm: ‖Δθ‖₂ over all parameters.
        evaluations: forward passes over the batch that the search made.
        seconds: wall-clock time of the measurement.
        tokens: tokens in the batch that the loss was averaged over.
        batch: which data the loss L is of: ``train``, the step's own batch, or the name of other
            data. There η_c and λ_c are the relative ones of Def. 4.1, of L along the update that
            the step's own batch has made: η_c^{1→2} = min{η > 0 : L₁(θ − ηΔθ₂) > L₁(θ)}.
        part: of which part P of the model the update was followed alone, the rest staying at θ:
            η_c^P = min{η > 0 : L(θ − ηΔθ_P) > L(θ)} (:mod:`megatron_sharpness.core.parts`), with
            the slope ⟨g, Δθ_P⟩ and the norm ‖Δθ_P‖₂. None is the whole model.
        status: how the measurement ended, see :data:`Status`.
        non_monotone: whether the loss crossed L(θ) more than once along the line.
        noise: root-mean-square error of one loss, in nats: of rounding the weights to the precision
            in which the forward pass reads them, √(Σ g²u²/12) with their spacing u; of kernels, as
            L(θ) was seen to repeat when it was first measured; and of fp32.
        replay_error: |replayed L(θ) − training loss|, in nats, as the run's first measurement has
            seen it, or this one in a mode that is self-tested; None where the training loss is not
            known.
        self_tested: modes of this run that were believed through its own self-test alone, since
            nobody could test them before: nothing was changed, and L(θ) was replayed exactly. None
            where there are none, or where the test is not passed.
        reason: what was seen, where the status does not say it all.
        adam_snr: signal-to-noise ratios of the optimizer's second moments by kind of layer
            (:func:`megatron_sharpness.core.second_moments.by_kind`), where they were asked for.
    """

    iteration: int
    consumed_samples: int | None
    lr: float
    batch: str
    status: Status
    loss: float | None = None
    slope: float | None = None
    critical_lr: float | None = None
    critical_lr_error: float | None = None
    critical_lr_lower: float | None = None
    critical_lr_upper: float | None = None
    critical_sharpness: float | None = None
    directional_sharpness: float | None = None
    edge_of_stability: float | None = None
    edge_of_stability_preconditioned: float | None = None
    lr_over_critical: float | None = None
    update_norm: float | None = None
    evaluations: int = 0
    seconds: float = 0.0
    tokens: int | None = None
    non_monotone: bool = False
    noise: float | None = None
    replay_error: float | None = None
    self_tested: str | None = None
    part: str | None = None
    reason: str | None = None
    adam_snr: Mapping[str, Mapping[str, Any]] | None = None

    @property
    def name(self) -> str:
        """What :class:`Records` calls it: the data, or ``part/NAME``."""
        return name_of(self.batch, self.part)

    def without_number(self, reason: str) -> Measurement:
        """The record of a measurement that is not to be trusted, with what was known before it."""
        kept = ("iteration", "consumed_samples", "lr", "batch", "part", "seconds", "evaluations")
        values = {name: getattr(self, name) for name in kept}
        return Measurement(**values, status="failed", reason=reason)

    def to_json(self) -> str:
        """One line of strict JSON: a number that is not finite is ``null``."""
        return json.dumps(
            {key: _finite(value) for key, value in dataclasses.asdict(self).items()},
            allow_nan=False,
        )

    def scalars(self) -> dict[str, float]:
        """Tag → value of what a logger can draw; what was not measured is left out."""
        values = {tag: _finite(getattr(self, field)) for tag, field in TAGS.items()}
        if self.name != TRAIN:
            values = {f"{tag}/{self.name}": values[tag] for tag in RELATIVE_TAGS}
        for kind, ratios in (self.adam_snr or {}).items():
            values |= {f"{SNR_TAG}/{kind}/{over}": ratios[over] for over in OVER}
        return {tag: float(value) for tag, value in values.items() if value is not None}


class Records(Mapping[str, Measurement]):
    """What was measured of one step: the records by :attr:`Measurement.name`, the step's own batch
    first.

    Args:
        measurements: one of the step's own batch, and those of other data and of parts.
    """

    def __init__(self, measurements: Iterable[Measurement]) -> None:
        self._named = {measurement.name: measurement for measurement in measurements}

    def __getitem__(self, name: str) -> Measurement:
        return self._named[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._named)

    def __len__(self) -> int:
        return len(self._named)

    @property
    def train(self) -> Measurement:
        """Of the step's own batch."""
        return self[TRAIN]

    def scalars(self) -> dict[str, float]:
        """Tag → value of all of them, for a logger."""
        return {tag: v for record in self.values() for tag, v in record.scalars().items()}

    def with_train(self, measurement: Measurement) -> Records:
        """The same with another record of the step's own batch."""
        return Records({**self._named, TRAIN: measurement}.values())

    def without_numbers(self, reason: str) -> Records:
        """All of them as :meth:`Measurement.without_number` says."""
        return Records(record.without_number(reason) for record in self.values())


def edge_of_stability(lr: float, weight_decay: float) -> float:
    """2/η − γ: where λ_c and λ_max of the Hessian settle at the edge of stability."""
    return 2.0 / lr - weight_decay


def edge_of_stability_preconditioned(lr: float, weight_decay: float, beta1: float) -> float:
    """(2/η − γ)(1 + β₁)/(1 − β₁): the line for the pre-conditioned Hessian (Result 3.1)."""
    return edge_of_stability(lr, weight_decay) * (1.0 + beta1) / (1.0 - beta1)


def rate_over_critical(status: str, lr_over_critical: float | None) -> float | None:
    """η/η_c of a record, in [0, ∞]: 0 where the loss never rises along the update, ∞ where it rises
    from the start or is not finite. None where that was not measured.
    """
    endings = {"not_descent": math.inf, "no_lower": math.inf, "non_finite": math.inf}
    return {"no_upper": 0.0, **endings}.get(status, lr_over_critical)


def relative_sharpness(
    status: str, critical_sharpness: float | None, critical_lr_lower: float | None = None
) -> float | None:
    """λ_c^{1→2} of a record, in [0, ∞]; None where it was not measured.

    A loss whose noise hides η_c, and that was never seen to fall, rises at once as far as that
    lets one tell.
    """
    if status == "noise_limited" and critical_lr_lower is None:
        return math.inf
    return _ENDINGS.get(status) if critical_sharpness is None else critical_sharpness


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
