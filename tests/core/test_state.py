"""What can be reached from an object, kept, compared and put back."""

from __future__ import annotations

import functools
import queue
import random
import threading
from array import array
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from enum import Enum
from fractions import Fraction
from types import FunctionType, MethodType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from megatron_sharpness.core.state import State
from megatron_sharpness.core.watch import Checksums, Watch, checksum

CPU = torch.device("cpu")


class Kind(Enum):
    ONE, TWO = 1, 2


class Own:
    def __init__(self, **held: Any) -> None:
        vars(self).update(held)

    def method(self) -> None: ...


class Slotted:
    __slots__ = ("__hidden", "count")

    def __init__(self) -> None:
        self.count, self.__hidden = 0, [0]

    def change(self) -> None:
        self.count += 1
        self.__hidden.append(1)


class Both(Slotted):
    """Slots, and a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.more = 1

    def change(self) -> None:
        super().change()
        self.more += 1


class Listed(list[int]):
    """A container with attributes of its own."""

    calls = 0


class Shared:
    """Counts in its class."""

    calls = 0


def closure() -> Callable[[], int]:
    calls, seen = 0, [0]

    def call() -> int:
        nonlocal calls
        calls += 1
        seen.append(calls)
        return calls

    return call


def change(value: Any) -> Any:
    """Another value of the same kind, in place where that can be done."""
    if isinstance(value, torch.Tensor):
        value.data.add_(1)
    elif isinstance(value, np.ndarray):
        value += 1
    elif isinstance(value, (Counter, OrderedDict, dict)):
        value["new"] = 1
    elif isinstance(value, Listed):
        value.calls += 1
    elif isinstance(value, (list, deque)):
        value.append(1)
    elif isinstance(value, set):
        value.add(99)
    elif isinstance(value, torch.Generator):
        torch.rand(1, generator=value)
    elif isinstance(value, (random.Random, np.random.Generator)):
        value.random()
    elif isinstance(value, np.random.RandomState):
        value.rand()
    elif isinstance(value, (Own, SimpleNamespace)):
        value.inside = 7
    elif isinstance(value, Slotted):
        value.change()
    elif isinstance(value, Shared):
        Shared.calls += 1
    elif isinstance(value, FunctionType):
        value()
    elif isinstance(value, queue.Queue):
        value.put(1)
    elif isinstance(value, (bytearray, array)):
        value[0] += 1
    elif isinstance(value, MethodType):
        value.__self__.inside += 1
    elif isinstance(value, functools.partial):
        value.args[0].append(1)
    elif isinstance(value, tuple):
        change(value[0])
    else:
        return {None: 1, True: False, 1.5: 2.5, "a": "b", Kind.ONE: Kind.TWO}[value]
    return value


HELD = {
    "none": None, "flag": True, "number": 1.5, "text": "a", "kind": Kind.ONE,
    "tensor": torch.ones(3), "bf16": torch.ones(2, 3, dtype=torch.bfloat16), "flags": [True],
    "array": np.ones(2), "list": [1, [2]], "deque": deque([0], maxlen=1), "set": {1, 2},
    "dictionary": {"a": 1}, "counter": Counter("ab"), "ordered": OrderedDict(a=1),
    "tuple": ([1], 2), "generator": torch.Generator(), "python": random.Random(1),
    "numpy": np.random.default_rng(1), "older": np.random.RandomState(1),
    "own": Own(inside=1, deeper=[Own(x=1)]), "names": SimpleNamespace(inside=1),
    "slotted": Slotted(), "both": Both(),
    "listed": Listed([1]), "shared": Shared(), "closure": closure(), "queue": queue.Queue(),
    "bytes": bytearray(2), "numbers": array("d", [1.0]),
    "bound": Own(inside=1).method, "partial": functools.partial(print, [1]),
    "complex": torch.ones(2, dtype=torch.complex64),
    "graph": torch.ones(2, requires_grad=True) * 2, "strided": torch.ones(4, 3).t(),
}  # fmt: skip


@pytest.mark.parametrize("name", HELD)
def test_every_kind_of_value_is_seen_and_put_back(name: str) -> None:
    module = nn.Linear(2, 2)
    setattr(module, name, HELD[name])
    holder = {"model": module}
    watch, state = Watch(lambda: holder), State(holder)
    setattr(module, name, change(HELD[name]))
    seen = Watch(lambda: holder)
    state.restore()
    assert watch.changes(CPU) == []
    assert getattr(module, name) is HELD[name]  # the same object
    named = seen.changes(CPU)
    assert named and all(entry.startswith(f"model.{name}") for entry in named)


def test_buffers_children_and_what_is_made_or_lost_in_a_pass() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3))
    norm = model[0]
    assert isinstance(norm, nn.BatchNorm1d)
    norm.lost = 3
    kept, state = norm.running_mean, State({"model": model})
    norm.running_mean = torch.full((3,), 9.0)  # a forward pass may assign a new tensor
    norm.running_var.add_(1.0)  # type: ignore[union-attr]
    norm.made = torch.ones(1)
    del norm.lost
    state.restore()
    assert norm.running_mean is kept and norm.running_mean.tolist() == [0.0] * 3
    assert norm.running_var.tolist() == [1.0] * 3 and norm.lost == 3  # type: ignore[union-attr]
    assert not hasattr(norm, "made")


def test_autograd_takes_what_is_put_back_for_no_change() -> None:
    model = nn.Linear(2, 2)
    model.hidden = torch.ones(2)
    weight = torch.ones(2, requires_grad=True)
    product = weight * model.hidden
    version = model.hidden._version
    state = State({"model": model})
    state.restore()
    assert model.hidden._version == version
    product.sum().backward()


def test_parameters_hooks_modes_and_scratch_are_left_to_others() -> None:
    model = nn.Linear(2, 2)
    model.input_tensor = torch.ones(2)
    state = State({"model": model})
    with torch.no_grad():
        model.weight.fill_(5.0)
    handle = model.register_forward_hook(lambda *_: None)
    model.eval()
    model.input_tensor = torch.zeros(2)
    state.restore()
    assert model.weight.unique().tolist() == [5.0] and len(model._forward_hooks) == 1
    assert not model.training and model.input_tensor.tolist() == [0.0, 0.0]
    handle.remove()


class Quantized(nn.Parameter):
    """Keeps its weights beside it until the first pass, as bitsandbytes' of 8 bits do."""


