"""What objects hold, kept and put back: tensors, numbers, flags, generators, containers of them.

A forward pass may change more than buffers: hidden states of truncated backpropagation through
time, counters, queues, generators of a module's own. All that can be reached from an object is
walked: attributes of modules and of a user's own objects, and what is in lists and dictionaries.
Objects of other libraries are not looked into, unless they are asked for.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import random
import sys
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import Enum
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

#: Values that are compared as they are.
PLAIN = (
    type(None), bool, int, float, complex, str, bytes, Enum, torch.dtype, torch.device,
)  # fmt: skip

#: Attributes that every pass writes before it reads them: activations and scratch memory.
SCRATCH = {"input_tensor", "_fp8_workspaces"}

#: Libraries whose objects are not looked into: their own business, or too much.
_CLOSED = (sys.stdlib_module_names - {"queue"}) | {
    "torch", "numpy", "megatron_sharpness", "megatron", "megatron_fsdp", "transformer_engine",
    "apex", "transformers", "accelerate", "datasets", "tokenizers", "peft", "trl", "lightning",
    "pytorch_lightning", "lightning_fabric", "olmo_core", "torchtitan", "torchao", "deepspeed",
    "tensorboard", "wandb", "tqdm", "pandas", "PIL", "matplotlib",
}  # fmt: skip

#: What reading an attribute may raise where that is code, and no lack of memory.
_STRANGE = (
    AttributeError, TypeError, ValueError, LookupError, NotImplementedError, AssertionError, OSError
)  # fmt: skip

#: What is code, most often; of thousands of classes nearly all that there is.
_CODE = frozenset({FunctionType, BuiltinFunctionType, type, property, classmethod, staticmethod})

#: What ``nn.Module`` itself keeps in every module: hooks, parameters, children.
_OF_MODULES = frozenset(vars(nn.Module()))


class State:
    """What can be reached from some objects, as it is now.

    Attributes:
        plain: values by name, to compare.
        tensors: tensors by name, of each what this rank holds.

    Args:
        roots: the objects by name. They are looked into whatever they are.
        copied: whether to keep what is in a tensor, to put it back.
        parameters: whether to look at the modules' parameters and their gradients, too.
        opened: libraries whose objects are looked into.
        ignored: attributes that are left out, beside :data:`SCRATCH`.
        without: objects that are left out.
    """

    def __init__(
        self,
        roots: Mapping[str, object],
        *,
        copied: Callable[[Tensor], bool] = lambda tensor: True,
        parameters: bool = False,
        opened: Iterable[str] = (),
        ignored: Iterable[str] = (),
        without: Iterable[object] = (),
    ) -> None:
        self.plain: dict[str, Any] = {}
        self.tensors: dict[str, Tensor] = {}
        self._copied = copied
        self._parameters = parameters
        self._closed = _CLOSED - set(opened)
        self._ignored = SCRATCH.union(ignored)
        self._put_back: list[Callable[[], object]] = []
        # And held, so that no id is used again.
        self._seen: dict[int, object] = {id(left_out): left_out for left_out in without}
        self._names: dict[int, str] = {}
        self._roots = {id(root) for root in roots.values()}
        for name, root in roots.items() if parameters else ():
            if isinstance(root, nn.Module):
                for path, parameter in root.named_parameters():
                    self._names.setdefault(id(parameter), f"{name}.{path}")
        pending = deque(roots.items())
        while pending:
            name, value = pending.popleft()
            if isinstance(value, PLAIN):
                self.plain[name] = value
            elif id(value) not in self._seen:
                self._seen[id(value)] = value
                with contextlib.suppress(*_STRANGE):  # objects that do not let themselves be read
                    pending.extend(self._visit(name, value))

    def restore(self) -> None:
        """Put everything back: the same objects, and in them what was in them.

        What does not let itself be written stays, and the watch names it.
        """
        with torch.no_grad():
            for put_back in self._put_back:
                with contextlib.suppress(Exception):
                    put_back()

    def _visit(self, name: str, value: Any) -> Iterable[tuple[str, object]]:
        """Keep one object, and say what is in it."""
        if isinstance(value, (type, ModuleType)):
            return self._visit_namespace(name, value) if id(value) in self._roots else ()
        if isinstance(value, Tensor):
            return self._visit_tensor(name, value)
        if isinstance(value, np.ndarray):
            if value.dtype != object:
                self.plain[name] = saved = value.copy()
                self._put_back.append(lambda: np.copyto(value, saved))
            return ()
        if (generator := _generator(value)) is not None:
            read, write = generator
            self.plain[name] = state = read()
            self._put_back.append(lambda: write(state))
            return ()
        if isinstance(value, (bytearray, array)):
            self.plain[name] = raw = value[:]
            self._put_back.append(lambda: operator.setitem(value, slice(None), raw))
            return ()
        if isinstance(value, (dict, list, tuple, deque, set, frozenset)):
            self._keep_container(value)
            # Sets of strings have another order in each process.
            ordered = sorted(value, key=_order) if isinstance(value, (set, frozenset)) else value
            items = value.items() if isinstance(value, dict) else enumerate(ordered)
            self.plain[f"{name} length"] = len(value)
            held = [(f"{name}[{self._key(i, key)}]", v) for i, (key, v) in enumerate(items)]
            return [*held, *self._visit_object(name, value)]  # a subclass may have attributes
        return self._visit_object(name, value)

    def _key(self, index: int, key: object) -> object:
        return key if isinstance(key, (str, int)) else self._names.get(id(key), index)

    def _keep_container(self, value: Any) -> None:
        if isinstance(value, dict):
            saved = dict(value)
            self._put_back.append(lambda: _put_entries_back(value, saved))
        elif isinstance(value, (list, deque)):
            items = list(value)
            self._put_back.append(lambda: _put_items_back(value, items))
        elif isinstance(value, set):
            members = set(value)
            self._put_back.append(lambda: _put_members_back(value, members))

    def _visit_tensor(self, name: str, tensor: Tensor) -> Iterable[tuple[str, object]]:
        is_parameter = isinstance(tensor, nn.Parameter)
        wanted = not is_parameter or self._parameters or id(tensor) in self._roots
        # A parameter that is quantized may keep there what its module's first pass takes over.
        inside = [] if self._is_closed(tensor) else [*self._visit_object(name, tensor)]
        if tensor.layout != torch.strided or not wanted:
            return inside
        name = self._names.get(id(tensor), name)
        with torch.no_grad():
            held = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if not is_parameter and is_traceable_wrapper_subclass(held):
            inner, _ = held.__tensor_flatten__()
            return [(f"{name}.{key}", getattr(held, key)) for key in inner]  # such as 8-bit moments
        if held.is_meta or (held.numel() and not held.untyped_storage().nbytes()):
            return inside  # without memory, or it was given back until it is gathered again
        self.tensors[name] = held
        # A tensor in which elements share memory can only have been written through another one.
        writable = not tensor.is_inference() and torch._debug_has_internal_overlap(held) == 0
        if writable and self._copied(tensor):
            copy = held.detach().clone()
            self._put_back.append(lambda: _write(held, copy))
        # FSDP1 tidies the gradients of its flat parameters up at the begin of each pass.
        if not (is_parameter and self._parameters) or getattr(tensor, "_is_flat_param", False):
            return inside
        gradient = tensor.grad
        self._put_back.append(lambda: setattr(tensor, "grad", gradient))
        return [(f"{name}.grad", gradient), *inside]

    def _visit_object(self, name: str, value: Any) -> Iterable[tuple[str, object]]:
        if isinstance(value, torch.jit.ScriptModule):
            return [(f"{name}.{path}", buffer) for path, buffer in value.named_buffers()]
        if isinstance(value, nn.Module):
            return self._visit_module(name, value)
        if isinstance(value, MethodType):
            return [(f"{name}.__self__", value.__self__)]
        if isinstance(value, FunctionType):
            return self._visit_function(name, value)
        if isinstance(value, functools.partial):
            given = {"func": value.func, "args": value.args, "keywords": value.keywords}
            return [(f"{name}.{key}", held) for key, held in given.items()]
        open_to_all = id(value) in self._roots or isinstance(value, SimpleNamespace)
        if self._is_closed(value) and not open_to_all:
            return ()
        attributes = {key: v for key, v in _attributes(value) if key not in self._ignored}
        own = getattr(value, "__dict__", {})
        others = {key: v for key, v in attributes.items() if key not in own}
        self._put_back.append(lambda: _set_attributes(value, others))
        if own or hasattr(value, "__dict__"):
            held = {key: v for key, v in attributes.items() if key in own}
            self._put_back.append(lambda: _put_entries_back(own, held, self._ignored))
        inside = [(f"{name}.{key}", v) for key, v in attributes.items()]
        return [*inside, *self._classes(name, value)]

    def _is_closed(self, value: object) -> bool:
        return type(value).__module__.partition(".")[0] in self._closed

    def _classes(self, name: str, value: object) -> Iterable[tuple[str, object]]:
        """The classes of an object, whose attributes its methods may change, too."""
        mine = [k for k in type(value).__mro__ if k.__module__.split(".")[0] not in self._closed]
        self._roots.update(map(id, mine))
        return [(f"{name}.{kind.__name__}", kind) for kind in mine]

    def _visit_namespace(
        self, name: str, value: type | ModuleType
    ) -> Iterable[tuple[str, object]]:
        """What a class or a Python module holds beside code."""
        held = {key: v for key, v in _values(value) if key not in self._ignored}
        self._put_back.append(lambda: _set_attributes(value, held))
        return [(f"{name}.{key}", v) for key, v in held.items()]

    def _visit_function(self, name: str, function: FunctionType) -> Iterable[tuple[str, object]]:
        """What a function has kept of the scope that it was defined in."""
        if (function.__module__ or "").partition(".")[0] in self._closed:
            return ()
        names = function.__code__.co_freevars
        cells = list(zip(names, function.__closure__ or (), strict=True))
        held = {key: cell.cell_contents for key, cell in cells}
        for key, cell in cells:
            self._put_back.append(functools.partial(setattr, cell, "cell_contents", held[key]))
        return [(f"{name}.{key}", v) for key, v in held.items()]

    def _visit_module(self, name: str, module: nn.Module) -> Iterable[tuple[str, object]]:
        left_out = _OF_MODULES | self._ignored
        held = vars(module)
        attributes = {key: value for key, value in held.items() if key not in left_out}
        self._put_back.append(lambda: _put_entries_back(held, attributes, left_out))
        self.plain[f"{name}.training"] = module.training
        self._keep_container(module._buffers)
        inside: dict[str, object] = {**module._modules, **module._buffers, **attributes}
        for key, parameter in module._parameters.items():
            if self._parameters or not self._is_closed(parameter):
                inside[key] = parameter
        found = [(f"{name}.{key}", v) for key, v in inside.items()]
        return [*found, *self._classes(name, module)]


def _order(member: object) -> str:
    """By which members of a set are put in a row; others than plain ones stay as they come."""
    return str(member) if isinstance(member, PLAIN) else ""


def _values(value: type | ModuleType) -> Iterator[tuple[str, Any]]:
    """Attributes of a class or a Python module that are no code."""
    for key, held in list(vars(value).items()):
        if type(held) in _CODE or key.startswith("__") or callable(held):
            continue
        if not isinstance(held, (classmethod, staticmethod, property)):
            yield key, held


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    """Attributes of an object: its own, and those in slots."""
    yield from list(getattr(value, "__dict__", {}).items())
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        for slot in (slots,) if isinstance(slots, str) else slots:
            private = slot.startswith("__") and not slot.endswith("__")
            key = f"_{kind.__name__.lstrip('_')}{slot}" if private else slot
            if key not in ("__dict__", "__weakref__") and hasattr(value, key):
                yield key, getattr(value, key)


def _generator(value: Any) -> tuple[Callable[[], Any], Callable[[Any], object]] | None:
    """What reads and what writes the state of a generator of random numbers; None for others."""
    if isinstance(value, torch.Generator):
        return value.get_state, value.set_state
    if isinstance(value, random.Random):
        return value.getstate, value.setstate
    if isinstance(value, np.random.RandomState):
        return value.get_state, value.set_state
    if isinstance(value, np.random.Generator):
        bits = value.bit_generator
        return lambda: bits.state, lambda state: setattr(bits, "state", state)
    return None


def _put_entries_back(
    entries: dict[Any, Any], saved: dict[Any, Any], left_out: Iterable[Any] = ()
) -> None:
    """Make a dictionary's entries the saved ones, but for those that are left out."""
    for key in [key for key in entries if key not in saved and key not in left_out]:
        del entries[key]
    for key, value in saved.items():
        if key not in entries or entries[key] is not value:
            entries[key] = value


def _put_items_back(items: list[Any] | deque[Any], saved: list[Any]) -> None:
    if len(items) != len(saved) or any(a is not b for a, b in zip(items, saved, strict=True)):
        items.clear()
        items.extend(saved)


def _put_members_back(members: set[Any], saved: set[Any]) -> None:
    members.intersection_update(saved)
    members.update(saved)


def _set_attributes(owner: Any, saved: Mapping[str, Any]) -> None:
    for key, value in saved.items():
        if getattr(owner, key, None) is not value:
            setattr(owner, key, value)


def _write(tensor: Tensor, copy: Tensor) -> None:
    """Write through ``.data``: autograd may hold the tensor, and this is no change to it."""
    if tensor.shape == copy.shape:
        tensor.data.copy_(copy)
    else:
        tensor.data = copy.clone()
