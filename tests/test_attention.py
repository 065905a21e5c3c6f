"""Attention within each conversation of a packed row: against torch's own, one conversation at a time, in fp64."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from compute import attention
from compute.attention import BlockedAttention, packed_attention
from compute.layers import checkpoint_activations, compile_layers, compiled_graphs, get_layers
from model import token_loss
from tests import fake_cuda
from tests.conftest import one_batch, tiny_llama

LENGTHS = (130, 1, 5, 300, 128)


def a_row(dtype, key_heads=2, width=16, value_width=None):
    """Query, key and value over all conversations, each (1, heads, T, D)."""
    torch.manual_seed(0)
    heads = ((6, width), (key_heads, width), (key_heads, value_width or width))
    shapes = [(1, count, sum(LENGTHS), size) for count, size in heads]
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def boundaries(lengths=LENGTHS):
    return {"cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).int(), "max_seqlen": max(lengths)}


def with_gradients(output, inputs):
    """An output, and the gradients of the sum of its squares."""
    return [output.detach(), *torch.autograd.grad(output.square().sum(), inputs)]


def per_sequence(query, key, value):
    """The attention of each conversation alone, by torch in fp64."""
    inputs = [tensor.detach().double().requires_grad_() for tensor in (query, key, value)]
    rows = zip(*(tensor.split(LENGTHS, 2) for tensor in inputs), strict=True)
    alone = [F.scaled_dot_product_attention(*row, is_causal=True, enable_gqa=True) for row in rows]
    return with_gradients(torch.cat(alone, 2).transpose(1, 2), inputs)


def off(ours, theirs):
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)],
)
def test_each_conversation_attends_to_itself_alone(dtype, tolerance):
    row = a_row(dtype)
    ours = with_gradients(packed_attention(None, *row, None, **boundaries())[0], row)
    assert off(ours, per_sequence(*row)) < tolerance


def test_contaminated_conversations_are_detected():
    row = a_row(torch.float32)
    contaminated = with_gradients(packed_attention(None, *row, None, **boundaries((sum(LENGTHS),)))[0], row)
    assert off(contaminated, per_sequence(*row)) > 0.1


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
    packed_attention(None, *a_row(torch.float32), None, **boundaries())
    with torch.no_grad():
        packed_attention(None, *a_row(torch.bfloat16), None, **boundaries())
    packed_attention(None, *a_row(torch.bfloat16), None, **boundaries(), dropout=0.5)
    assert asked == []
    packed_attention(None, *a_row(torch.bfloat16), None, **boundaries())
    assert asked == list(LENGTHS)


def test_products_are_in_autocasts_precision():
    row = a_row(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert packed_attention(None, *row, None, **boundaries())[0].dtype == torch.bfloat16


@pytest.mark.parametrize("asked", ["sliding_window", "softcap", "s_aux", "position_bias"])
def test_unsupported_options_are_refused(asked):
    with pytest.raises(NotImplementedError, match=asked):
        packed_attention(None, *a_row(torch.float32), None, **boundaries(), **{asked: 4})


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)], ids=str)
@pytest.mark.parametrize("key_heads", [1, 2, 6])
def test_the_varlen_kernel_is_called_as_it_requires(monkeypatch, dtype, tolerance, key_heads):
    fake_cuda.varlen_attention(monkeypatch)
    row = a_row(dtype, key_heads=key_heads)
    ours = with_gradients(packed_attention(None, *row, None, **boundaries())[0], row)
    assert off(ours, per_sequence(*row)) < tolerance
    assert fake_cuda.calls == ["varlen", "varlen backward"]


@pytest.mark.parametrize(
    "changes",
    [{"width": 12}, {"width": 264}, {"value_width": 8}, {"dtype": torch.float32}],
    ids=["12 wide", "264 wide", "narrower values", "fp32"],
)
def test_what_the_varlen_kernel_does_not_take_is_computed_per_sequence(monkeypatch, changes):
    fake_cuda.varlen_attention(monkeypatch)
    row = a_row(**{"dtype": torch.bfloat16} | changes)
    ours = with_gradients(packed_attention(None, *row, None, **boundaries())[0], row)
    assert off(ours, per_sequence(*row)) < 1e-2
    assert fake_cuda.calls == []


def count_graphs(model, batches):
    """The number of graphs that a model's compiled layers become; a graph break is an error."""
    torch.compiler.reset()
    before = compiled_graphs()
    for layer in get_layers(model):
        layer.compile = partial(layer.compile, fullgraph=True, backend="eager")
    compile_layers(model)
    for batch in batches:
        with torch.autocast("cpu", torch.bfloat16):
            token_loss(model, batch).backward()
    return compiled_graphs() - before


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
def test_compiled_layers_are_one_graph_for_all_layers_and_lengths(monkeypatch, ragged_window, checkpointing):
    """With activation checkpointing too, where a broken graph would leave nothing compiled."""
    fake_cuda.varlen_attention(monkeypatch)
    model, eager = (tiny_llama(259, hidden_size=64).train() for _ in range(2))
    for each in (model, eager):
        each.set_attn_implementation(attention.PACKED)
        if checkpointing:
            checkpoint_activations(each)
    batches = [one_batch(ragged_window[:count], packed=True) for count in (8, 7, 2, 5)]
    assert count_graphs(model, batches) == 1
    assert fake_cuda.calls.count("varlen") == 2 * 4 * (2 if checkpointing else 1)  # layers, batches, again
    for batch in batches:
        with torch.autocast("cpu", torch.bfloat16):
            token_loss(eager, batch).backward()
    for ours, theirs in zip(model.parameters(), eager.parameters(), strict=True):
        assert (ours.grad - theirs.grad).norm() <= 1e-2 * theirs.grad.norm()
