"""The tables of the README, from the committed records."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from experiments.learning_rate.prediction import (
    Predictor,
    apart,
    best,
    by_loss,
    by_optimizer,
    by_ratio,
    chosen_target,
    outcome,
    sweeps,
)
from experiments.learning_rate.run import FIVE, LOWEST, Case, Training, read
from experiments.learning_rate.verdicts import (
    TRUTHS,
    VERDICTS,
    at_best,
    by_optimizer_and_batch,
    confusion,
    spread,
)
from megatron_sharpness.report.phases import stable_phase
from megatron_sharpness.report.verdict import last_loss, verdict_of

Known = dict[Case, list[Training]]
NAMES = {"adamw": "AdamW", "muon": "Muon", "sgd": "SGD"}


def known() -> Known:
    """The sweeps, without the five trainings of the figure."""
    found = sweeps(read())
    found.pop(FIVE)
    return found


def predictors(on: Known) -> dict[str, Predictor]:
    """What predicts a learning rate, chosen on sweeps, by what it is called."""
    target = chosen_target(on)
    targets = {
        optimizer: chosen_target({c: s for c, s in on.items() if c.optimizer == optimizer})
        for optimizer in LOWEST
    }
    each = ", ".join(f"{NAMES[name]} {value:g}" for name, value in targets.items())
    return {
        f"η where η/η_c meets {target:g}": by_ratio(target),
        f"η where η/η_c meets one for each optimizer: {each}": lambda trainings: by_ratio(
            targets[trainings[0].case.optimizer]
        )(trainings),
        "η of the lowest loss of the three": by_loss,
        "the optimizer's best rate elsewhere, without a training": by_optimizer(on),
    }


def prediction_table() -> Iterator[str]:
    on, tried = apart(known())
    number = len(tried)
    yield f"| predictor | within a factor of 2, {number} sweeps | final loss there within 10 % |"
    yield "|---|---|---|"
    for name, predict in predictors(on).items():
        found = outcome(predict, tried)
        yield f"| {name} | {found.within} | {found.fine} |"


def best_table() -> Iterator[str]:
    yield (
        "| optimizer, sequences a batch | η/η_c at the best rate, each sweep | largest / smallest "
        "| best rates: largest / smallest |"
    )
    yield "|---|---|---|---|"
    for (optimizer, sequences), sweeps_of in by_optimizer_and_batch(known()).items():
        ratios = sorted(map(at_best, sweeps_of))
        spreads = (spread(ratios), spread(map(best, sweeps_of)))
        told = " | ".join(f"{s:.1f}" if len(ratios) > 1 else "" for s in spreads)
        values = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        yield f"| {NAMES[optimizer]}, {sequences} | {values} | {told} |"


def verdict_table() -> Iterator[str]:
    counted = [confusion(sweep.values()) for sweep in apart(known())]
    yield f"| verdict | {' | '.join(f'{truth}' for truth in TRUTHS)} |"
    yield "|---|---|---|---|"
    for verdict in VERDICTS:
        cells = [f"{counted[1][verdict, truth]} ({counted[0][verdict, truth]})" for truth in TRUTHS]
        yield f"| {verdict} | {' | '.join(cells)} |"


def five_table() -> Iterator[str]:
    yield "| η | median η/η_c | largest | loss in the end | verdict |"
    yield "|---|---|---|---|---|"
    for each in sweeps(read())[FIVE]:
        phase = stable_phase(each.run)
        assert phase is not None
        yield (
            f"| {each.peak:g} | {phase.median:.2g} | {phase.largest:.2g} | "
            f"{last_loss(each.run):.2f} | {verdict_of(each.run).name} |"
        )


TABLES: tuple[Callable[[], Iterator[str]], ...] = (
    prediction_table, best_table, verdict_table, five_table,
)  # fmt: skip


def tables() -> str:
    """All of them."""
    return "\n\n".join("\n".join(table()) for table in TABLES)
