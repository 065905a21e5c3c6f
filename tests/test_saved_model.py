"""`best/` is what was trained, for whoever loads it: what a saved model keeps of the one that training started from."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4Config,
    Llama4ForConditionalGeneration,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen3MoeConfig,
)

import train as train_command
from compute.self_check import use_layout
from config import UserError
from conversations.tokenizer import load_tokenizer
from model import load_model, save_model
from running.checkpoint import gather_state
from storage.durable import verify
from tests.conftest import CONTROL, byte_tokenizer, layout_of, tiny_llama

END, PAD, TURN = 2, 0, 5  # <|im_end|> and <|endoftext|>, and a further control token of the base model
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "vocab_size": 262, "max_position_embeddings": 512, "pad_token_id": None}


@pytest.fixture
def base(tmp_path):
    """A directory of the tiny model, whose tokenizer has three more control tokens than <|im_start|> and its kin."""
    tokenizer = byte_tokenizer([*CONTROL, "<s>", "</s>", "<|eot|>"])
    tokenizer.bos_token = "<s>"
    tokenizer.save_pretrained(tmp_path / "base")
    tiny_llama(len(tokenizer)).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def save_again(path, directory):
    """Load a model as a run does, and save it as a run does; returns the directory."""
    tokenizer = load_tokenizer(str(path), True)
    directory.mkdir()
    save_model(load_model(str(path), tokenizer, torch.device("cpu"), True), tokenizer, directory)
    return directory


def generation_settings(directory):
    """The settings of generation that transformers finds in a directory, without those that say nothing."""
    settings = AutoModelForCausalLM.from_pretrained(directory).generation_config.to_diff_dict()
    return {
        name: value for name, value in settings.items() if value and name not in ("transformers_version", "use_cache")
    }


# --- settings of generation

OURS = {"eos_token_id": END, "bos_token_id": 3}  # the padding token is 0
CHOSEN = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.05}
SETTINGS = {
    "as most models have them": (CHOSEN | {"max_new_tokens": 2048}, CHOSEN | {"max_new_tokens": 2048}, ""),
    "none": ({}, {}, ""),
    "another stop token": ({"eos_token_id": TURN}, {"eos_token_id": [END, TURN]}, ""),
    "stop tokens, the padding token and ours among them": (
        {"eos_token_id": [4, PAD, END, TURN], "pad_token_id": 4, "bos_token_id": 4},
        {"eos_token_id": [END, 4, TURN]},
        "",
    ),
    "a stop token that is not an id": ({"eos_token_id": 1.5}, {"eos_token_id": END}, ""),
    "a stop token that is a part of a text": ({"eos_token_id": [100, TURN]}, {"eos_token_id": [END, TURN]}, ""),
    "temperature without sampling, as in Llama 2": (
        {"temperature": 0.9, "top_p": 0.6, "max_length": 4096},
        {"temperature": 0.9, "top_p": 0.6, "max_length": 4096, "do_sample": True},
        "",
    ),
    "temperature and greedy": (
        {"do_sample": False, "temperature": 0.9, "repetition_penalty": 1.2},
        {"repetition_penalty": 1.2},
        "transformers refuses to save temperature 0.9",
    ),
    "settings of beams without beams": (
        {"early_stopping": True, "length_penalty": 2.0, "top_k": 5, "do_sample": True},
        {"top_k": 5, "do_sample": True},
        "transformers refuses to save early_stopping True, length_penalty 2.0",
    ),
    "suppressed stop tokens": (
        {"suppress_tokens": [END, 7], "begin_suppress_tokens": [TURN, 8], "eos_token_id": TURN},
        {"suppress_tokens": [7], "begin_suppress_tokens": [8], "eos_token_id": [END, TURN]},
        "",
    ),
    "what transformers does not know": ({"chat_format": "raw", "stop_strings": ["x"]}, None, ""),
}


@pytest.mark.parametrize("legacy", [False, True], ids=["generation_config.json", "config.json"])
@pytest.mark.parametrize(("settings", "expected", "warning"), SETTINGS.values(), ids=SETTINGS)
def test_settings_of_generation_are_kept_unless_they_contradict(
    base, tmp_path, capsys, settings, expected, warning, legacy
):
    if legacy:  # where models had them before they had a file of their own
        if "chat_format" in settings or isinstance(settings.get("eos_token_id"), float):
            pytest.skip("a configuration's own keys stay there, and its ids are checked")
        (base / "generation_config.json").unlink()
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps(config | settings))
    else:
        (base / "generation_config.json").write_text(json.dumps(settings))
    once = save_again(base, tmp_path / "once")
    assert warning in capsys.readouterr().err
    twice = save_again(once, tmp_path / "twice")
    assert capsys.readouterr().err == ""
    kept = OURS | (settings if expected is None else expected)
    assert generation_settings(once) == generation_settings(twice) == kept
    assert json.loads((twice / "generation_config.json").read_text())["pad_token_id"] == PAD
    AutoModelForCausalLM.from_pretrained(once).save_pretrained(tmp_path / "by somebody else")


# --- files of the base model

FILES = {
    "preprocessor_config.json": b'{"size": 224}',
    "processor_config.json": b"{}",
    "video_preprocessor_config.json": b"{}\n",
    "tokenizer.model": b"\x0a\x0e",
    "LICENSE": b"Do as you like.",
    "Notice.txt": b"By us.",
}
STALE = {"model.gguf", "special_tokens_map.json", ".gitattributes", "chat_template.json", "vocab.json"}


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "several"])
def test_files_of_the_base_model_are_kept_replaced_or_named(base, chats, tmp_path, capsys, sharded):
    for name, content in FILES.items():
        (base / name).write_bytes(content)
    for name in ("README.md", "model.gguf", ".gitattributes"):
        (base / name).write_text("of the base model")
    (base / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')
    (base / "chat_template.json").write_text('{"chat_template": "stale"}')
    (base / "modeling_odd.py").write_text("import os")
    (base / "onnx").mkdir()
    if sharded:
        (base / "model.safetensors").unlink()
        tiny_llama(262).save_pretrained(base, max_shard_size="20KB")
    run, flags = tmp_path / "run", "--batch-size 20 --eval-every 2 --save-every 3 --dtype fp32 --lr 1e-2".split()
    paths = ["--model", str(base), "--dataset", str(chats), "--output-dir", str(run)]
    assert train_command.main([*paths, *flags, "--max-steps", "4", "--seed", "3"]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "not kept" in line]
    assert lines == ["not kept with what is saved: modeling_odd.py, onnx/"]
    shutil.rmtree(base)
    before = generation_settings(run / "best")
    resumed = ["--resume", str(run), "--allow-changes", "--max-steps", "6", "--keep", "9"]
    assert train_command.main(resumed) == 0
    assert "not kept" not in capsys.readouterr().err
    for checkpoint in (run / "checkpoints").iterdir():
        for name, content in FILES.items():
            assert (checkpoint / "model" / name).read_bytes() == content
            assert f"model/{name}" in verify(checkpoint)["files"]
        names = {path.name for path in (checkpoint / "model").iterdir()}
        assert not names & {*STALE, "modeling_odd.py", "onnx"}
        assert generation_settings(checkpoint / "model") == before
    assert "of the base model" not in (run / "best" / "README.md").read_text()


def test_a_sentencepiece_model_comes_with_the_tokens_that_it_lacks(base, tmp_path):
    """Converters take the control tokens from beside it; transformers reads all of them from tokenizer.json."""
    (base / "tokenizer.model").write_bytes(b"\x0a\x0e")
    saved = save_again(base, tmp_path / "saved")
    assert json.loads((saved / "added_tokens.json").read_text()) == {}  # the tiny one has them in its vocabulary
    tokenizer = load_tokenizer(str(base), True)
    tokenizer.add_tokens(["<new>"])
    save_model(load_model(str(base), tokenizer, torch.device("cpu"), True), tokenizer, tmp_path / "more")
    assert json.loads((tmp_path / "more" / "added_tokens.json").read_text()) == {"<new>": 262}
    again = load_tokenizer(str(tmp_path / "more"), True)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.encode("a<|im_end|><new>") == tokenizer.encode("a<|im_end|><new>")


# --- weights and configurations


def save_base(directory, config):
    """Save a random model of a configuration, and a tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config) if not isinstance(config, torch.nn.Module) else config
    model.save_pretrained(directory)
    byte_tokenizer([*CONTROL, "<s>", "</s>", "<|eot|>"]).save_pretrained(directory)


