"""The forward passes of a training step: what they have drawn and read, and the same once more."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.nn.parallel import DistributedDataParallel

from megatron_sharpness.core.errors import ProbeError
from megatron_sharpness.core.replay import RandomStates
from megatron_sharpness.core.state import State
from megatron_sharpness.pytorch.pipelines import forward_only
from megatron_sharpness.pytorch.shards import OF_PASSES

#: What to say of an evaluation that draws other numbers than the step.
OTHER_DRAWS = (
    "evaluate draws random numbers outside of the model, and not the ones that the training step "
    "has drawn since the last after_step, as something else was drawn in between (a loader's seed, "
    "an augmentation); draw them in the model, or once a step and keep them"
)


#: Of DDP: whether the next pass broadcasts buffers, and prepares the reducer.
FLAGS = ("require_forward_param_sync", "require_backward_grad_sync")


def state_of(**objects: object) -> State:
    """What a model and others keep beside parameters, but for DDP's flags, of which each pass has
    its own, and what sharding has gathered for it."""
    return State(objects, ignored=(*FLAGS, *OF_PASSES))


@dataclass
class Pass:
    """One call of the model in the training step.

    Attributes:
        gradients: whether they were enabled.
        training: the model's mode.
        broadcasts: of each DDP module, whether it broadcast its buffers before.
        before, after: the random states.
    """

    gradients: bool
    training: bool
    broadcasts: list[bool]
    before: RandomStates = field(default_factory=RandomStates)
    after: RandomStates | None = None

    @property
    def drew(self) -> bool:
        """Whether random numbers were drawn in it."""
        return self.after is None or self.before != self.after


class RecordedPasses:
    """The forward passes of a step, and what they read and change beside the parameters.

    Recorded are the calls of the model outside of the backward pass, where a call is a
    recomputation, and before the step: those with gradients, and those without in training mode,
    as a teacher's.

    Attributes:
        passes: in order.
        read_in: the narrowest type that a pass has read weights in, None before the first pass.
        error: what went wrong while recording.

    Args:
        model: as the loop calls it.
        keep: objects beside it that a pass changes, by name.
        over: says whether the step has been made.
    """

    def __init__(
        self, model: nn.Module, keep: Mapping[str, object], over: Callable[[], bool]
    ) -> None:
        self.error: Exception | None = None
        self._model = model
        self._over = over
        # What lies beside the model may be called before it, and noise in the loss be drawn.
        self._began = RandomStates()
        try:
            self._beside = State(keep)
        except Exception as caught:
            self._beside, self.error = State({}), caught
        self._states: dict[bool, State] = {}  # before the first pass with gradients, and of any
        self.passes: list[Pass] = []
        self.read_in: torch.dtype | None = None
        self._data_parallel = [m for m in model.modules() if isinstance(m, DistributedDataParallel)]
        self._called = model
        self._repeated: list[Pass] | None = None
        self._unread: dict[nn.Module, Any] = {}
        self._handles: list[Any] = [
            model.register_forward_pre_hook(self._record),
            model.register_forward_hook(self._note_end),
        ]

    @property
    def coarse(self) -> bool:
        """Whether a pass has read weights in 16 bits, or may have done so out of sight."""
        if self.read_in is None or torch.finfo(self.read_in).bits < 32:
            return True
        return any(_is_compiled(module) for module in self._model.modules())

    @property
    def ambiguous(self) -> bool:
        """Whether passes without gradients may be the step's own, or something else's."""
        return len({entry.gradients for entry in self.passes}) > 1

    def restore(self) -> None:
        """Put back what was there before the first pass that is repeated."""
        self._beside.restore()
        self._before.restore()

    @property
    def _before(self) -> State:
        if not self._states:
            # The loop calls the model in another way than through the module that was given.
            self._states[True] = state_of(model=self._model)
        everything = self._repeated is None or not all(p.gradients for p in self._repeated)
        first = self._states.get(False) if everything else None
        return first or self._states.get(True) or self._states[False]

    def release(self) -> None:
        """Record no further passes."""
        for handle in (*self._handles, *self._unread.values()):
            handle.remove()
        self._handles, self._unread = [], {}

    def __reduce__(self) -> Any:
        """A model that is copied or saved meanwhile takes nothing of this along."""
        return _Unobserved, ()

    def choose(self, calls: int) -> None:
        """Repeat those of the recorded passes that a function makes which calls the model so often:
        those with gradients, or all."""
        with_gradients = [entry for entry in self.passes if entry.gradients]
        self._repeated = with_gradients if calls == len(with_gradients) else self.passes

    @contextlib.contextmanager
    def replaying(self, *, strict: bool) -> Iterator[Replay]:
        """Within it the passes draw what they have drawn in training.

        Args:
            strict: whether what is evaluated has to make the very passes of the step.
        """
        self.release()
        self.restore()
        if strict or not self.passes:
            self._began.restore()
        else:
            self.passes[0].before.restore()
        torch.clear_autocast_cache()  # it may hold casts of other weights
        passes = self.passes if self._repeated is None else self._repeated
        replay = Replay(passes, self._broadcast, strict=strict)
        handles = [
            self._called.register_forward_pre_hook(replay.begin),
            self._called.register_forward_hook(replay.end),
        ]
        try:
            yield replay
        finally:
            for handle in handles:
                handle.remove()

    @contextlib.contextmanager
    def elsewhere(self) -> Iterator[None]:
        """Within it the model is called on other data: DDP's buffers are rank 0's."""
        handle = self._called.register_forward_pre_hook(
            lambda *_: self._broadcast([True] * len(self._data_parallel))
        )
        try:
            with forward_only(self._model, other_data=True):
                yield
        finally:
            handle.remove()

    @contextlib.contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Within it no pass prepares DDP for a backward pass, and a schedule runs none; in the end
        both are as before.

        A pass without gradients has the next pass broadcast no buffers, and one with gradients,
        of a loss that differentiates, has the next backward pass wait for one that never came.
        """
        saved = [(m, name, getattr(m, name)) for m in self._data_parallel for name in FLAGS]
        for module in self._data_parallel:
            module.require_backward_grad_sync = False
        try:
            with forward_only(self._model):
                yield
        finally:
            for module, name, value in saved:
                setattr(module, name, value)

    @property
    def joining(self) -> bool:
        """Whether DDP runs under ``join``, so that other ranks may have ended already."""
        return any(module._join_config.enable for module in self._data_parallel)

    def _broadcast(self, flags: list[bool]) -> None:
        for module, flag in zip(self._data_parallel, flags, strict=True):
            module.require_forward_param_sync = flag

    def _record(self, module: nn.Module, *_: Any) -> None:
        if module is not self._model:
            return
        gradients = torch.is_grad_enabled()
        recomputed = torch._C._current_graph_task_id() != -1
        if recomputed or self._over() or not (gradients or self._model.training):
            return
        try:
            self._note_begin(gradients)
        except Exception as caught:  # out of memory, say: the pass itself goes on
            self.error = caught

    def _note_begin(self, gradients: bool) -> None:
        self._find_caller()
        if gradients not in self._states and True not in self._states:
            self._states[gradients] = state_of(model=self._model)
        if self.read_in is None:
            self._note_type(self._model)
            for module in _eager_owners(self._model):
                self._unread[module] = module.register_forward_pre_hook(self._note_first_call)
        broadcasts = [module.require_forward_param_sync for module in self._data_parallel]
        self.passes.append(Pass(gradients, self._model.training, broadcasts))

    def _find_caller(self) -> None:
        """Where the model given is what DDP wraps, the call is DDP's."""
        active: Any = getattr(DistributedDataParallel, "_active_ddp_module", None)
        known = active is None or active in self._data_parallel
        if not known and active.module is self._model:
            self._called = active
            self._data_parallel.append(active)

    def _note_end(self, *_: Any) -> None:
        if self.passes and self.passes[-1].after is None:
            self.passes[-1].after = RandomStates()

    def _note_first_call(self, module: nn.Module, *_: Any) -> None:
        """The type in which a module reads its weights."""
        if module in self._unread:
            self._unread.pop(module).remove()
            self._note_type(module)

    def _note_type(self, module: nn.Module) -> None:
        parameters = list(module.parameters(recurse=False))
        weights = [p for p in parameters if p.is_floating_point()]
        kinds = {p.device.type for p in weights} or {"cpu", collective_device().type}
        types = [p.dtype for p in weights]
        if len(weights) < len(parameters):  # bitsandbytes' of 4 bits have it, those of 8 do not
            types.append(getattr(module, "compute_dtype", None) or torch.float16)
        types += [torch.get_autocast_dtype(k) for k in kinds if torch.is_autocast_enabled(k)]
        if self.read_in is not None:
            types.append(self.read_in)
        self.read_in = max(types, key=lambda dtype: torch.finfo(dtype).eps, default=None)


