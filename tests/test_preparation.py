"""A corpus is prepared in batches, the tokenizer ahead in a thread: as if row by row, and each row is read once."""

import json
import threading

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_templates import QWEN3, QWEN_TOKENS, tokenizer_with

from config import UserError
from conversations import corpus, formats
from conversations.chatml import is_chatml
from conversations.formats import Reading, ReadReport, parse_row
from conversations.sources import InvalidRow, Source
from conversations.templates import TemplateError
from conversations.tokenizer import load_tokenizer
from tests.conftest import encode_each, read_file
from tests.families import TEMPLATES, save_model

MAX_LENGTH = 40


def chat(question, answer, *more):
    turns = [question, answer, *more]
    roles = ("user", "assistant") * len(turns)
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]}


ROWS = {
    "good": chat("Hi", "no so"),
    "long": chat("Hi", "no so so so so so so so so so", "So", "no"),
    "text": {"text": "so so so so so so so so so so so so so so so so so so so so so so so so so so so so so so so so"},
    "tokens": {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
    "no format": {},
    "no answer": chat("Hi", ""),
    "bad tokens": {"input_ids": [5, 6], "labels": [6, 5]},
    "not for ChatML": chat("Hi", "猫"),  # which the tokenizer below has no id for
    "not for a template": chat("Hi", "<tool_call>{</tool_call>"),
}


@pytest.fixture(scope="module", params=["ChatML", "a template"])
def tokenizer(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    if request.param == "a template":
        return tokenizer_with(QWEN3, QWEN_TOKENS, directory)
    save_model("T5", *TEMPLATES["ChatML"], directory)
    return load_tokenizer(str(directory), True)


def reading(tokenizer, skip=0.0):
    options = {"split": "train", "max_examples": 0, "skip_bad_rows": skip, "plain": is_chatml(tokenizer)}
    return {**options, "drop": (), "columns": {}, "vocabulary": len(tokenizer)}


def make(directory, path, tokenizer, skip):
    """The ids and labels of a corpus's rows, and the first of its notes; or the error."""
    directory.mkdir()
    try:
        corpus.make_corpus(directory, [Source(str(path))], reading(tokenizer, skip), tokenizer, "all", MAX_LENGTH)
    except UserError as error:
        return str(error)
    rows = pyarrow.ipc.open_stream(directory / "rows.arrow").read_all().to_pylist()
    notes, _ = json.loads((directory / "notes.json").read_text(encoding="utf-8"))
    return [(row["location"], row["input_ids"], row["labels"]) for row in rows], [n for n in notes if "rows" in n]


def make_row_by_row(rows, path, tokenizer, skip):
    """The same: each row is read, then each is encoded, alone."""
    report, read, made = ReadReport(), [], []
    try:
        for number, row in enumerate(rows, 1):
            report.rows += 1
            try:
                read.append((f"{path}:{number}", parse_row(row, report, Reading(plain=is_chatml(tokenizer)))))
            except InvalidRow as problem:
                report.add_bad_row(problem, f"{path}:{number}")
        report.check(skip)
        for location, messages in read:
            try:
                (examples,) = encode_each([messages], tokenizer, "all", MAX_LENGTH)
            except UserError as error:
                problem = error.__cause__
                if not (skip and isinstance(problem, TemplateError)):
                    return f"{location}: {error}"
                report.add_bad_row(InvalidRow(f"--chat-template: {problem.reason}", problem.where), location)
            else:
                made += [(location, *(values[:MAX_LENGTH].tolist() for values in example)) for example in examples]
        report.check(skip)
    except UserError as error:
        return str(error)
    return made, [note for note in report.notes() if "rows" in note]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    names=st.lists(st.sampled_from([*ROWS, *["good", "long"] * 6]), min_size=1, max_size=12),
    skip=st.sampled_from([0.0, 0.2, 0.5]),
    batch=st.sampled_from([1, 2, 3, 100]),
    ahead=st.integers(0, 4),
)
def test_a_corpus_in_batches_is_that_of_each_row(tokenizer, tmp_path_factory, monkeypatch, names, skip, batch, ahead):
    """The same ids and labels, notes and errors, for a bad row at any place, whatever is wrong with it."""
    directory, rows = tmp_path_factory.mktemp("corpus"), [ROWS[name] for name in ["good", *names]]
    path = directory / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(corpus, "BATCH", batch)
    monkeypatch.setattr(corpus, "AHEAD", ahead)
    assert make(directory / "made", path, tokenizer, skip) == make_row_by_row(rows, path, tokenizer, skip)


@pytest.fixture
def many(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(chat(f"{n}", "no" + " so" * (n % 7))) + "\n" for n in range(10 * corpus.BATCH)))
    return path


