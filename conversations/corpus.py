"""A corpus: the conversations of some sources, checked, encoded, and kept on disk.

It is written once, into the cache, under a key of everything it depends on: the bytes of the files, the tokenizer and
its template, the options, the code. Any change gives another key, so a stale corpus is never used. It is read row by
row, however large it is.
"""

import contextlib
import functools
import hashlib
import inspect
import json
import os
import re
import signal
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import datasets
import filelock
import pyarrow
import torch
from tqdm import tqdm

from config import UserError, die_with_parent
from conversations.formats import Findings, read_conversations
from conversations.sources import files_of
from conversations.templates import stop_ids
from storage import hub
from storage.durable import CorruptError, atomic_directory, make_directory, remove_partial, sha256, verify
from storage.quickstart import cache_directory, explain_unwritable_cache

CODE = sorted(Path(__file__).parent.glob("*.py"))  # and the file of the function that encodes
PLAIN = [("role", pyarrow.string()), ("content", pyarrow.string()), ("train", pyarrow.bool_())]
MESSAGE = pyarrow.struct([*PLAIN, ("more", pyarrow.string())])  # tools, tool calls and thoughts, as JSON
READ = pyarrow.schema(
    [("location", pyarrow.string()), ("source", pyarrow.int32()), ("messages", pyarrow.list_(MESSAGE))]
)
COUNTS = {"location": "string", "source": "int32", "digest": "string", "stops": "bool", "refused": "string"}
COUNTS |= dict.fromkeys(("tokens", "supervised_before", "supervised", "unknown", "part", "empty_thoughts"), "int32")
NO_IDS = torch.zeros(0, dtype=torch.int32).numpy()
NOTHING = dict.fromkeys(COUNTS, 0) | {"stops": False, "digest": "", "refused": ""}
NOTHING |= dict.fromkeys(("input_ids", "labels"), NO_IDS)
ROWS_AT_ONCE, CHARACTERS_AT_ONCE = 1000, 2**24  # of what is read and not yet on disk
NO_ID = -1
SEVERAL_PROCESSES = 5000  # rows from which they are worth starting
EMPTY_THOUGHT = re.compile(r"\s*(?:<think>\s*)?</think>")


@dataclass(frozen=True)
class Corpus:
    """Encoded conversations, a row for each example, in the order they were read in, and what reading them found.

    Its columns: `input_ids` and `labels`, truncated to the longest allowed; `supervised`, how many tokens are scored;
    both counts before that, `tokens` and `supervised_before`; `unknown`, how many scored tokens the tokenizer does not
    know; `stops`, whether a stop token is scored; its `location`; the number of its `source`; a `digest` of ids and
    labels; its `part` of a conversation, from 0; `empty_thoughts`, how many of its answers are scored with one.
    """

    rows: datasets.Dataset
    findings: Findings
    longest: int  # tokens after which a conversation was truncated

    @functools.cached_property
    def columns(self):
        """Everything but the ids and labels, as lists: read once, however many splits are taken."""
        return {name: self.rows[name][:] for name in self.rows.column_names if name not in ("input_ids", "labels")}

    @functools.cached_property
    def conversations(self):
        """For each conversation the rows of its examples, a range."""
        first = [row for row, part in enumerate(self.columns["part"]) if part == 0]
        return [range(*bounds) for bounds in pairwise([*first, len(self.rows)])]

    def notes(self):
        """How many examples the conversations became, where that is not one each: a line."""
        if len(self.conversations) < len(self.rows):
            yield (
                f"{len(self.conversations):,} conversations, {len(self.rows):,} examples: the template writes "
                "an earlier answer differently from the last"
            )

    @functools.cached_property
    def digests(self):
        """For each conversation a digest of the ids and labels of its examples."""
        parts = [[self.columns["digest"][row] for row in rows] for rows in self.conversations]
        return [own[0] if len(own) == 1 else hashlib.sha256("".join(own).encode()).hexdigest()[:32] for own in parts]

    @functools.cached_property
    def source_of(self):
        """For each conversation the number of its source."""
        return [self.columns["source"][rows[0]] for rows in self.conversations]


