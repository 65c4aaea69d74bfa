"""What a loss has to pass before it is believed: it repeats, it is the one that was trained on, and
next to θ it falls as the gradient says.

What does not pass is no number but a :class:`WrongLoss`, whose message is the record's reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from megatron_sharpness.core.errors import ProbeError
from megatron_sharpness.core.search import Probe

#: A replayed L(θ) is the training loss to within this, relatively: the two differ in the order and
#: precision of the sum over micro-batches alone.
EXACT = 2e-6

#: The largest relative error of rounding a number to fp64.
UNIT = 2.0**-53

#: A loss that is further off than this, relatively, is another loss, such as that of another batch:
#: before training these differ by 1e-3. Kernels that do not repeat were seen to move the mean of a
#: batch by 1e-4 in 16 bits at most, where it takes ten times as much.
SAME, SAME_IN_16_BITS = 1e-4, 1e-3

#: The error of a mean loss that was computed in fp32, relatively: a few roundings.
ROUNDING = 2.0**-22

#: "Next to θ": the slope promises a fall of this part of L(θ), at this part of η_c. There 1 - 1/16
#: of what it promises is left on a quadratic loss, and 0.7 was the least in GPTs' first steps.
NEXT_TO_LOSS, NEXT_TO_CRITICAL = 0.01, 1 / 16

#: A fall is compared with the slope where it would be so many times the noise; it agrees with it
#: within this factor. Auxiliary losses, which the gradient holds and L does not, and other dropout
#: masks stay within it; a sum that is divided by two micro-batches does not. A loss that bends soon
#: was seen at half its slope: where a second look cannot be taken nearer to θ, one disagrees by
#: four.
SEEN, AGREES, DISAGREES = 10.0, 1.8, 4.0

#: Names that a reason holds.
NAMED = 8

#: A loss that falls by no more than this part of what the slope says does not follow the weights.
STILL = 0.01


class WrongLoss(ProbeError):
    """What is evaluated is not the loss that was differentiated; the message says what was seen."""


class Ending(WrongLoss):
    """A loss after which no further step of the run is measured."""


class Unrepeatable(Ending):
    """It is another one each time: evaluating it once more can only change something again."""


class SelfTestFailed(Ending):
    """A mode that has to show in the run itself that it is replayed exactly, and was not."""


def is_exact(error: float | None, trained: float) -> bool:
    """Whether a replay that is off by ``error`` may stand for the training loss."""
    return error is not None and error <= EXACT * max(1.0, abs(trained))


def order_of_sum(loss: float, terms: int) -> float:
    """How far two sums of the same losses may lie apart, in nat: 2n·2⁻⁵³·|L|.

    L is (Σ lᵢ)/(Σ wᵢ) over n micro-batches of all ranks, in fp64. Each lᵢ is the same number in
    both, and none is negative, so that n - 1 additions in whichever order make a relative error of
    (n - 1)·2⁻⁵³ at most; the wᵢ are whole numbers, whose sum is exact; the division adds 2⁻⁵³. Two
    such means differ by twice n·2⁻⁵³. One lᵢ that is off in the last bit of fp32 moves L by about
    2⁻²⁴/n, which is more as long as n < 2¹⁴.

    Args:
        loss, terms: L and n.
    """
    return 2.0 * terms * UNIT * abs(loss)


def not_replayed(modes: Sequence[str], loss: float, trained: float) -> str:
    """What to say of a mode whose replay is not the training loss."""
    return (
        f"self-test of {', '.join(modes)}: the loss evaluated at θ is {loss!r}, and the step was "
        f"trained on {trained!r}. They are {abs(loss - trained):.3g} nat apart, more than the "
        "order of the sum explains: something that a forward pass reads is not put back, or "
        "kernels do not repeat. Training goes on as it was, and no further step of this run is "
        "measured"
    )


def repeat_error(loss: float, loss_at_start: Callable[[], float], same: float) -> float:
    """Root-mean-square error of L(θ) from evaluating it once more, and twice more if it differs.

    Args:
        loss, loss_at_start: L(θ), and what evaluates it again.
        same: SAME, or SAME_IN_16_BITS.

    Raises:
        Unrepeatable: it differs by more than kernels can explain.
    """
    losses = [loss, loss_at_start()]
    if losses[0] == losses[1]:
        return 0.0
    losses += [loss_at_start(), loss_at_start()]
    if not all(abs(value - loss) <= max(same * abs(loss), EXACT) for value in losses):
        raise Unrepeatable(
            f"the loss does not repeat: evaluated {len(losses)} times at the same weights it is "
            f"{min(losses):.6g} to {max(losses):.6g}. Likely causes: another batch at each call; "
            "state that it changes where it cannot be reached from the model (name it: `keep`), "
            "such as iterators and generators of other libraries. No further step of this run is "
            "measured"
        )
    mean = sum(losses) / len(losses)
    return math.sqrt(sum((value - mean) ** 2 for value in losses) / (len(losses) - 1))


def replay_error(loss: float, trained: float, same: float) -> float:
    """|L(θ) as it is evaluated - L(θ) as it was trained on|, in nat.

    Args:
        loss, trained: the two.
        same: SAME, or SAME_IN_16_BITS.

    Raises:
        WrongLoss: they are not the same loss.
    """
    error = abs(loss - trained)
    if error <= max(same * abs(trained), EXACT):
        return error
    raise WrongLoss(
        f"the loss evaluated at θ is {loss:.6g}, and the step was trained on {trained:.6g} "
        f"({loss / trained if trained else math.inf:.6g} times). Likely causes: a mean where the "
        "sum of losses is to be returned, or another number of tokens; another batch than the "
        "step's own (that is a loss on other data); another loss, such as one without a term that "
        "training adds; a loss given that was scaled for the backward pass; dropout masks that are "
        "drawn anew"
    )


def slope_ratio(
    loss: float,
    slope: float,
    nearest: float,
    probes: tuple[Probe, ...],
    critical_lr: float | None,
    loss_at: Callable[[float], float],
) -> float | None:
    """How fast the loss falls next to θ, as a part of the slope: (L(θ) - L(θ - ηΔθ))/(ηs).

    A probe that was made there will do; else the loss is evaluated, and, where it does not agree,
    once more an eighth as far, since it may bend sooner.

    Args:
        loss, slope: L(θ), and s > 0.
        nearest: η from which on a fall can be seen.
        probes: those of the search.
        critical_lr: η_c where it was found; else the smallest η with a loss above L(θ), or None.
        loss_at: η ↦ L(θ - ηΔθ).

    Returns:
        The ratio, or None where no fall can be seen next to θ.
    """
    farthest = min(
        NEXT_TO_LOSS * abs(loss) / slope or math.inf, NEXT_TO_CRITICAL * (critical_lr or math.inf)
    )
    if not nearest <= farthest < math.inf:
        return None
    there = [probe for probe in probes if nearest <= probe.lr <= farthest]
    probe = max(there, key=lambda p: p.lr) if there else Probe(farthest, loss_at(farthest))
    ratio = (loss - probe.loss) / (slope * probe.lr)
    if agrees(ratio):
        return ratio
    if nearest <= (nearer := probe.lr / 8):
        return (loss - loss_at(nearer)) / (slope * nearer)
    return None if agrees(ratio, DISAGREES) else ratio


def agrees(ratio: float, factor: float = AGREES) -> bool:
    """Whether the loss falls next to θ as the slope says, within a factor."""
    return 1 / factor <= ratio <= factor


def wrong_slope(ratio: float) -> str:
    """What to say of a loss that does not fall next to θ as the slope says."""
    return (
        f"next to θ the loss falls {ratio:.3g} times as fast as its gradient says. Likely causes: "
        "a mean where the sum of losses is to be returned, or another number of tokens; another "
        "batch than the step's own (that is a loss on other data), or another loss; gradients that "
        "were clipped by norm, where grad_norm is not given, or by value (where `loss` is given, "
        "too, the slope alone is left out then); a gradient that was taken at other weights, as in "
        "sharpness-aware minimization; weights that the optimizer steps and the model does not "
        "read"
    )


def still(loss: float) -> str:
    """What to say of a loss that does not change along the update."""
    return (
        f"the loss is {loss:.6g} wherever along the update, so that the model does not read the "
        "parameters that the optimizer steps. Likely causes: fp32 copies of the weights beside the "
        "model, which the loop writes into it (keep the weights themselves in fp32 and compute in "
        "16 bits under autocast); another model's optimizer; a loss that is a constant"
    )


def disturbed(changed: Sequence[str]) -> str:
    """What to say of a measurement that has changed what training reads later, by name."""
    more = f" and {len(changed) - NAMED} more" if len(changed) > NAMED else ""
    return (
        f"the measurement has changed what training reads later: {', '.join(changed[:NAMED])}"
        f"{more}. What could be put back was, and no further step of this run is measured. What a "
        "forward pass changes in the model is kept; what it changes elsewhere has to be named "
        "(`keep=`, in a loop of one's own), or to be written in training steps alone"
    )
