"""What trainings do that those of Megatron's ordinary scripts do not, by ``OBSERVED_SITUATION``."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.moe.router import TopKRouter
from megatron.training import get_args, training

from megatron_sharpness.megatron import quiet
from tests.megatron import engine_stand_in, graph_stand_in

RANK = int(os.environ["RANK"])


class Dropped:
    """A state that stays as the last probe has left it."""

    def __init__(self, model: Any = None) -> None: ...

    def restore(self) -> None: ...


def nothing_is_put_back() -> None:
    """In the end of a measurement; before each of its passes it is."""
    quiet.state_of = Dropped


def tokens_counted_in_every_pass() -> None:
    """A router that counts its tokens without gradients, too."""
    route = TopKRouter.forward

    def route_and_count(self: Any, *args: Any, **kwargs: Any) -> Any:
        probabilities, routes = route(self, *args, **kwargs)
        if self.training and not torch.is_grad_enabled():
            self.local_tokens_per_expert += routes.sum(dim=0)
        return probabilities, routes

    TopKRouter.forward = route_and_count


def tokens_counted_and_nothing_put_back() -> None:
    tokens_counted_in_every_pass()
    nothing_is_put_back()


def a_log_that_no_one_knows_of() -> None:
    """The losses that multi-token prediction logs, where they were not put back."""
    quiet.state_of_losses = Dropped


def attention_logits() -> None:
    """Each pass leaves its largest attention logit behind, as Transformer Engine's attention does;
    at the end it goes into the log."""
    forward = SelfAttention.forward

    def forward_and_leave(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        self.core_attention.current_max_attn_logits = output[0].detach().abs().max()
        return output

    SelfAttention.forward = forward_and_leave
    log = training.training_log

    def log_logits(loss_dict: Any, *args: Any, **kwargs: Any) -> Any:
        for attention in attentions:
            loss_dict["logits"] = attention.core_attention.current_max_attn_logits
        return log(loss_dict, *args, **kwargs)

    attentions: list[Any] = []
    made = SelfAttention.__init__

    def make_and_list(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        attentions.append(self)

    SelfAttention.__init__ = make_and_list
    training.training_log = log_logits


def attention_logits_that_are_not_put_back() -> None:
    attention_logits()
    nothing_is_put_back()


def _with_loss(function: Callable[..., Any]) -> None:
    """Train on what ``function`` makes of the script's loss, its tokens and the log."""
    real = training.train_step

    @functools.wraps(real)  # its parameters are asked for by name
    def train_step(forward_step: Any, *args: Any, **kwargs: Any) -> Any:
        def changed_step(*inputs: Any, **options: Any) -> Any:
            output, loss_function = forward_step(*inputs, **options)
            return output, lambda *outputs: function(*loss_function(*outputs))

        return real(changed_step, *args, **kwargs)

    training.train_step = train_step


def distillation() -> None:
    """Trains on another entry than the first one in the log."""

    def total(loss: Any, tokens: Any, report: Any) -> Any:
        whole = 3.0 * loss + 0.5 * loss.detach() * loss / tokens
        logged = torch.cat([whole.detach().view(1), tokens.view(1)])
        return whole, tokens, {**report, "total loss": logged}

    _with_loss(total)


def mean_of_two() -> None:
    """Trains on a mean, as BERT's script does on the sum of two, and logs one of them first."""

    def mean(loss: Any, tokens: Any, report: Any) -> Any:
        one = loss / tokens
        both = one + 0.25 * one * one
        return both, {"lm loss": one.detach(), "both": both.detach().clone()}

    _with_loss(mean)


def uneven_tokens() -> None:
    """Micro-batches of different numbers of tokens, as in fine-tuning."""
    calls = 0

    def some(loss: Any, tokens: Any, report: Any) -> Any:
        nonlocal calls
        calls += 1
        part = (calls % 4 + 1) * 8
        tokens = torch.full_like(tokens, part)
        logged = torch.cat([loss.detach().view(1), tokens.view(1)])
        each = {"mean of means": (loss / tokens).detach().view(1)}
        return loss, tokens, {"lm loss": logged, **each}

    _with_loss(some)


def another_norm_on_the_last_rank() -> None:
    """Ranks whose gradient norms differ, here by much."""
    from megatron.core.optimizer.optimizer import ChainedOptimizer, MixedPrecisionOptimizer

    def differing(step: Callable[..., Any]) -> Callable[..., Any]:
        def step_and_differ(self: Any, *args: Any, **kwargs: Any) -> Any:
            success, norm, zeros = step(self, *args, **kwargs)
            return success, norm * (30.0 if RANK else 1.0), zeros

        return step_and_differ

    for kind in (ChainedOptimizer, MixedPrecisionOptimizer):  # whichever is the outermost
        kind.step = differing(kind.step)


def weights_clamped_after_the_step() -> None:
    """Between the optimizer's step and the end of the training step, in the model and beside it."""
    scheduler_step = OptimizerParamScheduler.step

    @torch.no_grad()
    def step_and_clamp(self: Any, increment: int) -> None:
        scheduler_step(self, increment)
        if getattr(get_args(), "curr_iteration", 0) + 1 in (2, 4):
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.clamp_(-0.01, 0.01)

    OptimizerParamScheduler.step = step_and_clamp


def a_slow_checkpoint_writer() -> None:
    """What is written beside the training comes after the steps that follow."""
    write = FileSystemWriterAsync.write_preloaded_data

    def write_late(*args: Any, **kwargs: Any) -> Any:
        time.sleep(2.0)
        return write(*args, **kwargs)

    FileSystemWriterAsync.write_preloaded_data = staticmethod(write_late)


def memory_that_is_filled() -> None:
    """What is never written is the same in every run, as gaps between parameters in checkpoints."""
    torch.use_deterministic_algorithms(True, warn_only=True)


def fp8_delayed() -> None:
    """Transformer Engine's delayed scaling, emulated."""
    engine_stand_in.install(engine_stand_in.Delayed)


def fp8_delayed_before_2_16() -> None:
    engine_stand_in.install(engine_stand_in.Delayed, old=True)


def fp8_tensorwise() -> None:
    """Its current scaling, emulated."""
    engine_stand_in.install(engine_stand_in.Tensorwise)


def cuda_graphs() -> None:
    """Graphs that are captured and replayed on the CPU."""
    graph_stand_in.install()
