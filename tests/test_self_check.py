"""The check before training: which layout a model gets, and why not the faster one."""

from dataclasses import replace

import pytest
import torch
from transformers import CONFIG_MAPPING, AttentionInterface, AutoModelForCausalLM

from compute import attention
from compute.layers import compiled_graphs
from compute.memory import CPU_TOKENS
from compute.self_check import choose_layout, measure, relative_difference
from config import Config, UserError
from eval import evaluate
from evaluation.generation import generate_answers
from model import Precision, save_model, token_loss
from tests import fake_cuda
from tests.conftest import layout_of, one_batch, tiny_llama
from train import make_optimizer, train_step

CPU = torch.device("cpu")
FP32 = Precision("fp32", CPU)
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 259, "pad_token_id": 0}
GROUPED = SMALL | {"intermediate_size": 64, "num_key_value_heads": 2}
GEMMA = GROUPED | {"head_dim": 8, "sliding_window": 64, "layer_types": ["full_attention"] * 2}
GEMMA |= {"final_logit_softcapping": None, "attn_logit_softcapping": None}
SLIDING = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}
MODELS = {  # the kind, its configuration, its layout, and why it is not packed
    "llama": ("llama", GROUPED, "packed", ""),
    "a head with a bias": ("phi3", GROUPED, "packed", ""),
    "qwen2": ("qwen2", GROUPED, "packed", ""),
    "qwen3": ("qwen3", GROUPED, "packed", ""),
    "gpt2": ("gpt2", SMALL, "packed", ""),
    "sliding window": ("mistral", GROUPED | {"sliding_window": 64}, "padded", "sliding_window"),
    "sliding window in some layers": ("qwen2", GROUPED | SLIDING, "padded", "layers of sliding_attention"),
    "capped scores": ("gemma2", GEMMA | {"attn_logit_softcapping": 5.0}, "padded", "softcap"),
    "capped logits": ("gemma2", GEMMA | {"final_logit_softcapping": 30.0}, "own", "more than a matrix"),
    "scaled logits": ("granite", GROUPED | {"logits_scaling": 4.0}, "own", "more than a matrix"),
    "scaled the other way": ("cohere", GROUPED, "own", "more than a matrix"),
    "a head of two layers": ("bert", SMALL | {"is_decoder": True}, "own", "more than a matrix"),
    "no interface": ("bloom", SMALL, "padded", "cannot be replaced"),
}


@pytest.mark.parametrize(("kind", "options", "expected", "why"), MODELS.values(), ids=MODELS.keys())
def test_a_model_gets_the_fastest_layout_that_is_exact_for_it(ragged_window, kind, options, expected, why):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**options)).eval()
    own = sum(loss_alone(model, example) for example in ragged_window)
    layout = choose_layout(model, token_loss, Config(), 0, FP32)
    assert ("packed" if layout.packed else "own" if layout.own_logits else "padded") == expected
    assert why in layout.why
    assert bool(layout.why) == (expected != "packed")
    assert layout.tokens == CPU_TOKENS
    (batch,) = layout.micro_batches(ragged_window)
    assert token_loss(model, batch).item() == pytest.approx(own, rel=1e-5)
    assert evaluate(model, ragged_window, layout, FP32).loss * len(batch.targets) == pytest.approx(own, rel=1e-5)
    if not layout.packed:
        with pytest.raises(UserError, match=r"--layout packed: not exact for mine, .*; use --layout padded"):
            choose_layout(model, token_loss, Config(layout="packed", model="mine"), 0, FP32)


@torch.no_grad()
def loss_alone(model, example):
    """The loss of one conversation by the model's own forward pass; it has no row beside it, and no padding."""
    logits = model(example.input_ids[None]).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, example.labels[1:], reduction="sum").item()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_contaminated_conversations_are_detected(monkeypatch, precision):
    def contaminated(*tensors, cu_seqlens=None, **options):
        whole = None if cu_seqlens is None else cu_seqlens[[0, -1]]
        return attention.packed_attention(*tensors, cu_seqlens=whole, **options)

    monkeypatch.setitem(AttentionInterface._global_mapping, attention.PACKED, contaminated)
    layout = choose_layout(tiny_llama(259), token_loss, Config(), 0, Precision(precision, CPU))
    assert not layout.packed
    assert "off by" in layout.why


def test_a_layout_and_its_budget_can_be_set(tiny_model):
    assert not choose_layout(tiny_model, token_loss, Config(layout="padded"), 0, FP32).packed
    assert choose_layout(tiny_model, token_loss, Config(layout="packed", micro_batch_tokens=7), 0, FP32).tokens == 7


