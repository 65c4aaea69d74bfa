"""Signal-to-noise ratios of second moments that lie in pieces, and what is told of them."""

from __future__ import annotations

import math
import random
from functools import partial

import pytest
import torch
from torch import Tensor

from megatron_sharpness.core import second_moments
from megatron_sharpness.core.measurement import OVER
from megatron_sharpness.core.second_moments import (
    Matrix,
    Piece,
    SecondMoments,
    Source,
    by_kind,
    kind_of,
)

CPU = torch.device("cpu")


def moments(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).square() * 1e-12  # squares underflow in fp32


def run_of(tensor: Tensor, start: int, end: int) -> partial[Tensor]:
    return partial(torch.clone, tensor.flatten()[start:end])


def expected(v: Tensor) -> list[float]:
    v = v.double()
    each = [
        (stack.mean(dims) ** 2 / stack.var(dims, correction=0)).mean()
        for dims in (1, 0, (0, 1))
        for stack in v.view(-1, *v.shape[-2:])
    ]
    return torch.stack(each).view(3, -1).mean(dim=1).tolist()


def measured(pieces: list[Piece], said: list[str] | None = None) -> dict[str, list[float]]:
    snr = SecondMoments((said if said is not None else []).append)
    found = snr.measure(lambda: [Source(lambda: pieces, lambda sums: sums)], CPU) or {}
    return {kind: [ratios[over] for over in OVER] for kind, ratios in found.items()}


def test_pieces_of_any_kind_make_up_the_matrix() -> None:
    shape, whole = (3, 7, 5), moments(3, 7, 5)
    matrix = Matrix("experts", shape)
    draw = random.Random(0)
    for _ in range(20):
        cuts = sorted(draw.sample(range(1, 105), draw.randrange(6)))
        runs = list(zip([0, *cuts], [*cuts, 105], strict=True))
        pieces = [Piece(matrix, run_of(whole, a, b), shape, start=a) for a, b in runs]
        assert measured(pieces)["experts"] == pytest.approx(expected(whole), rel=1e-12)
    blocks = [
        Piece(matrix, run_of(block, a, b), (1, 7, width), (number, 0, column), start=a)
        for number in range(3)
        for column, width in ((0, 2), (2, 3))
        for block in [whole[number, :, column : column + width]]
        for a, b in ((0, 5), (5, 7 * width))
    ]
    assert measured(blocks)["experts"] == pytest.approx(expected(whole), rel=1e-12)


def test_matrices_that_are_taken_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(second_moments, "CHUNK", 16)
    monkeypatch.setattr(second_moments, "REDUCED", 60)  # one of them at a time
    matrices = {name: moments(9, 5, seed=i) for i, name in enumerate("abc")}
    pieces = [
        Piece(Matrix(name, (1, 9, 5)), partial(torch.clone, v), (1, 9, 5))
        for name, v in matrices.items()
    ]
    for name, ratios in measured(pieces).items():
        assert ratios == pytest.approx(expected(matrices[name]), rel=1e-12)


def test_what_does_not_vary_is_left_out() -> None:
    v = moments(6, 4)
    unseen = torch.cat((v, torch.zeros(2, 4)))  # tokens that no batch had
    found = measured([Piece(Matrix("w", (1, 8, 4)), lambda: unseen, (1, 8, 4))])["w"]
    assert found[0] == pytest.approx(expected(v)[0], rel=1e-12)
    assert found[1:] == pytest.approx(expected(unseen)[1:], rel=1e-12)
    constant = Piece(Matrix("w", (1, 8, 4)), lambda: torch.full((8, 4), 0.1), (1, 8, 4))
    assert measured([constant])["w"] == [None, None, None]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_of_moments_that_are_not_finite_nothing_is_told(value: float) -> None:
    v = moments(6, 4)
    v[2, 1] = value
    assert measured([Piece(Matrix("w", (1, 6, 4)), lambda: v, (1, 6, 4))])["w"] == [None] * 3


def test_a_piece_that_is_missing_is_told_once() -> None:
    said: list[str] = []
    v = moments(6, 4)
    snr = SecondMoments(said.append)
    piece = Piece(Matrix("w", (1, 6, 4)), lambda: v[:4], (1, 6, 4))
    for _ in range(2):
        assert snr.measure(lambda: [Source(lambda: [piece], lambda sums: sums)], CPU) is None
    assert said == [
        "critical sharpness: adam_snr was not measured: of the 24 second moments of w the ranks "
        "have 16"
    ]


def test_failures_and_nothing_at_all_are_told() -> None:
    said: list[str] = []

    def broken() -> list[Piece]:
        raise KeyError("exp_avg_sq")

    def unreadable() -> Tensor:
        raise MemoryError("out of it")

    assert SecondMoments(said.append).measure(lambda: [Source(broken, lambda s: s)], CPU) is None
    assert SecondMoments(said.append).measure(lambda: 1 / 0, CPU) is None  # type: ignore[arg-type, return-value]
    assert measured([Piece(Matrix("w", (1, 6, 4)), unreadable, (1, 6, 4))], said) == {}
    assert measured([], said) == {}
    for text, kind in zip(said, ("KeyError", "ZeroDivisionError", "MemoryError"), strict=False):
        assert kind in text
    assert said[3].endswith("no optimizer has second moments (exp_avg_sq) of a matrix")


def test_matrices_that_come_later_are_measured_then_and_those_that_go_are_not() -> None:
    snr = SecondMoments(print)
    pieces = [Piece(Matrix("a", (1, 6, 4)), lambda: moments(6, 4), (1, 6, 4))]
    sources = [Source(lambda: pieces, lambda sums: sums)]
    assert set(snr.measure(lambda: sources, CPU) or ()) == {"a"}
    pieces.append(Piece(Matrix("b", (1, 6, 4)), lambda: moments(6, 4, seed=1), (1, 6, 4)))
    assert set(snr.measure(lambda: sources, CPU) or ()) == {"a", "b"}
    del pieces[0]  # an optimizer that has forgotten it
    assert set(snr.measure(lambda: sources, CPU) or ()) == {"b"}


def test_a_kind_is_the_mean_of_its_layers() -> None:
    found = {
        Matrix("layers.0.mlp.weight", (1, 4, 8)): (1.0, 2.0, float("nan")),
        Matrix("layers.1.mlp.weight", (1, 4, 8)): (3.0, float("nan"), float("nan")),
        Matrix("layers.2.mlp.weight", (1, 8, 4)): (5.0, 5.0, 5.0),
    }
    assert by_kind(found) == {
        "layers.mlp.weight": {
            "shapes": [[2, 4, 8], [1, 8, 4]], "fan_in": 3.0, "fan_out": 3.5, "both": 5.0
        },
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("decoder.layers.11.mlp.linear_fc1.weight", "decoder.layers.mlp.linear_fc1.weight"),
        ("layers.3.mlp.experts.local_experts.7.linear_fc2.weight",
         "layers.mlp.experts.local_experts.linear_fc2.weight"),
        ("layers.3.mlp.experts.linear_fc1.weight5", "layers.mlp.experts.linear_fc1.weight"),
        ("blocks.2.mlp.0.weight", "blocks.mlp.0.weight"),
        ("0.weight", "0.weight"),
        ("encoder.mlp.2.weight", "encoder.mlp.2.weight"),
        ("h.7.attn.weight", "h.attn.weight"),
        ("model.embed_tokens.weight", "model.embed_tokens.weight"),
    ],
)  # fmt: skip
def test_kinds(name: str, kind: str) -> None:
    assert kind_of(name) == kind
