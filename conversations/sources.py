"""Where conversations come from: files, directories and datasets on the Hub, read row by row with their locations."""

import io
import json
import re
from pathlib import Path
from typing import NamedTuple

import pyarrow
import pyarrow.parquet

from config import UserError, first_line, renaming
from storage import hub

SUFFIXES = (".jsonl", ".json", ".parquet")
COMPRESSED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}  # as pyarrow calls them
# What a file of JSON does not begin with, and what to do about one that does.
OTHER_BEGINNINGS = {
    b"\xff\xfe": "UTF-16; save it as UTF-8",
    b"\xfe\xff": "UTF-16; save it as UTF-8",
    b"\x1f\x8b": "compressed by gzip; add .gz to its name",
    b"\x28\xb5\x2f\xfd": "compressed by zstd; add .zst to its name",
    b"BZh": "compressed by bzip2; add .bz2 to its name",
    b"PAR1": "a Parquet file; name it .parquet",
}
ABOUT = ("dataset_info.json", "dataset_infos.json")  # beside the rows of a dataset, but none of them
SAVED = ({"dataset_dict.json"}, {"dataset_info.json", "state.json"})  # what `save_to_disk` of datasets writes
AMOUNT = re.compile(r"(?P<name>.+)(?::(?P<weight>\d+\.?\d*|\.\d+)|#(?P<count>\d+))", re.DOTALL)


class InvalidRow(Exception):
    """Why a row is not a conversation: a reason that many rows can share, and the location in the row."""

    def __init__(self, reason, where=""):
        super().__init__(f"{where}: {reason}" if where else reason)
        self.reason, self.where = reason, where


class Source(NamedTuple):
    """A `--dataset`: its name, the configuration of a Hub dataset, and how much of it is used."""

    name: str
    config: str | None = None
    weight: float = 1.0  # how often training sees each conversation; below 1, the share that is used at all
    count: int | None = None  # how many conversations are used


def parse_source(text):
    """A `Source` from `name`, `name:2` (twice over), `name:0.5` (half of it), `name#500` (500 of it), `hub/id:config`.

    Raises:
        UserError: the name is empty, or the amount is 0 or not understood.
    """
    if not text.strip():
        raise UserError("--dataset is empty; name a file, a directory or a Hub id")
    if is_local(text):
        return Source(text)
    found = AMOUNT.fullmatch(text)
    name, weight, count = found.group("name", "weight", "count") if found else (text, None, None)
    if float(weight or 1) == 0 or int(count or 1) == 0:
        raise UserError(f"--dataset {text}: an amount of 0 uses nothing; leave it out")
    configuration = None
    if not is_local(name):
        base, colon, rest = max(name.rpartition(":"), name.rpartition("#"), key=lambda parts: len(parts[0]))
        if colon and is_local(base):
            raise UserError(f"--dataset {text}: {text[len(base) :]} is not an amount; write :2, :0.5 or #500")
        if colon == ":" and "/" not in rest:
            name, configuration = base, rest
    return Source(name, configuration, float(weight or 1), int(count) if count else None)


def is_local(name):
    """Whether a name is that of a file or directory on this disk, or could only be one."""
    path = Path(name).expanduser()
    return path.exists() or bool(kind_of(path)) or "\\" in name


