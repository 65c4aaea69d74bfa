"""Exact curvature at one optimizer step of a small model, by Hessian-vector products.

After Kalra et al. 2026 (arXiv 2601.16979): Result 2.1 (directional sharpness), Section 3 and
Result D.4 (the pre-conditioned Hessian).
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Adam, AdamW, Optimizer

from megatron_sharpness.core.errors import InputError

try:
    from hessian_eigenthings import HessianOperator, LambdaOperator, lanczos
    from hessian_eigenthings.operators import CurvatureOperator
except ImportError as error:
    raise ImportError(
        f"megatron_sharpness.reference needs hessian-eigenthings ({error}): "
        'pip install ".[reference]" in a clone of megatron_sharpness'
    ) from error

#: Lanczos steps of a first try; each costs a Hessian-vector product, some twelve forward passes.
LANCZOS_STEPS = 40
#: Tries, each with twice the steps of the one before.
LANCZOS_TRIES = 4
#: Residual ‖Av − λv‖/|λ| at which an eigenvalue counts as found; the error of the eigenvalue is of
#: second order in it.
LANCZOS_TOLERANCE = 1e-3
#: Memory of the Lanczos basis at the last try, above which a model is not small.
MEMORY_LIMIT = 8 * 2**30


@dataclasses.dataclass(frozen=True)
class ExactCurvature:
    """Curvature of the loss at θ_t, in the units of λ_c = 2/η_c.

    Attributes:
        directional_sharpness: λ_dir = ΔθᵀHΔθ / ⟨g, Δθ⟩ along the update (Result 2.1), to which λ_c
            tends where the loss is quadratic. Never above ``hessian_sharpness`` where Δθ = g.
        hessian_sharpness: λ_max^H, the largest eigenvalue of the Hessian H; None where it was not
            asked for.
        preconditioned_sharpness: λ_max^PH, the largest eigenvalue of P^{-1/2} H P^{-1/2} with the P
            of Adam (:func:`adam_preconditioner`); None under other optimizers.
    """

    directional_sharpness: float
    hessian_sharpness: float | None
    preconditioned_sharpness: float | None


def exact_curvature(
    model: nn.Module,
    optimizer: Optimizer,
    start: Sequence[Tensor],
    lr: float,
    loss: Callable[[], Tensor],
    *,
    hessian: bool = True,
) -> ExactCurvature:
    """The exact curvature at θ_t along the step that ``optimizer`` has just made.

    Call it on θ_{t+1}, after ``optimizer.step()`` and before its state changes again; it leaves the
    model as it was. ::

        start = [parameter.detach().clone() for parameter in model.parameters()]
        optimizer.step()
        exact = exact_curvature(model, optimizer, start, lr, lambda: mean_loss(model, batch))

    Args:
        model: on one device of one process, its parameters in fp32 or fp64.
        optimizer: of all parameters that it trains.
        start: θ_t, a tensor for each of ``model.parameters()``.
        lr: η of the step; with several groups the largest one, as in the record.
        loss: the mean loss of the step's batch at the model's weights, with its graph. It must
            repeat: no dropout.
        hessian: whether to compute λ_max^H too; without it a step under Adam costs half.

    Raises:
        InputError: the model is sharded, compiled, too large or in 16 bits, or its loss does not
            repeat; the message says what to do.
    """
    _refuse(model, loss)
    trained = [
        (parameter, before)
        for parameter, before in zip(model.parameters(), start, strict=True)
        if parameter.requires_grad
    ]
    update = [(before - parameter.detach()) / lr for parameter, before in trained]
    with _at(trained), sdpa_kernel(SDPBackend.MATH):  # flash attention has no second derivative
        product = HessianOperator(model, [None], lambda _model, _batch: loss())
        flat = _flat(update)
        gradient = _flat(torch.autograd.grad(loss(), [parameter for parameter, _ in trained]))
        directional = torch.dot(flat, product.matvec(flat)) / torch.dot(gradient, flat)
        preconditioned = None
        if isinstance(optimizer, (Adam, AdamW)):
            scale = _flat(adam_preconditioner(optimizer, [p for p, _ in trained])).rsqrt()
            preconditioned = largest_eigenvalue(
                LambdaOperator(
                    lambda v: scale * product.matvec(scale * v),
                    product.size,
                    product.device,
                    product.dtype,
                )
            )
        largest = largest_eigenvalue(product) if hessian else None
        return ExactCurvature(float(directional), largest, preconditioned)


def adam_preconditioner(optimizer: Optimizer, parameters: Sequence[Tensor]) -> list[Tensor]:
    """The diagonal of Adam's pre-conditioner P, for each of ``parameters`` in its shape.

    P = (1 − β₁ᵗ)(√(v_t / (1 − β₂ᵗ)) + ε), so that θ_{t+1} = θ_t − η P⁻¹ m_t with both bias
    corrections (Result D.4). From the optimizer's state after the step.
    """
    groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    diagonals = []
    for parameter in parameters:
        group, state = groups[parameter], optimizer.state[parameter]
        beta1, beta2 = group["betas"]
        step = float(state["step"])
        corrected = state["exp_avg_sq"] / (1.0 - beta2**step)
        diagonals.append((1.0 - beta1**step) * (corrected.sqrt() + group["eps"]))
    return diagonals


def largest_eigenvalue(operator: CurvatureOperator) -> float:
    """The largest, not the largest in magnitude, eigenvalue of a symmetric operator, by Lanczos."""
    for attempt in range(LANCZOS_TRIES):
        steps = min(LANCZOS_STEPS * 2**attempt, operator.size)
        found = lanczos(
            operator, k=1, max_iter=steps, tol=LANCZOS_TOLERANCE, which="LA", seed=0,
            reorthogonalize=True,
        )  # fmt: skip
        if bool(found.converged[0]) or steps == operator.size:
            break
    else:
        warnings.warn(
            f"the largest eigenvalue {float(found.eigenvalues[0]):g} has a residual of "
            f"{float(found.residuals[0]):g} after {steps} Lanczos steps",
            stacklevel=2,
        )
    return float(found.eigenvalues[0])


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


@contextlib.contextmanager
def _at(trained: Sequence[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Within it the parameters are those of θ_t."""
    saved = [parameter.detach().clone() for parameter, _ in trained]
    try:
        with torch.no_grad():
            for parameter, value in trained:
                parameter.copy_(value)
        yield
    finally:
        with torch.no_grad():
            for (parameter, _), value in zip(trained, saved, strict=True):
                parameter.copy_(value)


