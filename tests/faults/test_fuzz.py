"""Random files, flags and damage, bounded and seeded: what was asked, or one line why not; never a traceback."""

import contextlib
import gzip
import io
import json
import random
import shutil
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import data as data_command
import eval as eval_command
import train as train_command
from config import Config, Parser, UserError, first_line
from conversations.formats import ReadReport, read_conversations
from conversations.sources import parse_source
from tests.faults.harness import lines, some

FUZZED = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
COMMANDS = {"train.py": train_command.main, "data.py": data_command.main, "eval.py": eval_command.main}


def outcome(command, *argv):
    """The exit status of a command, and what it said on stderr; any exception but a mistake's line is a failure."""
    said = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        try:
            return COMMANDS[command](list(map(str, argv))), said.getvalue()
        except (UserError, OSError) as error:  # which `run_command` prints
            return 1, said.getvalue() + first_line(error)
        except SystemExit as leaving:  # --help
            return leaving.code, said.getvalue()


# --- (a) any bytes as a dataset file

GOOD = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello\n[{,}]"}]}
ROW = st.sampled_from([GOOD, GOOD["messages"], {**GOOD, "note": [1]}, {}, {"messages": []}, 7, "x", None, [], [1]])
ITEM = st.sampled_from([GOOD, {**GOOD, "note": "\u2028"}, {}, {"messages": "x"}])
BAD_LINE = st.sampled_from([b"{", b"nope", b'{"messages": [', b"\xff\xfe", b"{} {}", b'"\\ud800', b"[1, 2", b"\x00"])


def rows_in(value):
    """How many rows a JSON value stands for: an array's items, or one."""
    is_rows = isinstance(value, list) and value and not (isinstance(value[0], dict) and "role" in value[0])
    return len(value) if is_rows else 1


def read(path):
    """How many conversations of a file are used, and the `ReadReport`; None where it is refused as a whole."""
    report = ReadReport()
    try:
        reading = read_conversations([parse_source(str(path))], skip_bad_rows=1 - 1e-9, report=report)
        return sum(1 for _ in reading), report
    except UserError:
        return None, report


@FUZZED
@given(
    st.lists(st.one_of(ROW, st.lists(ITEM, min_size=1, max_size=3), BAD_LINE, st.sampled_from([b"", b"  "]))),
    st.sampled_from([b"\n", b"\r\n"]),
    st.sampled_from([b"", b"\xef\xbb\xbf"]),
)
def test_every_line_of_a_file_is_used_or_named(tmp_path_factory, values, end, mark):
    path = tmp_path_factory.mktemp("fuzz") / "rows.jsonl"
    encoded = [value if isinstance(value, bytes) else json.dumps(value).encode() for value in [{}, GOOD, *values]]
    path.write_bytes(mark + b"".join(line + end for line in encoded))
    there = 2 + sum(bool(value.strip()) if isinstance(value, bytes) else rows_in(value) for value in values)
    used, report = read(path)
    assert used + report.bad.total() == report.rows == there


@FUZZED
@given(
    st.lists(ITEM, max_size=6),
    st.sampled_from([None, 1]),
    st.sampled_from(["", " ", "\n", "x", "]", ",", "{", "[", "[1", "null", "\n[{}]"]),
)
def test_every_row_of_an_array_is_used_or_named(tmp_path_factory, rows, indent, rest):
    path = tmp_path_factory.mktemp("fuzz") / "rows.json"
    path.write_text("[\n" + json.dumps([GOOD, *rows], indent=indent)[1:] + rest)
    used, report = read(path)
    if rest.strip():
        assert used is None
    else:
        assert used + report.bad.total() == report.rows == 1 + len(rows)


def as_lines(rows):
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def as_parquet(rows):
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue()


FILES = {
    "a.jsonl": as_lines([GOOD] * 6),
    "a.json": json.dumps([GOOD] * 6, indent=1).encode(),
    "a.jsonl.gz": gzip.compress(as_lines([GOOD] * 6)),
    "a.parquet": as_parquet([GOOD] * 6),
    "a.parquet.gz": gzip.compress(as_parquet([GOOD] * 6)),
}


@FUZZED
@given(
    st.sampled_from(sorted(FILES)),
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 40), st.binary(max_size=12)), max_size=3),
)
def test_any_bytes_are_read_or_refused(tmp_path_factory, name, changes):
    content = FILES[name]
    for place, length, new in changes:
        place %= len(content) + 1
        content = content[:place] + new + content[place + length :]
    path = tmp_path_factory.mktemp("fuzz") / name
    path.write_bytes(content)
    used, report = read(path)
    if used is not None:
        assert used + report.bad.total() == report.rows
        if name == "a.jsonl" and not content.lstrip().startswith(b"["):
            assert report.rows >= sum(bool(line.strip()) for line in content.split(b"\n"))


# --- (b) any flags

NUMBERS = ["-1", "0", "1", "2", "7", "0.25", "1e3", "1e-12", "nan", "inf", "x", "", str(2**63), "9" * 30, "٣"]
WORDS = ["", "x", "-", "a b", "é", "..", "/", "\x01", *"chatml model none ultrachat quickstart cpu cuda".split()]


