"""Conversations: the files and datasets they come from, the formats they are written in, and what a valid one is.

A conversation is a list of messages `{"role", "content", "train"}`; `train` says whether an assistant's message may be
supervised. Rows are checked one by one, before anything is tokenised, and named by file and line.
"""

import io
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import pyarrow
import pyarrow.parquet

import hub
from chat import ROLES
from config import UserError, first_line

SHOWN_PROBLEMS = 10
COMPRESSED = (".gz", ".zst", ".bz2")
SUFFIXES = (".jsonl", ".json", ".parquet")
SOURCE = re.compile(r"(.+?)(?::([^:#/]*[^:#/.\d][^:#/]*))?(?::([\d.]+)|#(\d+))?", re.DOTALL)
# A name, the configuration of a Hub dataset (which is no number), and a weight or a count.
SOURCE = re.compile(r"(.+?)(?::([^:#/]*[^:#/.\d][^:#/]*))?(?::([\d.]+)|#(\d+))?")
# Who speaks, as ShareGPT's many descendants call them.
SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant"}
SPEAKERS |= {"model": "assistant", "bing": "assistant", "bard": "assistant", "system": "system"}
SPEAKERS |= {"tool": "tool", "observation": "tool"}


class BadRow(Exception):
    """Why a row is not a conversation: a reason that many rows can share, and where in the row."""

    def __init__(self, reason, where=""):
        super().__init__(f"{where}: {reason}" if where else reason)
        self.reason = reason


class Source(NamedTuple):
    """A `--dataset`: its name, the configuration of a Hub dataset, and how much of it is used."""

    name: str
    config: str | None = None
    weight: float = 1.0  # how often training sees each conversation; below 1, the share that is used at all
    count: int | None = None  # how many conversations are used


@dataclass
class Findings:
    """What reading some rows brought to light."""

    rows: int = 0
    formats: Counter = field(default_factory=Counter)
    ignored: Counter = field(default_factory=Counter)  # columns and keys that no format uses
    bad: Counter = field(default_factory=Counter)  # rows left out, by reason
    problems: list = field(default_factory=list)  # the first of them, each with its place

    def judge(self, skip_bad_rows):
        """Raise `UserError` for bad rows, or for more of them than the share that may be skipped."""
        count = self.bad.total()
        if count <= skip_bad_rows * self.rows:
            return
        if count == 1 and not skip_bad_rows:
            raise UserError(f"{self.problems[0]}; mend that row, or leave it out with --skip-bad-rows")
        allowed = "--skip-bad-rows leaves them out"
        if skip_bad_rows:
            allowed = f"more than --skip-bad-rows {skip_bad_rows:g}"
        lines = [f"{count:,} of {self.rows:,} rows are no conversations; {allowed}"]
        more = count - len(self.problems)
        raise UserError("\n  ".join(lines + self.problems + ([f"… and {more:,} more"] if more else [])))


# --- where rows come from


def parse_source(text):
    """A `Source` from `name`, `name:2` (twice over), `name:0.5` (half of it), `name#500` (500 of it), `hub/id:config`.

    Raises:
        UserError: an amount of nothing.
    """
    if Path(text).exists():
        return Source(text)
    name, config, weight, count = SOURCE.fullmatch(text).groups()
    try:
        source = Source(name, config, float(weight or 1), int(count) if count else None)
    except ValueError as error:
        raise UserError(f"--dataset {text}: {weight} is not a number") from error
    if source.weight == 0 or source.count == 0:
        raise UserError(f"--dataset {text}: that is none of it; leave it out")
    return source


def files_of(name):
    """The files that a dataset's name stands for, in order; none where it can only be a Hub id.

    Raises:
        UserError: it is plainly meant to be on this disk, and is not, or is of no known kind.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if kind_of(file))
        if not files:
            raise UserError(f"--dataset {name}: no {', '.join(SUFFIXES)} file in this directory")
        return files
    if path.exists():
        if not kind_of(path):
            raise UserError(f"--dataset {name}: not a {', '.join(SUFFIXES)} file (or one of them in .gz, .zst, .bz2)")
        return [path]
    if kind_of(path) or path.suffix in (".csv", ".txt") or hub.looks_like_a_path(name):
        raise UserError(f"--dataset {name}: there is no such file")
    return []


def kind_of(path):
    """The suffix that says what a file is, without its compression's; None where it is none of ours."""
    suffixes = [suffix for suffix in path.suffixes if suffix not in COMPRESSED]
    return suffixes[-1] if suffixes and suffixes[-1] in SUFFIXES else None


