from __future__ import annotations

import pytest
import torch

from megatron_sharpness.core import update_line
from megatron_sharpness.core.products import StepProducts
from megatron_sharpness.core.update_line import Shard, UpdateLine


@pytest.mark.parametrize("offload", [False, True])
def test_the_ends_are_exact_and_points_are_rounded_once(offload: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    main = torch.randn(1000, generator=generator)
    model = main.bfloat16()
    line = UpdateLine([Shard(main=main, model=model)], offload=offload)
    start, start_model = main.clone(), model.clone()
    line.begin()
    main += 1e-3 * torch.randn(1000, generator=generator)
    model.copy_(main)
    end_model = model.clone()
    line.end()

    line.move(0.0)
    assert torch.equal(model, start_model)
    line.move(0.3)
    assert torch.equal(model, torch.lerp(start, main, 0.3).bfloat16())
    line.move(1e6)
    line.move(1.0)
    assert torch.equal(model, end_model)


def test_a_shard_that_the_forward_reads_itself_is_copied_twice_and_restored() -> None:
    parameter = torch.arange(8, dtype=torch.float32)
    view = parameter.view(2, 4)[1]  # a slice of a larger buffer, as in fp32 training
    shard = Shard(main=view, model=parameter[4:])
    assert shard.aliased
    line = UpdateLine([shard])
    line.begin()
    view -= 1.0
    after = parameter.clone()
    line.end()
    line.move(-5.0)
    assert torch.equal(parameter[:4], after[:4])
    assert torch.equal(parameter[4:], torch.tensor([9.0, 10.0, 11.0, 12.0]))
    line.move(1.0)
    assert torch.equal(parameter, after)


@pytest.mark.parametrize("shape", [(), (1000,), (30, 40), (0, 3)])
def test_large_shards_are_taken_in_pieces(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(update_line, "CHUNK", 64)
    generator = torch.Generator().manual_seed(0)
    main = torch.randn(shape, generator=generator)
    main = main.t() if len(shape) == 2 else main
    start, model = main.clone(), torch.empty(main.shape, dtype=torch.bfloat16)
    line = UpdateLine([Shard(main=main, model=model)])
    line.begin()
    main *= 1.5
    line.end()
    line.move(0.25)
    assert torch.equal(model, torch.lerp(start, main, 0.25).bfloat16())
    totals = torch.zeros(1, StepProducts.COUNT, dtype=torch.float64)
    line.products([torch.full(main.shape, 2.0)], totals)
    (total,) = totals
    update = (start - main).double()
    # A piece is summed in fp32, and in the first product terms of both signs cancel.
    assert abs(total[0] - 2 * update.sum()) <= 1e-6 * 2 * update.abs().sum()
    assert torch.allclose(total[1], update.square().sum(), rtol=1e-6)
    assert total[2] == 4 * main.numel()
    distance = (start - start.bfloat16()).double()
    assert torch.allclose(total[4], 4 * distance.square().sum(), rtol=1e-6)


def test_products_count_every_parameter_once() -> None:
    shards = [
        Shard(main=torch.zeros(4), model=torch.zeros(4)),
        Shard(main=torch.zeros(4), model=torch.zeros(4), counted=False),
        Shard(main=torch.zeros(4), model=torch.zeros(4)),
    ]
    line = UpdateLine(shards)
    line.begin()
    for shard in shards:
        shard.main.sub_(2.0)
    line.end()
    totals = torch.zeros(1, StepProducts.COUNT, dtype=torch.float64)
    three = torch.full((4,), 3.0)
    line.products([three, three, None], totals)
    (total,) = totals
    # The third has moved, but has no gradient.
    assert total[:3].tolist() == [24.0, 32.0, 36.0]


def test_a_part_moves_alone_and_has_products_of_its_own() -> None:
    shards = [Shard(main=torch.zeros(2), model=torch.zeros(2)) for _ in range(3)]
    line = UpdateLine(shards)
    line.begin()
    for number, shard in enumerate(shards, 1):
        shard.main.sub_(float(number))
    line.end()
    line.parts = [(0,), (0, 1), ()]
    for part, moved in ((None, [-0.5, -1.0, -1.5]), (0, [-0.5, -1.0, 0.0]), (1, [0.0, -1.0, 0.0])):
        line.move(0.5, part)
        assert [float(shard.model[0]) for shard in shards] == moved
    totals = torch.zeros(3, StepProducts.COUNT, dtype=torch.float64)
    line.products([torch.ones(2)] * 3, totals)
    assert totals[:, 0].tolist() == [12.0, 6.0, 4.0]
    assert totals[:, 1].tolist() == [28.0, 10.0, 8.0]