def files_of(name):
    """The files that a dataset's name stands for, in order; none where it can only be a Hub id.

    Raises:
        UserError: it looks like a file, and is missing or of no known kind.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if any(all((path / file).exists() for file in files) for files in SAVED):
            raise UserError(
                f"--dataset {name}: written by save_to_disk; write it as a file: "
                f"datasets.load_from_disk({str(path)!r}).to_json(…), of a DatasetDict one of its splits"
            )
        files = read_in(path)
        if not files:
            raise UserError(f"--dataset {name}: no {', '.join(SUFFIXES)} file in this directory itself")
        for file in files:
            refuse_unreadable(file)
        return files
    if path.exists():
        refuse_unreadable(path)
        if not kind_of(path):
            raise UserError(f"--dataset {name}: not a {', '.join(SUFFIXES)} file (or one of them in .gz, .zst, .bz2)")
        return [path]
    if "://" in name:
        raise UserError(f"--dataset {name}: URLs are not read; download it, and name the file")
    if kind_of(path) or path.suffix in (".csv", ".txt") or hub.looks_like_a_path(name):
        raise UserError(f"--dataset {name}: there is no such file")
    return []


def check_sources(config):
    """Check that the datasets of a `Config` exist, before anything is loaded: those on disk first, then the Hub's.

    Raises:
        UserError: there is no such file, directory or dataset on the Hub, or the Hub and its cache have no answer.
    """
    flags = [("--dataset", text) for text in config.dataset]
    flags += [("--eval-dataset", config.eval_dataset)] if config.eval_dataset else []
    on_hub = []
    for flag, text in flags:
        with renaming("--dataset", flag):
            source = parse_source(text)
            if not files_of(source.name):
                on_hub.append((flag, source))
    for flag, source in on_hub:
        with renaming("--dataset", flag):
            hub.only_cached("dataset", source.name, source.config)


def read_in(directory):
    """The files in a directory that are read as rows, in order."""
    files = (file for file in directory.iterdir() if kind_of(file) and not file.name.startswith("."))
    return sorted(file for file in files if file.name not in ABOUT)


def refuse_unreadable(path):
    """Raise `UserError` for what is no ordinary file, and for a name that cannot be printed."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"--dataset {str(path)!a}: its name is not UTF-8; rename it") from error
    if not path.is_file():
        raise UserError(f"--dataset {path}: not a regular file; write its rows to one")


def notes_on_directories(sources):
    """Which files of the directories among some sources are read, and what else is in them: a line each."""
    for source in sources:
        path = Path(source.name).expanduser()
        if path.is_dir():
            read = read_in(path)
            others = sorted(file.name + "/" * file.is_dir() for file in {*path.iterdir()} - {*read})
            rest = f"; not read: {shortened(others)}" if others else ""
            yield f"{source.name}: {shortened([file.name for file in read])} read{rest}"


def shortened(names):
    """Some names, of many the first few."""
    more = f" and {len(names) - 10:,} more" if len(names) > 10 else ""
    return ", ".join(names[:10]) + more


