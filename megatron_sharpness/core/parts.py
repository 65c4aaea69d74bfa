"""Parts of a model, each of which may have an update of its own.

The update of a part P is Δθ on the parameters of P and zero elsewhere, and

    η_c^P = min{η > 0 : L(θ − ηΔθ_P) > L(θ)},    λ_c^P = 2/η_c^P.

Which parameters a part has is told by their names in the model, layers by their number in the whole
of it, and by the optimizer's groups.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from megatron_sharpness.core.errors import SettingError

#: ``modules``: a parameter is of the first whose expression is found in its name.
MODULES = {
    "experts": r"expert",
    "router": r"router|\bgate\.(weight|bias)$",
    "norms": r"norm|\bln(_|\d|\.)|\bln[a-z]?\b",
    "embeddings": r"embed|\bwte\b|\bwpe\b",
    "output": r"output_layer|lm_head|\bhead\.|\boutput\.weight$",
    "attention": r"attn|attention|qkv|query|[qkvo]_proj|linear_proj|\b(key|value|out|proj)\.",
    "mlp": r"mlp|ffn|feed_forward|linear_fc|\bfc\d|\bup\b|\bdown\b|(gate|up|down)_proj|\bw[123]\b",
    "rest": "",
}
#: ``layers``: thirds of the depth, and what is in no layer.
THIRDS = ("first-third", "middle-third", "last-third")
OUTSIDE = "outside"

PRESETS = ("modules", "groups", "layers")
LAYER = re.compile(r"(?:^|\.)(?:layers|blocks|layer|block|h)\.(\d+)\.")
_NAME = re.compile(r"[A-Za-z0-9_.-]+")


class Weight(NamedTuple):
    """What tells which parts a parameter is of: its name, and that of its optimizer's group."""

    name: str
    group: str


@dataclass(frozen=True)
class Parts:
    """The parts of a model, on all ranks.

    Attributes:
        names: of those that some rank has parameters of, in the order that all ranks measure in.
        depth: layers of the whole model.
        chosen: the preset, or the expressions by name.
    """

    names: tuple[str, ...]
    depth: int
    chosen: str | Mapping[str, str]

    def of(self, weight: Weight) -> tuple[int, ...]:
        """The numbers of the parts that a parameter is of."""
        labels = _labels(self.chosen, weight, self.depth)
        return tuple(number for number, name in enumerate(self.names) if name in labels)


def parts_of(
    chosen: str | Mapping[str, str],
    weights: Sequence[Weight],
    gather: Callable[[Any], list[Any]],
) -> Parts:
    """The parts of a model that is spread over ranks. Collective.

    Args:
        chosen: one of :data:`PRESETS`, or expressions by name.
        weights: those that this rank has.
        gather: an object of each rank, to a list of all.

    Raises:
        SettingError: no parameter of the model is of a part.
    """
    depth = max(gather(max((_layer(weight.name) for weight in weights), default=-1))) + 1
    mine = {label for weight in weights for label in _labels(chosen, weight, depth)}
    seen = {label for labels in gather(sorted(mine)) for label in labels}
    if not isinstance(chosen, str) and (missing := [name for name in chosen if name not in seen]):
        raise SettingError(
            "parts",
            f"{missing[0]}={chosen[missing[0]]}",
            "no parameter that is trained has a name in which this expression is found; names are "
            f"such as {', '.join(sorted({weight.name for weight in weights})[:3])}",
        )
    order = {"modules": (*MODULES,), "layers": (*THIRDS, OUTSIDE)}
    known = order.get(chosen, ()) if isinstance(chosen, str) else tuple(chosen)
    names = [*(name for name in known if name in seen), *sorted(seen - set(known))]
    if isinstance(chosen, str) and len(names) == 1:
        raise SettingError(
            "parts",
            chosen,
            f"all of the model is one part then, {names[0]}, which is the whole again; name parts "
            "by expressions, such as attention=attn mlp=mlp",
        )
    return Parts(tuple(names), depth, chosen)


def check_parts(chosen: object) -> None:
    """Refuse what names no parts.

    Raises:
        SettingError: names the value, the reason and the remedy.
    """
    if isinstance(chosen, str) and chosen in PRESETS:
        return
    if not isinstance(chosen, Mapping) or not chosen:
        raise SettingError(
            "parts",
            chosen,
            f"it is one of {', '.join(PRESETS)}, or names with an expression each, such as "
            "embeddings=embed",
        )
    for name, expression in chosen.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise SettingError(
                "parts", name, "a name is a tag's last part; give letters, digits, '_', '.', '-'"
            )
        try:
            re.compile(expression)
        except (re.error, TypeError) as error:
            raise SettingError(
                "parts", f"{name}={expression}", f"no regular expression of Python ({error})"
            ) from None


def _labels(chosen: str | Mapping[str, str], weight: Weight, depth: int) -> tuple[str, ...]:
    """The names of the parts of a parameter."""
    if chosen == "groups":
        return (weight.group,)
    if chosen == "modules":
        return (next(name for name, found in MODULES.items() if re.search(found, weight.name)),)
    if chosen == "layers":
        layer = _layer(weight.name)
        return (OUTSIDE if layer < 0 else THIRDS[3 * layer // depth],)
    assert not isinstance(chosen, str)
    return tuple(name for name, found in chosen.items() if re.search(found, weight.name))


def _layer(name: str) -> int:
    """The number of the layer that a parameter is in; -1 outside, and in a layer that predicts
    further tokens."""
    found = None if "mtp" in name.split(".") else LAYER.search(name)
    return int(found[1]) if found else -1


def tag_of(text: str) -> str:
    """Words as a part's name."""
    return re.sub(r"[^A-Za-z0-9_.]+", "-", text).strip("-").lower()
