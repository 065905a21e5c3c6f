"""Attention within each conversation of a packed row: against torch's own, one conversation at a time, in fp64."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

from compute import attention
from compute.attention import BlockedAttention, packed_attention, scores_by_block
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


def by_definition(query, key, value, sliding_window=None, softcap=None, s_aux=None):
    """The attention of each conversation alone with all its T × T scores, in fp64, as transformers' models write it."""
    inputs = [tensor.detach().double().requires_grad_() for tensor in (query, key, value)]
    inputs += [] if s_aux is None else [s_aux.detach().double().requires_grad_()]
    groups = query.shape[1] // key.shape[1]
    alone = []
    for q, k, v in zip(*(tensor.split(LENGTHS, 2) for tensor in inputs[:3]), strict=True):
        scores = q @ k.repeat_interleave(groups, 1).mT * q.shape[-1] ** -0.5
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        scores = scores.masked_fill(~transformers_mask(q.shape[2], sliding_window), -torch.inf)
        if s_aux is not None:
            scores = torch.cat([scores, inputs[3].view(1, -1, 1, 1).expand(1, -1, q.shape[2], 1)], -1)
        alone.append(scores.softmax(-1)[..., : k.shape[2]] @ v.repeat_interleave(groups, 1))
    return with_gradients(torch.cat(alone, 2).transpose(1, 2), inputs)


def transformers_mask(length, sliding_window):
    """Which keys (columns) a query sees by transformers' own rule, (t, t)."""
    sees = causal_mask_function if sliding_window is None else sliding_window_causal_mask_function(sliding_window)
    at = torch.arange(length)
    return torch.as_tensor(sees(0, 0, at[:, None], at[None])).expand(length, length)


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
    ours = with_gradients(
        BlockedAttention.apply(grouped, key, value, 0.3, None, None, None).flatten(0, 1), [query, key, value]
    )
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


def test_unsupported_options_are_refused():
    with pytest.raises(NotImplementedError, match="position_bias"):
        packed_attention(None, *a_row(torch.float32), None, **boundaries(), position_bias=4)


SINKS = torch.tensor([-1.0, 0.0, 1.0, 2.0, 3.0, 4.0], dtype=torch.float64)  # of 6 heads
ASKED = {  # what layers ask of their attention; the conversations have up to 300 tokens, the blocks 128 queries
    "a window": {"sliding_window": 100},
    "a window of two tokens": {"sliding_window": 2},
    "a window of a block": {"sliding_window": 128},
    "a window of a block and one": {"sliding_window": 129},
    "a window as long as a conversation": {"sliding_window": 300},
    "a cap": {"softcap": 0.5},
    "sinks": {"s_aux": SINKS},
    "a cap and a window": {"softcap": 0.5, "sliding_window": 100},
    "sinks and a window": {"s_aux": SINKS, "sliding_window": 100},
    "all": {"softcap": 0.5, "sliding_window": 100, "s_aux": SINKS},
}
WRONG = {  # what a mistake would make of it
    "a window longer by one": {"sliding_window": 101, "softcap": 0.5, "s_aux": SINKS},
    "a window shorter by one": {"sliding_window": 99, "softcap": 0.5, "s_aux": SINKS},
    "no window": {"softcap": 0.5, "s_aux": SINKS},
    "no cap": {"sliding_window": 100, "s_aux": SINKS},
    "no sinks": {"sliding_window": 100, "softcap": 0.5},
}


def attend_as_asked(row, asked, **options):
    """Packed attention and its gradients, those of the sinks too."""
    sinks = [asked["s_aux"].detach().requires_grad_()] if "s_aux" in asked else []
    asked = asked | ({"s_aux": sinks[0]} if sinks else {})
    return with_gradients(packed_attention(None, *row, None, **boundaries(), **asked, **options)[0], row + sinks)


