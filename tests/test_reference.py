"""Exact curvature against dense Hessians, and λ_c against it on quadratics."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import grad

pytest.importorskip(
    "hessian_eigenthings", reason="needs hessian-eigenthings: pip install .[reference]"
)

from megatron_sharpness import reference
from megatron_sharpness.core.errors import InputError
from megatron_sharpness.pytorch import CriticalSharpness
from megatron_sharpness.reference import exact_curvature

LR = 1e-2


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


class Network(nn.Module):
    """Attention, an affine LayerNorm and an MLP, small enough for a dense Hessian."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.norm = nn.Linear(4, 12), nn.LayerNorm(4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unsqueeze(1).chunk(3, dim=-1)
        y = F.scaled_dot_product_attention(query, key, value, is_causal=True).squeeze(1)
        out: Tensor = self.head(torch.tanh(self.frozen(self.norm(x + y))))
        return out


def training() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    model = Network().double()
    inputs, targets = torch.randn(8, 5, 4).double(), torch.randint(3, (40,))
    return model, lambda m: F.cross_entropy(m(inputs).flatten(0, 1), targets)


def dense(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> Tensor:
    """The Hessian, [n, n], of the parameters that are trained, by differences of gradients.

    Not by ``torch.func.hessian``, which is wrong for an affine LayerNorm in torch 2.13.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    columns = []
    for parameter in trained:
        for entry in parameter.detach().view(-1):
            value, gradients = float(entry), []
            for shift in (1e-5, -1e-5):
                entry.fill_(value + shift)
                gradients.append(torch.cat([g.view(-1) for g in grad(loss(model), trained)]))
            entry.fill_(value)
            columns.append((gradients[0] - gradients[1]) / 2e-5)
    return torch.stack(columns)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_it_is_that_of_the_dense_hessian(name: str) -> None:
    model, loss = training()
    optimizer = getattr(torch.optim, name)(
        [p for p in model.parameters() if p.requires_grad],
        lr=LR, **({} if name == "SGD" else {"betas": (0.8, 0.9), "eps": 1e-4}),
    )  # fmt: skip
    second_moment = torch.zeros(sum(p.numel() for p in model.parameters() if p.requires_grad))
    for _ in range(3):
        optimizer.zero_grad()
        loss(model).backward()
        flat = torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.requires_grad])
        second_moment = 0.9 * second_moment + 0.1 * flat**2
        before = copy.deepcopy(model)
        start = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
    after = [p.detach().clone() for p in model.parameters()]
    seen = exact_curvature(model, optimizer, start, LR, lambda: loss(model))

    assert all(torch.equal(p, value) for p, value in zip(model.parameters(), after, strict=True))
    matrix = dense(before, loss)
    update = torch.cat(
        [
            ((p - q) / LR).reshape(-1)
            for p, q in zip(before.parameters(), model.parameters(), strict=True)
            if p.requires_grad
        ]
    )
    assert seen.directional_sharpness == pytest.approx(
        float(update @ matrix @ update / (flat @ update)), rel=1e-7
    )
    largest = torch.linalg.eigvalsh(matrix)
    assert largest[0] < 0 < largest[-1]  # the largest in magnitude may be the other end
    assert seen.hessian_sharpness == pytest.approx(float(largest[-1]), rel=1e-6)
    if name == "SGD":
        assert seen.preconditioned_sharpness is None
    else:
        scale = (1 - 0.8**3) * ((second_moment / (1 - 0.9**3)).sqrt() + 1e-4)
        ends = torch.linalg.eigvalsh(matrix / scale.sqrt() / scale.sqrt()[:, None])
        assert seen.preconditioned_sharpness == pytest.approx(float(ends[-1]), rel=1e-6)


@pytest.mark.parametrize("tolerance", [1 / 16, 1e-3])
def test_critical_sharpness_is_the_directional_one_on_a_quadratic(tolerance: float) -> None:
    model = nn.Linear(6, 4).double()
    inputs, targets = torch.randn(32, 6).double(), torch.randn(32, 4).double()

    def loss() -> Tensor:
        return F.mse_loss(model(inputs), targets)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    sharpness = CriticalSharpness(model, optimizer, every=1, tolerance=tolerance)
    for step in range(4):
        loss().backward()
        start = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
        optimizer.zero_grad()
        record = sharpness.after_step(step, lambda: (loss(), 1))
        exact = exact_curvature(model, optimizer, start, 0.5, loss)
        assert record is not None and record.critical_sharpness is not None
        assert record.critical_lr_lower is not None and record.critical_lr_upper is not None
        directional = exact.directional_sharpness
        assert 2 / record.critical_lr_upper <= directional <= 2 / record.critical_lr_lower
        assert record.critical_sharpness == pytest.approx(directional, rel=tolerance)
        # The gradient's own direction: a Rayleigh quotient.
        assert directional <= exact.hessian_sharpness * (1 + 1e-9)


def test_more_lanczos_steps_are_made_where_few_do_not_do(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = torch.linspace(-2, 1, 300).double()
    operator = reference.LambdaOperator(lambda v: ends * v, 300, dtype=torch.float64)
    monkeypatch.setattr(reference, "LANCZOS_STEPS", 2)
    monkeypatch.setattr(reference, "LANCZOS_TRIES", 8)
    assert reference.largest_eigenvalue(operator) == pytest.approx(1.0, rel=1e-4)
    monkeypatch.setattr(reference, "LANCZOS_TRIES", 1)
    with pytest.warns(UserWarning, match="residual of .* after 2 Lanczos steps"):
        reference.largest_eigenvalue(operator)


def refused(model: nn.Module, loss: Callable[[], Tensor]) -> str:
    start = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    with pytest.raises(InputError) as error:
        exact_curvature(model, optimizer, start, LR, loss)
    return str(error.value)


def test_what_has_no_second_derivative_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = nn.Linear(4, 4), torch.randn(8, 4)
    dropout = nn.Sequential(model, nn.Dropout(0.5))
    assert "does not repeat" in refused(dropout, lambda: dropout(inputs).square().mean())
    half = nn.Linear(4, 4, dtype=torch.bfloat16)
    assert "torch.bfloat16" in refused(half, lambda: half.weight.square().mean())
    compiled = torch.compile(model)
    assert "compiled" in refused(compiled, lambda: compiled(inputs).square().mean())
    monkeypatch.setattr(reference, "MEMORY_LIMIT", 1000)
    assert "20 parameters" in refused(model, lambda: model(inputs).square().mean())
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    assert "4 processes" in refused(model, lambda: model(inputs).square().mean())
