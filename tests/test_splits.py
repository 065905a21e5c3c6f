"""Splits, quantities and copies of conversations are arithmetic on arrays, equal to plain loops over rows."""

import hashlib
import itertools
import json
import math
import sys

import numpy as np
import pyarrow
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from config import resolve
from conversations import corpus
from conversations.corpus import BATCH, Corpus, make_columns
from conversations.masking import IGNORE, Example
from conversations.sources import Source
from data import choose_rows, keep_duplicates_together, load_data, make_split, repeat_by_weight, split_rows
from storage.cache import cache_directory

# --- what the functions mean, row by row


def chosen_by_loop(source_of, sources, seed):
    generator, chosen = torch.Generator().manual_seed(seed), []
    for number, source in enumerate(sources):
        rows = [row for row, of in enumerate(source_of) if of == number]
        wanted = source.count or math.ceil(len(rows) * min(1.0, source.weight))
        chosen += [rows[i] for i in sorted(torch.randperm(len(rows), generator=generator)[:wanted].tolist())]
    return chosen


def repeated_by_loop(rows, source_of, sources, seed):
    generator, repeated = torch.Generator().manual_seed(seed), []
    for number, source in enumerate(sources):
        of_source = [row for row in rows if source_of[row] == number]
        times, fraction = divmod(max(1.0, source.weight), 1)
        order = torch.randperm(len(of_source), generator=generator).tolist()
        repeated += of_source * int(times) + [of_source[i] for i in order[: round(fraction * len(of_source))]]
    return repeated


def together_by_loop(splits, digests):
    split_of = {}
    for row, number in sorted((row, number) for number, rows in enumerate(splits) for row in rows):
        split_of.setdefault(digests[row], number)
    together = []
    for number, rows in enumerate(splits):
        own_first = itertools.chain(rows, *splits[:number], *splits[number + 1 :])
        together.append([row for row in own_first if split_of[digests[row]] == number])
    return together


def split_by_datasets(n, n_eval, n_test, seed):
    def hold_out(rows, count):
        if count in (0, len(rows)):
            return (rows, []) if count == 0 else ([], rows)
        parts = Dataset.from_dict({"row": rows}).train_test_split(test_size=count, seed=seed)
        return parts["train"]["row"][:], parts["test"]["row"][:]

    train, held_out = hold_out(list(range(n)), n_eval + n_test)
    return [train, *hold_out(held_out, n_test)]


def row_by_loop(example, stops, max_length):
    ids, labels = example.input_ids[:max_length].int(), example.labels[:max_length].int()
    return {
        "input_ids": ids.tolist(),
        "labels": labels.tolist(),
        "tokens": len(example.input_ids),
        "supervised_before": int((example.labels[1:] != IGNORE).sum()),
        "supervised": int((labels[1:] != IGNORE).sum()),
        "has_stop": bool(torch.isin(labels, torch.tensor(stops)).any()),
        "digest": hashlib.sha256(torch.cat([ids, labels]).numpy().tobytes()).hexdigest()[:32],
    }


# --- the same, by arrays

amounts = st.one_of(
    st.sampled_from([0.1, 0.5, 1.0, 1.5, 2.0, 3.25]).map(lambda weight: Source("a", weight=weight)),
    st.just(Source("a", count=1)),
)
some_sources = st.lists(amounts, min_size=1, max_size=4)


@settings(max_examples=50, deadline=None)
@given(st.data(), some_sources, st.integers(0, 200), st.integers(0, 2**31))
def test_rows_are_chosen_and_repeated_as_by_a_loop(draws, sources, n, seed):
    numbers = st.integers(0, len(sources) - 1)
    drawn = draws.draw(st.lists(numbers, min_size=n, max_size=n))
    source_of = np.sort(np.array([*range(len(sources)), *drawn], dtype=np.int32))
    chosen = choose_rows(source_of, sources, seed)
    assert chosen.tolist() == chosen_by_loop(source_of.tolist(), sources, seed)
    shuffled = np.random.default_rng(seed).permutation(chosen)
    expected = repeated_by_loop(shuffled.tolist(), source_of.tolist(), sources, seed)
    assert repeat_by_weight(shuffled, source_of, sources, seed).tolist() == expected


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3)), max_size=60), st.integers(0, 2**31))
def test_duplicates_are_kept_together_as_by_a_loop(rows, seed):
    """Of rows in some groups, each in a split or, with number 3, in none."""
    groups = [group for group, _ in rows]
    order = np.random.default_rng(seed).permutation(len(rows)).tolist()
    splits = [[row for row in order if rows[row][1] == number] for number in range(3)]
    arrays = [np.array(split, dtype=int) for split in splits]
    together = keep_duplicates_together(arrays, np.array(groups, dtype=int))
    assert [split.tolist() for split in together] == together_by_loop(splits, groups)


