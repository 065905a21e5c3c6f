"""A model that ranks share is the one that a single process loads: weights, buffers and settings."""

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AfmoeConfig, AfmoeForCausalLM

from compute.adapters import trained_parameters
from compute.distributed import full_tensor, is_rank0
from conversations.tokenizer import load_tokenizer
from model import Precision, load_model, load_on_ranks
from tests.conftest import tiny_llama, tiny_moe

FP32 = Precision("fp32", torch.device("cpu"))
TOKENS = 259
ROPE = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def tiny_afmoe(vocabulary):
    """A mixture whose routers have biases that no gradient moves."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 16, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_experts": 4}
    model = AfmoeForCausalLM(AfmoeConfig(vocab_size=vocabulary, num_experts_per_tok=2, num_dense_layers=1, **shape))
    bias = model.model.layers[1].mlp.expert_bias
    assert not bias.requires_grad
    bias.normal_()
    return model


MODELS = {
    "tied": tiny_llama,
    "untied": partial(tiny_llama, tie_word_embeddings=False),
    "scaled rope": partial(tiny_llama, rope_parameters=ROPE | {"original_max_position_embeddings": 64}),
    "new rows": lambda _: tiny_llama(TOKENS - 2),
    "new rows, untied": lambda _: tiny_llama(TOKENS - 2, tie_word_embeddings=False),
    "mixture of experts": tiny_moe,
    "a router's bias that its architecture freezes": tiny_afmoe,
}


def differences(path):
    """The names of weights, buffers and settings in which the sharded model differs from the one of `load_model`."""
    tokenizer = load_tokenizer(path, True)
    ours, theirs = load_on_ranks(path, tokenizer, FP32, 2, True), load_model(path, tokenizer, "cpu", True)
    found = {name: full_tensor(each.detach()) for name, each in ours.named_parameters()} | dict(ours.named_buffers())
    expected = dict(theirs.named_parameters()) | dict(theirs.named_buffers())
    assert found.keys() == expected.keys()
    assert {name for name, _ in theirs.named_parameters()} == trained_parameters(ours).keys()
    different = {name for name, each in found.items() if not torch.equal(each, expected[name])}
    for settings in ("config", "generation_config"):
        one, other = getattr(ours, settings).to_dict(), getattr(theirs, settings).to_dict()
        different |= {f"{settings}.{name}" for name in one.keys() | other.keys() if one.get(name) != other.get(name)}
    assert theirs.generation_config.temperature == 0.25
    assert theirs.kept_files == {"preprocessor_config.json": b"{}"}
    if is_rank0() and ours.kept_files != theirs.kept_files:  # which it saves
        different.add("kept_files")
    return different


@pytest.mark.parametrize("name", MODELS)
def test_a_sharded_model_is_the_one_that_one_process_loads(worker_pools, tiny_model_dir, tmp_path, name):
    path = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
    (path / "model.safetensors").unlink()
    MODELS[name](TOKENS).save_pretrained(path, max_shard_size="20KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    (path / "generation_config.json").write_text('{"temperature": 0.25, "top_k": 7, "do_sample": true}')
    (path / "preprocessor_config.json").write_bytes(b"{}")
    assert worker_pools(2).call(differences, str(path)) == [set(), set()]
