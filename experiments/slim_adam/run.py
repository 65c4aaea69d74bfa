"""GPTs under AdamW with the SNR of its second moments, and with second moments that are means."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import nn

from experiments import training
from experiments.gpt_wsd import run as gpt
from experiments.slim_adam.optimizer import SlimAdamW
from megatron_sharpness.core.measurement import OVER
from megatron_sharpness.core.second_moments import kind_of
from megatron_sharpness.pytorch import CriticalSharpness
from megatron_sharpness.report.records import Run
from megatron_sharpness.report.second_moments import Kind, kinds_of

RATES = (2e-3, 5e-3, 1.2e-2)
SEEDS = (0, 1, 2)
EVERY = 20
#: The last part of the text is not trained on; so many pieces of it give the loss in the end.
HELD_OUT, PIECES = 0.1, 256
#: What the rule is made from: the lowest rate with the first seed.
RULE_FROM = f"adamw-{RATES[0]:g}-{SEEDS[0]}"
#: Beside ``adamw`` and ``slim``: only kinds whose ratio is far above 1, one mean for a matrix, and
#: the dimension that the rule would not take.
VARIANTS = ("adamw", "slim", "careful", "one-mean", "opposite")
#: Those whose losses lie so far off that one seed tells.
CONTROLS = VARIANTS[3:]
FAR_ABOVE = 4.0
#: Of a record, what is kept.
FIELDS = (
    "iteration", "batch", "part", "status", "lr", "loss", "critical_lr", "critical_sharpness",
    "lr_over_critical", "edge_of_stability", "tokens", "adam_snr",
)  # fmt: skip

#: By kind of matrix, what its second moments are averaged over.
Means = Mapping[str, str | None]


def seeds_of(variant: str) -> tuple[int, ...]:
    """The seeds that a variant is trained with."""
    return SEEDS[:1] if variant in CONTROLS else SEEDS


def run(variant: str, peak: float, seed: int, means: Means) -> list[training.Row]:
    """One training; the last record has the loss on held-out text, ``held_out``."""
    trained, held_out = gpt.texts(HELD_OUT)
    network = gpt.model(seed=seed)
    optimizer = SlimAdamW(
        groups_of(network, means), lr=1.0, betas=(0.9, 0.95), weight_decay=gpt.WEIGHT_DECAY
    )
    sharpness = CriticalSharpness(network, optimizer, every=EVERY, adam_snr=variant == "adamw")
    rows = []
    for step, *_ in gpt.steps_of(
        network,
        [optimizer],
        sharpness,
        steps=gpt.STEPS,
        tokens_at=lambda step: gpt.windows(
            trained, gpt.SEQUENCES, gpt.LENGTH, 100_000 * seed + step
        ),
        lr_at=lambda step: gpt.learning_rate("wsd", peak, step),
    ):
        if step % EVERY == 0:
            record = json.loads(sharpness.records.train.to_json())
            rows.append({field: record[field] for field in FIELDS})
    with torch.no_grad():
        final = gpt.loss(network, gpt.windows(held_out, PIECES, gpt.LENGTH, 0)).item()
    rows[-1]["held_out"] = final
    return rows


def groups_of(network: nn.Module, means: Means) -> list[dict[str, object]]:
    """Its parameters by what their second moments are averaged over."""
    groups: dict[str | None, list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        groups.setdefault(means.get(kind_of(name)), []).append(parameter)
    return [{"params": parameters, "over": over} for over, parameters in groups.items()]


def rule(rows: Sequence[training.Row]) -> list[Kind]:
    """The kinds of matrices, from the records of one training under AdamW."""
    return kinds_of(Run("", list(rows)))


def means_of(variant: str, kinds: Iterable[Kind]) -> Means:
    """What a variant averages over."""
    if variant == "adamw":
        return {}
    if variant == "slim":
        return {kind.name: kind.over for kind in kinds}
    if variant == "careful":
        return {kind.name: kind.over for kind in kinds if is_far_above(kind)}
    if variant == "one-mean":
        return {kind.name: "both" for kind in kinds}
    return {kind.name: min(OVER[:2], key=kind.ratios.__getitem__) for kind in kinds}


def is_far_above(kind: Kind) -> bool:
    """Whether means would stand for its second moments by a stricter rule than the paper's."""
    return max(kind.ratios.values()) >= FAR_ABOVE


def saved(kinds: Sequence[Kind], variant: str) -> float:
    """Share of the matrices' second moments that ``slim`` or ``careful`` does without."""
    means = [kind for kind in kinds if variant == "slim" or is_far_above(kind)]
    return sum(kind.moments - kind.left for kind in means) / sum(kind.moments for kind in kinds)


def held_out(runs: training.Runs, variant: str, peak: float) -> np.ndarray:
    """The loss in the end with each of its seeds."""
    names = [f"{variant}-{peak:g}-{seed}" for seed in seeds_of(variant)]
    return np.array([runs[name][-1]["held_out"] for name in names])
