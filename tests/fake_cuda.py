"""CPU kernels in the place of GPU kernels, so that tests run the code around them.

They compute in fp64, one conversation at a time, and assert what the real kernels require.
"""

import torch
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode

from compute import attention

aten = torch.ops.aten
LIBRARY = torch.library.Library("aten", "IMPL")
calls = []  # the names of the kernels that ran


def varlen_attention(monkeypatch):
    """Make the CPU pass for an Ampere GPU in `compute.attention`."""
    monkeypatch.setattr(attention, "has_varlen_kernel", lambda _: True)
    calls.clear()


def check(query, key, value, cu_q, cu_k, max_q, max_k):
    """What the kernels for packed rows want: (T, H, D), (T, H_kv, D), (T, H_kv, D)."""
    for tensor in (query, key, value):
        assert tensor.ndim == 3
        assert tensor.stride(-1) == 1
        assert tensor.dtype == query.dtype
    assert query.shape[2] % 8 == 0
    assert query.shape[1] % key.shape[1] == 0
    for offsets, longest in ((cu_q, max_q), (cu_k, max_k)):
        assert offsets.dtype == torch.int32
        assert offsets.is_contiguous()
        assert int(offsets[0]) == 0
        assert int(offsets[-1]) == len(query)
        assert int(offsets.diff().max()) == longest  # a smaller one would leave tokens out


def in_fp64(query, key, value, cu_seqlens, scale, window):
    """Of each conversation: its slice, query, key and value as (H_kv, G, t, D) and (H_kv, 1, t, D), scores."""
    for begin, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        rows = slice(begin, end)
        q, k, v = (tensor[rows].double().transpose(0, 1) for tensor in (query, key, value))
        q, k, v = q.unflatten(0, (len(k), -1)), k[:, None], v[:, None]
        before = torch.arange(end - begin)[:, None] - torch.arange(end - begin)  # the query, the key is
        left, right = window
        unseen = (before < -right) | (before > left if left >= 0 else False)
        yield rows, q, k, v, ((q @ k.mT) * scale).masked_fill(unseen, -torch.inf)


def attend(query, key, value, cu_seqlens, scale, window):
    """The output, and the log-sum-exp of each query's scores, (H, T)."""
    output, lse = torch.empty_like(query), torch.empty(query.shape[1], len(query))
    for rows, _, _, v, scores in in_fp64(query, key, value, cu_seqlens, scale, window):
        output[rows] = (scores.softmax(-1) @ v).flatten(0, 1).transpose(0, 1).to(query.dtype)
        lse[:, rows] = scores.logsumexp(-1).flatten(0, 1).float()
    return output, lse


def gradients(upstream, query, key, value, out, lse, cu_seqlens, scale, window):
    """As FlashAttention computes them: probabilities by the log-sum-exp it is given, their mean by the output."""
    found = [torch.empty_like(tensor) for tensor in (query, key, value)]
    for rows, q, k, v, scores in in_fp64(query, key, value, cu_seqlens, scale, window):
        above, output = (each[rows].double().transpose(0, 1).unflatten(0, q.shape[:2]) for each in (upstream, out))
        p = (scores - lse[:, rows].double().unflatten(0, q.shape[:2])[..., None]).exp()
        scores = p * (above @ v.mT - (above * output).sum(-1, keepdim=True)) * scale
        parts = (scores @ k).flatten(0, 1), (scores.mT @ q).sum(1), (p.mT @ above).sum(1)
        for gradient, part in zip(found, parts, strict=True):
            gradient[rows] = part.transpose(0, 1).to(gradient.dtype)
    return tuple(found)


def forward(query, key, value, cu_q, cu_k, max_q, max_k, is_causal=False, scale=None, window_size=None, *more):
    calls.append("varlen")
    check(query, key, value, cu_q, cu_k, max_q, max_k)
    assert query.dtype in (torch.bfloat16, torch.float16)
    assert query.shape[2] <= 256
    assert is_causal == (list(window_size) == [-1, 0])
    assert window_size[1] == 0
    assert query.shape[1] == key.shape[1] or more[:1] in ((), (True,))
    return *attend(query, key, value, cu_q, scale, window_size), torch.zeros(2, dtype=torch.uint64)


def backward(upstream, query, key, value, out, lse, cu_q, cu_k, max_q, max_k, is_causal, rng, scale=None, window=None):
    calls.append("varlen backward")
    check(query, key, value, cu_q, cu_k, max_q, max_k)
    assert (upstream.shape, upstream.dtype, upstream.stride(-1)) == (out.shape, out.dtype, 1)
    assert (lse.dtype, lse.shape, rng.shape) == (torch.float32, (query.shape[1], len(query)), (2,))
    assert is_causal == (list(window) == [-1, 0])
    assert window[1] == 0
    return gradients(upstream, query, key, value, out, lse, cu_q, scale, window)


def addmm_dtype_out(self, mat1, mat2, out_dtype, *, beta=1, alpha=1, out):
    """A product of 16 bits added to an fp32 sum, which on a GPU the matrix product does itself."""
    calls.append("addmm")
    assert mat1.dtype == mat2.dtype
    assert out_dtype == out.dtype == self.dtype == torch.float32
    assert (beta, alpha) == (1, 1)
    assert mat1.dtype in (torch.bfloat16, torch.float16)
    return out.copy_(self + mat1.float() @ mat2.float())


varlen._varlen_attn.register_kernel("cpu", forward)
varlen._varlen_attn_backward.register_kernel("cpu", backward)
LIBRARY.impl("addmm.dtype_out", addmm_dtype_out, "CPU")


class Reads(TorchDispatchMode):
    """Lists the operations that would make the CPU wait for a GPU: values read, and shapes that depend on them."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        masks = args[1] if function.overloadpacket in (aten.index, aten.index_put, aten.index_put_) else ()
        by_values = (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero)
        if function.overloadpacket in by_values or any(m is not None and m.dtype == torch.bool for m in masks):
            self.found.append(str(function.overloadpacket))
        return function(*args, **kwargs)