def gemma3():
    """A Gemma 3 that sees images; transformers loads all of it as a causal language model."""
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = {"image_token_index": 258, "boi_token_index": 256, "eoi_token_index": 257}
    vision |= {"image_size": 28, "patch_size": 14}
    text = SHAPE | {"head_dim": 8, "sliding_window": 64}
    return Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **tokens)
    )


def llama4():
    """A Llama 4, of which transformers loads the text model."""
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14, "vision_output_dim": 16}
    vision |= {"projector_input_dim": 16, "projector_output_dim": 16}
    text = SHAPE | {"num_local_experts": 2, "intermediate_size_mlp": 64, "head_dim": 8}
    return Llama4ForConditionalGeneration(Llama4Config(text_config=text, vision_config=vision))


def differences(one, other, at=""):
    """The keys, dotted, in which two JSON objects differ."""
    for key in one.keys() | other.keys():
        ours, theirs = one.get(key), other.get(key)
        if isinstance(ours, dict) and isinstance(theirs, dict):
            yield from differences(ours, theirs, f"{at}{key}.")
        elif ours != theirs:
            yield f"{at}{key}"


ARCHITECTURES = {
    "llama": lambda: tiny_llama(262, pad_token_id=None),
    "untied, another use of tokens": lambda: tiny_llama(
        262, tie_word_embeddings=False, bos_token_id=7, use_cache=False
    ),
    "scaled positions": lambda: tiny_llama(
        262, rope_parameters={"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}, attention_dropout=0.25
    ),
    "stored in 16 bits": lambda: tiny_llama(262, pad_token_id=None).bfloat16(),
    "gpt2": lambda: GPT2Config(vocab_size=262, n_embd=32, n_layer=2, n_head=4, n_positions=512),
    "pythia": lambda: GPTNeoXConfig(**SHAPE),
    "qwen2": lambda: Qwen2Config(**SHAPE),
    "qwen3 mixture": lambda: Qwen3MoeConfig(
        **SHAPE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8, output_router_logits=True
    ),
    "gemma3, with images": gemma3,
}


@pytest.mark.parametrize("make", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_a_configuration_changes_by_the_control_tokens_alone(make, tmp_path, capsys):
    save_base(tmp_path / "base", make())
    tokenizer = load_tokenizer(str(tmp_path / "base"), True)
    model = load_model(str(tmp_path / "base"), tokenizer, torch.device("cpu"), True)
    if model._supports_attention_backend:
        use_layout(model, layout_of(packed=True))
    save_model(model, tokenizer, tmp_path / "saved")
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("base", "saved"))
    changed = {name.rpartition(".")[2] for name in differences(before, after)}
    assert changed <= {"eos_token_id", "pad_token_id", "dtype"}
    assert (after["eos_token_id"], after["pad_token_id"], after["dtype"]) == (END, PAD, "float32")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "saved"))
    assert before.keys() == after.keys()
    assert all(torch.equal(weights.float(), after[name]) for name, weights in before.items())
    assert "warning" not in capsys.readouterr().err


