"""Which parts of Megatron's model the parameters of its optimizers are of."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from megatron_sharpness.core.parts import Weight, parts_of, tag_of
from megatron_sharpness.core.replay import of_all_ranks
from megatron_sharpness.megatron.shards import Leaf, leaves_of
from megatron_sharpness.megatron.shards.gathers import Stepped

#: Of the weight that the first and the last pipeline stage have each a copy of.
_SHARED = "embedding.word_embeddings.weight"
_KINDS = ("muon", "adam", "sgd", "lion")


class PartsOfModel:
    """The parts that were asked for, and who is of which. Collective.

    Attributes:
        names: of the parts.

    Args:
        chosen: as in :class:`~megatron_sharpness.core.settings.Settings`.
        model: the model chunks of this rank.
        optimizer: the ``MegatronOptimizer`` that steps them.

    Raises:
        SettingError: a part has no parameter.
    """

    def __init__(
        self, chosen: str | Mapping[str, str], model: Sequence[Any], optimizer: Any
    ) -> None:
        names = names_of(model)
        weights = {id(leaf.optimizer): _weights(leaf, names) for leaf in leaves_of(optimizer)}
        parts = parts_of(chosen, list(chain.from_iterable(weights.values())), of_all_ranks)
        self.names = parts.names
        self._members = {key: list(map(parts.of, held)) for key, held in weights.items()}

    def of_shards(self, leaf: Leaf) -> list[tuple[int, ...]]:
        """The numbers of the parts that each shard of an optimizer is of, in their order."""
        return self._members[id(leaf.optimizer)]


def _weights(leaf: Leaf, names: Mapping[int, str]) -> list[Weight]:
    """Name and group of what an optimizer steps on this rank."""
    stepped = leaf.stepped()
    if not stepped:  # a stub has no groups
        return []
    groups = {
        id(parameter): _label(leaf.optimizer, group)
        for group in leaf.optimizer.param_groups
        for parameter in group["params"]
    }
    return [
        Weight(
            name_of(each, names),
            groups.get(id(each.parameter), ""),
        )
        for each in stepped
    ]


def name_of(stepped: Stepped, names: Mapping[int, str]) -> str:
    """What the model calls it; empty if nothing."""
    return names.get(id(stepped.weight)) or names.get(id(stepped.parameter), "")


def names_of(model: Sequence[Any]) -> dict[int, str]:
    """The names of the parameters of this rank, by their ids, layers by their number in the whole
    model."""
    found = {}
    for chunk in model:
        numbers = {
            name: str(module.layer_number - 1)
            for name, module in chunk.named_modules()
            if re.search(r"(^|\.)layers\.\d+$", name) and hasattr(module, "layer_number")
        }
        for name, parameter in chunk.named_parameters():
            shared = getattr(parameter, "shared_embedding", False)
            found[id(parameter)] = _SHARED if shared else _in_the_whole(name, numbers)
    return found


def _in_the_whole(name: str, numbers: Mapping[str, str]) -> str:
    local = name.split(".")
    words = list(local)
    for end in range(1, len(local)):
        if (number := numbers.get(".".join(local[:end]))) is not None:
            words[end - 1] = number
    return ".".join(word for word in words if word != "module")


def _label(optimizer: Any, group: Mapping[str, Any]) -> str:
    """What to call a group of parameters, the same on every rank that has it."""
    kind = type(optimizer.optimizer).__name__.lower()
    words = [next((known for known in _KINDS if known in kind), optimizer.config.optimizer)]
    words += ["experts"] * bool(group.get("is_expert_parallel"))
    words += ["decoupled-lr"] * bool(group.get("is_decoupled_lr"))
    words += ["not-decayed"] * (group.get("wd_mult") == 0.0)
    if (factor := group.get("lr_mult", 1.0)) != 1.0:
        words.append(f"lr-times-{factor:g}")
    return tag_of("-".join(words))
