"""Where conversations come from: files, directories and datasets on the Hub, read row by row with their locations."""

import csv
import functools
import io
import itertools
import json
import re
import textwrap
from pathlib import Path
from typing import NamedTuple

import pyarrow
import pyarrow.parquet

from config import UserError, first_line, rewrite_errors
from storage import hub

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".tsv")
COMPRESSED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}  # as pyarrow calls them
# Beside the rows of a dataset, or written by datasets' `save_to_disk`.
METADATA_FILES = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
csv.field_size_limit(2**31 - 1)  # a text may be long
QUANTITY = re.compile(r"(?P<name>.+?)(?::(?P<weight>\d+\.?\d*|\.\d+)|#(?P<count>\d+))?", re.DOTALL)
HUB_NAME = re.compile(r"(?P<name>[^:@~#]+)(~(?P<revision>[^:@~#]+))?(:(?P<config>[^:@~#/]+))?(@(?P<split>[^@~#]+))?")
NOT_UTF8 = re.compile("[\udc80-\udcff]")  # what "surrogateescape" makes of bytes that are not UTF-8
BOM = b"\xef\xbb\xbf"
CORRECT_FILE = "correct the file; --skip-bad-rows cannot tell where the next row begins"


class InvalidRow(Exception):
    """A row that is not a conversation: a reason that many rows can share, the place in the row, and its line."""

    def __init__(self, reason, where="", line=1):
        super().__init__(f"{where}: {reason}" if where else reason)
        self.reason, self.where, self.line = reason, where, line


class Source(NamedTuple):
    """A `--dataset`: its name, the configuration of a Hub dataset, and how much of it is used."""

    name: str
    config: str | None = None
    weight: float = 1.0  # how often training sees each conversation; below 1, the share that is used at all
    count: int | None = None  # how many conversations are used
    split: str | None = None  # of a Hub dataset; None: that of --split
    revision: str | None = None  # of a Hub dataset: a branch, a tag or a commit; None: its main branch

    @property
    def repository(self):
        """The name with its revision, as the user writes them."""
        return f"{self.name}~{self.revision}" if self.revision else self.name


def parse_source(text):
    """A `Source` from `name`, `name:2` (twice), `name:0.5` (half of it), `name#500` (500 of it).

    A name on the Hub may be `id~revision:config@split`. What exists on this disk, or ends as a file, is a file's name.
    """
    if not text.strip():
        raise UserError("--dataset is empty; name a file, a directory or a Hub id")
    if is_local(text):
        return Source(text)
    name, weight, count = QUANTITY.fullmatch(text).group("name", "weight", "count")
    weight, count = float(weight or 1), int(count) if count else None
    if weight == 0 or count == 0:
        raise UserError(f"--dataset {text}: a quantity of 0 uses nothing; leave it out")
    for end in [] if is_local(name) else [found.start() for found in re.finditer("(?<=.)[:#@~]", name)]:
        if is_local(name[:end]):
            also = "" if name[end] in ":#" else "; a file has no split and no revision"
            raise UserError(f"--dataset {text}: {text[end:]} is not a quantity; write :2, :0.5 or #500{also}")
    of_hub = None if is_local(name) else HUB_NAME.fullmatch(name)
    return Source(**(of_hub.groupdict() if of_hub else {"name": name}), weight=weight, count=count)


def name_sources(texts):
    """Short names of some datasets: of a file its last part, on the Hub without the revision; else the texts."""
    names = []
    for source in map(parse_source, texts):
        parts = [f":{source.config}" * bool(source.config), f"@{source.split}" * bool(source.split)]
        names.append(Path(source.name).name if find_files(source.name) else source.name + "".join(parts))
    return names if len(set(names)) == len(names) else list(texts)


def is_local(name):
    """Whether a name is that of a file or directory on this disk, or could only be one."""
    path = Path(name).expanduser()
    return path.exists() or bool(file_format(path)) or "\\" in name


def file_format(path):
    """The suffix that names a file's format, compression aside; None for an unknown one."""
    suffix = (path.with_suffix("") if path.suffix.lower() in COMPRESSED else path).suffix.lower()
    return suffix if suffix in SUFFIXES else None


def check_sources(config, recorded=()):
    """Check that the datasets of a `Config` exist, before anything is loaded.

    Returns the commits of those on the Hub, by name: those `recorded` by a run that is resumed, else those of today.
    """
    commits = {}
    for flag, texts in (("--dataset", config.dataset), ("--eval-dataset", config.eval_dataset)):
        with rewrite_errors("--dataset", flag):
            for source in map(parse_source, texts):
                if not find_files(source.name):
                    revision = dict(recorded).get(source.repository, source.revision)
                    commits[source.repository], _ = hub.find_commit("dataset", source.name, source.config, revision)
    return commits