def with_more_weights(config, names):
    """Make a base of which the model takes no notice of some weights."""

    def make(directory):
        save_base(directory, config)
        weights = load_file(directory / "model.safetensors")
        extra = {name: torch.ones(2, 2) for name in names}
        save_file(weights | extra, directory / "model.safetensors", metadata={"format": "pt"})

    return make


DEEPSEEK = {"num_hidden_layers": 2, "q_lora_rank": None, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
DEEPSEEK |= {"qk_nope_head_dim": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
LOST = {
    "images, by name": (lambda path: save_base(path, llama4()), ["multi_modal_projector.", "vision_model."], 26),
    "layers that predict further tokens, of which transformers is silent": (
        with_more_weights(DeepseekV3Config(**SHAPE | DEEPSEEK), [f"model.layers.61.{name}.weight" for name in "abc"]),
        ["model.layers.61."],
        3,
    ),
    "another part": (with_more_weights(tiny_llama(262), ["score.weight", "mtp.fc.weight"]), ["mtp.", "score."], 2),
}


@pytest.mark.parametrize(("make", "parts", "count"), LOST.values(), ids=LOST)
def test_weights_that_a_saved_model_will_lack_are_named(make, parts, count, tmp_path, capsys):
    make(tmp_path / "base")
    save_again(tmp_path / "base", tmp_path / "saved")
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: "))
    assert f"has {count} weights that the model does not use: " in line
    assert line.endswith("; what is saved will be without them")
    assert all(part in line for part in parts)


def test_masks_and_frequencies_in_old_files_are_not_called_lost(tmp_path, capsys):
    names = ["transformer.h.0.attn.bias", "transformer.h.0.attn.masked_bias"]
    with_more_weights(GPT2Config(vocab_size=262, n_embd=32, n_layer=2, n_head=4, n_positions=512), names)(
        tmp_path / "1"
    )
    names = ["gpt_neox.layers.0.attention.bias", "gpt_neox.layers.0.attention.rotary_emb.inv_freq"]
    with_more_weights(GPTNeoXConfig(**SHAPE), names)(tmp_path / "2")
    for name in ("1", "2"):
        save_again(tmp_path / name, tmp_path / f"saved {name}")
    assert "warning" not in capsys.readouterr().err


def test_a_quantized_base_is_refused_in_a_line_or_saved_as_what_it_was_trained_in(base, tmp_path):
    config = json.loads((base / "config.json").read_text())
    quantized = {"quant_method": "gptq", "bits": 4}  # whose library is not installed
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": quantized}))
    with pytest.raises(UserError, match="--model "):
        save_again(base, tmp_path / "refused")
    quantized = {"quant_method": "fp8", "weight_block_size": [128, 128]}  # which transformers converts
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": quantized}))
    saved = json.loads((save_again(base, tmp_path / "saved") / "config.json").read_text())
    assert not saved.keys() & {"quantization_config"}


def quantize_in_fp8(directory):
    """Replace a model's files by those of its matrices in 8 bits, 1/10 of their size; returns what they stand for."""
    stored, expected = load_file(directory / "model.safetensors"), {}
    weights = {name: each.bfloat16() for name, each in stored.items()}
    for name in list(weights):
        if "proj" in name:
            eighths = (10 * weights[name]).to(torch.float8_e4m3fn)
            weights |= {name: eighths, f"{name}_scale_inv": torch.tensor([[0.1]])}
            expected[name] = 0.1 * eighths.float()
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    change_config(directory, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    return expected


def quantize_in_mxfp4(directory):
    """Make a directory that of a gpt-oss, whose experts' matrices are blocks of 4 bits; returns what they stand for."""
    torch.manual_seed(0)
    shape = SHAPE | {"num_hidden_layers": 1, "head_dim": 8, "num_local_experts": 2, "intermediate_size": 32}
    GptOssForCausalLM(GptOssConfig(**shape)).save_pretrained(directory)
    weights, expected = load_file(directory / "model.safetensors"), {}
    for name in [name for name in weights if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = weights.pop(name).shape
        weights[f"{name}_blocks"] = torch.full((experts, outputs, inputs // 32, 16), 0x22, dtype=torch.uint8)
        weights[f"{name}_scales"] = torch.full((experts, outputs, inputs // 32), 122, dtype=torch.uint8)
        expected[name] = torch.full((experts, inputs, outputs), 2.0**-5)  # 4 bits of 1.0, and 2^(122 - 127)
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    change_config(directory, quantization_config={"quant_method": "mxfp4"})
    return expected


def change_config(directory, **settings):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | settings))


@pytest.mark.parametrize("quantize", [quantize_in_fp8, quantize_in_mxfp4])
def test_a_base_that_transformers_dequantizes_is_trained_and_saved_in_fp32(base, tmp_path, quantize):
    expected = quantize(base)
    model = load_model(str(base), load_tokenizer(str(base), True), torch.device("cpu"), True)
    assert {weights.dtype for weights in model.parameters()} == {torch.float32}
    saved, report = AutoModelForCausalLM.from_pretrained(save_again(base, tmp_path / "saved"), output_loading_info=True)
    assert not any(report.values())
    for name, weights in saved.named_parameters():
        assert torch.equal(weights, model.get_parameter(name))
        torch.testing.assert_close(weights, expected.get(name, weights), rtol=0.01, atol=0)  # its code is in bf16


def test_weights_that_stay_quantized_are_refused(base, tmp_path, monkeypatch):
    monkeypatch.setattr(LlamaForCausalLM, "is_quantized", True, raising=False)  # as on a GPU with the right kernels
    with pytest.raises(UserError, match=r"its weights are quantized; use a copy of it in 16 or 32 bits"):
        save_again(base, tmp_path / "refused")


def test_frozen_weights_are_saved_with_the_others():
    model = tiny_llama(262)
    model.model.layers[0].requires_grad_(False)
    model.model.embed_tokens.requires_grad_(False)
    weights, _ = gather_state(model, train_command.make_optimizer(model, 0.1))
    assert weights.keys() == dict(model.named_parameters()).keys()


def test_a_base_on_the_hub_keeps_its_small_files(base, monkeypatch, tmp_path):
    """One request names the files; none of the weights is fetched again."""
    (base / "preprocessor_config.json").write_bytes(b"{}")
    asked = []

    def snapshot(name, revision, allow_patterns, local_files_only):
        asked.append((name, revision, local_files_only))
        assert not any(Path("model.safetensors").match(pattern) for pattern in allow_patterns)
        return str(base)

    monkeypatch.setattr("storage.hub.snapshot_download", snapshot)
    tokenizer = load_tokenizer(str(base), True)
    real = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        AutoModelForCausalLM,
        "from_pretrained",
        lambda **options: real(**options | {"pretrained_model_name_or_path": base}),
    )
    model = load_model("acme/tiny", tokenizer, torch.device("cpu"), False)
    save_model(model, tokenizer, tmp_path / "saved")
    assert asked == [("acme/tiny", None, False)]
    assert (tmp_path / "saved" / "preprocessor_config.json").read_bytes() == b"{}"
