"""Attention within each conversation of a packed row: against torch's own, one conversation at a time, in fp64."""

import pytest
import torch
from torch.nn import functional as F

from compute import attention
from compute.attention import BlockedAttention, SequenceBoundaries, packed_attention

LENGTHS = (130, 1, 5, 300, 128)


def a_row(dtype, heads=6, key_heads=2, width=16):
    """Query, key and value over all conversations, each (1, heads, T, D)."""
    torch.manual_seed(0)
    shapes = [(1, count, sum(LENGTHS), width) for count in (heads, key_heads, key_heads)]
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def spans(lengths=LENGTHS):
    return SequenceBoundaries(lengths, torch.tensor([0, *lengths]).cumsum(0).int())


def with_gradients(output, inputs):
    """An output, and the gradients of the sum of its squares."""
    return [output.detach(), *torch.autograd.grad(output.square().sum(), inputs)]


def one_by_one(query, key, value):
    """What each conversation's attention is when it is alone, by torch in fp64."""
    inputs = [tensor.detach().double().requires_grad_() for tensor in (query, key, value)]
    rows = zip(*(tensor.split(LENGTHS, 2) for tensor in inputs), strict=True)
    alone = [F.scaled_dot_product_attention(*row, is_causal=True, enable_gqa=True) for row in rows]
    return with_gradients(torch.cat(alone, 2).transpose(1, 2), inputs)


def off(ours, theirs):
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    ("dtype", "bar"), [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)]
)
def test_each_conversation_attends_to_itself_alone(dtype, bar):
    row = a_row(dtype)
    ours = with_gradients(packed_attention(None, *row, None, boundaries=spans())[0], row)
    assert off(ours, one_by_one(*row)) < bar


def test_conversations_that_see_each_other_would_be_noticed():
    row = a_row(torch.float32)
    contaminated = with_gradients(packed_attention(None, *row, None, boundaries=spans((sum(LENGTHS),)))[0], row)
    assert off(contaminated, one_by_one(*row)) > 0.1


@pytest.mark.parametrize("key_heads", [1, 3, 6])
def test_attention_in_blocks_is_exact(key_heads):
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(n, 300, 16, dtype=torch.float64).requires_grad_() for n in (6, key_heads, key_heads)
    )
    grouped = query.unflatten(0, (key_heads, -1))
    ours = with_gradients(BlockedAttention.apply(grouped, key, value, 0.3).flatten(0, 1), [query, key, value])
    theirs = F.scaled_dot_product_attention(
        query[None], key[None], value[None], is_causal=True, scale=0.3, enable_gqa=True
    )
    assert off(ours, with_gradients(theirs[0], [query, key, value])) < 1e-14


def test_blocks_are_for_bf16_in_training_on_a_cpu(monkeypatch):
    asked = []
    monkeypatch.setattr(attention.BlockedAttention, "apply", lambda query, *_: asked.append(query.shape[2]) or query)
    packed_attention(None, *a_row(torch.float32), None, boundaries=spans())
    with torch.no_grad():
        packed_attention(None, *a_row(torch.bfloat16), None, boundaries=spans())
    packed_attention(None, *a_row(torch.bfloat16), None, boundaries=spans(), dropout=0.5)
    assert asked == []
    packed_attention(None, *a_row(torch.bfloat16), None, boundaries=spans())
    assert asked == list(LENGTHS)


def test_products_are_in_autocasts_precision_whatever_came():
    row = a_row(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert packed_attention(None, *row, None, boundaries=spans())[0].dtype == torch.bfloat16


@pytest.mark.parametrize("asked", ["sliding_window", "softcap", "s_aux", "position_bias"])
def test_what_a_model_asks_beyond_it_is_refused(asked):
    with pytest.raises(NotImplementedError, match=asked):
        packed_attention(None, *a_row(torch.float32), None, boundaries=spans(), **{asked: 4})