def test_the_tokenizer_is_at_work_while_a_batch_is_written(tokenizer, tmp_path, many, monkeypatch):
    """Rows are read once with ChatML; of a template's, which takes long, an invalid row is found before."""
    events = []

    def record(module, name, label):
        function = getattr(module, name)

        def recorded(*args, **options):
            events.append(label)
            return function(*args, **options)

        monkeypatch.setattr(module, name, recorded)

    record(corpus, "encode_as_lists", "begun")
    record(corpus, "make_columns", "written")
    record(formats, "read_rows", "read")
    threads = threading.active_count()
    made = make(tmp_path / "made", many, tokenizer, 0.0)
    assert len(made[0]) == 10 * corpus.BATCH
    ahead = corpus.AHEAD + 1
    assert events == [
        *["read"] * (1 if is_chatml(tokenizer) else 2),
        *["begun"] * ahead,
        *["written", "begun"] * (10 - ahead),
        *["written"] * ahead,
    ]
    assert threading.active_count() <= threads + 1  # that of a progress bar


def test_after_an_invalid_row_the_rest_is_only_checked(tokenizer, tmp_path, many, monkeypatch):
    """At once where rows are read once, and before anything is encoded where a template takes long."""
    rows = many.read_text().splitlines(keepends=True)
    rows[3], rows[-1] = "{}\n", "[1]\n"
    many.write_text("".join(rows))
    encoded, make_columns = [], corpus.make_columns
    monkeypatch.setattr(
        corpus, "make_columns", lambda rows, *options: encoded.append(rows) or make_columns(rows, *options)
    )
    error = make(tmp_path / "made", many, tokenizer, 0.0)
    assert error.startswith(f"2 of {len(rows):,} rows are invalid")
    assert not encoded


def test_a_batch_is_encoded_once_whatever_is_refused(tokenizer, tmp_path, monkeypatch):
    refused = "not for ChatML" if is_chatml(tokenizer) else "not for a template"
    names, encode_as_lists, encoded = [refused, "good", refused, "good"], corpus.encode_as_lists, []
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(ROWS[name]) + "\n" for name in names))

    def encode_and_count(chats, *options):
        encoded.append(len(chats))
        return encode_as_lists(chats, *options)

    monkeypatch.setattr(corpus, "encode_as_lists", encode_and_count)
    rows, _ = make(tmp_path / "made", tmp_path / "a.jsonl", tokenizer, 0.5)
    assert encoded == [4]
    assert [location for location, *_ in rows] == [f"{tmp_path}/a.jsonl:2", f"{tmp_path}/a.jsonl:4"]


@pytest.mark.parametrize("row", ["bad tokens", "no answer", "no format"])
def test_an_invalid_row_is_of_no_format(tmp_path, row):
    report = ReadReport()
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps(ROWS[name]) + "\n" for name in ("good", row, "text", "tokens"))
    )
    read_file(tmp_path / "a.jsonl", skip_bad_rows=0.5, report=report)
    assert report.rows == 4 == report.formats.total() + report.bad.total()
