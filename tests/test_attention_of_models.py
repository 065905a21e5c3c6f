"""Models whose attention is more than causal: packed, padded and their own forward pass have one loss and gradient."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface

from compute import attention
from compute.layers import checkpoint_activations, compile_layers, get_layers
from compute.self_check import NARROW, choose_layout, list_windows, use_layout
from config import Config
from evaluation.generation import generate_answers
from model import Precision, loss_and_correct, token_loss
from tests.conftest import layout_of
from tests.faults.harness import some
from tests.test_self_check import CPU, FP32, GROUPED, tiny

WINDOW = 8  # tokens; the conversations have up to 64
HEADS = GROUPED | {"head_dim": 8, "num_hidden_layers": 3}
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
MODELS = {  # the kind, its configuration, and its layout
    "Mistral 7B v0.1": ("mistral", {}),
    "Gemma 2": ("gemma2", {"layer_types": ALTERNATING, "attn_logit_softcapping": 2.0}),
    "Gemma 3": ("gemma3_text", {"layer_types": ALTERNATING}),
    "gpt-oss": ("gpt_oss", {"layer_types": ALTERNATING, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "Qwen2 with windows": ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}),
    "Phi-3 with windows": ("phi3", {}),
}


class InFp64(TorchFunctionMode):
    """Has a model compute in fp64 what its code computes in fp32 in any case: norms, rotary angles, softmax."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        function = torch.Tensor.double if function is torch.Tensor.float else function
        args = [torch.float64 if each is torch.float32 else each for each in args]
        kwargs = {name: torch.float64 if each is torch.float32 else each for name, each in (kwargs or {}).items()}
        return function(*args, **kwargs)


def build(name, window=WINDOW, **changes):
    """A tiny model of which every part of its attention matters."""
    kind, options = MODELS[name]
    model = tiny(kind, {**HEADS, **options, "sliding_window": window, **changes})
    if kind == "gemma2":
        model.set_attn_implementation("eager")  # transformers 5.17 takes one that leaves out the cap
    for parameter, weights in model.named_parameters():
        if "sinks" in parameter:
            torch.nn.init.normal_(weights, std=2.0)
    return model


def take_gradients(model):
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return gradients


def own_result(model, window):
    """The loss and gradients of the model's own forward pass over each conversation alone."""
    losses = []
    for example in window:
        logits = model(input_ids=example.input_ids[None], use_cache=False).logits[0, :-1]
        losses.append(F.cross_entropy(logits, example.labels[1:], reduction="sum"))
        losses[-1].backward()
    return sum(losses).item(), take_gradients(model)


def our_result(model, layout, window):
    """The loss and gradients of `token_loss` over the micro-batches of a layout."""
    use_layout(model, layout)
    losses = [token_loss(model, batch) for batch in layout.micro_batches(window)]
    sum(losses).backward()
    return sum(losses).item(), take_gradients(model)


def assert_equal(found, expected, tolerance):
    assert found[0] == pytest.approx(expected[0], rel=tolerance)
    largest = max(gradient.norm() for gradient in expected[1].values() if gradient is not None)
    for name, gradient in expected[1].items():
        assert (gradient is None) == (found[1][name] is None), name
        if gradient is not None:  # those of key biases are zero but for rounding
            assert (found[1][name] - gradient).norm() <= tolerance * max(gradient.norm(), 1e-2 * largest), name


@pytest.mark.parametrize("name", MODELS)
def test_packed_padded_and_the_models_own_are_equal(ragged_window, name):
    model, own_logits = build(name).double(), name == "Gemma 2"
    model.set_experts_implementation("eager")  # torch's grouped products take no fp64
    with InFp64():
        expected = own_result(model, ragged_window)
        assert_equal(our_result(model, layout_of(False, 130, own_logits), ragged_window), expected, 1e-12)
        for budget in (1, 70, 1000):
            assert_equal(our_result(model, layout_of(True, budget, own_logits), ragged_window), expected, 1e-12)


@pytest.mark.parametrize("how", ["recomputed", pytest.param("compiled", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", MODELS)
def test_recomputed_and_compiled_layers_ask_for_the_same(ragged_window, name, how):
    model = build(name)
    expected = own_result(model, ragged_window)
    if how == "recomputed":
        checkpoint_activations(model.train())
    else:
        torch.compiler.reset()
        for layer in get_layers(model):
            layer.compile = partial(layer.compile, backend="eager")
        compile_layers(model)
    assert_equal(our_result(model, layout_of(True, 70, name == "Gemma 2"), ragged_window), expected, 1e-4)


@pytest.mark.parametrize("window", [8, 4096], ids=["short", "longer than the small batch"])
@pytest.mark.parametrize("name", MODELS)
def test_the_self_check_packs_them(name, window):
    """And leaves their windows as they were."""
    model = build(name, window)
    layout = choose_layout(model, token_loss, Config(), 0, FP32)
    assert layout.packed
    assert layout.own_logits == (name == "Gemma 2")
    assert {owner.sliding_window for owner in list_windows(model)} == {window}


MISTAKES = {
    "a window longer by one": lambda asked: {"sliding_window": asked["sliding_window"] and asked["sliding_window"] + 1},
    "a window shorter by one": lambda asked: {
        "sliding_window": asked["sliding_window"] and asked["sliding_window"] - 1
    },
    "no window": lambda _: {"sliding_window": None},
    "a window in every layer": lambda _: {"sliding_window": NARROW},
    "no sinks": lambda _: {"s_aux": None},
    "no cap": lambda _: {"softcap": None},
}
ELSEWHERE = {  # mistakes that are none in these models
    "a window in every layer": {"Mistral 7B v0.1", "Phi-3 with windows"},
    "no sinks": MODELS.keys() - {"gpt-oss"},
    "no cap": MODELS.keys() - {"Gemma 2"},
}


@pytest.mark.parametrize(
    ("precision", "training"),
    some([("fp32", True), ("bf16", False), ("bf16", True), ("fp32", False)], fast=2),
    ids=["fp32-training", "bf16-evaluation", "bf16-training", "fp32-evaluation"],
)
@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("name", MODELS)
def test_the_self_check_notices_a_mistake(monkeypatch, name, mistake, precision, training):
    """Whatever the model's window is, here longer than the conversations of the small batch."""
    if name in ELSEWHERE.get(mistake, ()):
        pytest.skip("is none in this model")

    def mistaken(*tensors, **asked):
        return attention.packed_attention(*tensors, **asked | MISTAKES[mistake](asked))

    monkeypatch.setitem(AttentionInterface._global_mapping, attention.PACKED, mistaken)
    measured, loss_function = Precision(precision, CPU), token_loss if training else loss_and_correct
    layout = choose_layout(build(name, 4096), loss_function, Config(), 0, measured, training=training)
    assert not layout.packed
    assert " is off by " in layout.why


@pytest.mark.parametrize("name", MODELS)
def test_answers_are_those_of_the_models_own_attention(tiny_tokenizer, name):
    model = build(name)
    answers = generate_answers(model, tiny_tokenizer, ["Who are you?"], max_new_tokens=8)
    assert choose_layout(model, token_loss, Config(), 0, FP32).packed
    assert generate_answers(model, tiny_tokenizer, ["Who are you?"], max_new_tokens=8) == answers