def rows_of(source, split):
    """Yield `(place, row)` of a source; a row that could not be read is a `BadRow` in its place."""
    files = files_of(source.name)
    if not files:
        rows = hub.load_hub_dataset(source.name, source.config, split)
        yield from ((f"{source.name} ({split}) row {number}", row) for number, row in enumerate(rows))
    for path in files:
        try:
            if kind_of(path) == ".parquet":
                yield from rows_of_parquet(path)
            else:
                with pyarrow.input_stream(str(path), compression="detect") as stream:
                    yield from rows_of_json(path, io.BufferedReader(stream))
        except (OSError, EOFError, pyarrow.ArrowException) as error:
            raise UserError(f"{path}: cannot be read: {first_line(error)}") from error


def rows_of_parquet(path):
    """Yield `(file row N, row)`, counted from 0 as `datasets` does."""
    number = 0
    for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1000):
        for row in batch.to_pylist():
            yield f"{path} row {number}", row
            number += 1


def rows_of_json(path, lines):
    """Yield `(file:line, row)` of JSON lines, or of the items of one JSON array."""
    begins = lines.peek(1024)[:1024].removeprefix(b"\xef\xbb\xbf").lstrip()
    if begins.startswith(b"["):
        yield from rows_of_array(path, lines.read())
        return
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield f"{path}:{number}", parse_line(line)


def parse_line(line):
    """The JSON value in a line of bytes, or a `BadRow`."""
    try:
        return json.loads(line.decode("utf-8-sig").rstrip())
    except UnicodeDecodeError as error:
        return BadRow("not UTF-8", f"byte {error.start + 1}")
    except RecursionError:
        return BadRow("JSON nested too deeply")
    except ValueError as error:
        if not line.endswith(b"\n"):
            return BadRow("the file ends within this row: it was cut short")
        return BadRow("not valid JSON", f"column {error.colno}, {error.msg}")


def rows_of_array(path, content):
    """Yield `(file:line, row)` of the items of a JSON array; the first broken item is the last."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        yield f"{path}:{line}", BadRow("not UTF-8")
        return
    decoder, space = json.JSONDecoder(), re.compile(r"[\s]*")
    line, counted, position = 1, 0, space.match(text, text.index("[") + 1).end()
    while text[position : position + 1] != "]":
        line, counted = line + text.count("\n", counted, position), position
        try:
            row, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            cut_short = position >= len(text)
            reason = "the file ends within the array: it was cut short" if cut_short else "not valid JSON"
            yield f"{path}:{line}", BadRow(reason)
            return
        yield f"{path}:{line}", row
        position = space.match(text, position).end()
        if text[position : position + 1] == ",":
            position = space.match(text, position + 1).end()


# --- what rows say


def read_conversations(sources, split="train", max_examples=0, skip_bad_rows=0.0, findings=None):
    """Yield `(place, number of its source, messages)` for each row of some sources, checked.

    Args:
        sources: a list of `Source`.
        max_examples: stop after so many rows; 0: all.
        skip_bad_rows: the share of rows that may be left out; 0: none.
        findings: a `Findings` to fill.

    Raises:
        UserError: no such source, nothing in it, or (at the end, once all rows have been read) rows that are not
            conversations: the first ten by place and reason.
    """
    findings = Findings() if findings is None else findings
    for number, source in enumerate(sources):
        for place, row in rows_of(source, split):
            if max_examples and findings.rows == max_examples:
                break
            findings.rows += 1
            try:
                messages = conversation_of(row, findings)
            except BadRow as problem:
                findings.bad[problem.reason] += 1
                if len(findings.problems) < SHOWN_PROBLEMS:
                    findings.problems.append(f"{place}: {problem}")
            else:
                yield place, number, messages
    findings.judge(skip_bad_rows)
    if findings.rows == findings.bad.total():
        names = " ".join(source.name for source in sources)
        raise UserError(f"--dataset {names}: there are no conversations in it")


def read_file(path, **options):
    """All conversations of one file, as a list: `read_conversations` without places and sources."""
    return [messages for _, _, messages in read_conversations([Source(str(path))], **options)]


def conversation_of(row, findings):
    """The messages of a row in any known format, checked.

    Raises:
        BadRow: it is not a conversation, or has nothing to train.
    """
    if isinstance(row, BadRow):
        raise row
    if not isinstance(row, dict):
        raise BadRow("not a JSON object")
    row = {name: value for name, value in row.items() if value is not None}  # a table's way to leave a key out
    name, keys, read = next((entry for entry in FORMATS if set(entry[1]) <= row.keys()), (None, (), None))
    if name is None:
        raise BadRow(f"no conversation: none of {', '.join('+'.join(keys) for _, keys, _ in FORMATS)}")
    messages = read(row, findings)
    findings.formats[name] += 1
    findings.ignored.update(row.keys() - {*keys, *OPTIONAL.get(name, ())})
    replies = [message for message in messages if message["role"] == "assistant"]
    if not replies:
        raise BadRow("no message is the assistant's: there is nothing to train")
    if not any(message["train"] for message in replies):
        raise BadRow("no message of the assistant's is to be trained")
    return messages


def read_messages(row, findings, key="messages", roles=None, names=("role", "content")):
    """Messages as role and content, or as they are called in `names`, with roles as they are called in `roles`."""
    if not isinstance(row[key], list) or not row[key]:
        raise BadRow(f'"{key}" is not a list of messages')
    role_key, content_key = names
    messages = []
    for number, given in enumerate(row[key], 1):
        where = f"message {number}"
        if not isinstance(given, dict):
            raise BadRow("not an object with a role and a content", where)
        given = {name: value for name, value in given.items() if value is not None}
        if role_key not in given:
            raise BadRow(f'no "{role_key}"', where)
        role = given[role_key] if roles is None or not isinstance(given[role_key], str) else roles.get(given[role_key])
        if role not in ROLES:
            known = ", ".join(ROLES if roles is None else roles)
            raise BadRow(f"an unknown {role_key} (known: {known})", f"{where}, {given[role_key]!r:.40}")
        if given.get("tool_calls"):
            raise BadRow("tool_calls, which would be lost: write them into its content", where)
        if content_key not in given:
            raise BadRow(f'no "{content_key}"', where)
        messages.append(
            {"role": role, "content": text_of(given[content_key], where), "train": is_trained(given, where)}
        )
        used = {role_key, content_key, "train", "weight", "tool_calls"}
        findings.ignored.update(f"{key}[].{name}" for name in given.keys() - used)
    return messages


def text_of(content, where):
    """A content as text: a string, or a list of text parts, joined."""
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        if len(texts) < len(content) or not all(isinstance(text, str) for text in texts):
            raise BadRow('its content has parts that are not {"type": "text", "text": …}', where)
        content = "".join(texts)
    if not isinstance(content, str):
        raise BadRow("its content is not a text", where)
    if not content.strip():
        raise BadRow("its content is empty", where)
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise BadRow("its content has half a surrogate pair, which is no Unicode", where) from error
    return content


def is_trained(message, where):
    """Whether a message may be supervised: `"train"`, or OpenAI's `"weight"` of 0 or 1."""
    trained = message.get("train", message.get("weight", True))
    if trained not in (0, 1):  # False and True are these too
        raise BadRow('"train" must be true or false, "weight" 0 or 1', where)
    return bool(trained)


