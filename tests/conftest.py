"""A tiny random model with a byte-level tokenizer for the mechanics, and the quickstart's real one for the rest."""

import contextlib
import functools
import gc
import importlib.metadata
import json
import os
from unittest import mock

import hypothesis
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from compute.layout import Layout
from config import QUICKSTART_MODEL, UserError
from conversations.formats import parse_columns, read_conversations
from conversations.masking import Example, encode_as_lists
from conversations.sources import Source
from conversations.tokenizer import load_tokenizer
from evaluation import comparison, facts
from evaluation.generation import GREEDY, generate_answers
from storage import hub
from storage.quickstart import quickstart_model
from tests.worker_pool import WorkerPool

hub.quiet_libraries()
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # each of the processes that share the tests has a core


def shorten_runs():
    """Leave out of a small run what takes most of its time and is tested elsewhere.

    Answers end after 4 tokens of 50, the intervals in its records have 200 draws of 2,000, and the version of a package
    is read once.
    """
    generate_answers.__defaults__ = (GREEDY, 4, "")
    facts.difference = difference_in_few_draws
    importlib.metadata.version = functools.cache(importlib.metadata.version)


def difference_in_few_draws(*losses_and_tokens):
    with mock.patch.object(comparison, "RESAMPLES", 200):
        return comparison.difference(*losses_and_tokens)


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Collect tests, and no garbage: what is imported stays, and each look at all of it takes half a second."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(*gc.get_threshold()[:2], 100)  # 10 by default; such a look takes as long as some tests
        gc.enable()


shorten_runs()
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="session", autouse=True)
def cache_of_their_own(tmp_path_factory):
    """A cache for the tests and the processes they start, with nothing in it but the quickstart's weights, if any."""
    cache = tmp_path_factory.mktemp("cache")
    (cache / "plain-sft").mkdir()
    with contextlib.suppress(UserError):  # they are not installed; what needs them is skipped
        weights = quickstart_model()
        (cache / "plain-sft" / weights.name).symlink_to(weights)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        yield


def read_file(path, **options):
    """All conversations of one file, as a list: `read_conversations` without locations and sources."""
    return [messages for _, _, messages in read_conversations([Source(str(path))], **options)]


def encode_each(conversations, tokenizer, supervise="all", max_length=None):
    """Conversations to their `Example`s, for each a list."""
    encoded = encode_as_lists(conversations, tokenizer, supervise, max_length)
    return [[Example(torch.tensor(ids), torch.tensor(labels)) for ids, labels in examples] for examples in encoded]


def to_flags(settings):
    """Settings as a command line names them."""
    return [str(part) for name, value in settings.items() for part in (f"--{name}", value)]


def byte_tokenizer(control):
    """A tokenizer of one token a byte, after the control tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(control + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(control)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=control[0], eos_token=control[0])


def tiny_llama(vocabulary, **changes):
    """A tied Llama of two layers with grouped queries, like SmolLM2 but tiny; always the same random weights."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": True}
    # Its padding token is <|im_end|>, as it is in the quickstart's weights.
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **({"pad_token_id": 2} | shape | changes)))


def tiny_moe(vocabulary):
    """A mixture of four experts, which transformers joins into one tensor and files keep apart."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 16, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_experts": 4}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=vocabulary, num_experts_per_tok=2, **shape))


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory):
    """A directory with the tiny model and its tokenizer, as the Hub would hold it."""
    directory = tmp_path_factory.mktemp("tiny")
    tokenizer = byte_tokenizer(CONTROL)
    tokenizer.save_pretrained(directory)
    tiny_llama(len(tokenizer)).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_model_dir):
    return load_tokenizer(str(tiny_model_dir), local_files_only=True)


@pytest.fixture
def tiny_model(tiny_tokenizer):
    return tiny_llama(len(tiny_tokenizer))


@pytest.fixture(scope="session")
def real_tokenizer():
    """SmolLM2's, out of the quickstart's weights."""
    try:
        return load_tokenizer(*hub.find_model(QUICKSTART_MODEL))
    except UserError as why:
        pytest.skip(str(why))


@pytest.fixture(scope="session")
def worker_pools():
    """A function: a group of processes of some size, which is started when it is first needed."""
    started = {}
    yield lambda size: started.get(size) or started.setdefault(size, WorkerPool(size))
    for pool in started.values():
        pool.close()


@pytest.fixture
def ragged_window():
    """Eight examples of very different lengths; one supervised from its first token, one not at all."""
    generator = torch.Generator().manual_seed(1)
    window = []
    for number, length in enumerate((3, 40, 7, 19, 2, 64, 11, 28)):
        ids = torch.randint(3, 259, (length,), generator=generator)
        labels = ids.clone()
        labels[: number * length // 9] = -100
        window.append(Example(ids, torch.full_like(ids, -100) if number == 3 else labels))
    return window


def layout_of(packed, tokens=10_000, own_logits=False):
    """A `Layout` for the tiny model."""
    return Layout(packed, tokens, pad_id=0, own_logits=own_logits)


def one_batch(examples, packed=False):
    """Examples as a single micro-batch."""
    (batch,) = layout_of(packed).micro_batches(examples)
    return batch


def write_rows(path, rows):
    """Write a file of JSON lines; returns its path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def a_chat(text, answer="Yes."):
    """A row with a conversation of a question and an answer."""
    return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]}


def write_chats(directory):
    """Write a file of 40 small conversations of different lengths; returns its path."""
    chats = [a_chat(f"Count to {number}", " ".join(map(str, range(number % 7 + 1)))) for number in range(40)]
    return write_rows(directory / "chats.jsonl", chats)


@pytest.fixture
def write(tmp_path):
    """A function that writes a file of rows; returns its path, a text."""
    return lambda name, rows: str(write_rows(tmp_path / name, rows))


@pytest.fixture
def read(write):
    """A function that reads rows from a file of JSON lines, with columns renamed as the command line has it."""
    return lambda *rows, columns=(), **options: read_file(
        write("a.jsonl", rows), columns=parse_columns(columns), **options
    )


@pytest.fixture
def chats(tmp_path):
    """A file of 40 small conversations of different lengths."""
    return write_chats(tmp_path)
