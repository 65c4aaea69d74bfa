"""Parts of a model, and the alarm, in loops of one's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from megatron_sharpness.core.alarm import Alarm
from megatron_sharpness.core.errors import SettingError
from megatron_sharpness.pytorch import CriticalSharpness
from tests.pytorch.loop import Loop

#: Half of them times a parameter's square is its loss: in blocks, so that parts are exact.
CURVATURES = {"embed": 3.0, "layers.0.mlp": 40.0, "layers.1.mlp": 10.0, "norm": 0.5}


class Quadratic(nn.Module):
    """L = Σ_P h_P‖θ_P‖²/2."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Parameter(torch.linspace(1.0, 2.0, 8))
        self.layers = nn.ModuleList(nn.ParameterDict({"mlp": torch.ones(4)}) for _ in range(2))
        self.norm = nn.Parameter(torch.full((3,), 2.0))

    def forward(self) -> Tensor:
        named = dict(self.named_parameters())
        parts = [0.5 * h * named[name].double().square().sum() for name, h in CURVATURES.items()]
        return torch.stack(parts).sum()


def measured(parts: object, **groups: bool) -> CriticalSharpness:
    model = Quadratic()
    named = dict(model.named_parameters())
    optimizers = [SGD(list(named.values()), lr=1e-3)]
    if groups:
        matrices = [named["layers.0.mlp"], named["layers.1.mlp"]]
        rest = [{"params": [named["embed"]]}, {"params": [named["norm"]], "name": "The norm"}]
        optimizers = [SGD(matrices, lr=1e-3), SGD(rest, lr=1e-3)]
    sharpness = CriticalSharpness(model, optimizers, 1, parts=parts, tolerance=1e-3)
    loss = model()
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    sharpness.after_step(1, lambda: (model(), 1), loss=(loss.detach(), 1))
    return sharpness


@pytest.mark.parametrize("parts, expected", [
    ("modules", {"norms": ["norm"], "embeddings": ["embed"],
                 "mlp": ["layers.0.mlp", "layers.1.mlp"]}),
    ("layers", {"first-third": ["layers.0.mlp"], "middle-third": ["layers.1.mlp"],
                "outside": ["embed", "norm"]}),
    ({"deep": r"layers\.1", "all": "."}, {"deep": ["layers.1.mlp"], "all": list(CURVATURES)}),
])  # fmt: skip
def test_parts_of_a_quadratic_are_exact(parts: object, expected: dict[str, list[str]]) -> None:
    found = measured(parts).records
    assert list(found) == ["train", *(f"part/{name}" for name in expected)]
    named = dict(Quadratic().named_parameters())
    for part, names in expected.items():
        record = found[f"part/{part}"]
        # Δθ is the gradient hθ: the slope Σh²θ² and the curvature Σh³θ².
        sums = [
            sum(CURVATURES[name] ** power * float(named[name].square().sum()) for name in names)
            for power in (2, 3)
        ]
        assert record.status == "found"
        assert record.slope == pytest.approx(sums[0], rel=1e-4)
        assert record.critical_lr == pytest.approx(2.0 * sums[0] / sums[1], rel=1e-3)
        assert record.critical_sharpness == 2.0 / record.critical_lr


def test_groups_have_the_names_of_their_optimizers_or_their_own() -> None:
    with pytest.raises(SettingError, match="one part then, sgd"):
        measured("groups")
    several = measured("groups", apart=True).records
    assert list(several) == ["train", "part/sgd-0", "part/sgd-1", "part/the-norm"]


@pytest.mark.parametrize("parts", ["module", {"head": "lm_head"}])
def test_parts_that_are_none_are_refused_when_it_is_made(parts: object) -> None:
    with pytest.raises(SettingError, match="parts="):
        measured(parts)


def test_tensors_that_have_no_name_are_refused() -> None:
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    with pytest.raises(SettingError, match="under no name"):
        CriticalSharpness(model, AdamW(other.parameters()), 1, parts="layers")


def test_an_alarm_has_a_loop_looked_at_closer_and_leaves_it_as_it_is() -> None:
    heard: list[Alarm] = []
    watched = Loop(4, alarm=1e-6, alarm_after=1, alarm_every=1, on_alarm=heard.append)
    with pytest.warns(UserWarning, match="ALARM at iteration 4"):
        watched.run(7)
    assert list(watched.records) == [4, 5, 6, 7]
    assert [alarm.iteration for alarm in heard] == [4]
    assert watched.digest() == Loop(0).run(7).digest()
