"""Near-copies between training and held-out conversations: all are found, nothing else is, and they can be left out."""

import json
import re

import numpy as np
import pyarrow
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import data as data_command
from config import UserError, resolve
from conversations import corpus, leaks
from conversations.corpus import Corpus, make_columns
from conversations.leaks import COMMON, GRAM, find_leaks
from conversations.masking import IGNORE, Example
from data import describe_leaks, load_data
from tests.conftest import write_rows

# --- what a leak is, conversation by conversation


def grams_of(chat, kind):
    """The grams of a conversation, a list of (ids, answer?) runs, and their places among its tokens of the kind."""
    place = 0
    for ids, supervised in used_runs(chat):
        if supervised == (kind == "answers"):
            yield from ((place + i, tuple(ids[i : i + leaks.GRAM])) for i in range(len(ids) - leaks.GRAM + 1))
            place += len(ids)


def leaks_by_loop(train, held_out):
    """The leaks as a set of (number of the held-out conversation, of the training one, kind, tokens)."""
    found = set()
    for kind in ("answers", "prompts"):
        known = [{gram for _, gram in grams_of(chat, kind)} for chat in train]
        distinct = {json.dumps(chat): grams for chat, grams in zip(train, known, strict=True)}.values()
        for number, chat in enumerate(held_out):
            grams = dict(grams_of(chat, kind))
            often = {g for g in grams.values() if sum(g in of_chat for of_chat in distinct) > leaks.COMMON}
            boilerplate = cover(place for place, gram in grams.items() if gram in often)
            total = sum(len(ids) for ids, supervised in used_runs(chat) if supervised == (kind == "answers"))
            for other, of_chat in enumerate(known):
                shared = cover(place for place, gram in grams.items() if gram in of_chat - often) - boilerplate
                if len(shared) >= leaks.GRAM and 2 * len(shared) > total - len(boilerplate):
                    found.add((number, other, kind, len(shared)))
    return found


def used_runs(chat):
    """The runs of a conversation without those of examples in which nothing is supervised after the first token."""
    for runs in runs_of_examples(chat):
        if any(supervised for ids, supervised in runs for _ in ids[0 if ids is not runs[0][0] else 1 :]):
            yield from runs


def runs_of_examples(chat):
    """Conversations of four runs are two examples."""
    return [chat[:2], chat[2:]] if len(chat) == 4 else [chat]


def cover(places):
    return {place + i for place in places for i in range(leaks.GRAM)}


# --- the same, by arrays


def as_corpus(chats, name="a.jsonl"):
    """Conversations, lists of (ids, answer?) runs, as a `Corpus`."""
    encoded = [
        (f"{name}:{number}", 0, [as_example(runs) for runs in runs_of_examples(chat)])
        for number, chat in enumerate(chats)
    ]
    batches = [
        pyarrow.RecordBatch.from_pydict(make_columns(encoded[i : i + 3], [1], 10_000), corpus.SCHEMA)
        for i in range(0, len(encoded), 3)
    ]
    return Corpus(pyarrow.Table.from_batches(batches), [], 10_000)


def as_example(runs):
    ids = torch.tensor([id for ids, _ in runs for id in ids])
    supervised = torch.tensor([is_answer for ids, is_answer in runs for _ in ids])
    return Example(ids, ids.where(supervised, IGNORE))


def find(train, held_out):
    """The leaks as `leaks_by_loop` has them."""
    found = find_leaks(*((as_corpus(chats), np.arange(len(chats))) for chats in (train, held_out)))
    for leak in found:
        assert leak.train == f"a.jsonl:{leak.number}"
    return {(int(leak.held_out.partition(":")[2]), leak.number, leak.kind, leak.tokens) for leak in found}


def of_first_copies(found, train):
    """Leaks without those of the second of two same conversations of training."""
    return {leak for leak in found if leak[1] == train.index(train[leak[1]])}


@st.composite
def chats(draw):
    runs = draw(st.lists(st.lists(st.integers(2, 4), min_size=1, max_size=8), min_size=1, max_size=5))
    first = draw(st.integers(0, 1))
    return [(run, bool(number % 2)) for number, run in enumerate(runs, first)]


