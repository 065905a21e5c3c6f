"""A model that does not fit is refused by name: missing weights, another architecture, a foreign tokenizer, damage."""

import io
import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertLMHeadModel, T5Config, T5ForConditionalGeneration

from compute.self_check import choose_layout
from config import Config, UserError
from conversations.tokenizer import NO_LIMIT, load_tokenizer
from model import Precision, load_model, token_loss
from storage.hub import find_model
from tests.conftest import CONTROL, byte_tokenizer, tiny_llama

CPU = torch.device("cpu")


@pytest.fixture
def model_dir(tiny_model_dir, tmp_path):
    """A copy of the tiny model, to be corrupted."""
    return shutil.copytree(tiny_model_dir, tmp_path / "model")


def load(path):
    return load_model(str(path), load_tokenizer(str(path), True), CPU, True)


def change_weights(directory, change):
    path = directory / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def refusal(path):
    with pytest.raises(UserError) as raised:
        load(path)
    assert "\n" not in str(raised.value)
    return str(raised.value).removeprefix(f"--model {path}: ")


NORM = "model.norm.weight"


def test_weights_under_a_prefix_are_refused_with_the_repair(model_dir):
    change_weights(model_dir, lambda weights: {f"_orig_mod.{name}": part for name, part in weights.items()})
    said = refusal(model_dir)
    assert said.startswith("21 of the model's weights are not in its files, such as ")
    assert said.endswith("; remove the prefix '_orig_mod.' from their names")


@pytest.mark.parametrize(("missing", "count"), [("model.layers.1.", 9), ("lm_head.weight", 1)])
def test_a_missing_layer_and_a_missing_head_are_refused(model_dir, missing, count):
    tiny_llama(259, tie_word_embeddings=False).save_pretrained(model_dir)
    change_weights(
        model_dir, lambda weights: {name: part for name, part in weights.items() if not name.startswith(missing)}
    )
    assert refusal(model_dir).startswith(f"{count} of the model's weights are not in its files, such as {missing}")


def test_a_shape_that_does_not_fit_is_named(model_dir):
    change_weights(model_dir, lambda weights: {**weights, NORM: torch.ones(5)})
    assert refusal(model_dir) == f"its weights {NORM} have shape (5,), the model (32,)"


def test_weights_that_are_not_used_are_a_warning(model_dir, capsys):
    change_weights(model_dir, lambda weights: {**weights, "score.weight": torch.ones(5)})
    load(model_dir)
    assert "has 1 weights that the model does not use: score.weight" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "is a git-lfs pointer"),
        (None, "its weights are corrupt ("),
    ],
    ids=["pointer", "truncated"],
)
def test_damaged_weights_are_one_line(model_dir, content, said):
    path = model_dir / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    assert said in refusal(model_dir)


def test_a_pointer_in_place_of_the_tokenizer_is_one_line(model_dir):
    (model_dir / "tokenizer.json").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert "tokenizer.json is a git-lfs pointer, not the file itself; run: git lfs pull" in refusal(model_dir)


def test_a_tokenizer_far_larger_than_the_embeddings_is_refused(model_dir):
    byte_tokenizer([*CONTROL, *(f"<word {number}>" for number in range(2000))]).save_pretrained(model_dir)
    assert "more tokens than the model has embeddings; they do not belong together" in refusal(model_dir)


@pytest.mark.parametrize(
    ("name", "value"), [("hidden_size", "wide"), ("num_attention_heads", None), ("model_type", "x")]
)
def test_a_configuration_of_wrong_types_is_one_line(model_dir, name, value):
    path = model_dir / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    assert refusal(model_dir)


def test_no_code_of_a_model_directory_is_run(model_dir, monkeypatch, tmp_path):
    path = model_dir / "config.json"
    settings = {**json.loads(path.read_text()), "model_type": "mine", "auto_map": {"AutoConfig": "mine.MineConfig"}}
    path.write_text(json.dumps(settings))
    (model_dir / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass MineConfig: pass\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    assert "no usable tokenizer and configuration" in refusal(model_dir)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_model_that_is_not_causal_is_refused(tiny_tokenizer, precision):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model = BertLMHeadModel(BertConfig(vocab_size=len(tiny_tokenizer), **shape))
    with pytest.raises(UserError, match="--model bert: not a causal language model"):
        choose_layout(model, token_loss, Config(model="bert"), 0, Precision(precision, CPU))


def test_a_model_with_an_encoder_is_refused(model_dir):
    shape = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4}
    T5ForConditionalGeneration(T5Config(vocab_size=259, **shape)).save_pretrained(model_dir)
    assert "T5Config'> for this kind of AutoModel: AutoModelForCausalLM" in refusal(model_dir)


def test_a_directory_without_a_tokenizer_is_refused(model_dir):
    for path in model_dir.glob("*token*"):
        path.unlink()
    assert refusal(model_dir).startswith("no usable tokenizer and configuration (ValueError: Couldn't")


def test_a_file_and_an_adapter_are_refused(tmp_path):
    path = tmp_path / "adapter_config.json"
    path.touch()
    for name, said in (
        (path, "there is no such directory"),
        (tmp_path, f"these are adapters; merge them first: python eval.py {tmp_path} --export DIR --dtype fp32"),
    ):
        with pytest.raises(UserError) as raised:
            find_model(str(name))
        assert str(raised.value) == f"--model {name}: {said}"
    (tmp_path / "config.json").touch()
    for may_be_adapter in (True, False):
        with pytest.raises(UserError, match="holds a model and adapters, which libraries add to it; remove one of"):
            find_model(str(tmp_path), may_be_adapter)


def test_a_model_without_a_limit_of_positions_has_none(model_dir):
    path = model_dir / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_position_embeddings": -1}))
    assert load_tokenizer(str(model_dir), True).model_max_length >= NO_LIMIT