def odd_values(setting, model, chats):
    """Values for a flag, most of them odd."""
    own = {
        "model": [model, model / "x", "no/such", "a:b"],
        "dataset": [f"{chats}{amount}" for amount in ("", ":2", ":0.5", "#3", "#99", ":x", ":-1", "#", ":1e9")],
        "eval_dataset": [chats, f"{chats}#4", f"{chats}:3"],
        "output_dir": [chats, chats.parent, "out"],
        "max_length": ["40"],
        "batch_size": ["5"],
    }
    choices = list(setting.metadata["parsing"].get("choices", []))
    if setting.type in (int, float):
        return NUMBERS + own.get(setting.name, [])
    return WORDS + choices + [str(value) for value in own.get(setting.name, []) * 3]


@pytest.mark.parametrize("seed", some(range(240), fast=30))
def test_any_flags_do_what_they_say_or_are_refused(tiny_model_dir, chats, tmp_path, monkeypatch, seed):
    monkeypatch.chdir(tmp_path)
    fields = {name: setting for name, setting in Config.__dataclass_fields__.items() if name != "compile"}  # a minute
    chance, run = random.Random(seed), tmp_path / "run"
    argv = ["--model", tiny_model_dir, "--dataset", chats, "--dtype", "fp32", "--max-steps", "2", "--output-dir", run]
    asked = {}
    for name in chance.sample(sorted(fields), chance.randint(1, 3)):
        flag = "--" + name.replace("_", "-")
        if fields[name].type is bool:
            argv.append(flag if chance.random() < 0.5 else flag.replace("--", "--no-"))
            continue
        asked[name] = chance.choice(odd_values(fields[name], tiny_model_dir, chats))
        argv += [f"{flag}={asked[name]}"]
    plan_only = "max_steps" in asked  # of any number of updates
    status, _ = outcome("train.py", *argv, *["--dry-run"] * plan_only)
    assert status in (0, 1)
    record = Path(asked.get("output_dir", run)) / "config.json"
    if status == 0 and not plan_only:
        recorded = json.loads(record.read_text())["config"]
        parser = Parser()
        parser.add_config_flags()
        named, _ = parser.parse(list(map(str, argv)))
        for name in asked.keys() - {"preset", "output_dir", "model", "dataset", "eval_dataset"}:
            assert recorded[name] == named[name]
    elif status:
        assert not record.exists() or record.parent != run


# --- (c) any damage to a run


@pytest.fixture
def one_thread():
    """As the processes of the uninterrupted run have: another number of threads rounds otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


JSON = ["null", "[]", "{}", '{"a": 1}', "7", '[{"step": 1}]', '{"config": {}}', '"x"', '{"after": []}']
DAMAGES = {
    "truncated": lambda path, _: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path, _: path.write_bytes(b""),
    "a bit flipped": lambda path, chance: path.write_bytes(flipped(path.read_bytes() or b"\0", chance)),
    "garbage": lambda path, chance: path.write_bytes(chance.randbytes(chance.choice([1, 50, 5000]))),
    "other JSON": lambda path, chance: path.write_text(chance.choice(JSON)),
    "removed": lambda path, _: path.unlink(),
    "a directory": lambda path, _: (path.unlink(), path.mkdir()),
}


def flipped(content, chance):
    """Bytes with one bit another."""
    place = chance.randrange(len(content))
    return content[:place] + bytes([content[place] ^ 1 << chance.randrange(8)]) + content[place + 1 :]


def files_of(run):
    return sorted(path.relative_to(run) for path in Path(run).rglob("*") if path.is_file() and path.name != ".lock")


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("seed", some(range(200), fast=8))
def test_a_damaged_run_resumes_exactly_or_says_why_not(killed, uninterrupted, tmp_path, seed):
    chance, run = random.Random(seed), tmp_path / "run"
    shutil.copytree(killed, run)
    name = chance.choice(files_of(run))
    damage = chance.choice(sorted(DAMAGES))
    DAMAGES[damage](run / name, chance)
    for foreign in (run / "mine.txt", run / "checkpoints" / "mine.txt", tmp_path / "mine.txt"):
        foreign.write_text("mine")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}

    assert outcome("train.py", "--output-dir", run, "--dataset", "x.jsonl")[0] == 1
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert outcome("eval.py", run, "--prompts", "Hi", "--max-new-tokens", "2")[0] in (0, 1)

    status, said = outcome("train.py", "--resume", run)
    assert status in (0, 1)
    for foreign in (run / "mine.txt", run / "checkpoints" / "mine.txt", tmp_path / "mine.txt"):
        assert foreign.read_text() == "mine"
    if status == 0 and not said:
        assert lines(run) == lines(uninterrupted), f"{name} {damage}"
        for same in ("answers.json", "best/model.safetensors"):
            assert (run / same).read_bytes() == (uninterrupted / same).read_bytes(), f"{name} {damage}"


@pytest.mark.parametrize("seed", some(range(100), fast=6))
def test_a_damaged_finished_run_is_shown_as_it_was_or_says_why_not(uninterrupted, tmp_path, seed):
    chance, run = random.Random(seed), tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    name = chance.choice([name for name in files_of(run) if name.parts[0] != "checkpoints"])
    DAMAGES[chance.choice(sorted(DAMAGES))](run / name, chance)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert outcome("eval.py", run, "--prompts", "Hi", "--max-new-tokens", "2")[0] in (0, 1)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert outcome("train.py", "--resume", run)[0] in (0, 1)
