"""Megatron's own attention with what it leaves to Transformer Engine's: context parallelism, packed
sequences, the largest logits of each head, and values narrower than keys (multi-latent attention).
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor

from megatron_sharpness.core.errors import InputError


def complete_attention() -> None:
    """Have ``DotProductAttention`` take what it refuses. This imports Megatron."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    build, attend = DotProductAttention.__init__, DotProductAttention.forward

    @functools.wraps(build)
    def build_complete(
        self: Any,
        config: Any,
        *args: Any,
        k_channels: int | None = None,
        v_channels: int | None = None,
        **kwargs: Any,
    ) -> None:
        alone = copy.copy(config)
        alone.context_parallel_size = 1
        if v_channels is not None:
            alone.kv_channels = v_channels  # of its output; the scale of the logits is given
        build(self, alone, *args, **kwargs)
        self.config = config
        if getattr(config, "qk_clip", False) or getattr(config, "log_max_attention_logit", False):
            self.current_max_attn_logits = None
            self.scale_mask_softmax.register_forward_pre_hook(functools.partial(_note_logits, self))

    @functools.wraps(attend)
    def attend_complete(
        self: Any,
        query: Any,
        key: Any,
        value: Any,
        attention_mask: Any,
        *args: Any,
        packed_seq_params: Any = None,
        **kwargs: Any,
    ) -> Any:
        size = self.config.context_parallel_size
        if packed_seq_params is not None:
            if size > 1:
                raise InputError(
                    f"--context-parallel-size {size}: on the CPU backend it is not for packed "
                    "sequences; give 1"
                )
            mask = _apart(packed_seq_params, len(query))
            query, key, value = (part.unsqueeze(1) for part in (query, key, value))
            return attend(self, query, key, value, mask, *args, **kwargs)
        if size == 1:
            return attend(self, query, key, value, attention_mask, *args, **kwargs)
        mask = _behind(len(query), size) if attention_mask is None else attention_mask
        windowed = self.scale_mask_softmax.window_size is not None
        if windowed or mask.shape[-2:] != (len(query), len(query) * size):
            raise InputError(
                f"--context-parallel-size {size}: on the CPU backend it is for causal attention "
                "without a window, and with a mask of this rank's queries over all keys, or none; "
                "give 1"
            )
        key, value = _of_all_ranks(key, size), _of_all_ranks(value, size)
        return attend(self, query, key, value, mask, *args, **kwargs)

    DotProductAttention.__init__ = build_complete
    DotProductAttention.forward = attend_complete


def _of_all_ranks(part: Tensor, size: int) -> Tensor:
    """The whole sequence in its order. Of 2n slices a rank has the i-th and the i-th from the
    end."""
    from megatron.core import mpu
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

    gathered = gather_from_sequence_parallel_region(part, group=mpu.get_context_parallel_group())
    slices = gathered.chunk(2 * size)
    return torch.cat([*slices[::2], *reversed(slices[1::2])])


def _behind(length: int, size: int) -> Tensor:
    """Which keys of the whole sequence lie behind each of this rank's queries: (1, 1, queries,
    keys)."""
    from megatron.core import mpu

    rank, half = mpu.get_context_parallel_rank(), length // 2
    places = torch.arange(half)
    own = torch.cat([places + rank * half, places + (2 * size - 1 - rank) * half])
    return (torch.arange(size * length) > own[:, None])[None, None]


def _apart(packed: Any, length: int) -> Tensor:
    """Which keys of packed sequences lie behind a query, or in another sequence: (1, 1, queries,
    keys)."""
    padded = packed.cu_seqlens_q_padded
    ends = (packed.cu_seqlens_q if padded is None else padded)[1:]
    places = torch.arange(length)
    sequence = torch.bucketize(places, ends, right=True)
    return ((sequence[:, None] != sequence) | (places > places[:, None]))[None, None]


def _note_logits(attention: Any, softmax: Any, arguments: tuple[Any, ...]) -> None:
    """The largest logits of the passes so far, one a head, as Transformer Engine keeps them."""
    logits, mask = arguments[0].detach().float(), arguments[1]
    if softmax.scale is not None:
        logits = logits * softmax.scale
    if mask is None:
        mask = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
    largest = logits.masked_fill(mask, -torch.inf).amax(dim=(0, 2, 3))
    before = attention.current_max_attn_logits
    attention.current_max_attn_logits = largest if before is None else before.maximum(largest)
