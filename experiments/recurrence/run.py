"""A GPT whose middle blocks are looped, in more turns as its training goes on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from experiments import training
from experiments.gpt_wsd import run as gpt
from megatron_sharpness.core.measurement import TRAIN, Measurement, relative_sharpness
from megatron_sharpness.pytorch import CriticalSharpness

#: Blocks before the loop, in it, and after it.
PRELUDE, CORE, CODA = 1, 1, 1
WIDTH, SEQUENCES = 32, 16
WARMUP, RATE = 20, 5e-3
#: Of a curriculum or a constant depth, of a retrofit, and of a plain GPT that costs as much.
STEPS, RETROFIT_STEPS, PLAIN_STEPS = 240, 300, 460
DEEPEST = 8
#: Where the depth doubles, and where a retrofit goes from plain to the deepest.
JUMPS, RETROFIT = (90, 140, 190), 240
#: λ_c is measured at every step so near to a jump, and at every so many elsewhere.
WINDOW, EVERY = 10, 5
#: The last part of the text is not trained on; so many pieces of it give the held-out loss.
HELD_OUT, PIECES, HELD_EVERY = 0.1, 64, 20
#: Of the held-out loss in the end.
DEPTHS = (1, 2, 4, 8)
DEEPER = "deeper"


class Loop(nn.Module):
    """Blocks in ``turns`` turns. One turn is the blocks as they are: a plain GPT has depth 1.

    Args:
        blocks: the recurrent core.
        injected: whether the core's input e is added to its state at each turn, s ← core(s + e)
            from s = 0, or at the first alone.
    """

    def __init__(self, blocks: Iterable[nn.Module], injected: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.injected = injected
        self.turns = 1

    def forward(self, e: Tensor, rotation: Any) -> Tensor:
        state = e
        for turn in range(self.turns):
            if turn and self.injected:
                state = state + e
            for block in self.blocks:
                state = block(state, rotation)
        return state


@dataclass(frozen=True)
class Case:
    """What is trained. Trainings of one seed see the same batches.

    Attributes:
        loop: ``injected`` or ``bare``, see :class:`Loop`.
        curriculum: ``doubled`` at :data:`JUMPS`, ``retrofit`` (a plain GPT that goes to the deepest
            at once), or a constant depth.
        rate: what the learning rate does where the depth grows: ``same``, or ``warm-up`` anew.
        seed: of weights and data.
    """

    loop: str
    curriculum: str
    rate: str
    seed: int

    def __str__(self) -> str:
        return f"{self.loop}-{self.curriculum}-{self.rate}-{self.seed}"

    @property
    def steps(self) -> int:
        return {"1": PLAIN_STEPS, "retrofit": RETROFIT_STEPS}.get(self.curriculum, STEPS)

    @property
    def jumps(self) -> tuple[int, ...]:
        """Around these steps λ_c is measured at each, also where nothing jumps."""
        return {"1": (*JUMPS, RETROFIT), "retrofit": (RETROFIT,)}.get(self.curriculum, JUMPS)

    def turns(self, step: int) -> int:
        """The depth at a step; steps count from 1."""
        if self.curriculum == "doubled":
            return int(2 ** sum(step >= jump for jump in JUMPS))
        if self.curriculum == "retrofit":
            return DEEPEST if step >= RETROFIT else 1
        return int(self.curriculum)

    def blocks(self, step: int) -> int:
        """Blocks that a forward pass of this step goes through: what it costs."""
        return PRELUDE + CORE * self.turns(step) + CODA

    def lr(self, step: int) -> float:
        """Constant after a linear warm-up."""
        again = self.jumps if self.rate == "warm-up" else ()
        since = step - max((jump for jump in again if step >= jump), default=1)
        return RATE * min(1.0, (since + 1) / WARMUP)


CASES = [
    Case(loop, curriculum, rate, seed)
    for seed in range(3)
    for loop, curriculum, rate in (
        ("injected", "1", "same"), ("injected", "8", "same"),
        ("injected", "doubled", "same"), ("bare", "doubled", "same"),
        ("injected", "retrofit", "same"), ("bare", "retrofit", "same"),
        ("bare", "retrofit", "warm-up"),
    )
]  # fmt: skip


@dataclass(frozen=True, eq=False)
class Trained:
    """A training, step by step.

    Attributes:
        case: what was trained.
        loss, lr: of each step.
        sharpness: λ_c at the step's own depth; NaN where it was not measured.
        deeper: λ_c^{r→r'} of the step's batch at the depth r' that comes next, along the same
            update; in the steps before a jump.
        held: the held-out loss after each ``HELD_EVERY`` steps, at the depth of that step.
        final: that in the end, at depths 1, 2, 4, 8.
    """

    case: Case
    loss: NDArray[np.float64]
    lr: NDArray[np.float64]
    sharpness: NDArray[np.float64]
    deeper: NDArray[np.float64]
    held: NDArray[np.float64]
    final: NDArray[np.float64]

    def to_row(self) -> training.Row:
        """For records: four digits."""
        columns = {name: [_short(value) for value in getattr(self, name)] for name in COLUMNS}
        return {"case": asdict(self.case), **columns}

    @classmethod
    def from_row(cls, row: training.Row) -> Trained:
        """From what :meth:`to_row` made."""
        return cls(Case(**row["case"]), *(np.array(row[name], float) for name in COLUMNS))


COLUMNS = ("loss", "lr", "sharpness", "deeper", "held", "final")


def _short(value: float) -> float | str | None:
    found: float | None = training.short(float(value), 4)
    return "inf" if value == math.inf else found


def stretches(case: Case) -> Iterator[tuple[int, int, int, bool]]:
    """First and last step, the interval of measurements, and whether the deeper loss is measured,
    too, of the parts of a training that are measured alike."""
    first = 1
    for jump in case.jumps:
        deeper = case.rate == "same" and case.curriculum in ("doubled", "retrofit")
        yield first, jump - WINDOW - 1, EVERY, False
        yield jump - WINDOW, jump - 1, 1, deeper
        yield jump, jump + WINDOW - 1, 1, False
        first = jump + WINDOW
    yield first, case.steps, EVERY, False


class Training:
    """One training, between two stretches of it.

    Attributes:
        made: steps made in the stretches before.
        next: the depth after this stretch.
    """

    def __init__(self, case: Case, width: int) -> None:
        self.case = case
        self.network = gpt.model(PRELUDE + CORE + CODA, width, case.seed)
        blocks = list(self.network.blocks)
        self.loop = Loop(blocks[PRELUDE:-CODA], case.loop == "injected")
        self.network.blocks = nn.ModuleList([*blocks[:PRELUDE], self.loop, *blocks[-CODA:]])
        self.optimizer = gpt.optimizer_of(self.network)
        self.text, held_out = gpt.texts(HELD_OUT)
        self.held_out = gpt.windows(held_out, PIECES, gpt.LENGTH, 0)
        self.batch = self.held_out
        self.made, self.next = 0, 1

    def tokens_at(self, step: int) -> Tensor:
        """The depth of a step of this stretch is set; its batch."""
        step += self.made
        self.loop.turns = self.case.turns(step)
        seed = 100_000 * self.case.seed + step
        self.batch = gpt.windows(self.text, SEQUENCES, gpt.LENGTH, seed)
        return self.batch

    def lr_at(self, step: int) -> float:
        return self.case.lr(self.made + step)

    def deeper(self) -> tuple[Tensor, int]:
        """The loss of the step's batch at the depth that comes next."""
        return self.loss_at(self.next, self.batch), 1

    def loss_at(self, turns: int, tokens: Tensor) -> Tensor:
        own, self.loop.turns = self.loop.turns, turns
        loss = gpt.loss(self.network, tokens)
        self.loop.turns = own
        return loss

    @torch.no_grad()
    def held(self, turns: int) -> float:
        return self.loss_at(turns, self.held_out).item()


def run(case: Case, width: int = WIDTH) -> Trained:
    """One of the trainings."""
    it = Training(case, width)
    seen: list[tuple[float, ...]] = []
    held: list[float] = []
    for first, last, every, deeper in stretches(case):
        it.made, it.next = first - 1, case.turns(last + 1)
        losses = {DEEPER: it.deeper} if deeper else None
        sharpness = CriticalSharpness(it.network, it.optimizer, every=every, losses=losses)
        for step, loss, _ in gpt.steps_of(
            it.network, [it.optimizer], sharpness, steps=last - it.made,
            tokens_at=it.tokens_at, lr_at=it.lr_at,
        ):  # fmt: skip
            records = sharpness.records if step % every == 0 else {}
            found = [_sharpness(records.get(name)) for name in (TRAIN, DEEPER)]
            seen.append((loss, it.lr_at(step), *found))
            if len(seen) % HELD_EVERY == 0:
                held.append(it.held(it.loop.turns))
        sharpness.close()
    columns = [*np.array(seen).T, np.array(held), np.array([it.held(turns) for turns in DEPTHS])]
    return Trained(case, *columns)


def _sharpness(record: Measurement | None) -> float:
    if record is None:
        return math.nan
    found = relative_sharpness(record.status, record.critical_sharpness, record.critical_lr_lower)
    return math.nan if found is None else found


def rows(case: Case, width: int = WIDTH) -> list[training.Row]:
    """The record of one of the trainings."""
    return [run(case, width).to_row()]


def trained(runs: training.Runs) -> dict[str, Trained]:
    """Those in records, by the name of the case."""
    found = (Trained.from_row(row) for each in runs.values() for row in each)
    return {str(each.case): each for each in found}