def _refuse(model: nn.Module, loss: Callable[[], Tensor]) -> None:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if dist.is_initialized() and dist.get_world_size() > 1:
        raise InputError(
            f"exact curvature: there are {dist.get_world_size()} processes, and Hessian-vector "
            "products are of one process and its batch; run it on one"
        )
    if any(isinstance(parameter, DTensor) for parameter in parameters):
        raise InputError(
            "exact curvature: the parameters are DTensors, whose shards have no second "
            "derivative; use a model that is not sharded"
        )
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise InputError(
            "exact curvature: a compiled model has no second derivative; give what was compiled"
        )
    narrow = {parameter.dtype for parameter in parameters} - {torch.float32, torch.float64}
    if narrow:
        raise InputError(
            f"exact curvature: parameters in {', '.join(map(str, narrow))} are too coarse for "
            "second derivatives; use fp32 or fp64"
        )
    count = sum(parameter.numel() for parameter in parameters)
    steps = min(LANCZOS_STEPS * 2 ** (LANCZOS_TRIES - 1), count)
    needed = count * steps * parameters[0].element_size()
    if needed > MEMORY_LIMIT:
        raise InputError(
            f"exact curvature: the model has {count:,} parameters, and {steps} Lanczos vectors of "
            f"that length take {needed / 2**30:.0f} GiB; use one of at most "
            f"{MEMORY_LIMIT // (steps * parameters[0].element_size()):,}"
        )
    with torch.no_grad():
        first, second = float(loss()), float(loss())
    if first != second:
        raise InputError(
            f"exact curvature: the loss does not repeat ({first} and then {second}); switch "
            "dropout off, or call model.eval()"
        )
