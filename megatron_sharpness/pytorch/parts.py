"""Which parts of a model the parameters of a loop's optimizers are of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from megatron_sharpness.core.errors import SettingError
from megatron_sharpness.core.parts import Weight, parts_of, tag_of
from megatron_sharpness.core.replay import of_all_ranks
from megatron_sharpness.pytorch.pipelines import PipelinedModel
from megatron_sharpness.pytorch.shards import deepspeed

#: What wrappers of a model put into the names of its parameters.
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


class PartsOfModel:
    """The parts that were asked for, and who is of which. Collective.

    Attributes:
        names: of the parts.

    Args:
        chosen: as in :class:`~megatron_sharpness.core.settings.Settings`.
        model: as the loop calls it.
        optimizers: all that step its parameters.

    Raises:
        SettingError: a part has no parameter.
    """

    def __init__(
        self, chosen: str | Mapping[str, str], model: nn.Module, optimizers: Sequence[Optimizer]
    ) -> None:
        if any(map(deepspeed.owns, optimizers)):
            raise SettingError(
                "parts", chosen, "what DeepSpeed steps holds pieces of many parameters, which are "
                "not moved by themselves; leave it out",
            )  # fmt: skip
        weights = _weights(model, optimizers)
        if chosen != "groups" and not all(weight.name for weight in weights.values()):
            raise SettingError(
                "parts", chosen, "the optimizer steps tensors that the model has under no name; "
                "give parts='groups', or leave it out",
            )  # fmt: skip
        parts = parts_of(chosen, list(weights.values()), of_all_ranks)
        self.names = parts.names
        self._members = {key: parts.of(weight) for key, weight in weights.items()}

    def of(self, parameter: Tensor) -> tuple[int, ...]:
        """The numbers of the parts that a parameter is of."""
        return self._members.get(id(parameter), ())


def _weights(model: nn.Module, optimizers: Sequence[Optimizer]) -> dict[int, Weight]:
    """Name and group of each parameter that trains, by its id."""
    names = names_of(model)
    groups = [(optimizer, group) for optimizer in optimizers for group in optimizer.param_groups]
    kinds = Counter(type(optimizer).__name__ for optimizer, _ in groups)
    numbers: Counter[str] = Counter()
    found = {}
    for optimizer, group in groups:
        kind = type(optimizer).__name__
        label = f"{kind}-{numbers[kind]}" if kinds[kind] > 1 else kind
        numbers[kind] += 1
        for parameter in group["params"]:
            if not parameter.requires_grad:
                continue
            name = name_of(parameter, names)
            found[id(parameter)] = Weight(name, tag_of(str(group.get("name", label))))
    return found


def names_of(model: nn.Module) -> dict[int, str]:
    """The names of this rank's parameters in the model, by their ids."""
    models = model if isinstance(model, PipelinedModel) else [model]
    named = [entry for one in models for entry in one.named_parameters()]
    return {id(parameter): _unwrapped(name) for name, parameter in named}


def name_of(parameter: Tensor, names: Mapping[int, str]) -> str:
    """What the model calls a parameter of an optimizer; empty if nothing."""
    original = getattr(parameter, "orig_param", None)  # of Megatron-FSDP's
    return names.get(id(parameter)) or names.get(id(original), "")


def _unwrapped(name: str) -> str:
    return ".".join(word for word in name.split(".") if word not in _WRAPPERS)
