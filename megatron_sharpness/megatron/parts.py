"""Which parts of Megatron's model the parameters of its optimizers are of."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch.distributed as dist

from megatron_sharpness.core.parts import Weight, parts_of, tag_of
from megatron_sharpness.megatron.shards import Leaf, leaves_of

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
        self._model = model
        weights = [weight for leaf in leaves_of(optimizer) for weight in self._weights(leaf)]
        self._parts = parts_of(chosen, weights, _gather)
        self.names = self._parts.names

    def of_shards(self, leaf: Leaf) -> list[tuple[int, ...]]:
        """The numbers of the parts that each shard of an optimizer is of, in their order."""
        return [self._parts.of(weight) for weight in self._weights(leaf)]

    def _weights(self, leaf: Leaf) -> Iterator[Weight]:
        stepped = leaf.stepped()
        if not stepped:
            return
        names = _names(self._model)
        groups = {
            id(parameter): _label(leaf.optimizer, group)
            for group in leaf.optimizer.param_groups
            for parameter in group["params"]
        }
        for each in stepped:
            name = names.get(id(each.weight)) or names.get(id(each.parameter), "")
            yield Weight(name, groups.get(id(each.parameter), ""))


def _names(model: Sequence[Any]) -> dict[int, str]:
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
    words = name.split(".")
    for end in range(1, len(words)):
        if (number := numbers.get(".".join(name.split(".")[:end]))) is not None:
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


def _gather(mine: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found
