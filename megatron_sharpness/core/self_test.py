"""The self-test of a run: what a loss has to pass before it is believed, and what that has shown.

Each test is made once, by the first measurements; :mod:`megatron_sharpness.core.checks` says what
passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from megatron_sharpness.core.checks import (
    DISAGREES,
    ROUNDING,
    SAME,
    SAME_IN_16_BITS,
    SEEN,
    STILL,
    SelfTestFailed,
    WrongLoss,
    agrees,
    is_exact,
    not_replayed,
    order_of_sum,
    repeat_error,
    replay_error,
    slope_ratio,
    still,
    wrong_slope,
)
from megatron_sharpness.core.measurement import TRAIN, Measurement
from megatron_sharpness.core.search import SearchResult
from megatron_sharpness.core.step import Step


@dataclass
class SelfTest:
    """What a run has shown of its losses.

    Attributes:
        repeat_errors: root-mean-square error of L(θ) evaluated again, in nats, by name of the data,
            as it was seen when that loss was first measured.
        replay_error: |replayed L(θ) − training loss|, in nats; None where none was compared.
        slope_agrees: whether next to θ the loss was seen to fall as the slope says; None before.
    """

    repeat_errors: dict[str, float] = field(default_factory=dict)
    replay_error: float | None = None
    slope_agrees: bool | None = None

    def noise(self, step: Step, name: str, loss: float) -> float:
        """Root-mean-square error of one loss: of the weights' rounding, of kernels, and of fp32."""
        rounding = ROUNDING * loss if math.isfinite(loss) else 0.0
        return math.hypot(step.noise, self.repeat_errors.get(name, 0.0), rounding)

    def loss_at_start(
        self, step: Step, loss_at: Callable[[float], float], warn: Callable[[str], object]
    ) -> float:
        """L(θ): the training loss where its replay is known to equal it, an evaluation elsewhere.

        Args:
            step: the step.
            loss_at: η ↦ L(θ − ηΔθ).
            warn: tells the user what a record cannot.

        Raises:
            WrongLoss: it does not repeat, or is not the loss that was trained on.
        """
        trained = step.training_loss
        if trained is None:
            loss = loss_at(0.0)
            self.check_repeats(step, TRAIN, loss, lambda: loss_at(0.0))
            return loss
        if not math.isfinite(trained) or is_exact(self.replay_error, trained):
            return trained
        loss = loss_at(0.0)
        exact = is_exact(abs(loss - trained), trained)
        self.check_repeats(step, TRAIN, loss, lambda: trained if exact else loss_at(0.0))
        error = replay_error(loss, trained, _same(step))
        if self.replay_error is None and not exact:
            warn(
                f"critical sharpness: the replayed loss {loss!r} differs from the training loss "
                f"{trained!r} at iteration {step.iteration}. L(θ) is evaluated at each "
                "measurement from now on, at the cost of one forward pass. Likely causes: kernels "
                "that are not deterministic, or state that a forward pass changes; a loss that is "
                "not quite the one trained on, such as another batch's or one without a small term."
            )
        self.replay_error = error
        return trained if exact else loss

    def exact_loss_at_start(
        self, step: Step, loss_at: Callable[[float], float], modes: Sequence[str]
    ) -> float:
        """L(θ) in modes that have to show, each time, that a replay is the training loss exactly.

        Args:
            step: the step, whose training loss is known.
            loss_at: η ↦ L(θ − ηΔθ).
            modes: their names.

        Raises:
            SelfTestFailed: it is another number by more than the order of the sum explains.
        """
        trained = step.training_loss
        assert trained is not None
        if not math.isfinite(trained):
            return trained
        loss = loss_at(0.0)
        self.replay_error = abs(loss - trained)
        if not self.replay_error <= order_of_sum(trained, step.terms):
            raise SelfTestFailed(not_replayed(modes, loss, trained))
        self.repeat_errors[TRAIN] = 0.0
        return trained

    def check_repeats(
        self, step: Step, name: str, loss: float, again: Callable[[], float]
    ) -> None:
        """Once for each loss: whether it repeats, and with which error.

        Raises:
            WrongLoss: it does not.
        """
        if name not in self.repeat_errors and math.isfinite(loss):
            self.repeat_errors[name] = repeat_error(loss, again, _same(step))

    def check_moves(self, step: Step, search: SearchResult, loss: float, noise: float) -> None:
        """Whether the loss follows the weights at all.

        Raises:
            WrongLoss: it is L(θ) wherever it was looked, though the slope promises to be seen.
        """
        losses = {probe.loss for probe in search.probes}
        if len(search.probes) < 3 or len(losses) > 1:
            return
        (everywhere,) = losses
        if not math.isfinite(everywhere) or not is_exact(abs(everywhere - loss), loss):
            return
        farthest = max(probe.lr for probe in search.probes)
        promised = step.slope is None or abs(step.slope) * farthest > SEEN * noise
        if promised and farthest > step.resolution:
            raise WrongLoss(still(everywhere))

    def check_slope(
        self,
        step: Step,
        record: Measurement,
        search: SearchResult,
        loss_at: Callable[[float], float],
        warn: Callable[[str], object],
    ) -> Measurement:
        """Once a run: whether next to θ the loss falls as the slope says.

        Where it does not and the loss is known to be right, the slope is of more than this loss,
        and not used.

        Raises:
            WrongLoss: it does not, and the loss may be the wrong one.
        """
        slope = step.slope
        if self.slope_agrees is not None or slope is None or not 0 < slope < math.inf:
            return record
        assert record.loss is not None and record.noise is not None
        nearest = max(SEEN * record.noise / slope, step.resolution)
        ratio = slope_ratio(
            record.loss, slope, nearest, search.probes, search.eta or search.upper, loss_at
        )
        if ratio is None:
            return record
        if step.trained:
            known = self.replay_error is not None and abs(ratio) >= STILL
        else:  # without dropout, say, it is a similar loss
            known = agrees(ratio, DISAGREES)
        if not agrees(ratio) and not known:
            raise WrongLoss(wrong_slope(ratio))
        self.slope_agrees = agrees(ratio)
        if self.slope_agrees:
            return record
        if step.trained:
            warn(
                f"critical sharpness: next to θ the loss falls {ratio:.3g} times as fast as the "
                "gradient says, so that the slope and the directional sharpness are left out of "
                "the records. η_c does not depend on it. Likely causes: gradients that were "
                "clipped, where the norm is not given, or losses that are in the gradient alone."
            )
        return replace(record, slope=None, directional_sharpness=None)


def _same(step: Step) -> float:
    return SAME_IN_16_BITS if step.coarse else SAME