@pytest.mark.parametrize("key_heads", [1, 2, 6])
@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED.keys())
def test_whatever_a_layer_asks_of_its_attention_is_exact(asked, key_heads):
    row = a_row(torch.float64, key_heads)
    assert off(attend_as_asked(row, asked), by_definition(*row, **asked)) < 1e-13


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_a_mistake_in_what_a_layer_asks_is_detected(wrong):
    row = a_row(torch.float64)
    ours, right = attend_as_asked(row, wrong)[:4], by_definition(*row, **ASKED["all"])[:4]
    assert off(ours, right) > 1e-2


@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED.keys())
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_it_is_exact_in_other_precisions(asked, dtype, tolerance):
    row = a_row(dtype)
    assert off(attend_as_asked(row, asked), by_definition(*row, **asked)) < tolerance


@pytest.mark.parametrize("length", range(1, 9))
@pytest.mark.parametrize("block", [1, 2, 3, 128])
def test_a_window_is_that_of_transformers_masks(monkeypatch, length, block):
    """For every window: the scores that are -inf are those that transformers' own mask leaves out."""
    monkeypatch.setitem(attention.BLOCK, "cpu", block)
    query, key = torch.zeros(1, 1, length, 8), torch.zeros(1, length, 8)
    for window in (None, *range(1, length + 2)):
        found = torch.zeros(length, length, dtype=torch.bool)
        for queries, keys, _, scores in scores_by_block(query, key, 1.0, window, None):
            found[queries, keys] = scores[0] == 0
        assert torch.equal(found, transformers_mask(length, window))


@pytest.mark.parametrize("asked", [ASKED["a window"], ASKED["all"]], ids=["a window", "all"])
def test_dropout_keeps_to_it(asked):
    """What is dropped is drawn for each probability: without any the result is exact, with it the mean is."""
    row = [tensor[:, :, :60] for tensor in a_row(torch.float64)]
    short = boundaries((20, 40))
    asked = asked | {"sliding_window": 7}
    exact = packed_attention(None, *row, None, **short, **asked)[0]
    torch.manual_seed(0)
    drawn = [packed_attention(None, *row, None, **short, **asked, dropout=0.1)[0] for _ in range(300)]
    assert not torch.equal(drawn[0], exact)
    assert (sum(drawn) / 300 - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)], ids=str)
@pytest.mark.parametrize("key_heads", [1, 2, 6])
def test_the_varlen_kernel_is_called_as_it_requires(monkeypatch, dtype, tolerance, key_heads):
    fake_cuda.varlen_attention(monkeypatch)
    row = a_row(dtype, key_heads=key_heads)
    ours = with_gradients(packed_attention(None, *row, None, **boundaries())[0], row)
    assert off(ours, per_sequence(*row)) < tolerance
    assert fake_cuda.calls == ["varlen", "varlen backward"]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)], ids=str)
@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED.keys())
def test_the_varlen_kernel_takes_windows_and_sinks(monkeypatch, asked, dtype, tolerance, checkpointing):
    fake_cuda.varlen_attention(monkeypatch)
    row = a_row(dtype)
    packed = packed_attention
    if checkpointing:
        monkeypatch.setitem(globals(), "packed_attention", partial(checkpoint, packed, use_reentrant=False))
    assert off(attend_as_asked(row, asked), by_definition(*row, **asked)) < tolerance
    assert fake_cuda.calls[:1] == ([] if "softcap" in asked else ["varlen"])


# The width of a window is a number in the graph, whatever it is.
@pytest.mark.parametrize(
    "asked",
    [
        pytest.param(asked, id=name, marks=() if "sinks" in name or name == "a window" else pytest.mark.slow)
        for name, asked in ASKED.items()
        if "softcap" not in asked
    ],
)
def test_with_the_varlen_kernel_it_is_one_graph(monkeypatch, asked):
    fake_cuda.varlen_attention(monkeypatch)
    torch.compiler.reset()
    row = a_row(torch.bfloat16)
    packed = torch.compile(packed_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    monkeypatch.setitem(globals(), "packed_attention", packed)
    assert off(attend_as_asked(row, asked), by_definition(*row, **asked)) < 1e-2


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