def kind_of(path):
    """The suffix that names a file's format, compression aside; None for an unknown one."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in SUFFIXES else None


def rows_of(source, split):
    """Yield `(location, row)` of a source; a row that cannot be read is an `InvalidRow`."""
    files = files_of(source.name)
    if not files:
        rows = hub.load_hub_dataset(source.name, source.config, split)
        yield from ((f"{source.name} ({split}) row {number}", without_nulls(row)) for number, row in enumerate(rows))
    for path in files:
        try:
            if hub.is_lfs_pointer(path):
                raise UserError(f"{path}: a git-lfs pointer, not the file itself; run: git lfs pull")
            if kind_of(path) == ".parquet":
                yield from rows_of_parquet(path)
            else:
                with open_decompressed(path) as stream:
                    lines = io.BufferedReader(stream)
                    refuse_other_beginning(path, lines.peek(4))
                    yield from rows_of_json(path, lines)
        except (OSError, EOFError, pyarrow.ArrowException) as error:
            raise UserError(f"{path}: cannot be read: {first_line(error)}") from error


def refuse_other_beginning(path, content):
    """Raise `UserError` where a file of JSON begins as another kind of file does."""
    for beginning, what in OTHER_BEGINNINGS.items():
        if content.startswith(beginning):
            raise UserError(f"{path}: it is {what}")


def open_decompressed(path):
    """A stream of the bytes of a file, without its compression."""
    return pyarrow.input_stream(str(path), compression=COMPRESSED.get(path.suffix.lower()))


def rows_of_parquet(path):
    """Yield `(file row N, row)`, counted from 0 as `datasets` does."""
    file = path
    if path.suffix.lower() in COMPRESSED:  # Parquet is read from its end, so that all of it is needed
        with open_decompressed(path) as stream:
            file = pyarrow.BufferReader(stream.read())
    number = 0
    for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1000):
        for row in batch.to_pylist():
            yield f"{path} row {number}", without_nulls(row)
            number += 1


def without_nulls(value):
    """A value out of a table without the keys that only other rows have: a table fills them with null."""
    if isinstance(value, dict):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    return list(map(without_nulls, value)) if isinstance(value, list) else value


def rows_of_json(path, lines):
    """Yield `(file:line, row)` of JSON lines, or of the items of JSON arrays.

    An array that is a list of messages is one row. Arrays may follow one another, each on a line or over many.

    Raises:
        UserError: an array over many lines is not valid JSON: where its next row begins is then unknown.
    """
    if lines.peek(1024)[:1024].removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        content = lines.read()
        if content.removeprefix(b"\xef\xbb\xbf").split() == [b"[]"]:
            return
        if not is_value(content.lstrip().partition(b"\n")[0]):
            yield from rows_of_arrays(path, content)
            return
        lines = content.splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield from ((f"{path}:{number}", row) for row in items_of(parse_line(line)))


def is_value(line):
    """Whether a line of bytes is a JSON value by itself."""
    return not isinstance(parse_line(line), InvalidRow)


def items_of(value):
    """The rows in a JSON value: itself, or the items of an array that is not a list of messages."""
    return value if isinstance(value, list) and value and not is_message(value[0]) else [value]


def is_message(value):
    """Whether a JSON value looks like a message rather than a row."""
    return isinstance(value, dict) and bool(value.keys() & {"role", "from"})


def parse_line(line):
    """The JSON value in a line of bytes, or an `InvalidRow`."""
    try:
        return json.loads(text := line.decode("utf-8-sig").rstrip())
    except UnicodeDecodeError as error:
        return InvalidRow("not UTF-8", f"byte {error.start + 1}")
    except RecursionError:
        return InvalidRow("JSON nested too deeply")
    except json.JSONDecodeError as error:
        if not line.endswith(b"\n") and is_truncated(error, text):
            return InvalidRow("the file ends within this row: it is truncated")
        return InvalidRow("not valid JSON", f"column {error.colno}, {error.msg}")
    except ValueError as error:  # a number of more digits than Python reads
        return InvalidRow(f"not valid JSON: {first_line(error)}")


def is_truncated(error, text):
    """Whether a text stops being JSON where it ends, so that more of it might have been valid."""
    rest = text[error.pos :]
    started = any(word.startswith(rest) for word in ("true", "false", "null", "NaN", "Infinity", "-Infinity"))
    escape = "escape" in error.msg and len(rest) < len("\\uFFFF")
    return not rest or started or escape or error.msg.startswith("Unterminated string")


def rows_of_arrays(path, content):
    """Yield `(file:line, row)` of the items of JSON arrays that follow one another, each over any number of lines.

    A value that is no array of rows is a row itself.
    """
    json_text = JsonText(path, content)
    position = json_text.after_space(0)
    while position < len(json_text.text):
        first = json_text.first_row_in_array(position)
        if first is None:
            row, end = json_text.value_at(position)
            yield json_text.location(position), row
            position = json_text.after_space(end)
            continue
        position, separator = first, ","
        while separator == ",":
            row, end = json_text.value_at(position)
            yield json_text.location(position), row
            end = json_text.after_space(end)
            separator = json_text.text[end : end + 1]
            if separator not in (",", "]"):
                raise json_text.invalid(end, "not valid JSON: no comma after a row")
            position = json_text.after_space(end + 1)


class JsonText:
    """The text of a JSON file, read value by value. Positions may only grow, as lines are counted on the way."""

    def __init__(self, path, content):
        try:
            self.text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            raise UserError(f"{path}:{line}: not UTF-8; correct the file") from error
        self.path, self.line, self.counted = path, 1, 0

    def after_space(self, position):
        """The first position, from one on, that is not white space."""
        return re.compile(r"\s*").match(self.text, position).end()

    def first_row_in_array(self, position):
        """Where the first row stands in an array that begins here; None for any other value, a list of messages too."""
        first = self.after_space(position + 1)
        if self.text[position] != "[" or self.text[first : first + 1] == "]" or is_message(self.value_at(first)[0]):
            return None
        return first

    def value_at(self, position):
        """The JSON value at a position, and where it ends."""
        try:
            return json.JSONDecoder().raw_decode(self.text, position)
        except (ValueError, RecursionError) as error:
            ends = isinstance(error, json.JSONDecodeError) and is_truncated(error, self.text)
            where = len(self.text) if ends else getattr(error, "pos", position)
            raise self.invalid(where, "not valid JSON") from error

    def location(self, position):
        """The file and the line of a position."""
        self.line, self.counted = self.line + self.text.count("\n", self.counted, position), position
        return f"{self.path}:{self.line}"

    def invalid(self, position, why):
        """A `UserError` about a position."""
        advice = "correct the file; --skip-bad-rows cannot tell where the next row begins"
        if position >= len(self.text):
            why, advice = "the file ends within the array: it is truncated", "correct the file"
        column = position - self.text.rfind("\n", 0, position)
        return UserError(f"{self.location(position)}: column {column:,}: {why}; {advice}")
