"""Causal attention over packed conversations: they lie end to end in one row, and each attends to itself alone.

There is no T × T mask: the sequence boundaries say what a token may attend to. What else a layer asks of its attention,
transformers passes with each call: a sliding window, a cap on the scores, sinks.
"""

import inspect

import torch
from torch.nn import functional as F
from torch.nn.attention.varlen import AuxRequest, varlen_attn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

PACKED = "packed"  # the name for `model.set_attn_implementation`
BLOCK = {"cpu": 128, "cuda": 1024}  # queries; on a GPU fewer and larger kernels
# The kernel takes fewer key heads than query heads in every version, but torch 2.12 and newer require this flag.
GROUPED = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def packed_attention(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling=None,
    dropout=0.0,
    cu_seqlens=None,
    max_seqlen=None,
    sliding_window=None,
    softcap=None,
    s_aux=None,
    **options,
):
    """Attention for transformers' `AttentionInterface`: (1, T, H, D), and None in the place of the weights.

    Args:
        query: (1, H, T, D).
        key, value: (1, H_kv, T, D); H is a multiple of H_kv.
        cu_seqlens: (conversations + 1,) int32, the first token of each conversation, then T; None: the row is one
            conversation, which a window, a cap or sinks are not computed for.
        max_seqlen: tokens of the longest conversation.
        sliding_window: the tokens a token attends to, itself and those right before it; None: all before it.
        softcap: scores s become softcap · tanh(s / softcap); None: they stay.
        s_aux: (H,), the sinks: a logit of each head that takes a share of the softmax and gives nothing; None: none.
    """
    if options.get("position_bias") is not None:
        raise NotImplementedError("its attention has position_bias")
    if not getattr(module, "is_causal", True):
        raise NotImplementedError("its attention has no causal order")
    if cu_seqlens is None:
        if sliding_window is not None or softcap is not None or s_aux is not None:
            raise NotImplementedError("without cu_seqlens, its windows, cap or sinks are not computed")
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    device_type = query.device.type
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else value.dtype
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    with torch.autocast(device_type, enabled=False):
        query, key, value = (tensor[0].transpose(0, 1).to(dtype) for tensor in (query, key, value))  # (T, H, D)
        width = query.shape[-1]
        kernel_takes = dtype.itemsize == 2 and width == value.shape[-1] and width % 8 == 0 and width <= 256
        if not (kernel_takes and has_varlen_kernel(query.device)) or dropout or softcap:
            output = per_sequence(query, key, value, cu_seqlens, dropout, scaling, sliding_window, softcap, s_aux)
        else:
            sequences = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)  # of the queries and of the keys
            window = (-1 if sliding_window is None else sliding_window - 1, 0)  # tokens before and after the query
            if s_aux is None:
                output = varlen_attn(query, key, value, *sequences, scale=scaling, window_size=window, **GROUPED)
            else:
                output = VarlenWithSinks.apply(query, key, value, s_aux, sequences, scaling, window)
    return output[None], None


AttentionInterface.register(PACKED, packed_attention)