def pin_commits(settings, commits):
    """Settings in which each name on the Hub has its commit, of {"model": {name: commit}, "dataset": {…}}."""

    def pin(text):
        source = parse_source(text)
        commit = commits.get("dataset", {}).get(source.repository)
        return f"{source.name}~{commit}{text[len(source.repository) :]}" if commit else text

    pinned = {name: tuple(map(pin, settings[name])) for name in ("dataset", "eval_dataset")}
    if commit := commits.get("model", {}).get(settings["model"]):
        pinned["model"] = f"{hub.split_revision(settings['model'])[0]}@{commit}"
    return {**settings, **pinned}


def load_from_hub(source, split):
    """The dataset of a `Source` on the Hub, in its own split or else in this one."""
    return hub.load_hub_dataset(source.name, source.config, source.split or split, source.revision)


def find_files(name):
    """The files that a dataset's name stands for, in order; none where it can only be a Hub id."""
    path = Path(name).expanduser()
    if path.is_dir():
        if not (files := files_in(path)):
            raise UserError(f"--dataset {name}: no {', '.join(SUFFIXES)} file in this directory itself")
    elif path.exists():
        files = [path]
    elif file_format(path) or path.suffix == ".txt" or hub.looks_like_a_path(name):
        raise UserError(f"--dataset {name}: there is no such file")
    else:
        return []
    for file in files:
        if not file.is_file():
            raise UserError(f"--dataset {file}: not a regular file; write its rows to one")
        if not file_format(file):
            raise UserError(f"--dataset {name}: not a {', '.join(SUFFIXES)} file (or one of them in .gz, .zst, .bz2)")
    return files


def files_in(directory):
    """The files in a directory that are read as rows, in order."""
    files = (file for file in directory.iterdir() if file_format(file) and not file.name.startswith("."))
    return sorted(file for file in files if file.name not in METADATA_FILES)


def notes_on_directories(sources):
    """A line for each directory among some sources: the files in it that are read, and those that are not."""
    for source in sources:
        path = Path(source.name).expanduser()
        if path.is_dir():
            read = files_in(path)
            others = sorted(file.name + "/" * file.is_dir() for file in {*path.iterdir()} - {*read})
            rest = f"; not read: {textwrap.shorten(', '.join(others), 300)}" if others else ""
            yield f"{source.name}: {textwrap.shorten(', '.join(file.name for file in read), 300)} read{rest}"


def read_rows(source, split):
    """Yield `(location, row)` of a source; a row that cannot be parsed is an `InvalidRow`.

    The location is `file:line` in JSON lines and CSV, else `file row N` (or of the Hub's), from 0 as in `datasets`.
    """
    files = find_files(source.name)
    if not files:
        # As Arrow has it: what `datasets` makes of a value does not keep the nulls of JSON apart from those of a table.
        dataset = load_from_hub(source, split).with_format("arrow")
        name = f"{source.name}:{source.config}" if source.config else source.name
        yield from read_table(f"{name} ({source.split or split})", dataset.iter(batch_size=1000))
    for path in files:
        try:
            if hub.is_lfs_pointer(path):
                raise UserError(f"{path}: a git-lfs pointer, not the file itself; run: git lfs pull")
            with pyarrow.input_stream(str(path), compression=COMPRESSED.get(path.suffix.lower())) as stream:
                yield from READERS.get(file_format(path), read_json)(path, stream)
        except (OSError, EOFError, UnicodeEncodeError, pyarrow.ArrowException) as error:
            raise UserError(f"{path}: cannot be read: {first_line(error)}") from error


def read_parquet(path, stream):
    """Yield `(location, row)` of a Parquet file."""
    # Parquet is read from its end: compressed, all of it is needed.
    file = pyarrow.BufferReader(stream.read()) if path.suffix.lower() in COMPRESSED else path
    yield from read_table(path, pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1000))


def read_table(name, batches):
    """Yield `(location, row)` of the Arrow batches of a table; a value that Python cannot have is an `InvalidRow`."""
    numbers = itertools.count()
    for batch in batches:
        for values in zip(*map(read_column, batch.columns), strict=True):
            yield f"{name} row {next(numbers)}", dict(zip(batch.schema.names, values, strict=True))


def read_column(column):
    """Yield the values of a column as JSON has them, or else an `InvalidRow`."""
    decode = make_decoder(column.type)
    for value in column:
        try:
            yield decode(value.as_py())
        except Exception as error:  # not UTF-8, not JSON, a year above 9999: whatever Python has against it
            yield InvalidRow(f"a value that cannot be read ({type(error).__name__})")


