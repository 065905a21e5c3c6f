"""The check before training: which layout a model gets, and why not the faster one."""

import contextlib
import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import CONFIG_MAPPING, AttentionInterface, AutoModelForCausalLM, PreTrainedModel

from compute import attention
from compute.cross_entropy import LinearCrossEntropy
from compute.layers import compiled_graphs, list_extra_losses
from compute.layout import random_examples
from compute.memory import CPU_TOKENS
from compute.self_check import choose_layout, measure, relative_difference
from config import QUICKSTART_MODEL, Config, UserError
from eval import evaluate
from evaluation.generation import generate_answers
from model import Precision, load_model, loss_and_correct, save_model, token_loss
from storage import hub
from tests import fake_cuda, test_causal_models
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
    "sliding window": ("mistral", GROUPED | {"sliding_window": 8}, "packed", ""),
    "sliding window in some layers": ("qwen2", GROUPED | SLIDING, "packed", ""),
    "chunks": ("llama4_text", GROUPED | {"num_local_experts": 2}, "own", "layers of chunked_attention"),
    "capped scores": ("gemma2", GEMMA | {"attn_logit_softcapping": 5.0}, "packed", ""),
    "capped logits": ("gemma2", GEMMA | {"final_logit_softcapping": 30.0}, "packed, own", "more than a matrix"),
    "scaled logits": ("granite", GROUPED | {"logits_scaling": 4.0}, "packed, own", "more than a matrix"),
    "scaled the other way": ("cohere", GROUPED, "packed, own", "more than a matrix"),
    "a head of two layers": ("bert", SMALL | {"is_decoder": True}, "packed, own", "more than a matrix"),
    "no interface": ("bloom", SMALL, "padded", "cannot be replaced"),
}


def tiny(kind, options):
    """A model of a kind with weights large enough that attention depends on what it attends to."""
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {kind}")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**options)).eval()
    for weights in model.parameters():
        if weights.ndim == 2:
            torch.nn.init.normal_(weights, std=0.2)
    model.get_input_embeddings().padding_idx = None  # as `load_model` does
    return model


@pytest.mark.parametrize(("kind", "options", "expected", "why"), MODELS.values(), ids=MODELS.keys())
def test_a_model_gets_the_fastest_layout_that_is_exact_for_it(ragged_window, kind, options, expected, why):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**options)).eval()
    own = sum(loss_alone(model, example) for example in ragged_window)
    layout = choose_layout(model, token_loss, Config(), 0, FP32)
    kind = [name for name, given in (("packed", layout.packed), ("own", layout.own_logits)) if given]
    assert (", ".join(kind) or "padded") == expected
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


def see_each_other(*tensors, cu_seqlens=None, **options):
    """Attention in which the conversations of a row see each other."""
    whole = None if cu_seqlens is None else cu_seqlens[[0, -1]]
    return attention.packed_attention(*tensors, cu_seqlens=whole, **options)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_contaminated_conversations_are_detected(monkeypatch, precision):
    monkeypatch.setitem(AttentionInterface._global_mapping, attention.PACKED, see_each_other)
    layout = choose_layout(tiny_llama(259), token_loss, Config(), 0, Precision(precision, CPU))
    assert not layout.packed
    assert "off by" in layout.why


def test_another_kernels_rounding_is_not_a_mismatch(monkeypatch, real_tokenizer):
    """On a GPU layouts have kernels of their own; on its way back through 30 layers what they round grows."""

    def round_otherwise(*tensors, **options):
        output, _ = attention.packed_attention(*tensors, **options)
        return output * (1 + 2**-20 * torch.randn_like(output)), None  # eight times the last bit

    monkeypatch.setitem(AttentionInterface._global_mapping, attention.PACKED, round_otherwise)
    path, local_files_only = hub.find_model(QUICKSTART_MODEL)
    layout = choose_layout(load_model(path, real_tokenizer, CPU, local_files_only), token_loss, Config(), 0, FP32)
    assert layout.packed, layout.why


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


LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
LONG |= {"factor": 4.0, "original_max_position_embeddings": 64}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
PLAIN = {"rope_type": "default", "rope_theta": 1e4}
EXPERTS = {"moe_intermediate_size": 16, "head_dim": 8, "num_experts": 8, "num_experts_per_tok": 2}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
LATENT |= {"num_key_value_heads": 4, "dim_model_base": 32}
ROPES = {  # the kind, and its configuration; 64 tokens is where its frequencies, or the scale of its scores, change
    "phi3": ("phi3", {"rope_scaling": LONG, "max_position_embeddings": 256, "original_max_position_embeddings": 64}),
    "its scale": ("phimoe", {"rope_scaling": LONG | {"short_mscale": 1.0, "long_mscale": 1.5}, "num_local_experts": 4}),
    "llama": ("llama", {"rope_parameters": LONG, "max_position_embeddings": 256}),
    "minicpm3": ("minicpm3", LATENT | {"rope_scaling": LONG, "max_position_embeddings": 256}),
    "by kind of layer": ("mellum", EXPERTS | {"rope_parameters": {"full_attention": LONG, "sliding_attention": PLAIN}}),
    "dynamic": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 64}),
    "dynamic by kind of layer": (
        "laguna",
        EXPERTS
        | {"rope_parameters": {"full_attention": DYNAMIC, "sliding_attention": PLAIN}, "max_position_embeddings": 64},
    ),
}


@pytest.mark.parametrize(("kind", "options"), ROPES.values(), ids=ROPES.keys())
def test_positions_that_depend_on_the_micro_batch_are_refused(ragged_window, kind, options):
    """By the longest conversation; shorter ones have the same positions however a window is cut."""
    model = tiny(kind, {**GROUPED, **options})
    ids = ragged_window[5].input_ids.repeat(2)[None]  # 128
    with torch.no_grad():
        first = [model(ids[:, :length], use_cache=False).logits[0, 9] for length in (63, 64, 65)]
    torch.testing.assert_close(first[0], first[1])
    assert not torch.allclose(first[1], first[2], rtol=1e-3)
    layout = choose_layout(model, token_loss, Config(micro_batch_tokens=150), 0, FP32, longest=64)
    assert layout.packed
    own = sum(loss_alone(model, example) for example in ragged_window)
    losses = [token_loss(model, batch).item() for batch in layout.micro_batches(ragged_window)]
    assert sum(losses) == pytest.approx(own, rel=1e-6)
    with pytest.raises(UserError, match=r"beyond 64 tokens its \w+ positions .*; use --max-length 64"):
        choose_layout(tiny(kind, {**GROUPED, **options}), token_loss, Config(), 0, FP32, longest=65)


POSITIONS = {  # the kind, its configuration and the length of its table of positions; None: it has none
    "learned": ("gpt2", {"n_positions": 64}, 64),
    "learned, none for the first two": ("opt", {"max_position_embeddings": 64, "ffn_dim": 64}, 64),
    "learned, after that of the padding": ("roberta", {"max_position_embeddings": 64, "is_decoder": True}, 63),
    "computed": ("ctrl", {"n_positions": 64, "dff": 64}, 64),
    "rotary, computed beforehand": ("gptj", {"n_positions": 64, "rotary_dim": 8}, 64),
    "biases computed beforehand": ("mpt", {"max_seq_len": 64, "d_model": 32, "n_heads": 4, "n_layers": 2}, 64),
    "rotary": ("llama", {"max_position_embeddings": 64}, None),
    "biases": ("bloom", {}, None),
    "none": ("mamba", {"state_size": 8}, None),
}


@pytest.mark.parametrize(("kind", "options", "limit"), POSITIONS.values(), ids=POSITIONS.keys())
def test_a_conversation_longer_than_a_table_of_positions_is_refused(kind, options, limit):
    """Before any forward pass: on a GPU, a wrong index ends every use of the device."""
    model = tiny(kind, {**SMALL, **options})
    ids = torch.full((1, 65), 7)
    with torch.no_grad():
        model(ids[:, :limit], use_cache=False)
        with pytest.raises((IndexError, RuntimeError)) if limit else contextlib.nullcontext():
            model(ids[:, : limit + 1 if limit else 65], use_cache=False)
    choose_layout(model, token_loss, Config(), 0, FP32, longest=limit or 65)
    if limit:
        with pytest.raises(UserError, match=rf"--model mine: it has {limit} positions; use --max-length {limit}"):
            choose_layout(model, token_loss, Config(model="mine"), 0, FP32, longest=limit + 1)


# --- what is not as in most models


