"""The GPT of the tests, its first Adam step and its critical learning rate, in fp64 on one process.

Written from the equations, not from Megatron: a second opinion on what the hook measures.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_sharpness.data import evaluation
from tests.megatron.canonical import full_parameter

LAYERS, WIDTH, HEADS, LENGTH, VOCABULARY = 4, 32, 4, 32, 256
LR, WEIGHT_DECAY, BETA1, BETA2, EPSILON, CLIP = 1e-2, 0.1, 0.9, 0.999, 1e-8, 1.0


def parameters() -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {
        "embedding.word_embeddings.weight": (VOCABULARY, WIDTH),
        "embedding.position_embeddings.weight": (LENGTH, WIDTH),
        "decoder.final_layernorm.weight": (WIDTH,),
        "decoder.final_layernorm.bias": (WIDTH,),
    }
    for layer in range(LAYERS):
        prefix = f"decoder.layers.{layer}."
        shapes |= {
            prefix + "input_layernorm.weight": (WIDTH,),
            prefix + "input_layernorm.bias": (WIDTH,),
            prefix + "self_attention.linear_proj.weight": (WIDTH, WIDTH),
            prefix + "self_attention.linear_proj.bias": (WIDTH,),
            prefix + "self_attention.linear_qkv.weight": (3 * WIDTH, WIDTH),
            prefix + "self_attention.linear_qkv.bias": (3 * WIDTH,),
            prefix + "pre_mlp_layernorm.weight": (WIDTH,),
            prefix + "pre_mlp_layernorm.bias": (WIDTH,),
            prefix + "mlp.linear_fc1.weight": (4 * WIDTH, WIDTH),
            prefix + "mlp.linear_fc1.bias": (4 * WIDTH,),
            prefix + "mlp.linear_fc2.weight": (WIDTH, 4 * WIDTH),
            prefix + "mlp.linear_fc2.bias": (WIDTH,),
        }
    return {name: full_parameter(name, shape).double() for name, shape in shapes.items()}


def loss(weights: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
    """Mean cross-entropy a token of one batch, in nats."""

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (WIDTH,), weights[name + ".weight"], weights[name + ".bias"], 1e-5)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weights[name + ".weight"], weights[name + ".bias"])

    words = weights["embedding.word_embeddings.weight"]
    x = words[batch["tokens"]] + weights["embedding.position_embeddings.weight"]
    for layer in range(LAYERS):
        prefix = f"decoder.layers.{layer}."
        qkv = linear(norm(x, prefix + "input_layernorm"), prefix + "self_attention.linear_qkv")
        samples, length, _ = qkv.shape
        # Megatron interleaves: for every head its query, key and value.
        qkv = qkv.view(samples, length, HEADS, 3, WIDTH // HEADS).permute(3, 0, 2, 1, 4)
        attended = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], is_causal=True)
        attended = attended.transpose(1, 2).reshape(samples, length, WIDTH)
        x = x + linear(attended, prefix + "self_attention.linear_proj")
        hidden = F.gelu(linear(norm(x, prefix + "pre_mlp_layernorm"), prefix + "mlp.linear_fc1"))
        x = x + linear(hidden, prefix + "mlp.linear_fc2")
    logits = F.linear(norm(x, "decoder.final_layernorm"), words)
    losses = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none")
    mask = batch["loss_mask"].double().flatten()
    return torch.sum(losses * mask) / mask.sum()


def other_batch(path: Path, end: int = 254) -> dict[str, Tensor]:
    """The eight samples of ``sums`` that runs draw of :func:`tests.megatron.harness.other_data`,
    whose answers end with the token ``end``."""
    sums = evaluation.read(
        "sums", path, samples=8, length=LENGTH, seed=1234, tokenize=evaluation.byte_tokens,
        end=end, vocabulary=VOCABULARY,
    )  # fmt: skip
    tokens = torch.from_numpy(sums.tokens)
    return {
        "tokens": tokens[:, :-1], "labels": tokens[:, 1:], "loss_mask": torch.from_numpy(sums.mask)
    }  # fmt: skip


@dataclass(frozen=True)
class Reference:
    loss: float
    slope: float
    update_norm: float
    critical_lr: float
    relative_critical_lr: float
    directional_sharpness: float
    parts: dict[str, tuple[float, float, float]]  # slope, norm of the update, η_c
    adam_snr: dict[str, dict[str, float]]  # of the second moments, by kind of matrix


#: Parts of the model by name, which the flag has too, and what is in their parameters' names.
PARTS = {"embeddings": "embedding.", "norms": "norm", "late": "layers.3."}


def measure(batch: dict[str, Tensor], other: dict[str, Tensor] | None = None) -> Reference:
    """The first AdamW step on ``batch`` and the exact numbers along its update, on both."""
    other = batch if other is None else other
    weights = {name: value.requires_grad_() for name, value in parameters().items()}
    start = loss(weights, batch)
    gradients = dict(
        zip(weights, torch.autograd.grad(start, list(weights.values())), strict=True)
    )
    total = math.sqrt(sum(float(torch.sum(g * g)) for g in gradients.values()))
    clip = min(1.0, CLIP / (total + 1e-6))
    update = {}
    for name, weight in weights.items():
        g = gradients[name] * clip
        adam = g / (g.abs() + EPSILON)  # m̂/(√v̂ + ε) of the first step
        # Megatron decays neither biases nor one-dimensional parameters.
        decay = WEIGHT_DECAY if weight.dim() > 1 and not name.endswith(".bias") else 0.0
        update[name] = (adam + decay * weight).detach()
    slope = sum(float(torch.sum(gradients[name] * update[name])) for name in weights)

    def along(eta: float, data: dict[str, Tensor] = batch, part: str = "") -> float:
        with torch.no_grad():
            moved = {
                name: weight - eta * update[name] if part in name else weight
                for name, weight in weights.items()
            }
            return float(loss(moved, data))

    parts = {}
    for part, word in PARTS.items():
        own = [name for name in weights if word in name]
        parts[part] = (
            sum(float(torch.sum(gradients[name] * update[name])) for name in own),
            math.sqrt(sum(float(torch.sum(update[name] ** 2)) for name in own)),
            bisect(lambda eta, word=word: along(eta, part=word), start.item()),
        )
    return Reference(
        parts=parts,
        adam_snr=ratios_of(gradients),
        loss=float(start),
        slope=slope,
        update_norm=math.sqrt(sum(float(torch.sum(u * u)) for u in update.values())),
        critical_lr=bisect(along, float(start)),
        relative_critical_lr=bisect(lambda eta: along(eta, other), along(0.0, other)),
        # As the measurement estimates it, at the smallest η probed: the cold guess, the step's lr.
        directional_sharpness=2.0 * (along(LR) - float(start) + LR * slope) / (slope * LR * LR),
    )


def ratios_of(gradients: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """(E[V])² / Var[V] of the first step's second moments, which are g² but for a factor."""
    kinds: dict[str, list[dict[str, float]]] = {}
    for name, gradient in gradients.items():
        if gradient.dim() != 2:
            continue
        v = gradient.square()
        inputs = v.mean(1) ** 2 / v.var(1, correction=0)
        outputs = v.mean(0) ** 2 / v.var(0, correction=0)
        ratios = {
            "fan_in": inputs[v.sum(1) > 0].mean().item(),
            "fan_out": outputs[v.sum(0) > 0].mean().item(),
            "both": (v.mean() ** 2 / v.var(correction=0)).item(),
        }
        kinds.setdefault(re.sub(r"layers\.\d+", "layers", name), []).append(ratios)
    return {
        kind: {over: sum(row[over] for row in rows) / len(rows) for over in rows[0]}
        for kind, rows in kinds.items()
    }


def bisect(along: Callable[[float], float], start: float) -> float:
    upper = LR
    while along(upper) <= start:
        upper *= 2.0
        if upper > 1e6:  # before a normalization weights may grow without end
            return math.inf
    while along(upper / 2.0) > start:
        upper /= 2.0
    lower = upper / 2.0
    for _ in range(40):
        middle = 0.5 * (lower + upper)
        lower, upper = (lower, middle) if along(middle) > start else (middle, upper)
    return 0.5 * (lower + upper)