@settings(max_examples=300)
@given(
    st.lists(chats(), min_size=1, max_size=8).map(lambda train: [*train, train[0]]),
    st.lists(chats(), min_size=1, max_size=8),
    st.sampled_from([1, 5, 40, 10_000]),
)
def test_the_leaks_are_those_that_a_loop_finds(train, held_out, chunk):
    """With grams of 3 of few different tokens, and chunks of any size."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"GRAM": 3, "COMMON": 2, "CHUNK": chunk}.items():
            patch.setattr(leaks, name, value)
        assert find(train, held_out) == of_first_copies(leaks_by_loop(train, held_out), train)


# --- planted texts, at the sizes that count


def noise(random, count):
    """Ids that are hardly twice the same 13 in a row."""
    return random.integers(1000, 50_000, count).tolist()


def plant(random, shared, length, kind):
    """A chat whose text of a kind has so many ids, the shared ones somewhere among them."""
    before = int(random.integers(0, length - len(shared) + 1))
    text = noise(random, before) + shared + noise(random, length - len(shared) - before)
    other = noise(random, 50)
    return [(text, False), (other, True)] if kind == "prompts" else [(other, False), (text, True)]


@pytest.mark.parametrize("kind", ["answers", "prompts"])
def test_an_overlap_is_a_leak_from_13_tokens_and_half_of_the_held_out_text_on(kind):
    random = np.random.default_rng(0)
    train, held_out, expected = [], [], set()
    for count in (12, 13, 14, 30, 31):
        for length in (count, 2 * count - 1, 2 * count, 5 * count):
            shared = noise(random, count)
            if count >= GRAM and 2 * count > length:
                expected.add((len(held_out), len(train), kind, count))
            train.append(plant(random, shared, 100, kind))
            held_out.append(plant(random, shared, length, kind))
    assert len(expected) == 8
    assert find(train, held_out) == expected
    order = random.permutation(len(train))
    shuffled = find([train[i] for i in order], held_out)
    assert {(held, int(order[number]), *rest) for held, number, *rest in shuffled} == expected


def test_a_prompt_is_not_the_leak_of_an_answer():
    text = noise(np.random.default_rng(0), 40)
    assert find([[(text, False), ([7] * 20, True)]], [[([8] * 20, False), (text, True)]]) == set()


@pytest.mark.parametrize("others", [COMMON - 1, COMMON])
def test_what_more_than_ten_conversations_share_is_boilerplate(others):
    """A long system prompt, before questions one of which is a near-copy; and an answer that is given often."""
    random = np.random.default_rng(0)
    system, refusal, question, answer = (noise(random, count) for count in (80, 30, 20, 40))
    train = [[(system + noise(random, 20), False), (refusal + noise(random, 2), True)] for _ in range(others)]
    train.append([(system + question, False), (refusal + noise(random, 2), True)])
    near = [(system + question[:-3] + noise(random, 3), False), (noise(random, 40), True)]
    unlike = [(system + noise(random, 20), False), (refusal + noise(random, 3), True)]
    copied = [(noise(random, 40), False), ([*answer[:-1], 5], True)]
    train.append([(noise(random, 40), False), (answer, True)])
    held_out = [near, unlike, copied]
    found = {leak[:3] for leak in find(train, held_out)}
    assert {(0, others, "prompts"), (2, others + 1, "answers")} <= found
    if others == COMMON:
        assert len(found) == 2  # else the refusal and the system prompt count
        first = find_leaks(*((as_corpus(chats), np.arange(len(chats))) for chats in (train, held_out)))[0]
        assert first.shared[-1] == question[0]  # the first gram that is not boilerplate


def test_copies_in_training_are_one_conversation():
    random = np.random.default_rng(0)
    text = noise(random, 40)
    chat = [(noise(random, 40), False), (text, True)]
    assert find([chat] * (COMMON + 5), [[(noise(random, 40), False), (text[:-1], True)]]) == {(0, 0, "answers", 39)}


# --- in a dataset and in the commands


def chat(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.fixture
def leaky(tmp_path):
    """A file of 60 conversations in pairs: the answers of a pair are the same but for an ending."""
    random = np.random.default_rng(0)
    rows = []
    for number in range(30):
        answer = "".join(random.choice(list("abcdefgh "), 60))
        rows += [chat(f"{number} {ending}" * 3, answer + ending) for ending in ("one", "two")]
    write_rows(tmp_path / "leaky.jsonl", rows)
    return {"dataset": [str(tmp_path / "leaky.jsonl")], "eval_fraction": 0.1, "test_fraction": 0.1}


def test_excluding_leaks_leaves_none_and_the_held_out_splits_as_they_are(leaky, tiny_tokenizer):
    before = load_data(resolve(leaky, "none"), tiny_tokenizer)
    after = load_data(resolve({**leaky, "exclude_leaks": True}, "none"), tiny_tokenizer)
    assert before.leaks
    assert re.match(
        r"[1-9]\d* of 12 held-out conversations share most of their answers with one in training, 0 most",
        describe_leaks(before),
    )
    assert after.leaks == []
    assert describe_leaks(after).startswith(
        "0 of 12 held-out conversations share most of their answers with one in training, 0"
    )
    assert (after.eval.digest, after.test.digest) == (before.eval.digest, before.test.digest)
    assert after.fingerprint != before.fingerprint
    left_out = {leak.train for leak in before.leaks}
    locations = [
        [split.location(i) for i in range(len(split))] for split in (before.train.examples, after.train.examples)
    ]
    assert locations[1] == [location for location in locations[0] if location not in left_out]
    assert f"{len(left_out)} left out of training because held-out conversations share their text" in after.notes


def test_what_is_boilerplate_no_more_once_others_are_left_out_is_left_out_too(tmp_path, tiny_tokenizer):
    """Of 11 answers with one beginning, one is a leak by its ending; then the beginning is that of ten alone."""
    random = np.random.default_rng(0)
    start, end, *others = ("".join(random.choice(list("abcdefgh "), 60)) for _ in range(40))
    answers = [start + end] + [start + other[:10] for other in others[:10]]
    write_rows(
        tmp_path / "train.jsonl",
        [chat(f"{number} {others[11 + number][:20]}", text) for number, text in enumerate(answers)],
    )
    write_rows(tmp_path / "eval.jsonl", [chat(others[30], start + end[:-1]), chat(others[31], start + others[32][:10])])
    config = {
        "dataset": [str(tmp_path / "train.jsonl")],
        "eval_dataset": [str(tmp_path / "eval.jsonl")],
        "test_fraction": 0,
    }
    found = load_data(resolve(config, "none"), tiny_tokenizer).leaks
    assert [leak.number for leak in found] == [0]
    with pytest.raises(UserError, match="all of its conversations are leaks or duplicates"):
        load_data(resolve({**config, "exclude_leaks": True}, "none"), tiny_tokenizer)


def test_leaks_of_an_eval_dataset_are_found_in_its_own_file(leaky, tmp_path, tiny_tokenizer):
    copied = json.loads((tmp_path / "leaky.jsonl").read_text().splitlines()[4])
    copied["messages"][1]["content"] += " indeed"
    write_rows(tmp_path / "eval.jsonl", [chat("Hi", "Ho"), copied])
    config = {**leaky, "eval_dataset": [str(tmp_path / "eval.jsonl")], "test_fraction": 0}
    found = load_data(resolve(config, "none"), tiny_tokenizer).leaks
    places = {(leak.held_out, leak.train, leak.kind) for leak in found}
    line = f"{tmp_path}/leaky.jsonl:5"
    assert {(f"{tmp_path}/eval.jsonl:2", line, "answers"), (f"{tmp_path}/eval.jsonl:2", line, "prompts")} <= places


def test_nothing_held_out_has_no_line_and_excludes_nothing(leaky, tiny_tokenizer):
    nothing = {**leaky, "eval_fraction": 0, "test_fraction": 0}
    assert describe_leaks(load_data(resolve(nothing, "none"), tiny_tokenizer)) == ""
    with pytest.raises(UserError, match="--exclude-leaks has no effect where nothing is held out"):
        resolve({**nothing, "exclude_leaks": True}, "none")


def test_the_command_lists_them(leaky, tiny_model_dir, tmp_path, capsys):
    flags = ["--model", str(tiny_model_dir), "--dataset", *leaky["dataset"], "--eval-fraction", "0.1"]
    assert data_command.main([*flags, "--leaks", "--json"]) == 0
    output = capsys.readouterr()
    listed = [json.loads(line) for line in output.out.splitlines()]
    rows = (tmp_path / "leaky.jsonl").read_text().splitlines()
    for leak in listed:
        held_out, train = (json.loads(rows[int(leak[name].rpartition(":")[2]) - 1]) for name in ("held_out", "train"))
        assert leak["kind"] == "answers"
        assert all(leak["shared"] in row["messages"][1]["content"] for row in (held_out, train))
    assert "most of their answers" in output.err
    assert data_command.main([*flags, "--leaks"]) == 0
    assert capsys.readouterr().out.count(" tokens of its answers with ") == len(listed) > 0
    assert data_command.main([*flags, "--leaks", "--exclude-leaks"]) == 0
    assert capsys.readouterr().out == ""
    assert data_command.main(flags) == 0
    assert "most of their answers" in capsys.readouterr().out
    with pytest.raises(UserError, match="--html and --leaks: use one of them"):
        data_command.main([*flags, "--leaks", "--html", "page.html"])