def read_sharegpt(row, findings):
    """ShareGPT: messages with `from` and `value`, under `conversations`; some write role and content there."""
    first = row["conversations"][0] if isinstance(row["conversations"], list) and row["conversations"] else None
    if isinstance(first, dict) and "role" in first:
        return read_messages(row, findings, "conversations")
    return read_messages(row, findings, "conversations", SPEAKERS, ("from", "value"))


def read_prompt_and_completion(row, findings):
    """A prompt and its completion, as texts or as messages; only the completion is trained."""
    if isinstance(row["prompt"], str) and isinstance(row["completion"], str):
        return say(("user", "prompt", row["prompt"]), ("assistant", "completion", row["completion"]))
    prompt, completion = (read_messages(row, findings, key) for key in ("prompt", "completion"))
    return [{**message, "train": False} for message in prompt] + completion


def read_alpaca(row, _findings):
    """Alpaca: an instruction, perhaps with an input, and the output."""
    parts = [row["instruction"], row.get("input", "")]
    if not all(isinstance(part, str) for part in parts):
        raise BadRow('"instruction" or "input" is not a text')
    question = "\n\n".join(part for part in parts if part.strip())
    system = [("system", "system", row["system"])] if row.get("system") else []
    return say(*system, ("user", "instruction", question), ("assistant", "output", row["output"]))


def say(*spoken):
    """Messages from `(role, key, content)`s."""
    return [{"role": role, "content": text_of(content, f'"{key}"'), "train": True} for role, key, content in spoken]


FORMATS = (
    ("messages", ("messages",), read_messages),
    ("ShareGPT", ("conversations",), read_sharegpt),
    ("prompt/completion", ("prompt", "completion"), read_prompt_and_completion),
    ("Alpaca", ("instruction", "output"), read_alpaca),
)
OPTIONAL = {"Alpaca": ("input", "system")}