def load_corpus(sources, config, tokenizer, encode):
    """The `Corpus` of some sources under the settings of a `Config`: from the cache, or made and put there.

    Args:
        encode: `data.encode_each`, or a function like it.

    Raises:
        UserError: a source is missing, or has rows that are not conversations.
    """
    longest = config.max_length or tokenizer.model_max_length
    reading = {"split": config.split, "max_examples": config.max_examples, "skip_bad_rows": config.skip_bad_rows}
    reading["plain"] = config.chat_template == "chatml"
    key = key_of(sources, tokenizer, encode, {**reading, "supervise": config.supervise, "longest": longest})
    directory = cache_directory() / "corpora" / key[:16]
    if damage := damage_of(directory):
        if directory.exists():
            print(f"the cached corpus is damaged and is made again: {damage}", file=sys.stderr)
        with explain_unwritable_cache():
            make_directory(directory.parent)
            with filelock.FileLock(directory.with_name(f".{directory.name}.lock")):
                if damage_of(directory):  # another process may have made it in the meantime
                    remove_partial(directory.parent, directory.name)
                    with atomic_directory(directory, {"key": key}) as path:
                        make_corpus(path, sources, reading, tokenizer, encode, config.supervise, longest)
    findings = json.loads((directory / "findings.json").read_text(encoding="utf-8"))
    counters = {name: Counter(findings[name]) for name in ("formats", "ignored", "bad")}
    return Corpus(datasets.load_from_disk(directory / "rows"), Findings(**{**findings, **counters}), longest)


def damage_of(directory):
    """What is wrong with a cached corpus; None where every byte of it is as it was written."""
    try:
        verify(directory)
    except CorruptError as damage:
        return damage


def key_of(sources, tokenizer, encode, options):
    """SHA-256 over everything that a corpus depends on."""
    contents = []
    for source in sources:
        files = files_of(source.name)
        if files:
            contents += [(str(file), sha256(file)) for file in files]
        else:
            contents.append(hub.load_hub_dataset(source.name, source.config, options["split"])._fingerprint)
        contents.append("end of source")
    parts = [contents, options, tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, tokenizer.eos_token]
    parts += [sha256(path) for path in (*CODE, inspect.getsourcefile(encode))]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def make_corpus(directory, sources, reading, tokenizer, encode, supervise, longest):
    """Read and check all rows, then encode them all, into `directory`."""
    findings = Findings()
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        read = Path(scratch) / "read.arrow"
        write_read(read, read_conversations(sources, **reading, findings=findings))
        rows = datasets.Dataset.from_file(str(read))
        several = len(rows) >= SEVERAL_PROCESSES and (os.cpu_count() or 1) > 1
        os.environ["TOKENIZERS_PARALLELISM"] = str(not several).lower()
        with hub.bar_on_a_terminal(), forked_processes_end_with_this_one():
            encoded = rows.map(
                encode_rows,
                fn_kwargs={
                    "parent": os.getpid(),
                    "tokenizer": tokenizer,
                    "encode": encode,
                    "supervise": supervise,
                    "longest": longest,
                    "skip": bool(reading["skip_bad_rows"]),
                },
                batched=True,
                batch_size=100,
                num_proc=os.cpu_count() if several else None,
                remove_columns="messages",
                features=datasets.Features(
                    {name: datasets.Value(kind) for name, kind in COUNTS.items()}
                    | {name: datasets.List(datasets.Value("int32")) for name in ("input_ids", "labels")}
                ),
                new_fingerprint="encoded",
                cache_file_name=str(Path(scratch) / "encoded.arrow"),
                desc="encoding",
            )
        leave_out_refused(encoded, findings, reading["skip_bad_rows"]).save_to_disk(directory / "rows")
        del encoded, rows  # their files are mapped
    (directory / "findings.json").write_text(json.dumps(vars(findings), ensure_ascii=False), encoding="utf-8")


def write_read(path, conversations):
    """Write conversations to an Arrow file as they come, so that they need not fit into memory."""
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, READ) as writer:
        batch, characters = [], 0

        def flush():
            writer.write_batch(pyarrow.RecordBatch.from_pylist(batch, READ))
            batch.clear()

        for location, source, messages in tqdm(conversations, desc="reading", unit=" rows", disable=None, leave=False):
            batch.append({"location": location, "source": source, "messages": list(map(as_stored, messages))})
            characters += sum(len(message["content"]) for message in messages)
            if len(batch) == ROWS_AT_ONCE or characters > CHARACTERS_AT_ONCE:
                flush()
                characters = 0
        flush()


