"""A corpus: the conversations of some sources, checked, encoded, and cached on disk.

It is written once, under a key of everything it depends on: the bytes of the files, the tokenizer and its template, the
options, the code. Any change gives another key, so a stale corpus is never used. However large it is, it is written
batch by batch, and memory-mapped; its columns are arrays, as a million Python objects would take seconds.
"""

import collections
import functools
import gc
import hashlib
import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow
from tqdm import tqdm

from config import UserError
from conversations.chatml import is_chatml
from conversations.encoding import TemplateError
from conversations.formats import ReadReport, parse_columns, read_conversations
from conversations.masking import IGNORE, encode_as_lists
from conversations.sources import InvalidRow, find_files, load_from_hub
from conversations.templates import stop_ids
from storage.cache import cached
from storage.durable import json_sha256, sha256

SOURCE_FILES = sorted(Path(__file__).parent.glob("*.py"))  # the code that a corpus depends on
IDS = pyarrow.list_(pyarrow.int32())
NUMBERS = {name: pyarrow.int32() for name in "source part tokens supervised_before supervised".split()}
NUMBERS["has_stop"] = pyarrow.bool_()
TEXTS = {"location": pyarrow.string(), "digest": pyarrow.large_string()}
SCHEMA = pyarrow.schema({**TEXTS, **NUMBERS, "input_ids": IDS, "labels": IDS})
DIGITS = 32  # of a digest, in hexadecimal
BATCH = 100  # conversations that are encoded at once
AHEAD = 4  # batches that the tokenizer is given before one is written


@dataclass(frozen=True)
class Corpus:
    """Encoded conversations, a row for each example, in the order they were read in.

    Its columns: `input_ids` and `labels`, truncated to `max_length`; `supervised`, the number of supervised tokens;
    both numbers before truncation, `tokens` and `supervised_before`; `has_stop`, whether a stop token is supervised;
    its `location`; the number of its `source`; a `digest` of ids and labels; its `part` of a conversation, from 0.
    """

    rows: pyarrow.Table
    notes: list  # lines about the rows that were read
    max_length: int  # tokens

    @functools.cached_property
    def columns(self):
        """The numbers of each row as NumPy arrays, (rows,), and its `digest` as an Arrow array."""
        return {name: self.rows[name].to_numpy() for name in NUMBERS} | {"digest": self.rows["digest"].combine_chunks()}

    @functools.cached_property
    def bounds(self):
        """For each conversation its first row, and at the end the number of rows: (conversations + 1,)."""
        return np.append(np.flatnonzero(self.columns["part"] == 0), len(self.rows))

    @functools.cached_property
    def digests(self):
        """For each conversation the digests of its examples, joined, as an Arrow array."""
        offsets, joined = pyarrow.py_buffer(DIGITS * self.bounds), self.columns["digest"].buffers()[2]
        return pyarrow.LargeStringArray.from_buffers(len(self.bounds) - 1, offsets, joined)

    @functools.cached_property
    def source_of(self):
        """For each conversation the number of its source, (conversations,)."""
        return self.columns["source"][self.bounds[:-1]]

    def rows_of(self, conversations):
        """The rows of some conversations, one conversation after the other."""
        counts = np.diff(self.bounds)[conversations]
        before = counts.cumsum() - counts  # rows of earlier conversations
        return np.arange(counts.sum()) + np.repeat(self.bounds[conversations] - before, counts)


def load_corpus(sources, config, tokenizer, may_lack_columns=False):
    """The `Corpus` of some sources under the settings of a `Config`: from the cache, or made and put there."""
    max_length = min(config.max_length or tokenizer.model_max_length, np.iinfo(np.int32).max)
    reading = reading_options(config, tokenizer)
    key = cache_key(sources, tokenizer, {**reading, "supervise": config.supervise, "max_length": max_length})

    def write(directory):
        gc.freeze()  # what the libraries have made, which Python would look through again every 10,000 rows
        try:
            make_corpus(directory, sources, reading, tokenizer, config.supervise, max_length)
        finally:
            gc.unfreeze()

    directory = cached(f"corpora/{key[:16]}", write, "the cached corpus")
    notes, absent = json.loads((directory / "notes.json").read_text(encoding="utf-8"))
    if absent and not may_lack_columns:
        raise UserError("\n".join(absent))
    rows = pyarrow.ipc.open_stream(pyarrow.memory_map(str(directory / "rows.arrow"))).read_all()
    return Corpus(rows, notes, max_length)


def reading_options(config, tokenizer):
    """The options of `read_conversations` under the settings of a `Config`."""
    reading = {"split": config.split, "max_examples": config.max_examples, "skip_bad_rows": config.skip_bad_rows}
    reading |= {"plain": config.chat_template == "chatml", "drop": config.drop_columns}
    return reading | {"columns": parse_columns(config.columns), "vocabulary": len(tokenizer)}


def cache_key(sources, tokenizer, options):
    """SHA-256 over everything that a corpus depends on."""
    parts = [options, tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, tokenizer.special_tokens_map]
    for source in sources:
        files = [(str(file), sha256(file)) for file in find_files(source.name)]
        parts.append(files or load_from_hub(source, options["split"])._fingerprint)
    return json_sha256([*parts, *map(sha256, SOURCE_FILES)])


