"""Where conversations come from: files, directories and datasets on the Hub, read row by row with their locations."""

import io
import json
import re
from pathlib import Path
from typing import NamedTuple

import pyarrow
import pyarrow.parquet

from config import UserError, first_line
from storage import hub

COMPRESSED = (".gz", ".zst", ".bz2")
SUFFIXES = (".jsonl", ".json", ".parquet")
# A name, the configuration of a Hub dataset (which is no number), and a weight or a count.
SOURCE = re.compile(r"(.+?)(?::([^:#/]*[^:#/.\d][^:#/]*))?(?::([\d.]+)|#(\d+))?", re.DOTALL)


class InvalidRow(Exception):
    """Why a row is not a conversation: a reason that many rows can share, and the location in the row."""

    def __init__(self, reason, where=""):
        super().__init__(f"{where}: {reason}" if where else reason)
        self.reason = reason


class Source(NamedTuple):
    """A `--dataset`: its name, the configuration of a Hub dataset, and how much of it is used."""

    name: str
    config: str | None = None
    weight: float = 1.0  # how often training sees each conversation; below 1, the share that is used at all
    count: int | None = None  # how many conversations are used


def parse_source(text):
    """A `Source` from `name`, `name:2` (twice over), `name:0.5` (half of it), `name#500` (500 of it), `hub/id:config`.

    Raises:
        UserError: the amount is 0 or not a number.
    """
    if Path(text).exists():
        return Source(text)
    name, config, weight, count = SOURCE.fullmatch(text).groups()
    try:
        source = Source(name, config, float(weight or 1), int(count) if count else None)
    except ValueError as error:
        raise UserError(f"--dataset {text}: {weight} is not a number") from error
    if source.weight == 0 or source.count == 0:
        raise UserError(f"--dataset {text}: an amount of 0 uses nothing; leave it out")
    return source


def files_of(name):
    """The files that a dataset's name stands for, in order; none where it can only be a Hub id.

    Raises:
        UserError: it looks like a file, and is missing or of no known kind.
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
    """The suffix that names a file's format, compression aside; None for an unknown one."""
    suffixes = [suffix for suffix in path.suffixes if suffix not in COMPRESSED]
    return suffixes[-1] if suffixes and suffixes[-1] in SUFFIXES else None


def rows_of(source, split):
    """Yield `(location, row)` of a source; a row that cannot be read is an `InvalidRow`."""
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
    """The JSON value in a line of bytes, or a `InvalidRow`."""
    try:
        return json.loads(line.decode("utf-8-sig").rstrip())
    except UnicodeDecodeError as error:
        return InvalidRow("not UTF-8", f"byte {error.start + 1}")
    except RecursionError:
        return InvalidRow("JSON nested too deeply")
    except ValueError as error:
        if not line.endswith(b"\n"):
            return InvalidRow("the file ends within this row: it is truncated")
        return InvalidRow("not valid JSON", f"column {error.colno}, {error.msg}")


def rows_of_array(path, content):
    """Yield `(file:line, row)` of the items of a JSON array; the first broken item is the last."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        yield f"{path}:{line}", InvalidRow("not UTF-8")
        return
    decoder, space = json.JSONDecoder(), re.compile(r"[\s]*")
    line, counted, position = 1, 0, space.match(text, text.index("[") + 1).end()
    while text[position : position + 1] != "]":
        line, counted = line + text.count("\n", counted, position), position
        try:
            row, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            truncated = position >= len(text)
            reason = "the file ends within the array: it is truncated" if truncated else "not valid JSON"
            yield f"{path}:{line}", InvalidRow(reason)
            return
        yield f"{path}:{line}", row
        position = space.match(text, position).end()
        if text[position : position + 1] == ",":
            position = space.match(text, position + 1).end()
