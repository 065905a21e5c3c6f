"""A corpus: the conversations of some sources, checked, encoded, and cached on disk.

It is written once, under a key of everything it depends on: the bytes of the files, the tokenizer and its template, the
options, the code. Any change gives another key, so a stale corpus is never used. It is memory-mapped and read row by
row, however large it is.
"""

import functools
import hashlib
import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import torch
from tqdm import tqdm

from config import UserError
from conversations.chatml import is_chatml
from conversations.formats import ReadReport, parse_columns, read_conversations
from conversations.masking import Example, encode_each
from conversations.sources import InvalidRow, find_files, load_from_hub
from conversations.templates import TemplateError, stop_ids
from storage.cache import cached
from storage.durable import sha256

SOURCE_FILES = sorted(Path(__file__).parent.glob("*.py"))  # the code that a corpus depends on
IDS = pyarrow.list_(pyarrow.int32())
SCHEMA = pyarrow.schema(
    [("location", pyarrow.string()), ("digest", pyarrow.string()), ("has_stop", pyarrow.bool_())]
    + [(name, pyarrow.int32()) for name in "source part tokens supervised_before supervised".split()]
    + [("input_ids", IDS), ("labels", IDS)]
)
BATCH = 100  # conversations that are encoded at once


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
        """Everything but the ids and labels, as lists: read once, however many splits are taken."""
        return {name: self.rows[name].to_pylist() for name in SCHEMA.names if name not in ("input_ids", "labels")}

    @functools.cached_property
    def conversations(self):
        """For each conversation the rows of its examples, a range."""
        first = [row for row, part in enumerate(self.columns["part"]) if part == 0]
        return [range(*bounds) for bounds in itertools.pairwise([*first, len(self.rows)])]

    @functools.cached_property
    def digests(self):
        """For each conversation a digest of the ids and labels of its examples."""
        parts = [[self.columns["digest"][row] for row in rows] for rows in self.conversations]
        return [one[0] if len(one) == 1 else hashlib.sha256("".join(one).encode()).hexdigest()[:32] for one in parts]

    @functools.cached_property
    def source_of(self):
        """For each conversation the number of its source."""
        return [self.columns["source"][rows[0]] for rows in self.conversations]


def load_corpus(sources, config, tokenizer, may_lack_columns=False):
    """The `Corpus` of some sources under the settings of a `Config`: from the cache, or made and put there."""
    max_length = config.max_length or tokenizer.model_max_length
    reading = {"split": config.split, "max_examples": config.max_examples, "skip_bad_rows": config.skip_bad_rows}
    reading |= {"plain": config.chat_template == "chatml", "drop": config.drop_columns}
    reading |= {"columns": parse_columns(config.columns), "vocabulary": len(tokenizer)}
    key = cache_key(sources, tokenizer, {**reading, "supervise": config.supervise, "max_length": max_length})

    def write(directory):
        make_corpus(directory, sources, reading, tokenizer, config.supervise, max_length)

    directory = cached(f"corpora/{key[:16]}", {"key": key}, write, "the cached corpus")
    notes, absent = json.loads((directory / "notes.json").read_text(encoding="utf-8"))
    if absent and not may_lack_columns:
        raise UserError("\n".join(absent))
    rows = pyarrow.ipc.open_stream(pyarrow.memory_map(str(directory / "rows.arrow"))).read_all()
    return Corpus(rows, notes, max_length)


def cache_key(sources, tokenizer, options):
    """SHA-256 over everything that a corpus depends on."""
    contents = []
    for source in sources:
        if files := find_files(source.name):
            contents += [(str(file), sha256(file)) for file in files]
        else:
            contents.append(load_from_hub(source, options["split"])._fingerprint)
        contents.append("end of source")
    parts = [contents, options, tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, tokenizer.eos_token]
    parts += map(sha256, SOURCE_FILES)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def make_corpus(directory, sources, reading, tokenizer, supervise, max_length):
    """Read and check all rows, then read them again and encode them, into `directory`."""
    report, conversations, examples = ReadReport(), 0, 0
    progress = functools.partial(tqdm, unit=" rows", disable=None, leave=False)  # on a terminal only
    for _ in progress(read_conversations(sources, **reading, report=report), "checking"):
        pass
    stops, options = torch.tensor(stop_ids(tokenizer)), (supervise, max_length)
    rows = iter(progress(read_conversations(sources, **reading), "encoding", report.rows))
    with pyarrow.OSFile(str(directory / "rows.arrow"), "wb") as file, pyarrow.ipc.new_stream(file, SCHEMA) as writer:
        while batch := list(itertools.islice(rows, BATCH)):
            encoded = []
            for location, source, found in encode_rows(batch, tokenizer, options, reading["skip_bad_rows"], report):
                conversations += 1
                for part, example in enumerate(found):
                    row = describe_example(example, stops, max_length)
                    encoded.append({"location": location, "source": source, "part": part, **row})
            examples += len(encoded)
            writer.write_batch(pyarrow.RecordBatch.from_pylist(encoded, SCHEMA))
    report.check(reading["skip_bad_rows"])
    notes = list(report.notes())
    if conversations < examples:
        why = "the template writes an earlier answer differently from the last"
        why = "the tokenizer joins some answers with their header" if is_chatml(tokenizer) else why
        if report.formats["text"]:
            why = f"a text longer than {max_length:,} tokens is cut, or {why}"
        notes.append(f"{conversations:,} conversations, {examples:,} examples: {why}")
    absent = list(report.absent_columns(reading["drop"], reading["columns"]))
    (directory / "notes.json").write_text(json.dumps([notes, absent]), encoding="utf-8")


def encode_rows(rows, tokenizer, options, skip, report):
    """Yield `(location, source, examples)` for each `(location, source, messages)`.

    With `skip`, a conversation that the template cannot write is added to the report, and left out.
    """
    # ChatML takes nearly every conversation, so many are encoded at once; a template renders them one by one.
    groups = [rows] if is_chatml(tokenizer) else [[row] for row in rows]
    for group in groups:
        locations, sources, conversations = zip(*group, strict=True)
        try:
            yield from zip(locations, sources, encode_each(conversations, tokenizer, *options), strict=True)
        except UserError as error:
            if len(group) > 1:
                for row in group:
                    yield from encode_rows([row], tokenizer, options, skip, report)
                continue
            if not (skip and isinstance(error.__cause__, TemplateError)):
                raise UserError(f"{locations[0]}: {error}") from error
            problem = error.__cause__
            report.add_bad_row(InvalidRow(f"--chat-template: {problem.reason}", problem.where), locations[0])


def describe_example(example, stops, max_length):
    """The columns of an example, without its origin."""
    kept = Example(example.input_ids[:max_length], example.labels[:max_length])
    ids, labels = kept.input_ids.int(), kept.labels.int()
    return {
        "input_ids": ids.numpy(),
        "labels": labels.numpy(),
        "tokens": len(example.input_ids),
        "supervised_before": example.supervised_tokens,
        "supervised": kept.supervised_tokens,
        "has_stop": bool(torch.isin(labels, stops).any()),
        "digest": hashlib.sha256(torch.cat([ids, labels]).numpy().tobytes()).hexdigest()[:32],
    }