def make_corpus(directory, sources, reading, tokenizer, supervise, max_length):
    """Read, check and encode all rows, into `directory`."""
    report, checked, skip, refused = ReadReport(), ReadReport(), reading["skip_bad_rows"], []
    progress = functools.partial(tqdm, unit=" rows", disable=None, leave=False)  # on a terminal only
    if not is_chatml(tokenizer):  # a template takes a hundred times as long as the checks, so they come first
        collections.deque(progress(read_conversations(sources, **reading, report=checked), "checking"), maxlen=0)
    rows = iter(progress(read_conversations(sources, **reading, report=report), "encoding", checked.rows or None))
    try:
        batches = encode_batches(rows, (tokenizer, supervise, max_length), skip, refused)
        valid = itertools.takewhile(lambda _: skip or not report.bad, batches)
        conversations, examples = write_rows(directory / "rows.arrow", valid, stop_ids(tokenizer), max_length)
    except UserError:
        collections.deque(rows, maxlen=0)  # to name an invalid row first
        raise
    collections.deque(rows, maxlen=0)  # those after an invalid row are only checked
    for problem, location in refused:
        report.add_bad_row(problem, location)
    report.check(skip)
    notes = list(report.notes())
    if conversations < examples:
        why = "the template writes an earlier answer differently from the last"
        why = "the tokenizer joins some answers with their header" if is_chatml(tokenizer) else why
        if report.formats["text"]:
            why = f"a text longer than {max_length:,} tokens is cut, or {why}"
        notes.append(f"{conversations:,} conversations, {examples:,} examples: {why}")
    absent = list(report.absent_columns(reading["drop"], reading["columns"]))
    (directory / "notes.json").write_text(json.dumps([notes, absent]), encoding="utf-8")


def encode_batches(rows, options, skip, refused):
    """Yield batches of `(location, source, examples)` for the `(location, source, messages)` of all rows.

    The tokenizer works at the next few batches while one is used. With `skip`, a conversation that the template cannot
    write is left out, and added to `refused` as `(InvalidRow, location)`.
    """
    begun = collections.deque()
    while batch := list(itertools.islice(rows, BATCH)):
        begun.append((batch, encode_as_lists([messages for _, _, messages in batch], *options)))
        if len(begun) > AHEAD:
            yield finish_batch(*begun.popleft(), skip, refused)
    yield from (finish_batch(*each, skip, refused) for each in begun)


def finish_batch(rows, encoding, skip, refused):
    """A list of `(location, source, examples)` for some rows, of the iterator over their examples."""
    encoded = []
    for location, source, _ in rows:
        try:
            encoded.append((location, source, next(encoding)))
        except UserError as error:
            problem = error.__cause__
            if not (skip and isinstance(problem, TemplateError)):
                raise UserError(f"{location}: {error}") from error
            refused.append((InvalidRow(f"--chat-template: {problem.reason}", problem.where), location))
    return encoded


def write_rows(path, batches, stops, max_length):
    """Write batches of `(location, source, examples)` to a file; the numbers of conversations and of examples."""
    conversations, examples = 0, 0
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, SCHEMA) as writer:
        for encoded in filter(None, batches):
            columns = make_columns(encoded, stops, max_length)
            writer.write_batch(pyarrow.RecordBatch.from_pydict(columns, SCHEMA))
            conversations += len(encoded)
            examples += len(columns["location"])
    return conversations, examples


def make_columns(encoded, stops, max_length):
    """The columns of the examples of some `(location, source, examples)`."""
    origins = [(location, source, part) for location, source, found in encoded for part in range(len(found))]
    examples = [example for _, _, found in encoded for example in found]
    lengths = np.array([len(ids) for ids, _ in examples])
    row_of = np.repeat(np.arange(len(examples)), lengths)  # of each token, as what follows: (tokens,)
    position = np.arange(len(row_of)) - np.repeat(lengths.cumsum() - lengths, lengths)
    ids, labels = (
        np.fromiter(itertools.chain.from_iterable(lists), np.int32, len(row_of))
        for lists in zip(*examples, strict=True)
    )
    supervised = (labels != IGNORE) & (position > 0)  # as `Example.supervised_tokens` counts them
    kept = position < max_length

    def count(tokens):
        return np.bincount(row_of[tokens], minlength=len(examples))

    columns = dict(zip(("location", "source", "part"), zip(*origins, strict=True), strict=True))
    columns |= {"tokens": lengths, "supervised_before": count(supervised), "supervised": count(supervised & kept)}
    columns["has_stop"] = count(np.isin(labels, stops) & kept) > 0
    ids, labels, offsets = ids[kept], labels[kept], np.append(0, np.minimum(lengths, max_length).cumsum())
    bounds = itertools.pairwise(offsets.tolist())
    contents = (ids[start:end].tobytes() + labels[start:end].tobytes() for start, end in bounds)
    columns["digest"] = [hashlib.sha256(content).hexdigest()[:DIGITS] for content in contents]
    for name, values in (("input_ids", ids), ("labels", labels)):
        columns[name] = pyarrow.ListArray.from_arrays(pyarrow.array(offsets, pyarrow.int32()), values)
    return columns