CHANGES = {  # of logits; each is nearly the identity where they are small, or where 16 bits round
    "cap": lambda logits: 30 * torch.tanh(logits / 30),
    "clamp": lambda logits: logits.clamp(-30, 30),
    "scale": lambda logits: logits * 1.001,
    "shift by token": lambda logits: logits + 0.01 * torch.arange(259),
    "normalize": lambda logits: logits - logits.mean(-1, keepdim=True),
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_whatever_changes_logits_after_the_head_is_noticed(change, precision):
    model = tiny_llama(259)
    for weights in model.parameters():
        weights.data *= 0.1 if weights.ndim > 1 else 1.0

    def change_logits(_module, _inputs, output):
        output.logits = change(output.logits)
        return output

    model.register_forward_hook(change_logits)
    layout = choose_layout(model, token_loss, Config(), 0, Precision(precision, CPU))
    assert layout.own_logits
    assert layout.why == "its output head is more than a matrix product"


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_structure_is_compared_in_fp32(precision):
    """A mask of the model's own, which packing leaves out, is 0 when training begins: only its gradient is missing."""
    options = GROUPED | {"keep_window_size": 2048, "hidden_act": "silu"}
    model = tiny("doge", options)
    model.set_attn_implementation("eager")  # with torch's attention, it is not causal in transformers 5.17
    layout = choose_layout(model, token_loss, Config(), 0, Precision(precision, CPU))
    assert not layout.packed
    assert layout.why.startswith("a gradient of all weights is off by ")


def test_a_weight_that_a_layout_leaves_out_is_noticed_however_small_its_gradient():
    """With logits this small, that of Doge's mask is 0.07 % of the gradient of all weights."""
    model = test_causal_models.build("doge", 0.02)
    layout = choose_layout(model, token_loss, Config(), 0, FP32)
    assert not layout.packed
    assert re.fullmatch(r"weight model\.layers\.\d\.self_attn\.\S+ gets no gradient", layout.why)


def test_positions_that_go_on_in_the_next_conversation_are_detected():
    model = tiny("gpt2", SMALL)
    model.base_model.register_forward_pre_hook(
        lambda _, args, options: (args, options | {"position_ids": None}), with_kwargs=True
    )
    layout = choose_layout(model, token_loss, Config(), 0, FP32)
    assert not layout.packed
    assert "off by" in layout.why


@pytest.mark.parametrize("name", ["auto", "padded"])
def test_whatever_a_faster_layout_raises_becomes_another_layout(monkeypatch, name):
    jetmoe = tiny("jetmoe", GROUPED | {"kv_channels": 8, "num_local_experts": 4})
    assert choose_layout(jetmoe, token_loss, Config(layout=name), 0, FP32).describe().startswith("padded: ")

    model = tiny_llama(259)
    model.base_model.register_forward_hook(lambda *call: call[-1].to_tuple())
    monkeypatch.setattr(type(model), "forward", lambda self, input_ids, **_: logits_of_tuple(self, input_ids))
    layout = choose_layout(model, token_loss, Config(layout=name), 0, FP32)
    assert layout.own_logits
    assert layout.why or name == "padded"


def logits_of_tuple(model, ids):
    """The forward pass of a model whose base returns a tuple."""
    return SimpleNamespace(logits=model.lm_head(model.base_model(input_ids=ids, use_cache=False)[0]))


def test_an_error_in_a_kernel_becomes_another_layout_and_too_little_memory_does_not(monkeypatch):
    def mistaken(*_, **__):
        raise error

    fake_cuda.varlen_attention(monkeypatch)
    monkeypatch.setattr(attention, "varlen_attn", mistaken)
    error = TypeError("got an unexpected keyword argument 'enable_gqa'\nmore")
    layout = choose_layout(tiny_llama(259, hidden_size=64), token_loss, Config(), 0, Precision("bf16", CPU))
    assert not layout.packed
    assert layout.why == "TypeError: got an unexpected keyword argument 'enable_gqa'"
    error = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        choose_layout(tiny_llama(259, hidden_size=64), token_loss, Config(), 0, Precision("bf16", CPU))


def test_a_model_whose_own_forward_pass_fails_is_refused_in_one_line(monkeypatch, tiny_model):
    def forward(*_, **__):
        raise AssertionError("use\nmodel.train()")

    monkeypatch.setattr(type(tiny_model), "forward", forward)
    with pytest.raises(UserError, match=r"^--model mine: its own forward pass fails, AssertionError: use$"):
        choose_layout(tiny_model, token_loss, Config(model="mine"), 0, FP32)


def test_a_model_whose_loss_depends_on_padding_is_refused(tiny_model):
    def add_length(_module, _inputs, output):
        output.logits = output.logits * (1 + output.logits.shape[1] / 100)
        return output

    tiny_model.register_forward_hook(add_length)
    with pytest.raises(UserError, match=r"^--model mine: padding changes its loss, a loss is off by .*; it cannot be"):
        choose_layout(tiny_model, token_loss, Config(model="mine"), 0, FP32)


def test_rows_lose_their_mask_unless_the_model_needs_it(tiny_model):
    assert not choose_layout(tiny_model, token_loss, Config(layout="padded"), 0, FP32).masked

    def read_others_without_a_mask(_module, args, options):
        mistaken = "attention_mask" not in options and len(options["input_ids"]) > 1
        return args, options | ({"input_ids": (options["input_ids"] + 1) % 259} if mistaken else {})

    tiny_model.base_model.register_forward_pre_hook(read_others_without_a_mask, with_kwargs=True)
    layout = choose_layout(tiny_model, token_loss, Config(layout="padded"), 0, FP32)
    assert layout.masked
    assert "attention_mask" in layout.collate(random_examples((3, 5), 259)).inputs


def test_rows_that_have_no_mask_cost_no_more_than_a_read(tiny_model):
    """Of whether their positions go up by one, by transformers."""
    reads = {}
    for masked in (True, False):
        batch = replace(layout_of(packed=False), masked=masked).collate(random_examples((3, 5), 259))
        with fake_cuda.Reads() as found:
            token_loss(tiny_model, batch).backward()
        reads[masked] = len(found.found)
    assert reads[False] <= 1 <= reads[True]


MIXTURES = {
    "mixtral": GROUPED | {"num_local_experts": 4},
    "qwen3_moe": GROUPED | EXPERTS,
    "olmoe": GROUPED | {"num_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": GROUPED | {"num_local_experts": 4, "logits_scaling": 4.0},  # own logits
}


@pytest.mark.parametrize("name", ["auto", "padded"])
@pytest.mark.parametrize("kind", MIXTURES)
def test_a_routers_loss_is_off(ragged_window, tiny_tokenizer, tmp_path, kind, name):
    """Without it, and without an error, in every layout; `best/` keeps the setting of the base model."""
    model = tiny(kind, {**MIXTURES[kind], "output_router_logits": True})
    own = sum(loss_alone(model, example) for example in ragged_window)
    layout = choose_layout(model, token_loss, Config(layout=name, micro_batch_tokens=60), 0, FP32)
    losses = [token_loss(model, batch).item() for batch in layout.micro_batches(ragged_window)]
    assert sum(losses) == pytest.approx(own, rel=1e-5)
    assert evaluate(model, ragged_window, layout, FP32).loss_sum == pytest.approx(own, rel=1e-5)
    assert generate_answers(model, tiny_tokenizer, ["Who are you?"], max_new_tokens=3)
    assert list_extra_losses(model) == ["output_router_logits"]
    save_model(model, tiny_tokenizer, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["output_router_logits"] is True


def test_an_evaluation_computes_no_gradient(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("an evaluation needs no gradient")

    monkeypatch.setattr(torch.Tensor, "backward", fail)
    monkeypatch.setattr(LinearCrossEntropy, "forward", fail)
    model, grad_enabled = tiny_llama(259), []
    model.base_model.register_forward_hook(lambda *_: grad_enabled.append(torch.is_grad_enabled()))
    assert choose_layout(model, loss_and_correct, Config(), 0, FP32, training=False).packed
    assert not any(grad_enabled)
    monkeypatch.setitem(AttentionInterface._global_mapping, attention.PACKED, see_each_other)
    assert not choose_layout(tiny_llama(259), loss_and_correct, Config(), 0, FP32, training=False).packed


# --- compiling


def compile_with(monkeypatch, backend):
    """Have another backend compile, as inductor takes its time."""
    compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **how: compile(module, **how, backend=backend))
    torch.compiler.reset()


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_layers_are_exact_and_not_recompiled_for_every_length(monkeypatch, ragged_window, backend):
    compile_with(monkeypatch, backend)
    model = tiny_llama(259).eval()
    expected = measure(model, token_loss, layout_of(packed=False), FP32, False, training=True)
    layout = choose_layout(model, token_loss, Config(compile=True), 0, FP32)
    compiled = measure(model, token_loss, layout, FP32, False, training=True)
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
    if hasattr(PreTrainedModel, "activation_checkpointing_enable"):  # what came before it leaves more to compile
        with pytest.raises(UserError, match=r"--compile and --gradient-checkpointing: .* or use --layout padded"):
            choose_layout(tiny_llama(259), token_loss, both, 0, FP32)
    compile_with(monkeypatch, "eager")
    choose_layout(tiny_llama(259), token_loss, replace(both, layout="padded"), 0, FP32)
    monkeypatch.undo()
    compile_with(monkeypatch, no_compiler)
    with pytest.raises(UserError, match=r"--compile: .*; leave it out"):
        choose_layout(tiny_llama(259), token_loss, Config(compile=True), 0, FP32)


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