def as_stored(message):
    """A message as READ holds it."""
    if len(message) == len(PLAIN):
        return message
    plain = {name: message[name] for name, _ in PLAIN}
    return {**plain, "more": json.dumps({name: value for name, value in message.items() if name not in plain})}


def as_read(message):
    """A message as `formats` made it, out of READ."""
    more = message.pop("more")
    return {**message, **json.loads(more)} if more else message


@contextlib.contextmanager
def forked_processes_end_with_this_one():
    """Let every process that is forked meanwhile, `datasets`' own helper too, call `end_with` first of all."""
    parent = [os.getpid()]
    os.register_at_fork(after_in_child=lambda: end_with(*parent) if parent else None)  # it cannot be unregistered
    try:
        yield
    finally:
        parent.clear()


def end_with(parent):
    """Let this worker process be killed when its parent dies, and leave Ctrl-C to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent()
    if os.getppid() != parent:
        os._exit(1)


def encode_rows(batch, parent, tokenizer, encode, supervise, longest, skip):
    """Encode a batch of rows as read: columns in, columns out; `refused` says why a conversation has no examples."""
    if os.getpid() != parent:
        end_with(parent)
    conversations = [list(map(as_read, messages)) for messages in batch["messages"]]
    encoded = encode_located(conversations, batch["location"], encode, tokenizer, supervise, skip)
    rows, stops = [], torch.tensor(stop_ids(tokenizer))
    for location, source, examples in zip(batch["location"], batch["source"], encoded, strict=True):
        origin = {"location": location, "source": source}
        if isinstance(examples, UserError):
            rows.append(NOTHING | origin | {"refused": str(examples)})
        else:
            rows += [row_of(each, part, tokenizer, stops, longest) | origin for part, each in enumerate(examples)]
    return {name: [row[name] for row in rows] for name in NOTHING}


def row_of(example, part, tokenizer, stops, longest):
    """The columns of an example, which is a part of its conversation."""
    unknown = NO_ID if tokenizer.unk_token_id in (None, tokenizer.eos_token_id) else tokenizer.unk_token_id
    kept = example.truncated(longest)
    ids, labels = kept.input_ids.int(), kept.labels.int()
    return NOTHING | {
        "input_ids": ids.numpy(),
        "labels": labels.numpy(),
        "tokens": len(example.input_ids),
        "supervised_before": example.supervised_tokens,
        "supervised": kept.supervised_tokens,
        "unknown": int((labels == unknown).sum()),
        "stops": bool(torch.isin(labels, stops).any()),
        "digest": hashlib.sha256(torch.cat([ids, labels]).numpy().tobytes()).hexdigest()[:32],
        "part": part,
        "empty_thoughts": empty_thoughts(kept, tokenizer),
    }


def encode_located(conversations, locations, encode, tokenizer, supervise, skip):
    """The examples of some conversations; an error names the location of the conversation that it is about.

    Args:
        skip: let the error stand for the examples of that conversation.
    """
    try:
        return encode(conversations, tokenizer, supervise)
    except UserError:
        found = []
        for messages, location in zip(conversations, locations, strict=True):
            try:
                found += encode([messages], tokenizer, supervise)
            except UserError as error:
                found.append(UserError(f"{location}: {error}"))
                if not skip:
                    raise found[-1] from error
        return found


def leave_out_refused(encoded, findings, skip_bad_rows):
    """The rows whose conversations the template could write; the others are counted among the bad ones.

    Raises:
        UserError: with the others they are more than the share that may be left out.
    """
    reasons = encoded["refused"][:]
    for reason in filter(None, reasons):
        findings.refuse("the template cannot write it", reason)
    findings.check(skip_bad_rows)
    kept = [row for row, reason in enumerate(reasons) if not reason]
    return (encoded if len(kept) == len(reasons) else encoded.select(kept)).remove_columns("refused")


def empty_thoughts(example, tokenizer):
    """How many answers of an example are scored with a thought that says nothing."""
    if "</think>" not in str(tokenizer.chat_template):
        return 0
    begins = (example.supervised & ~example.supervised.roll(1)).nonzero()[:, 0].tolist()
    return sum(bool(EMPTY_THOUGHT.match(tokenizer.decode(example.input_ids[at : at + 8]))) for at in begins)