def make_decoder(kind):
    """A function from the values of an Arrow type to those of JSON; what JSON has no place for stays what it is.

    The keys that only other rows have are left out, as a table fills them with null. `arrow.json` is JSON text.
    """
    if isinstance(kind, pyarrow.JsonType):
        return lambda value: None if value is None else json.loads(value)
    if pyarrow.types.is_struct(kind):
        fields = {field.name: make_decoder(field.type) for field in kind}
        return lambda value: value and {key: fields[key](item) for key, item in value.items() if item is not None}
    if pyarrow.types.is_map(kind):
        decode = make_decoder(kind.item_type)
        return lambda value: None if value is None else {key: decode(item) for key, item in value}
    if pyarrow.types.is_nested(kind) and hasattr(kind, "value_type"):  # a list
        decode = make_decoder(kind.value_type)
        return lambda value: value and [decode(item) for item in value]
    return lambda value: value


def read_json(path, stream):
    """Yield `(location, row)` of JSON lines, or of an array over many lines; a list of messages is one row.

    Raises:
        UserError: an array over many lines is not valid JSON: where its next row begins is then unknown.
    """
    lines = io.BufferedReader(stream)
    numbered = ((number, line) for number, line in enumerate(lines, 1) if line.removeprefix(BOM).strip())
    begin, first = next(numbered, (1, b""))
    head = first.removeprefix(BOM).strip()[:3]
    if head in (b"", b"[]") and not lines.peek(1):
        return
    if head == b"{" or (head[:1] == b"[" and isinstance(parse_json(first), InvalidRow)):  # one value over many lines
        value = parse_json((first + lines.read()).rstrip())
        if isinstance(value, InvalidRow):
            raise UserError(f"{path}:{begin - 1 + value.line}: {value}; {CORRECT_FILE}")
        yield from ((f"{path} row {number}", row) for number, row in enumerate(split_array(value)))
        return
    for number, line in itertools.chain([(begin, first)], numbered):
        rows = split_array(parse_json(line))
        for place, row in enumerate(rows):
            yield f"{path}:{number} row {place}" if len(rows) > 1 else f"{path}:{number}", row


def read_csv(path, stream, delimiter=","):
    """Yield `(location, row)` of comma-separated values under a header, as strings; an empty cell is None.

    Raises:
        UserError: the quotation marks are not valid: where the next row begins is then unknown.
    """
    text = io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline="")
    rows, begin, header = csv.reader(text, delimiter=delimiter, strict=True), 1, None
    try:
        for cells in rows:
            line, begin = begin, rows.line_num + 1
            if not cells:
                continue
            if header is None:
                header = check_header(cells, f"{path}:{line}")
            elif len(cells) != len(header):
                yield f"{path}:{line}", InvalidRow(f"it has {len(cells)} cells, and the header {len(header)}")
            elif NOT_UTF8.search("".join(cells)):
                yield f"{path}:{line}", InvalidRow("not UTF-8")
            else:
                yield f"{path}:{line}", {name: cell or None for name, cell in zip(header, cells, strict=True)}
    except csv.Error as error:
        raise UserError(f"{path}:{begin}: not valid CSV: {error}; {CORRECT_FILE}") from error


def check_header(cells, location):
    """The names of the columns of a CSV file; one without a name, as pandas writes for its index, gets a number."""
    names = [cell or f"column {number}" for number, cell in enumerate(cells, 1)]
    twice = [name for name in names if names.count(name) > 1]
    if twice or NOT_UTF8.search("".join(names)):
        problem = f"two columns are named {twice[0]!r}" if twice else "not UTF-8; save it as UTF-8"
        raise UserError(f"{location}: {problem}")
    return names


READERS = {".parquet": read_parquet, ".csv": read_csv, ".tsv": functools.partial(read_csv, delimiter="\t")}


def split_array(value):
    """The rows in a JSON value: itself, or the items of an array of rows; a list of messages is a row of them."""
    rows = [value] if not isinstance(value, list) or not value or is_conversation(value) else value
    return [{"messages": row} if is_conversation(row) else row for row in rows]


def is_conversation(value):
    """Whether a JSON value looks like a list of messages rather than a list of rows."""
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, dict) and bool(first.keys() & {"role", "from"})


def parse_json(content):
    """The JSON value in some bytes, or an `InvalidRow`."""
    try:
        text = content.removeprefix(BOM).decode().rstrip()
        return json.loads(text)
    except UnicodeDecodeError as error:
        *earlier, last = content[: error.start].split(b"\n")
        return InvalidRow("not UTF-8", f"byte {len(last) + 1}", len(earlier) + 1)
    except json.JSONDecodeError as error:
        ends_within = error.pos >= len(text) or error.msg.startswith("Unterminated string")
        if ends_within and not content.endswith(b"\n"):
            return InvalidRow("the file ends within this row: it is truncated", line=error.lineno)
        return InvalidRow("not valid JSON", f"column {error.colno}, {error.msg}", error.lineno)
    except (RecursionError, ValueError) as error:  # nested too deeply, or a number of too many digits
        return InvalidRow(f"not valid JSON: {first_line(error)}")
