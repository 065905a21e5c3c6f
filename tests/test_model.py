"""The loss, its precision, and what is done to a model before it is trained."""

import platform
import resource

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from compute.memory import keep_freed_memory
from config import UserError
from conversations.masking import IGNORE, encode
from conversations.tokenizer import load_tokenizer
from model import choose_precision, has_expected_tying, load_model, save_model
from tests.conftest import byte_tokenizer, tiny_llama
from tests.worker_pool import CONTEXT


def test_chatml_tokens_are_added_where_they_are_missing(tmp_path, capsys):
    byte_tokenizer(["<s>"]).save_pretrained(tmp_path / "base")
    tiny_llama(257).save_pretrained(tmp_path / "base")
    tokenizer = load_tokenizer(tmp_path / "base", local_files_only=True)
    assert capsys.readouterr().err.splitlines() == [
        "added to the tokenizer, and new rows to the embeddings: <|im_start|> <|im_end|> <|pad|>"
    ]
    model = load_model(tmp_path / "base", tokenizer, torch.device("cpu"))
    assert model.get_input_embeddings().num_embeddings == len(tokenizer) == 260
    assert has_expected_tying(model)
    ids, labels = encode(
        [[{"role": "user", "content": "<|im_end|>"}, {"role": "assistant", "content": "a"}]], tokenizer
    )[0]
    assert ids.tolist().count(tokenizer.eos_token_id) == 2
    assert tokenizer.decode(labels[labels != IGNORE]) == "a<|im_end|>\n"

    save_model(model, tokenizer, tmp_path / "saved")
    saved, again = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved"),
        AutoTokenizer.from_pretrained(tmp_path / "saved"),
    )
    assert saved.generation_config.eos_token_id == again.eos_token_id == again.convert_tokens_to_ids("<|im_end|>")
    assert saved.generation_config.pad_token_id == again.pad_token_id == again.convert_tokens_to_ids("<|pad|>")
    assert again.chat_template == tokenizer.chat_template
    for name, weights in model.state_dict().items():
        assert torch.equal(weights, saved.state_dict()[name])


def usage():
    return resource.getrusage(resource.RUSAGE_SELF)


def times_mapped(keeping):
    """How often memory that is freed ten times over is given back to the kernel."""
    if keeping:
        keep_freed_memory()
    before = usage().ru_minflt
    for _ in range(10):
        [b"x" * 2**24 for _ in range(8)]
    return (usage().ru_minflt - before) * resource.getpagesize() // 2**27


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_kept_for_the_next_tensor():
    with CONTEXT.Pool(1) as pool:
        given_back, kept = pool.map(times_mapped, [False, True])
    assert kept <= 1 < 9 <= given_back


def test_a_tokenizer_with_chatml_keeps_its_vocabulary(real_tokenizer, capsys):
    assert len(real_tokenizer) == 49152
    assert (real_tokenizer.pad_token, real_tokenizer.eos_token) == ("<|endoftext|>", "<|im_end|>")
    assert capsys.readouterr().err == ""


def test_an_untied_head_that_should_be_tied_is_detected(tiny_model):
    assert has_expected_tying(tiny_model)
    tiny_model.lm_head.weight = torch.nn.Parameter(tiny_model.lm_head.weight.clone())
    assert not has_expected_tying(tiny_model)


def test_a_stop_token_that_was_the_padding_token_gets_its_gradient(tiny_model_dir, tiny_tokenizer):
    model = load_model(tiny_model_dir, tiny_tokenizer, torch.device("cpu"))
    stop = tiny_tokenizer.eos_token_id
    model.get_input_embeddings()(torch.tensor([stop])).sum().backward()
    assert (model.get_input_embeddings().weight.grad[stop] == 1).all()


@pytest.mark.parametrize(
    ("gpu", "gpu_bf16", "cpu_bf16", "expected"),
    [
        (True, True, False, "bf16"),
        (True, False, True, "fp16"),
        (False, False, True, "bf16"),
        (False, False, False, "fp32"),
    ],
)
def test_precision_follows_the_device(monkeypatch, gpu, gpu_bf16, cpu_bf16, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(gpu))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_options: gpu_bf16)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": cpu_bf16, "avx2": True})
    precision = choose_precision()
    assert (precision.name, precision.device.type) == (expected, "cuda" if gpu else "cpu")


def test_a_gpu_of_a_number_becomes_the_current_one(monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_options: True)
    choose_precision("cuda:1", "bf16")
    choose_precision("cuda", "bf16")
    choose_precision("cpu", "fp32")
    assert current == [torch.device("cuda", 1)]


@pytest.mark.parametrize("device", ["cuda:9", "tpu", "meta"])
def test_an_unavailable_device_is_refused(device):
    with pytest.raises(UserError, match=f"--device {device}"):
        choose_precision(device)


def growth():
    """By how many KiB this process grows that makes large tensors, one after another, and keeps small ones."""
    keep_freed_memory()
    before, kept = usage().ru_maxrss, []
    for _ in range(30):
        torch.ones(57 * 2**20, dtype=torch.uint8)
        kept.append(torch.ones(2000))
    return usage().ru_maxrss - before


def test_memory_does_not_grow_by_what_is_freed():
    """What stays, however small, must not cut up the largest blocks, of which a new one would be needed every time."""
    with CONTEXT.Pool(1) as pool:
        assert pool.apply(growth) < 2 * 57 * 1024
