"""A corpus: the conversations of some sources, all checked, then encoded, and kept on disk.

It is written once, into the cache, under a key of everything it follows from: the bytes of the files, the tokenizer and
its template, the options, the code. Whatever changes has another key, so that nothing stale can be met. It is read row
by row from there, however large it is.
"""

import functools
import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import filelock
import pyarrow
import torch
from tqdm import tqdm

import hub
from chat import Example, encode
from checkpoint import make_directory, remove_unfinished, replace_directory, sha256
from conversations import Findings, files_of, read_conversations
from quickstart import cache_directory

CODE = ("chat.py", "conversations.py", "corpus.py", "templates.py")
MESSAGE = pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string()), ("train", pyarrow.bool_())])
READ = pyarrow.schema([("place", pyarrow.string()), ("source", pyarrow.int32()), ("messages", pyarrow.list_(MESSAGE))])
COUNTS = {"place": "string", "source": "int32", "digest": "string", "stops": "bool"}
COUNTS |= dict.fromkeys(("tokens", "supervised_before", "supervised"), "int32")
ROWS_AT_ONCE, CHARACTERS_AT_ONCE = 1000, 2**24  # of what is read and not yet on disk
SEVERAL_PROCESSES = 5000  # rows from which they are worth starting


@dataclass(frozen=True)
class Corpus:
    """Encoded conversations, a row each, in the order they were read in, and what reading them brought to light.

    Its columns: `input_ids` and `labels`, cut to the longest allowed; `supervised`, how many tokens are scored; both
    counts before the cut, `tokens` and `supervised_before`; `stops`, whether a stop token is scored; its `place`; the
    number of its `source`; a `digest` of ids and labels.
    """

    rows: datasets.Dataset
    findings: Findings
    longest: int  # tokens after which a conversation was cut

    @functools.cached_property
    def columns(self):
        """Everything but the ids and labels, as lists: read once, however many splits are taken."""
        return {name: self.rows[name][:] for name in self.rows.column_names if name not in ("input_ids", "labels")}


class Examples(Sequence):
    """The `Example`s of some rows of a corpus, read from disk when asked for."""

    def __init__(self, rows, numbers):
        self.rows, self.numbers = rows.select_columns(["input_ids", "labels"]), numbers
        self.read_at = rows.select_columns(["place"])

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = self.rows[self.numbers[index]]
        return Example(torch.tensor(row["input_ids"]), torch.tensor(row["labels"]))

    def place(self, index):
        """Where the conversation of an example was read: file and line."""
        return self.read_at[self.numbers[index]]["place"]


def load_corpus(sources, config, tokenizer):
    """The `Corpus` of some sources under the settings of a `Config`: out of the cache, or made and put there.

    Raises:
        UserError: a source is missing, or has rows that are not conversations.
    """
    longest = config.max_length or tokenizer.model_max_length
    reading = {
        "split": config.split,
        "max_examples": config.max_examples,
        "skip_bad_rows": config.skip_bad_rows,
    }
    key = key_of(sources, tokenizer, {**reading, "supervise": config.supervise, "longest": longest})
    directory = cache_directory() / "corpora" / key[:16]
    if not directory.exists():
        make_directory(directory.parent)
        with filelock.FileLock(directory.with_name(f".{directory.name}.lock")):
            if not directory.exists():  # another process may have made it in the meantime
                remove_unfinished(directory.parent, directory.name)
                replace_directory(
                    directory,
                    lambda path: make_corpus(path, sources, reading, tokenizer, config.supervise, longest),
                )
    findings = json.loads((directory / "findings.json").read_text())
    counters = {name: Counter(findings[name]) for name in ("formats", "ignored", "bad")}
    return Corpus(datasets.load_from_disk(directory / "rows"), Findings(**{**findings, **counters}), longest)


def key_of(sources, tokenizer, options):
    """SHA-256 over all that a corpus follows from."""
    here = Path(__file__).parent
    contents = []
    for source in sources:
        files = files_of(source.name)
        if files:
            contents += [(str(file), sha256(file)) for file in files]
        else:
            contents.append(hub.load_hub_dataset(source.name, source.config, options["split"])._fingerprint)
        contents.append("end of source")
    parts = [contents, options, tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, tokenizer.eos_token]
    parts += [sha256(here / name) for name in CODE]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def make_corpus(directory, sources, reading, tokenizer, supervise, longest):
    """Read and check all rows, then encode them all, into `directory`."""
    findings = Findings()
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        read = Path(scratch) / "read.arrow"
        write_read(read, read_conversations(sources, **reading, findings=findings))
        rows = datasets.Dataset.from_file(str(read))
        several = len(rows) >= SEVERAL_PROCESSES and (os.cpu_count() or 1) > 1
        os.environ["TOKENIZERS_PARALLELISM"] = str(not several).lower()
        with hub.bar_on_a_terminal():
            encoded = rows.map(
                encode_rows,
                fn_kwargs={"tokenizer": tokenizer, "supervise": supervise, "longest": longest},
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
        encoded.save_to_disk(directory / "rows")
        del encoded, rows  # their files are mapped
    (directory / "findings.json").write_text(json.dumps(vars(findings), ensure_ascii=False))


def write_read(path, conversations):
    """Write conversations to an Arrow file as they come, so that they need not fit into memory."""
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, READ) as writer:
        batch, characters = [], 0

        def flush():
            writer.write_batch(pyarrow.RecordBatch.from_pylist(batch, READ))
            batch.clear()

        for place, source, messages in tqdm(conversations, desc="reading", unit=" rows", disable=None, leave=False):
            batch.append({"place": place, "source": source, "messages": messages})
            characters += sum(len(message["content"]) for message in messages)
            if len(batch) == ROWS_AT_ONCE or characters > CHARACTERS_AT_ONCE:
                flush()
                characters = 0
        flush()


def encode_rows(batch, tokenizer, supervise, longest):
    """Encode a batch of rows as read: columns in, columns out."""
    columns = {name: [] for name in (*COUNTS, "input_ids", "labels")}
    for example in encode(batch["messages"], tokenizer, supervise):
        short = Example(example.input_ids[:longest], example.labels[:longest])
        ids, labels = short.input_ids.int(), short.labels.int()
        columns["input_ids"].append(ids.numpy())
        columns["labels"].append(labels.numpy())
        columns["tokens"].append(len(example.input_ids))
        columns["supervised_before"].append(example.supervised_tokens)
        columns["supervised"].append(short.supervised_tokens)
        columns["stops"].append(bool((labels == tokenizer.eos_token_id).any()))
        columns["digest"].append(hashlib.sha256(torch.cat([ids, labels]).numpy().tobytes()).hexdigest()[:32])
    return {**columns, "place": batch["place"], "source": batch["source"]}