@settings(max_examples=50, deadline=None)
@given(st.integers(10, 300), st.sampled_from([0.0, 0.05, 0.3]), st.sampled_from([0.0, 0.05, 0.5]), st.integers(0, 99))
def test_rows_are_split_as_datasets_splits_them(n, eval_fraction, test_fraction, seed):
    counts = [math.ceil(round(share * n, 9)) for share in (eval_fraction, test_fraction)]
    expected = split_by_datasets(n, *counts, seed)
    assert [rows.tolist() for rows in split_rows(n, eval_fraction, test_fraction, seed)] == expected


@st.composite
def encoded_conversations(draw):
    encoded = []
    for number in range(draw(st.integers(1, 8))):
        pairs = st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=12)
        found = [
            Example(
                torch.tensor([token for token, _ in tokens]),
                torch.tensor([token if supervised else IGNORE for token, supervised in tokens]),
            )
            for tokens in draw(st.lists(pairs, min_size=1, max_size=3))
        ]
        encoded.append((f"a.jsonl:{number + 1}", 0, found))
    return encoded


@settings(max_examples=50, deadline=None)
@given(encoded_conversations(), st.integers(1, 12))
def test_the_columns_and_counts_are_those_of_each_example(encoded, max_length):
    stops, conversations = [3, 7], range(len(encoded))
    batch = pyarrow.RecordBatch.from_pydict(make_columns(encoded, stops, max_length), corpus.SCHEMA)
    rows, expected, digests = batch.to_pylist(), [], []
    for location, source, found in encoded:
        parts = [row_by_loop(example, stops, max_length) for example in found]
        expected += [{"location": location, "source": source, "part": part, **row} for part, row in enumerate(parts)]
        digests.append("".join(row["digest"] for row in parts))
    assert rows == expected
    encoded_corpus = Corpus(pyarrow.Table.from_batches([batch]), [], max_length)
    assert encoded_corpus.digests.to_pylist() == digests
    chosen = [number for number in conversations if number % 3 != 1][::-1]
    split = make_split(encoded_corpus, np.array(chosen))
    of_split = [row for number in chosen for row in rows if row["location"] == encoded[number][0]]
    kept = [row for row in of_split if row["supervised"]]
    assert [example.input_ids.tolist() for example in split.examples] == [row["input_ids"] for row in kept]
    assert split._replace(examples=()) == data.Split(
        (),
        conversations=len(chosen),
        truncated=sum(row["tokens"] > max_length for row in of_split),
        dropped=len(of_split) - len(kept),
        tokens=sum(len(row["input_ids"]) for row in kept),
        longest=max((len(row["input_ids"]) for row in kept), default=0),
        supervised=sum(row["supervised"] for row in kept),
        supervised_lost=sum(row["supervised_before"] - row["supervised"] for row in of_split),
        has_stop=any(row["has_stop"] for row in kept),
        digest=hashlib.sha256("".join(row["digest"] for row in kept).encode()).hexdigest(),
    )
    json.dumps(split._replace(examples=()))  # as a run's files have it: Python's numbers


# --- at any size


@pytest.fixture
def numbered(tmp_path, monkeypatch):
    """A function that writes a file of so many conversations, a tenth of them duplicates."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def write(n):
        chats = ([{"role": "user", "content": str(i % (n * 9 // 10))}] for i in range(n))
        rows = ({"messages": [*chat, {"role": "assistant", "content": "Yes."}]} for chat in chats)
        path = tmp_path / f"{n}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


def test_a_corpus_is_written_batch_by_batch(tiny_tokenizer, numbered):
    n = 3 * BATCH + 1
    load_data(resolve({"dataset": [numbered(n)]}, "none"), tiny_tokenizer)
    (path,) = cache_directory().glob("corpora/*/rows.arrow")
    with pyarrow.ipc.open_stream(path) as reader:
        assert [len(batch) for batch in reader] == [BATCH, BATCH, BATCH, 1]


def test_a_start_executes_no_python_for_each_row(tiny_tokenizer, numbered):
    """With the corpus in the cache, as many instructions of Python for many rows as for few."""
    ours, executed = {data.__file__, corpus.__file__}, 0

    def trace(frame, event, _argument):
        nonlocal executed
        if frame.f_code.co_filename not in ours:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        executed += event == "opcode"
        return trace

    counts = []
    for n in (100, 1000):
        path = numbered(n)
        config = resolve({"dataset": [f"{path}:2.5"], "eval_dataset": [f"{path}#10"], "test_fraction": 0.1}, "none")
        load_data(config, tiny_tokenizer)
        executed, before = 0, sys.gettrace()
        sys.settrace(trace)
        try:
            load_data(config, tiny_tokenizer)
        finally:
            sys.settrace(before)
        counts.append(executed)
    assert counts[0] == counts[1] > 0
