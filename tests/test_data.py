"""Which update sees which conversations, and how they are shown."""

import difflib
import itertools
import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch.utils.data import RandomSampler

from config import UserError
from conversations.masking import encode
from conversations.preview import preview
from data import epoch_order, split_rows, window_at, window_indices, windows_per_epoch
from tests.conftest import read_file

EXAMPLES = Path(__file__).parent.parent / "examples"
HELLO = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there. How are you!!!"}]


def say(*texts):
    """A conversation of alternating user and assistant messages."""
    return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)]


def quickstart_conversations():
    return read_file(EXAMPLES / "quickstart.jsonl")


# --- previews


def test_the_preview_marks_what_is_supervised(real_tokenizer):
    example = encode([say("Hi", "Ho")], real_tokenizer)[0]
    header = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert preview(example, real_tokenizer, color=False) == header + "[[Ho<|im_end|>\n]]"
    assert preview(example, real_tokenizer, color=True) == f"\033[31m{header}\033[0m\033[32mHo<|im_end|>\n\033[0m"


def test_the_preview_shows_control_characters_instead_of_obeying_them(real_tokenizer):
    example = encode([say("a\x1b[31m\r", "b\tc\x00\x7f\x9b")], real_tokenizer)[0]
    shown = preview(example, real_tokenizer, color=False)
    assert "user\na\\x1b[31m\\r<|im_end|>" in shown
    assert "[[b\tc\\x00\\x7f\\x9b<|im_end|>" in shown


# --- splits, epochs, windows, micro-batches


def test_the_splits_equal_the_reference_experiments():
    first = Dataset.from_dict({"row": range(2000)}).train_test_split(test_size=0.1, seed=42)
    second = first["test"].train_test_split(test_size=0.5, seed=42)
    train, evaluation, test = (rows.tolist() for rows in split_rows(2000, 0.05, 0.05, 42))
    assert (train, evaluation, test) == (first["train"]["row"][:], second["train"]["row"][:], second["test"]["row"][:])
    assert [len(train), len(evaluation), len(test)] == [1800, 100, 100]
    assert windows_per_epoch(1800, 32) == 57


@pytest.mark.parametrize(("n", "evaluation", "test"), [(1, 0.05, 0.05), (2, 0.5, 0.4), (3, 0.9, 0.05)])
def test_a_split_without_rows_is_refused(n, evaluation, test):
    with pytest.raises(UserError, match=f"of {n} conversations leave 0 to train on"):
        split_rows(n, evaluation, test, 42)


def test_every_epoch_sees_every_example_once_in_the_order_of_trainer():
    examples = list(range(10))
    for epoch in (0, 1):
        steps = range(epoch * 3, epoch * 3 + 3)
        windows = [window_at(step, examples, batch_size=4, seed=42) for step in steps]
        assert [len(window) for window in windows] == [4, 4, 2]
        generator = torch.Generator().manual_seed(42 + epoch)
        assert list(itertools.chain(*windows)) == list(RandomSampler(examples, generator=generator))


def test_an_epoch_is_shuffled_once(monkeypatch):
    shuffled = []
    permute = torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda n, **options: shuffled.append(n) or permute(n, **options))
    epoch_order.cache_clear()
    windows = [window_indices(step, 10, 3, seed=5) for step in range(8)]  # two epochs of four
    assert shuffled == [10, 10]
    for epoch in (0, 1):
        order = permute(10, generator=torch.Generator().manual_seed(5 + epoch)).tolist()
        assert list(itertools.chain(*windows[4 * epoch : 4 * epoch + 4])) == order


# --- the quickstart's conversations


def test_the_quickstart_conversations_are_what_the_readme_says():
    conversations = quickstart_conversations()
    assert len(conversations) >= 240
    assert sum(len(chat) > 3 for chat in conversations) >= len(conversations) / 3
    assert sum(chat[0]["role"] == "system" for chat in conversations) >= 20
    answers = [m["content"] for chat in conversations for m in chat if m["role"] == "assistant"]
    for text in answers:
        assert len([part for part in re.split(r"(?<=[.!?])[\"')]*\s+", text) if part]) <= 3, text


def test_no_two_quickstart_prompts_are_alike_and_none_is_held_out():
    conversations = quickstart_conversations()
    plain = [
        re.sub(r"[^a-z0-9 ]", "", next(m["content"] for m in c if m["role"] == "user").lower()) for c in conversations
    ]
    held_out = (EXAMPLES / "heldout_prompts.txt").read_text().splitlines()
    assert len(held_out) == 20
    seen = [re.sub(r"[^a-z0-9 ]", "", prompt.lower()) for prompt in held_out]
    for prompt in plain:
        for other in seen:
            matcher = difflib.SequenceMatcher(None, prompt, other, autojunk=False)
            if matcher.real_quick_ratio() > 0.75 and matcher.quick_ratio() > 0.75:
                assert matcher.ratio() <= 0.75 or {prompt, other} == {"who are you", "who made you"}, (prompt, other)
        seen.append(prompt)
