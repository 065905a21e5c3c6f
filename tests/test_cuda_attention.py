"""Windows, capped scores and sinks as only a GPU can run them; everything here is skipped without one."""

import time

import pytest
import torch

from compute import attention
from compute.layout import random_examples
from compute.self_check import choose_layout, use_layout
from config import Config
from model import Precision, token_loss
from tests.conftest import layout_of
from tests.test_attention import ASKED, LENGTHS, WRONG, a_row, by_definition, off, with_gradients
from tests.test_attention_of_models import ELSEWHERE, MISTAKES, MODELS, build

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
GPU = torch.device("cuda")
TOLERANCES = [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)]
WIDE = {"head_dim": 16}  # as small as kernels take


def attend(row, asked, compiled=False):
    """Packed attention on the GPU and its gradients, those of the sinks too."""
    row = [tensor.detach().to(GPU).requires_grad_() for tensor in row]
    sinks = [asked["s_aux"].to(GPU, torch.float32).requires_grad_()] if "s_aux" in asked else []
    asked = asked | ({"s_aux": sinks[0]} if sinks else {})
    boundaries = torch.tensor([0, *LENGTHS], device=GPU).cumsum(0).int()
    packed = torch.compile(attention.packed_attention, dynamic=True) if compiled else attention.packed_attention
    output = packed(None, *row, None, cu_seqlens=boundaries, max_seqlen=max(LENGTHS), **asked)[0]
    return [each.cpu() for each in with_gradients(output, row + sinks)]


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES, ids=str)
@pytest.mark.parametrize("width", [16, 128])
@pytest.mark.parametrize("key_heads", [2, 6])
@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED.keys())
def test_whatever_a_layer_asks_of_its_attention_is_exact(monkeypatch, asked, key_heads, width, dtype, tolerance):
    monkeypatch.setitem(attention.BLOCK, "cuda", 128)  # as on a CPU: conversations of several blocks
    row = a_row(dtype, key_heads, width)
    found, expected = attend(row, asked), by_definition(*row, **asked)
    for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert off([ours], [theirs]) < tolerance, ("output", "query", "key", "value", "sinks")[number]


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_a_mistake_is_far_beyond_the_tolerance(wrong):
    row = a_row(torch.bfloat16)
    assert off(attend(row, wrong)[:4], by_definition(*row, **ASKED["all"])[:4]) > 4e-2


@pytest.mark.parametrize("asked", [ASKED["a window"], ASKED["sinks and a window"]], ids=["window", "sinks and window"])
def test_compiled_it_is_exact(asked):
    torch.compiler.reset()
    row = a_row(torch.bfloat16)
    assert off(attend(row, asked, compiled=True), by_definition(*row, **asked)) < 2e-2


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", MODELS)
def test_models_are_packed(name, precision):
    """Their windows as they are, and narrow ones: loss and gradient as of their own forward pass."""
    layout = choose_layout(build(name, 4096, **WIDE).to(GPU), token_loss, Config(), 0, Precision(precision, GPU))
    assert layout.packed, layout.why


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("name", MODELS)
def test_the_self_check_notices_a_mistake(monkeypatch, name, mistake):
    if name in ELSEWHERE.get(mistake, ()):
        pytest.skip("is none in this model")
    own = attention.packed_attention

    def mistaken(*tensors, **asked):
        return own(*tensors, **asked | MISTAKES[mistake](asked))

    monkeypatch.setitem(attention.AttentionInterface._global_mapping, attention.PACKED, mistaken)
    layout = choose_layout(build(name, 4096, **WIDE).to(GPU), token_loss, Config(), 0, Precision("bf16", GPU))
    assert not layout.packed


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("Gemma 2", "gpt-oss")])
def test_packed_layers_with_windows_do_not_wait_for_the_gpu(name):
    model, precision = build(name, 8, **WIDE).to(GPU), Precision("bf16", GPU)
    window = random_examples((40, 7, 19, 64), 259)
    layout = choose_layout(model, token_loss, Config(micro_batch_tokens=100), 0, precision)
    batches = [batch.to(GPU) for batch in layout.micro_batches(window)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches:
            with precision.autocast():
                token_loss(model, batch).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["Mistral 7B v0.1", "Gemma 3", "Qwen2 with windows"])
def test_compiled_layers_with_windows(name):
    model, precision = build(name, 8, **WIDE).to(GPU), Precision("bf16", GPU)
    layout = choose_layout(model, token_loss, Config(compile=True, micro_batch_tokens=100), 0, precision)
    assert layout.packed
    assert layout.compiled


@pytest.mark.parametrize("name", MODELS)
def test_tokens_a_second_packed_and_padded(name, capsys):
    """No assertion: what each layout makes of 16 ragged conversations of up to 1,024 tokens, windows of 256."""
    shape = {"hidden_size": 512, "intermediate_size": 1024, "head_dim": 64, "num_hidden_layers": 6}
    shape |= {"num_attention_heads": 8, "num_key_value_heads": 4}
    if "layer_types" in MODELS[name][1]:
        shape["layer_types"] = MODELS[name][1]["layer_types"] * 2
    precision, lengths = Precision("bf16", GPU), tuple(range(64, 1025, 64))
    model, found = build(name, 256, **shape).to(GPU).train(), {}
    own = model.config._attn_implementation
    for packed in (False, True):
        model.set_attn_implementation(own)
        layout = layout_of(packed, 8192, own_logits=name == "Gemma 2")
        use_layout(model, layout)
        batches = [batch.to(GPU) for batch in layout.micro_batches(random_examples(lengths, 259))]
        for attempt in range(4):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for batch in batches:
                with precision.autocast():
                    token_loss(model, batch).backward()
            torch.cuda.synchronize()
            if attempt:
                found.setdefault(packed, []).append(sum(lengths) / (time.perf_counter() - start))
    with capsys.disabled():
        print(f"\n{name}: padded {max(found[False]):,.0f} tokens/s, packed {max(found[True]):,.0f}")