@torch.compiler.assume_constant_result
def has_varlen_kernel(device):
    """True on an Ampere or newer GPU: one kernel attends within all conversations of a 16-bit row."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


class VarlenWithSinks(torch.autograd.Function):
    """`varlen_attn` with sinks, which it does not have: exp(lse) of each query grows by exp(sink).

    Its backward pass is exact if it gets that log-sum-exp and the output that belongs to it. A sink has the probability
    P = exp(sink - lse) and the value 0: with the output O and its upstream gradient dO, its gradient is -P (dO · O).
    """

    @staticmethod
    def forward(ctx, query, key, value, sinks, sequences, scaling, window):
        how = {"scale": scaling, "window_size": window, "return_aux": AuxRequest(lse=True), **GROUPED}
        output, of_keys = varlen_attn(query, key, value, *sequences, **how)
        lse = torch.logaddexp(of_keys, sinks.float()[:, None])  # (H, T)
        output = (output * (of_keys - lse).exp().T[..., None]).to(output.dtype)
        ctx.save_for_backward(query, key, value, output, lse, *sequences[:2], sinks)
        ctx.how = *sequences[2:], scaling, window
        return output

    @staticmethod
    def backward(ctx, upstream):
        (*tensors, sinks), (max_q, max_k, scaling, window) = ctx.saved_tensors, ctx.how
        output, lse = tensors[3:5]
        random_state = torch.zeros(2, dtype=torch.uint64, device=lse.device)  # of a dropout, which there is none of
        how = max_q, max_k, window == (-1, 0), random_state, scaling, list(window)
        gradients = torch.ops.torch_attn._varlen_attn_backward(upstream, *tensors, *how)
        p = (sinks.float()[:, None] - lse).exp()
        grad_sinks = -(p * (upstream.float() * output).sum(-1).T).sum(1)
        return *gradients, grad_sinks.to(sinks.dtype), None, None, None


@torch.compiler.disable  # it depends on the conversations' lengths, and its kernels are compiled already
def per_sequence(query, key, value, cu_seqlens, dropout, *how):
    """Attention of one conversation after the other: (T, H, D), (T, H_kv, D), (T, H_kv, D) to (T, H, D)."""
    lengths = cu_seqlens.diff().tolist()  # in every layer, the CPU waits for the GPU here
    rows = zip(*(tensor.transpose(0, 1).split(lengths, 1) for tensor in (query, key, value)), strict=True)
    return torch.cat([attend(*row, dropout, *how) for row in rows], 1).transpose(0, 1)


def attend(query, key, value, dropout, scaling, window=None, softcap=None, sinks=None):
    """Attention of one conversation: (H, t, D), (H_kv, t, D), (H_kv, t, D) to (H, t, D)."""
    window = window if window and window < query.shape[1] else None
    # Matrix products: torch's kernel takes 1.3 to 2 times as long in bf16 on a CPU, forward and backward.
    faster = query.device.type == "cpu" and query.dtype == torch.bfloat16 and torch.is_grad_enabled() and not dropout
    if not faster and window is None and softcap is None and sinks is None:
        return F.scaled_dot_product_attention(
            query[None], key[None], value[None], dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=True
        )[0]
    grouped = query.unflatten(0, (len(key), -1))  # (H_kv, G, t, D): the G heads that share keys and values
    if dropout:  # autograd keeps what was dropped
        return attend_in_blocks(grouped, key, value, scaling, window, softcap, sinks, dropout).flatten(0, 1)
    return BlockedAttention.apply(grouped, key, value, scaling, window, softcap, sinks).flatten(0, 1)


class BlockedAttention(torch.autograd.Function):
    """`attend_in_blocks` that keeps no scores for the backward pass.

    With S = scaling · Q Kᵀ, P = softmax(S), O = P V and the upstream gradient dO, the backward pass recomputes P:
    dV = Pᵀ dO, dP = dO Vᵀ, dS is dP through the softmax, dQ = scaling · dS K and dK = scaling · dSᵀ Q.
    """

    @staticmethod
    def forward(ctx, query, key, value, scaling, window, softcap, sinks):
        ctx.save_for_backward(query, key, value, sinks)
        ctx.how = scaling, window, softcap
        return attend_in_blocks(query, key, value, scaling, window, softcap, sinks)

    @staticmethod
    def backward(ctx, upstream):
        (query, key, value, sinks), (scaling, window, softcap) = ctx.saved_tensors, ctx.how
        grad_query, grad_key, grad_value = [], torch.zeros_like(key), torch.zeros_like(value)
        sinks = None if sinks is None else sinks.detach().requires_grad_()
        grad_sinks = None if sinks is None else torch.zeros_like(sinks)
        for queries, keys, block, scores in scores_by_block(query, key, scaling, window, softcap):
            above = upstream[:, :, queries].flatten(1, 2)
            inputs = [scores.requires_grad_()] if sinks is None else [scores.requires_grad_(), sinks]
            with torch.enable_grad():
                p = softmax_with_sinks(scores, sinks)
            grad_scores, *of_sinks = torch.autograd.grad(p, inputs, above @ value[:, keys].mT)
            if sinks is not None:
                grad_sinks += of_sinks[0]
            if softcap:
                grad_scores *= 1 - (scores.detach().clamp(min=-softcap) / softcap).square()
            grad_value[:, keys] += p.mT @ above
            grad_query.append((grad_scores @ key[:, keys]).unflatten(1, (query.shape[1], -1)))
            grad_key[:, keys] += grad_scores.mT @ block
        return torch.cat(grad_query, 2) * scaling, grad_key, grad_value, None, None, None, grad_sinks


def attend_in_blocks(query, key, value, scaling, window, softcap, sinks, dropout=0.0):
    """Causal attention of (H_kv, G, t, D) to (H_kv, t, D) by matrix products, for each block of queries."""
    blocks = scores_by_block(query, key, scaling, window, softcap)
    output = [F.dropout(softmax_with_sinks(scores, sinks), dropout) @ value[:, keys] for _, keys, _, scores in blocks]
    return torch.cat([block.unflatten(1, (query.shape[1], -1)) for block in output], 2)


def scores_by_block(query, key, scaling, window, softcap):
    """Yield each block of n queries: slices of queries and of the m keys that they see, scaling · Q, and S.

    scaling · Q is (H_kv, G · n, D); S is (H_kv, G · n, m), capped, and -inf where a key is not in a query's window.
    """
    size = BLOCK[query.device.type]
    minus_infinity = torch.full((size, size), -torch.inf, dtype=query.dtype, device=query.device)
    causal_mask = minus_infinity.triu(1)
    for begin in range(0, query.shape[2], size):
        end = min(begin + size, query.shape[2])
        first, n = max(0, begin - window + 1) if window else 0, end - begin
        block = query[:, :, begin:end].flatten(1, 2) * scaling
        scores = block @ key[:, first:end].mT
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        of_each = scores.unflatten(1, (-1, n))
        of_each[..., -n:] += causal_mask[:n, :n]
        if window and (early := end - first - window) > 0:  # keys that the block's last query no longer sees
            of_each[..., :early] += minus_infinity[:n, :early].tril(early - n)
        yield slice(begin, end), slice(first, end), block, scores


def softmax_with_sinks(scores, sinks):
    """The softmax of S, (H_kv, G · n, m), without the share that the sinks take, (H_kv · G,)."""
    if sinks is None:
        return scores.softmax(-1)
    n = scores.shape[:2].numel() // len(sinks)
    column = sinks.to(scores.dtype).view(len(scores), -1).repeat_interleave(n, 1)[..., None]
    return torch.cat([scores, column], -1).softmax(-1)[..., :-1]