def test_what_a_librarys_parameter_keeps_beside_it_is_put_back() -> None:
    module = nn.Module()
    module.weight = Quantized(torch.zeros(2), requires_grad=False)
    module.weight.scales = scales = torch.ones(2)
    state = State({"module": module})
    module.scales, module.weight.scales = module.weight.scales, None
    scales.fill_(3.0)
    state.restore()
    assert module.weight.scales is scales and scales.tolist() == [1.0, 1.0]
    assert not hasattr(module, "scales")


def test_what_cannot_be_written_is_left() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("positions", torch.arange(3).expand(4, -1))
    with torch.inference_mode():
        model.cached = torch.ones(2)
    model.meta = torch.empty(2, device="meta")
    model.sparse = torch.eye(2).to_sparse()
    model.lock = threading.Lock()
    model.itself = model  # a cycle
    State({"model": model}).restore()
    Watch(lambda: {"model": model})


def test_a_watch_names_parameters_gradients_and_optimizers_state() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    roots = {"model": model, "optimizer": optimizer}
    watch = Watch(lambda: roots)
    assert watch.changes(CPU) == []
    with torch.no_grad():
        model.weight[0, 0] += 1.0
        model.bias.grad.mul_(2.0)  # type: ignore[union-attr]
        optimizer.state[model.bias]["exp_avg"].mul_(2.0)
    optimizer.param_groups[0]["lr"] = 1.0
    assert set(watch.changes(CPU)) == {
        "model.weight", "model.bias.grad", "optimizer.state[model.bias][exp_avg]",
        "optimizer.param_groups[0][lr]",
    }  # fmt: skip
    assert optimizer.param_groups[0]["lr"] == 1e-3  # and puts small things back
    assert watch.changes(CPU) == []


def test_a_tensor_that_is_made_of_others_is_read_by_them() -> None:
    """As the moments of 8-bit optimizers are: whole, they offer few operations."""
    codes, scales = torch.ones(3), torch.ones(3)
    optimizer = SimpleNamespace(state={"moment": TwoTensor(codes, scales)})
    watch = Watch(lambda: {"optimizer": optimizer})
    assert watch.changes(CPU) == []
    scales[0] = 2.0
    assert watch.changes(CPU) == ["optimizer.state[moment].b"]
    assert scales[0] == 1.0


def test_libraries_are_looked_into_where_that_is_asked_for() -> None:
    held = SimpleNamespace(fraction=Fraction(1, 2))
    closed = State({"held": held}).plain
    assert not any("numerator" in name for name in closed)
    opened = State({"held": held}, opened=("fractions",)).plain
    assert opened["held.fraction._numerator"] == 1
    assert State({"held": held}, opened=("fractions",), ignored=("fraction",)).plain == {}


def test_class_attributes_and_globals_of_modules_are_looked_at_and_put_back() -> None:
    class Tracker:
        log = {"values": torch.zeros(2)}  # noqa: RUF012
        calls = 0

        def method(self) -> None: ...

    watch = Watch(lambda: {"Tracker": Tracker})
    Tracker.log["values"] += 1.0
    Tracker.calls += 1
    assert watch.changes(CPU) == ["Tracker.calls", "Tracker.log[values]"]
    assert Tracker.calls == 0 and Tracker.log["values"].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool]
)
def test_a_checksum_tells_bits_and_their_places(dtype: torch.dtype) -> None:
    values = (torch.arange(2**20 + 5) % 7 % 2).to(dtype)  # over more than one chunk
    swapped = values.clone()
    swapped[[0, 1]] = swapped[[1, 0]]
    flipped = values.clone()
    flipped[-1] = 1 - int(flipped[-1])
    sums = {int(checksum(t)) for t in (values, swapped, flipped)}
    assert len(sums) == 3
    assert int(checksum(values.clone())) in sums
    assert Checksums([values]) == Checksums([values.clone()]) != Checksums([flipped])


def test_a_checksum_of_zeros_nan_and_nothing() -> None:
    nan = torch.tensor([float("nan")])
    assert int(checksum(nan)) == int(checksum(nan.clone()))
    assert int(checksum(torch.tensor([0.0]))) != int(checksum(torch.tensor([-0.0])))
    assert int(checksum(torch.empty(0))) == 0
    assert int(checksum(torch.tensor(1.0))) == int(checksum(torch.tensor([1.0])))
    assert Checksums([]) == Checksums([])


def test_what_cannot_be_looked_at_is_said_and_takes_nothing_down() -> None:
    class Shy:
        def __getattribute__(self, name: str) -> Any:
            raise AttributeError(name)

    def roots() -> dict[str, object]:
        raise torch.OutOfMemoryError("no memory for a copy")

    (said,) = Watch(roots).changes(CPU)
    assert said == "what could not be read (OutOfMemoryError: no memory for a copy)"
    model = nn.Linear(2, 2)
    model.shy = [Shy()]
    assert Watch(lambda: {"model": model}).changes(CPU) == []
