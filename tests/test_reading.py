"""Models that processes share are read by one of them, tensor by tensor: the same weights, in little memory."""

import contextlib
import shutil
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compute import reading
from compute.sharding import whole
from config import UserError
from conversations.tokenizer import load_tokenizer
from model import Precision, load_model, load_sharded
from tests.company import Company
from tests.conftest import tiny_llama, tiny_moe
from tests.faults.inject import give_memory_back

CPU = torch.device("cpu")
TOKENS = 259
ROPE = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.fixture(scope="module")
def both():
    company = Company(2)
    yield company
    company.close()


@pytest.fixture(scope="module")
def alone():
    """One process that shares with itself: where it fails, no other waits for it."""
    company = Company(1)
    yield company
    company.close()


MODELS = {
    "tied": tiny_llama,
    "untied": partial(tiny_llama, tie_word_embeddings=False),
    "scaled rope": partial(tiny_llama, rope_parameters=ROPE | {"original_max_position_embeddings": 64}),
    "new rows": lambda _: tiny_llama(TOKENS - 2),
    "new rows, untied": lambda _: tiny_llama(TOKENS - 2, tie_word_embeddings=False),
    "fused experts": tiny_moe,
}


def in_directory(model, tokenizer_from, directory, **how):
    """A directory with a model and the tiny tokenizer."""
    shutil.copytree(tokenizer_from, directory)
    (directory / "model.safetensors").unlink()
    model.save_pretrained(directory, **how)
    return str(directory)


def what_differs(path):
    """Between the model whose weights are divided and the whole one: names of weights, buffers and settings; and which
    weights the first process handed on while it read."""
    tokenizer, handed_on = load_tokenizer(path, True), set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "handing_on", remembering(reading.handing_on, handed_on))
        ours = load_sharded(path, tokenizer, Precision("fp32", CPU), 2, True)
    theirs = load_model(path, tokenizer, CPU, True)
    mine = {name: whole(each.detach()) for name, each in ours.named_parameters()} | dict(ours.named_buffers())
    expected = dict(theirs.named_parameters()) | dict(theirs.named_buffers())
    assert mine.keys() == expected.keys()
    different = {name for name, each in mine.items() if not torch.equal(each, expected[name])}
    for settings in ("config", "generation_config"):
        one, other = getattr(ours, settings).to_dict(), getattr(theirs, settings).to_dict()
        different |= {f"{settings}.{name}" for name in one.keys() | other.keys() if one.get(name) != other.get(name)}
    return different, len(handed_on), len(dict(ours.named_parameters()))


def remembering(handing_on, names):
    """`handing_on` that leaves the names it yields in a set."""

    @contextlib.contextmanager
    def remember(model):
        with handing_on(model) as sent:
            yield sent
        names.update(sent)

    return remember


@pytest.mark.parametrize("name", MODELS)
def test_what_processes_share_is_what_one_would_load(both, tiny_model_dir, tmp_path, name):
    path = in_directory(MODELS[name](TOKENS), tiny_model_dir, tmp_path / "model", max_shard_size="20KB")
    assert len(list(Path(path).glob("*.safetensors"))) > 2
    (different, handed_on, of), (also_different, *_) = both.call(what_differs, path)
    assert different == also_different == set()
    assert handed_on == of - (2 if name == "new rows, untied" else 0 if "untied" in name or "experts" in name else 1)


NORM = "model.norm.weight"
SPOILED = {
    "not finite": lambda weights: weights | {NORM: weights[NORM] * torch.nan},
    "missing": lambda weights: {name: each for name, each in weights.items() if ".layers.1." not in name},
    "under a prefix": lambda weights: {f"_orig_mod.{name}": each for name, each in weights.items()},
    "another shape": lambda weights: weights | {NORM: torch.ones(5)},
}
HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"


def refusal(path):
    """What is said when the model is loaded divided."""
    with pytest.raises(UserError) as divided:
        load_sharded(path, load_tokenizer(path, True), Precision("fp32", CPU), 1, True)
    return str(divided.value)


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
def test_what_does_not_fit_is_refused_as_one_process_would(alone, tiny_model_dir, tmp_path, spoil):
    path = shutil.copytree(tiny_model_dir, tmp_path / "model") / "model.safetensors"
    save_file(spoil(load_file(path)), path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"--model {path.parent}: ") as whole:
        load_model(str(path.parent), load_tokenizer(str(path.parent), True), CPU, True)
    assert alone.call(refusal, str(path.parent)) == [str(whole.value)]


def test_a_head_that_only_the_configuration_says_is_tied_is_refused(alone, tiny_model_dir, tmp_path):
    path = shutil.copytree(tiny_model_dir, tmp_path / "model") / "model.safetensors"
    weights = load_file(path)
    save_file(weights | {HEAD: weights[EMBEDDINGS] + 1}, path, metadata={"format": "pt"})
    (said,) = alone.call(refusal, str(path.parent))
    assert said.endswith("correct tie_word_embeddings there, or use --shard 1")


def own_memory():
    """The bytes of this process that are no mapped file's."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in status if line.startswith("RssAnon:"))


@contextlib.contextmanager
def most_memory():
    """A context that yields a list; in the end it has the most bytes that this process had more than at the start."""
    before, most, done = own_memory(), [0], threading.Event()

    def watch():
        while not done.wait(0.001):
            most[0] = max(most[0], own_memory() - before)

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield most
    finally:
        done.set()
        watching.join()


def memory_of_loading(path):
    """The most that this process needs to load its part, and the bytes of that."""
    give_memory_back()
    tokenizer = load_tokenizer(path, True)
    with most_memory() as most:
        model = load_sharded(path, tokenizer, Precision("fp32", CPU), 2, True)
    return most[0], sum(weights.to_local().nbytes for weights in model.parameters())


@pytest.mark.skipif(sys.platform != "linux", reason="it is Linux that tells memory of files from the rest")
def test_nobody_holds_more_than_its_part_and_a_few_tensors(both, tiny_model_dir, tmp_path):
    model = tiny_llama(TOKENS, hidden_size=768, intermediate_size=3072, num_hidden_layers=8)
    largest = max(weights.nbytes for weights in model.parameters())
    path = in_directory(model.bfloat16(), tiny_model_dir, tmp_path / "model")
    del model
    for most, part in both.call(memory_of_loading, path):
        assert part > 140e6
        assert most < part + 4 * largest, (most, part)
