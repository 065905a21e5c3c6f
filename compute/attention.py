"""Causal attention over conversations that lie end to end in one row, each attending to itself alone.

No mask of T × T is made: what a conversation may see is where it begins and ends.
"""

import inspect

import torch
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

PACKED = "packed"  # what `model.set_attn_implementation` calls it
# What some models ask of their attention, by the names that transformers passes, and this does not support.
UNSUPPORTED = ("sliding_window", "softcap", "s_aux", "position_bias")
BLOCK = 128  # queries
# Its kernel takes fewer heads of keys than of queries in any version; torch 2.12 and newer want to be told.
GROUPED = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
CAUSAL_WINDOW = (-1, 0)  # everything before a token, nothing after it
CAUSAL_MASK = 1  # the same to `_efficient_attention_forward`


def packed_attention(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, cu_seqlens=None, max_seqlen=None, **options
):
    """Attention as transformers' `AttentionInterface` has it.

    Args:
        query: (1, H, T, D).
        key, value: (1, H_kv, T, D); H is a multiple of H_kv.
        cu_seqlens: (conversations + 1,) int32, the sequence boundaries: where each conversation begins, and where the
            last one ends; None: there is one, as when an answer is generated.
        max_seqlen: tokens of the longest conversation.

    Returns:
        (1, T, H, D), and None for the weights, which are not returned.

    Raises:
        NotImplementedError: the model wants more of its attention than that it is causal.
    """
    wanted = [name for name in UNSUPPORTED if options.get(name) is not None]
    if wanted or not getattr(module, "is_causal", True):
        raise NotImplementedError(f"its attention has {wanted[0] if wanted else 'no causal order'}")
    if cu_seqlens is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    with torch.autocast(kind, enabled=False):
        query, key, value = (tensor[0].transpose(0, 1).to(dtype) for tensor in (query, key, value))  # (T, H, D)
        width = query.shape[-1]
        flash = dtype.itemsize == 2 and width % 8 == 0 and width <= 256 and not dropout
        if flash and has_flash_kernel(query.device):
            output = varlen(query, key, value, cu_seqlens, max_seqlen, scaling)
        elif dtype.itemsize <= 4 and width % 8 == 0 and has_efficient_kernel(query.device):
            output = efficient(query, key, value, cu_seqlens, max_seqlen, scaling, dropout)
        else:
            output = one_by_one(query, key, value, cu_seqlens, scaling, dropout)
    return output[None], None


AttentionInterface.register(PACKED, packed_attention)


@torch.compiler.assume_constant_result
def has_flash_kernel(device):
    """Whether torch's kernel for packed rows in 16 bits runs on a device: an Ampere GPU or a newer one."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


@torch.compiler.assume_constant_result
def has_efficient_kernel(device):
    """Whether torch's kernel for packed rows in fp32, and in 16 bits on older GPUs, runs on a device."""
    return device.type == "cuda"


def in_the_graph(device):
    """Whether `torch.compile` can take packed attention into a layer's graph: with the first of the kernels alone."""
    return has_flash_kernel(device)


def varlen(query, key, value, cu_seqlens, max_seqlen, scaling):
    """All conversations in one kernel, 16 bits: (T, H, D), (T, H_kv, D), (T, H_kv, D) to (T, H, D)."""
    sequences = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)  # of queries and of keys
    return varlen_attn(query, key, value, *sequences, scale=scaling, window_size=CAUSAL_WINDOW, **GROUPED)


@torch.compiler.disable  # torch 2.13 cannot trace its backward pass
def efficient(query, key, value, cu_seqlens, max_seqlen, scaling, dropout):
    """The same in fp32 and on older GPUs; as nested tensors call it, which would read the lengths.

    This kernel takes as many heads of keys as of queries.
    """
    group = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(group, 1) for tensor in (key, value))
    return torch.ops.aten._efficient_attention_forward(
        query[None],
        key[None],
        value[None],
        None,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        dropout,
        CAUSAL_MASK,
        True,  # keep what the backward pass needs
        scale=scaling,
    )[0][0]


@torch.compiler.disable  # it depends on the conversations' lengths, and its kernels are compiled already
def one_by_one(query, key, value, cu_seqlens, scaling, dropout):
    """The same on a CPU, a conversation at a time."""
    lengths = cu_seqlens.diff().tolist()
    rows = zip(*(tensor.transpose(0, 1).split(lengths, 1) for tensor in (query, key, value)), strict=True)
    return torch.cat([one_conversation(*row, scaling, dropout) for row in rows], 1).transpose(0, 1)


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