def test_it_leaves_saved_files_and_answers_as_they_were(tiny_model, tiny_tokenizer, tmp_path):
    before = generate_answers(tiny_model, tiny_tokenizer, ["Who are you?"], max_new_tokens=8)
    assert choose_layout(tiny_model, token_loss, Config(), 0, FP32).packed
    assert generate_answers(tiny_model, tiny_tokenizer, ["Who are you?"], max_new_tokens=8) == before
    save_model(tiny_model, tiny_tokenizer, tmp_path)
    assert "packed" not in (tmp_path / "config.json").read_text()
    assert not any(weights.grad is not None for weights in tiny_model.parameters())


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_positions_that_depend_on_the_micro_batch_are_refused(rope):
    """By the longest conversation; shorter ones have the same positions however a window is cut."""
    parameters = {"rope_type": rope, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
    if rope == "longrope":
        parameters |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    model = tiny_llama(259, rope_parameters=parameters)
    assert choose_layout(model, token_loss, Config(), 0, FP32, longest=64).packed
    with pytest.raises(UserError, match=rf"beyond 64 tokens its {rope} positions .*; use --max-length 64"):
        choose_layout(model, token_loss, Config(), 0, FP32, longest=65)


def compile_with(monkeypatch, backend):
    """Have another backend compile, as inductor takes its time."""
    compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **how: compile(module, **how, backend=backend))
    torch.compiler.reset()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_layers_are_exact_and_not_recompiled_for_every_length(monkeypatch, ragged_window, backend):
    compile_with(monkeypatch, backend)
    model = tiny_llama(259).eval()
    expected = measure(model, token_loss, layout_of(packed=False), FP32, training=True)
    layout = choose_layout(model, token_loss, Config(compile=True), 0, FP32)
    compiled = measure(model, token_loss, layout, FP32, training=True)
    assert relative_difference(compiled["loss"], expected["loss"]) <= 1e-6
    assert relative_difference(compiled["gradient"], expected["gradient"]) <= 1e-5
    graphs = compiled_graphs()
    for count in range(2, 9):
        token_loss(model, one_batch(ragged_window[:count], packed=True)).backward()
    assert compiled_graphs() == graphs > 0


def test_what_cannot_be_compiled_is_refused(monkeypatch):
    def no_compiler(*_):
        raise RuntimeError("no C++ compiler found")

    both = Config(compile=True, gradient_checkpointing=True)
    with pytest.raises(UserError, match=r"--compile and --gradient-checkpointing: .* or use --layout padded"):
        choose_layout(tiny_llama(259), token_loss, both, 0, FP32)
    compile_with(monkeypatch, "aot_eager")
    choose_layout(tiny_llama(259), token_loss, replace(both, layout="padded"), 0, FP32)
    monkeypatch.undo()
    compile_with(monkeypatch, no_compiler)
    with pytest.raises(UserError, match=r"--compile: .*; leave it out"):
        choose_layout(tiny_llama(259), token_loss, Config(compile=True), 0, FP32)


def test_an_unexpected_error_is_not_taken_for_a_mismatch(monkeypatch):
    def mistaken(*_, **__):
        raise TypeError("got an unexpected keyword argument 'enable_gqa'")

    fake_cuda.varlen_attention(monkeypatch)
    monkeypatch.setattr(attention, "varlen_attn", mistaken)
    with pytest.raises(TypeError, match="enable_gqa"):
        choose_layout(tiny_llama(259, hidden_size=64), token_loss, Config(), 0, Precision("bf16", CPU))


def test_an_update_reads_two_numbers_from_the_device_at_its_end(monkeypatch, ragged_window):
    """The loss and the gradient's norm; nothing else that the CPU would wait for a GPU for."""
    fake_cuda.varlen_attention(monkeypatch)
    model, precision = tiny_llama(259, hidden_size=64), Precision("bf16", CPU)
    layout = choose_layout(model, token_loss, Config(micro_batch_tokens=80), 0, precision)
    assert layout.packed
    window = list(layout.micro_batches(ragged_window))
    assert len(window) == 3
    optimizer, scaler = make_optimizer(model, 0.1), precision.grad_scaler()
    model.train()
    settings = {"precision": precision, "scaler": scaler, "max_grad_norm": 1.0}
    with fake_cuda.Reads() as reads:
        optimizer.register_step_post_hook(lambda *_: reads.found.append("optimizer"))
        train_step(model, optimizer, window, 1e-4, **settings, while_busy=lambda: reads.found.append("while busy"))
    assert reads.found == ["optimizer", "while busy", *["aten._local_scalar_dense"] * 2]
