"""Causal attention over packed conversations: they lie end to end in one row, and each attends to itself alone.

There is no T × T mask: the sequence boundaries say what a token may attend to.
"""

import inspect

import torch
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

PACKED = "packed"  # the name for `model.set_attn_implementation`
UNSUPPORTED = ("sliding_window", "softcap", "s_aux", "position_bias")  # options that some models' attention has
BLOCK = 128  # queries
# The kernel takes fewer key heads than query heads in every version, but torch 2.12 and newer require this flag.
GROUPED = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
CAUSAL_WINDOW = (-1, 0)  # every token before the query, none after it


def packed_attention(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, cu_seqlens=None, max_seqlen=None, **options
):
    """Attention for transformers' `AttentionInterface`: (1, T, H, D), and None in the place of the weights.

    Args:
        query: (1, H, T, D).
        key, value: (1, H_kv, T, D); H is a multiple of H_kv.
        cu_seqlens: (conversations + 1,) int32, the first token of each conversation, then T; None in generation, where
            the row is one conversation.
    """
    needed = [name for name in UNSUPPORTED if options.get(name) is not None]
    if needed or not getattr(module, "is_causal", True):
        raise NotImplementedError(f"its attention has {needed[0] if needed else 'no causal order'}")
    if cu_seqlens is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    device_type = query.device.type
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else value.dtype
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    with torch.autocast(device_type, enabled=False):
        query, key, value = (tensor[0].transpose(0, 1).to(dtype) for tensor in (query, key, value))  # (T, H, D)
        width = query.shape[-1]
        kernel_takes = dtype.itemsize == 2 and width == value.shape[-1] and width % 8 == 0 and width <= 256
        if kernel_takes and not dropout and has_varlen_kernel(query.device):
            sequences = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)  # of the queries and of the keys
            output = varlen_attn(query, key, value, *sequences, scale=scaling, window_size=CAUSAL_WINDOW, **GROUPED)
        else:
            output = per_sequence(query, key, value, cu_seqlens, scaling, dropout)
    return output[None], None


AttentionInterface.register(PACKED, packed_attention)


@torch.compiler.assume_constant_result
def has_varlen_kernel(device):
    """True on an Ampere or newer GPU: one kernel attends within all conversations of a 16-bit row."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


@torch.compiler.disable  # it depends on the conversations' lengths, and its kernels are compiled already
def per_sequence(query, key, value, cu_seqlens, scaling, dropout):
    """Attention of one conversation after the other: (T, H, D), (T, H_kv, D), (T, H_kv, D) to (T, H, D)."""
    lengths = cu_seqlens.diff().tolist()  # in every layer, the CPU waits for the GPU here
    rows = zip(*(tensor.transpose(0, 1).split(lengths, 1) for tensor in (query, key, value)), strict=True)
    return torch.cat([attend(*row, scaling, dropout) for row in rows], 1).transpose(0, 1)


def attend(query, key, value, scaling, dropout):
    """Attention of one conversation: (H, t, D), (H_kv, t, D), (H_kv, t, D) to (H, t, D)."""
    if query.device.type == "cpu" and query.dtype == torch.bfloat16 and torch.is_grad_enabled() and not dropout:
        # Matrix products: torch's kernel takes 1.3 to 2 times as long in bf16 on a CPU, forward and backward.
        grouped = query.unflatten(0, (len(key), -1))  # (H_kv, G, t, D): the G heads that share keys and values
        return BlockedAttention.apply(grouped, key, value, scaling).flatten(0, 1)
    return F.scaled_dot_product_attention(
        query[None], key[None], value[None], dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=True
    )[0]


class BlockedAttention(torch.autograd.Function):
    """Causal attention of (H_kv, G, t, D) to (H_kv, t, D) by matrix products, for each block of queries.

    With S = scaling · Q Kᵀ, P = softmax(S), O = P V and the upstream gradient dO, the backward pass recomputes P:
    dV = Pᵀ dO, dP = dO Vᵀ, dS is dP through the softmax, dQ = scaling · dS K and dK = scaling · dSᵀ Q.
    """

    @staticmethod
    def forward(ctx, query, key, value, scaling):
        ctx.save_for_backward(query, key, value)
        ctx.scaling = scaling
        output = [scores.softmax(-1) @ value[:, :end] for _, end, _, scores in scores_by_block(query, key, scaling)]
        return torch.cat([block.unflatten(1, (query.shape[1], -1)) for block in output], 2)

    @staticmethod
    def backward(ctx, upstream):
        query, key, value = ctx.saved_tensors
        grad_query, grad_key, grad_value = [], torch.zeros_like(key), torch.zeros_like(value)
        for begin, end, block, scores in scores_by_block(query, key, ctx.scaling):
            above = upstream[:, :, begin:end].flatten(1, 2)
            with torch.enable_grad():
                p = scores.requires_grad_().softmax(-1)
            (grad_scores,) = torch.autograd.grad(p, scores, above @ value[:, :end].mT)
            grad_value[:, :end] += p.mT @ above
            grad_query.append((grad_scores @ key[:, :end]).unflatten(1, (query.shape[1], -1)))
            grad_key[:, :end] += grad_scores.mT @ block
        return torch.cat(grad_query, 2) * ctx.scaling, grad_key, grad_value, None


def scores_by_block(query, key, scaling):
    """Yield each block of n queries: its begin and end, scaling · Q as (H_kv, G · n, D), S as (H_kv, G · n, end)."""
    causal_mask = torch.full((BLOCK, BLOCK), -torch.inf, dtype=query.dtype).triu(1)
    for begin in range(0, query.shape[2], BLOCK):
        end = min(begin + BLOCK, query.shape[2])
        block = query[:, :, begin:end].flatten(1, 2) * scaling
        scores = block @ key[:, :end].mT
        scores.unflatten(1, (-1, end - begin))[..., begin:] += causal_mask[: end - begin, : end - begin]
        yield begin, end, block, scores
