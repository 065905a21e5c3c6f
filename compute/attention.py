"""Causal attention over conversations that lie end to end in one row, each attending to itself alone.

No mask of T × T is made: what a conversation may see is where it begins and ends.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

PACKED = "packed"  # what `model.set_attn_implementation` calls it
# What some models ask of their attention, by the names that transformers passes, and this does not support.
UNSUPPORTED = ("sliding_window", "softcap", "s_aux", "position_bias")
BLOCK = 128  # queries


@dataclass(frozen=True)
class SequenceBoundaries:
    """Where the conversations of a packed row begin and end; an object, which `torch.compile` does not trace."""

    lengths: tuple[int, ...]  # of the conversations
    cu_seqlens: torch.Tensor  # (conversations + 1,) int32: where each begins, and where the last one ends


@torch.compiler.disable  # it depends on the conversations' lengths, and its kernels are compiled already
def packed_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, boundaries=None, **options):
    """Attention as transformers' `AttentionInterface` has it.

    Args:
        query: (1, H, T, D).
        key, value: (1, H_kv, T, D); H is a multiple of H_kv.
        boundaries: the `SequenceBoundaries` of the conversations; None: there is one, as when an answer is generated.

    Returns:
        (1, T, H, D), and None for the weights, which are not returned.

    Raises:
        NotImplementedError: the model wants more of its attention than that it is causal.
    """
    wanted = [name for name in UNSUPPORTED if options.get(name) is not None]
    if wanted or not getattr(module, "is_causal", True):
        raise NotImplementedError(f"its attention has {wanted[0] if wanted else 'no causal order'}")
    if boundaries is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    with torch.autocast(kind, enabled=False):
        query, key, value = (tensor[0].to(dtype) for tensor in (query, key, value))
        if kind == "cuda" and fits_varlen(query, dropout):
            output = varlen(query, key, value, scaling, boundaries)
        else:
            rows = zip(*(tensor.split(boundaries.lengths, 1) for tensor in (query, key, value)), strict=True)
            output = torch.cat([one_conversation(*row, scaling, dropout) for row in rows], 1).transpose(0, 1)
    return output[None], None


AttentionInterface.register(PACKED, packed_attention)


def fits_varlen(query, dropout):
    """Whether torch's kernel for packed rows takes this: 16 bits, on an Ampere GPU or a newer one."""
    recent = torch.cuda.get_device_capability(query.device) >= (8, 0)
    return recent and query.dtype in (torch.bfloat16, torch.float16) and not dropout


def varlen(query, key, value, scaling, boundaries):
    """All conversations in one kernel: (H, T, D), (H_kv, T, D), (H_kv, T, D) to (T, H, D)."""
    from torch.nn.attention.varlen import varlen_attn  # which a torch without CUDA may not have

    query, key, value = (tensor.transpose(0, 1) for tensor in (query, key, value))
    cu_seqlens, longest = boundaries.cu_seqlens, max(boundaries.lengths)
    sequences = (cu_seqlens, cu_seqlens, longest, longest)  # of queries and of keys
    causal = (-1, 0)  # the window: everything before a token, nothing after it
    return varlen_attn(query, key, value, *sequences, scale=scaling, window_size=causal, enable_gqa=True)


def one_conversation(query, key, value, scaling, dropout):
    """Attention of one conversation: (H, t, D), (H_kv, t, D), (H_kv, t, D) to (H, t, D)."""
    # In bf16, torch's CPU kernel takes 1.3 to 2 times as long, forward and backward, as the same in matrix products.
    in_blocks = query.device.type == "cpu" and query.dtype == torch.bfloat16 and torch.is_grad_enabled()
    if in_blocks and not dropout:
        grouped = query.unflatten(0, (len(key), -1))  # (H_kv, G, t, D): the G heads that share keys and values
        return BlockedAttention.apply(grouped, key, value, scaling).flatten(0, 1)
    return F.scaled_dot_product_attention(
        query[None], key[None], value[None], dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=True
    )[0]


class BlockedAttention(torch.autograd.Function):
    """Causal attention in a few matrix products for each block of queries; its backward makes the probabilities anew.

    With P = softmax(scaling · Q Kᵀ), O = P V and dO from above: dV = Pᵀ dO, dP = dO Vᵀ, dS = P ∘ (dP - Σ P ∘ dP),
    dQ = scaling · dS K, dK = scaling · dSᵀ Q. Query is (H_kv, G, t, D), key and value are (H_kv, t, D).
    """

    @staticmethod
    def forward(ctx, query, key, value, scaling):
        ctx.save_for_backward(query, key, value)
        ctx.scaling = scaling
        output = [p @ value[:, :end] for _, end, _, p in probabilities(query, key, scaling)]
        return torch.cat([block.unflatten(1, (query.shape[1], -1)) for block in output], 2)

    @staticmethod
    def backward(ctx, upstream):
        query, key, value = ctx.saved_tensors
        grad_query, grad_key, grad_value = [], torch.zeros_like(key), torch.zeros_like(value)
        for begin, end, block, p in probabilities(query, key, ctx.scaling):
            above = upstream[:, :, begin:end].flatten(1, 2)
            grad_value[:, :end] += p.mT @ above
            grad_scores = torch._softmax_backward_data(above @ value[:, :end].mT, p, -1, p.dtype)
            grad_query.append((grad_scores @ key[:, :end]).unflatten(1, (query.shape[1], -1)))
            grad_key[:, :end] += grad_scores.mT @ block
        return torch.cat(grad_query, 2) * ctx.scaling, grad_key, grad_value, None


def probabilities(query, key, scaling):
    """Of each block of queries where it begins and ends, scaling · Q as (H_kv, G · n, D), P as (H_kv, G · n, end)."""
    later = torch.full((BLOCK, BLOCK), -torch.inf, dtype=query.dtype).triu(1)
    for begin in range(0, query.shape[2], BLOCK):
        end = min(begin + BLOCK, query.shape[2])
        block = query[:, :, begin:end].flatten(1, 2) * scaling
        scores = block @ key[:, :end].mT
        scores.unflatten(1, (-1, end - begin))[..., begin:] += later[: end - begin, : end - begin]
        yield begin, end, block, scores.softmax(-1)
