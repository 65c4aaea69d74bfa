"""Which parameters are of which part, on all ranks alike, and what a meter measures of each."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

import megatron_sharpness
from megatron_sharpness.arguments import FLAGS
from megatron_sharpness.core.errors import SettingError
from megatron_sharpness.core.measurement import Measurement
from megatron_sharpness.core.meter import FARTHEST, Meter
from megatron_sharpness.core.parts import Parts, Weight, check_parts, parts_of
from megatron_sharpness.core.settings import Settings
from megatron_sharpness.core.step import Step


def on_ranks(chosen: str | Mapping[str, str], *ranks: list[str]) -> list[dict[str, list[str]]]:
    """Names by part on each of several ranks, that hold weights of these names."""
    weights = [[Weight(name, f"group-{len(name) % 2}") for name in rank] for rank in ranks]
    barrier, given = threading.Barrier(len(ranks)), [None] * len(ranks)

    def on_rank(rank: int) -> Parts:
        def gather(mine: Any) -> list[Any]:
            given[rank] = mine
            barrier.wait()
            found = list(given)
            barrier.wait()
            return found

        return parts_of(chosen, weights[rank], gather)

    with ThreadPoolExecutor(len(ranks)) as pool:
        found = list(pool.map(on_rank, range(len(ranks))))
    assert len({parts.names for parts in found}) == 1
    return [
        {
            name: [weight.name for weight in held if number in parts.of(weight)]
            for number, name in enumerate(parts.names)
        }
        for parts, held in zip(found, weights, strict=True)
    ]


PACKAGE = Path(megatron_sharpness.__file__).parent

MEGATRON = [
    "embedding.word_embeddings.weight", "decoder.layers.0.input_layernorm.weight",
    "decoder.layers.0.self_attention.linear_qkv.weight",
    "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight",
    "decoder.layers.0.self_attention.linear_proj.bias", "decoder.layers.0.mlp.router.weight",
    "decoder.layers.0.mlp.linear_fc1.weight", "decoder.layers.0.self_attention.q_layernorm.weight",
    "decoder.layers.0.mlp.experts.linear_fc1.weight0", "decoder.final_layernorm.weight",
    "output_layer.weight",
]  # fmt: skip
LLAMA = [
    "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.mlp.gate_proj.weight", "model.layers.0.input_layernorm.weight",
    "model.layers.0.block_sparse_moe.gate.weight", "model.layers.0.block_sparse_moe.experts.0.w1",
    "model.norm.weight", "lm_head.weight",
]  # fmt: skip
GPT2 = [
    "transformer.wte.weight", "transformer.h.0.ln_1.weight", "transformer.h.0.attn.c_attn.weight",
    "transformer.h.0.mlp.c_fc.weight", "transformer.ln_f.weight",
]  # fmt: skip


def test_modules_are_told_by_the_usual_names() -> None:
    (found,) = on_ranks("modules", MEGATRON)
    assert {part: [MEGATRON.index(name) for name in names] for part, names in found.items()} == {
        "experts": [8], "router": [5], "norms": [1, 3, 7, 9], "embeddings": [0], "output": [10],
        "attention": [2, 4], "mlp": [6],
    }  # fmt: skip
    (found,) = on_ranks("modules", LLAMA)
    assert {part: [LLAMA.index(name) for name in names] for part, names in found.items()} == {
        "experts": [5], "router": [4], "norms": [3, 6], "embeddings": [0], "output": [7],
        "attention": [1], "mlp": [2],
    }  # fmt: skip
    (found,) = on_ranks("modules", GPT2)
    assert {part: len(names) for part, names in found.items()} == {
        "norms": 2, "embeddings": 1, "attention": 1, "mlp": 1
    }  # fmt: skip
    (found,) = on_ranks("modules", ["weight", "a.bias", "mlp.weight"])
    assert list(found) == ["mlp", "rest"]


@pytest.mark.parametrize(("preset", "name"), [("modules", "rest"), ("layers", "outside")])
def test_a_preset_that_parts_nothing_is_refused(preset: str, name: str) -> None:
    with pytest.raises(SettingError, match=f"one part then, {name}, .*attention=attn"):
        on_ranks(preset, ["weight", "a.bias"])
    (found,) = on_ranks({"all": "."}, ["weight", "a.bias"])  # asked for by name
    assert list(found) == ["all"]


def test_ranks_that_hold_some_of_the_layers_agree() -> None:
    names = [f"decoder.layers.{layer}.mlp.weight" for layer in range(6)]
    first, last = on_ranks("layers", ["embedding.weight", *names[:4]], names[4:])
    assert first == {
        "first-third": names[:2], "middle-third": names[2:4], "last-third": [],
        "outside": ["embedding.weight"],
    }  # fmt: skip
    assert last == {"first-third": [], "middle-third": [], "last-third": names[4:], "outside": []}


def test_few_layers_fill_few_thirds_and_predictions_of_more_tokens_none() -> None:
    (found,) = on_ranks("layers", ["h.0.weight", "h.1.weight", "mtp.layers.0.weight"])
    assert found == {
        "first-third": ["h.0.weight"], "middle-third": ["h.1.weight"],
        "outside": ["mtp.layers.0.weight"],
    }  # fmt: skip


def test_groups_and_expressions() -> None:
    assert on_ranks("groups", ["a", "bb"], ["cc"]) == [
        {"group-0": ["bb"], "group-1": ["a"]}, {"group-0": ["cc"], "group-1": []},
    ]  # fmt: skip
    one, two = on_ranks({"late": r"layers\.[1-9]", "all": "."}, ["layers.0.w"], ["layers.1.w"])
    assert one == {"late": [], "all": ["layers.0.w"]}
    assert two == {"late": ["layers.1.w"], "all": ["layers.1.w"]}


def test_an_expression_that_finds_nothing_is_refused_by_name() -> None:
    with pytest.raises(SettingError, match=r"head=lm_head.*names are such as a\.weight, b\.weight"):
        on_ranks({"all": ".", "head": "lm_head"}, ["b.weight", "a.weight"])


@pytest.mark.parametrize(
    "chosen", ["module", "", {}, ["modules"], {"a b": "."}, {"a": "("}, {"a": 1}]
)
def test_what_names_no_parts_is_refused(chosen: object) -> None:
    with pytest.raises(SettingError, match="parts="):
        check_parts(chosen)


@pytest.mark.parametrize("settings", [
    {"parts_every": 100}, {"parts": "modules", "parts_every": 150},
    {"parts": "modules", "parts_every": 0}, {"parts": "modules", "parts_every": 1.0},
])  # fmt: skip
def test_an_interval_is_a_multiple(settings: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match="parts_every"):
        Settings(**settings)


def test_parts_are_due_with_their_interval() -> None:
    settings = Settings(every=2, parts="modules", parts_every=6)
    assert [n for n in range(1, 13) if settings.due_parts(n)] == [6, 12]
    assert Settings(every=2, parts="modules").due_parts(4)
    assert not Settings(every=2).due_parts(4) and not Settings(every=0, parts="groups").due_parts(4)


def test_every_trainer_takes_every_setting() -> None:
    """Those that name their settings, read as text: their libraries need not be there."""
    names = [field.name for field in fields(Settings) if field.name != "on_alarm"]
    for trainer in ("olmo_core", "torchtitan"):
        text = (PACKAGE / "trainers" / f"{trainer}.py").read_text()
        assert [name for name in names if f"\n    {name}: " not in text] == []
    assert set(FLAGS) == set(names)


LOSS, SLOPES, CURVATURES = 3.0, {"one": 2.0, "two": 6.0, "flat": 1.0, "still": 0.0}, (40.0, 30.0)
WHOLE = Step(iteration=7, lr=0.01, training_loss=LOSS, slope=9.0, update_norm=2.0)


def measure(meter: Meter, step: Step = WHOLE) -> tuple[dict[str, Measurement], list[str]]:
    """Of a loss whose curvature is that of two blocks, a part that is flat, and one at rest."""
    calls: list[str] = []

    def part_loss(name: str, eta: float) -> tuple[float, int]:
        calls.append(name)
        curvature = dict(zip(SLOPES, (*CURVATURES, 0.0, 0.0), strict=True))[name]
        if name == "flat":
            return LOSS - 1.0 + 1.0 / (1.0 + eta), 64
        return LOSS - SLOPES[name] * eta + 0.5 * curvature * eta**2, 64

    def whole(eta: float) -> tuple[float, int]:
        return LOSS - 9.0 * eta + 0.5 * sum(CURVATURES) * eta**2, 64

    parts = [
        replace(step, part=name, slope=slope, update_norm=1.0 if slope else 0.0)
        for name, slope in SLOPES.items()
    ]
    records = meter.measure(replace(step, parts=parts), whole, part_loss_at=part_loss)
    return dict(meter.write(records)), calls


def test_each_part_has_a_record_of_its_own() -> None:
    meter = Meter(Settings())
    found, _ = measure(meter)
    assert list(found) == ["train", "part/one", "part/two", "part/flat", "part/still"]
    assert found["train"].critical_lr == pytest.approx(18 / 70) and found["train"].part is None
    for name, critical_lr in (("one", 4 / 40), ("two", 12 / 30)):
        record = found[f"part/{name}"]
        assert record.status == "found" and record.part == name and record.batch == "train"
        assert record.critical_lr == pytest.approx(critical_lr, rel=1e-6)
        assert record.slope == SLOPES[name] and record.update_norm == 1.0
        assert record.loss == LOSS and record.tokens == 64
        assert set(record.scalars()) == {
            f"{tag}/part/{name}"
            for tag in ("critical-sharpness", "critical-learning-rate",
                        "learning-rate-over-critical")
        }  # fmt: skip
    flat, still = found["part/flat"], found["part/still"]
    assert flat.status == "no_upper" and flat.critical_lr is None
    assert flat.critical_lr_lower == pytest.approx(FARTHEST * 18 / 70)
    assert still.status == "zero_lr" and "not moved this part" in str(still.reason)


def test_later_searches_begin_where_those_of_the_same_part_ended() -> None:
    meter = Meter(Settings())
    measure(meter)
    resumed = Meter(Settings())
    resumed.load_state_dict(meter.state_dict())
    found, calls = measure(resumed)
    assert [calls.count(name) for name in SLOPES] == [3, 3, 1, 0]  # at η_c itself nothing is told
    assert found["part/two"].critical_lr == pytest.approx(0.4, rel=1e-6)


def test_an_error_in_a_part_costs_that_part_alone() -> None:
    def broken(name: str, eta: float) -> tuple[float, int]:
        if name == "one":
            raise MemoryError("no memory")
        return LOSS - 6.0 * eta + 15.0 * eta**2, 64

    parts = [replace(WHOLE, part=name, slope=6.0) for name in ("one", "two")]
    records = Meter(Settings()).measure(
        replace(WHOLE, parts=parts), lambda eta: (LOSS - 9 * eta + 35 * eta**2, 64),
        part_loss_at=broken,
    )  # fmt: skip
    assert [record.status for record in records.values()] == ["found", "failed", "found"]
    assert records["part/one"].reason == "MemoryError: no memory"


@pytest.mark.parametrize("step", [
    replace(WHOLE, skipped="overflow"), replace(WHOLE, lr=0.0), replace(WHOLE, failed="broken"),
    replace(WHOLE, training_loss=math.nan),
])  # fmt: skip
def test_where_the_whole_was_not_measured_no_part_is(step: Step) -> None:
    found, calls = measure(Meter(Settings()), step)
    assert not calls
    assert len({(record.status, record.reason) for record in found.values()}) == 1