class _Unobserved(RecordedPasses):
    """What is left in the hooks of a copy: it records nothing."""

    def __init__(self) -> None:
        self._model = nn.Identity()  # which no one calls
        self._unread = {}
        self.passes = []


class Replay:
    """The passes of one evaluation, each begun as it was in training.

    What an evaluation draws between them, as noise in the loss, has to be what training has drawn:
    then the random states are right without being set.

    Attributes:
        calls: how often the model has been called.
        strayed: whether other numbers were drawn between the passes than in training.
        strict: whether this is to be the very step.
    """

    def __init__(
        self, passes: list[Pass], broadcast: Callable[[list[bool]], None], *, strict: bool
    ) -> None:
        self.calls = 0
        self.strict = strict
        self._passes = passes
        self._broadcast = broadcast
        self._left = RandomStates()
        self.strayed = False

    def begin(self, module: nn.Module, *_: Any) -> None:
        expected = self._passes[self.calls] if self.calls < len(self._passes) else None
        if self.strict and expected is not None and module.training != expected.training:
            return  # an evaluation inside of the step
        self.calls += 1
        if expected is None:
            return
        self._broadcast(expected.broadcasts)
        now = RandomStates()
        if now != expected.before:
            self.strayed |= now != self._left
            expected.before.restore()

    def end(self, *_: Any) -> None:
        self._left = RandomStates()

    def check(self, *, known: bool) -> None:
        """Whether the evaluation has drawn what training has drawn.

        Args:
            known: whether the training loss is known, which tells by itself.

        Raises:
            ProbeError: it has not, or it may be so.
        """
        if not self.strict or not self._passes:
            return
        if self.calls != len(self._passes) and any(entry.drew for entry in self._passes):
            without = sum(not entry.gradients for entry in self._passes)
            raise ProbeError(
                f"the training step has called the model {len(self._passes)} times"
                + (f", {without} of them without gradients" if without else "")
                + f", and evaluate calls it {self.calls} times, so that its dropout masks cannot "
                "be matched to the passes that drew them; have evaluate make the passes of the "
                "step since the last after_step, all of them and in their order, or use mode='eval'"
            )
        if self.strayed and not known:
            raise ProbeError(f"{OTHER_DRAWS}. With `loss` it could be told whether they matter")


def _eager_owners(module: nn.Module) -> Iterator[nn.Module]:
    """The modules that hold matrices, but for those in compiled ones: a hook would compile anew."""
    if _is_compiled(module):
        return
    # Under ZeRO 3 a parameter has its shape in a pass alone.
    if any(len(getattr(p, "ds_shape", p.shape)) > 1 for p in module.parameters(recurse=False)):
        yield module
    for child in module.children():
        yield from _eager_owners(child)


def _is_compiled(module: nn.Module) -> bool:
    scripted = isinstance(module, torch.jit.ScriptModule)
    return scripted or isinstance(module, OptimizedModule) or module._compiled_call_impl is not None


def collective_device() -> torch.device:
    """Where the default process group reduces."""
    if not dist.is_initialized() or "cpu:" in dist.get_backend_config():
        return torch.device("cpu")
    return torch.accelerator.current_accelerator() or torch.device("cpu")
