"""Any conversation file: read in whatever format it is, or refused with file and line."""

import gzip
import json
import os
import re
import tracemalloc
from collections import Counter

import pyarrow
import pyarrow.parquet
import pytest

import data as data_command
import eval as eval_command
import train as train_command
from config import UserError
from conversations.formats import ReadReport, read_conversations
from conversations.sources import InvalidRow, Source, find_files, notes_on_directories, parse_source, read_rows
from storage import hub
from tests.conftest import read_file

HELLO = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
GOOD = {"messages": HELLO}
READ = [{**message, "train": True} for message in HELLO]


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def chat(*messages):
    return {"messages": list(messages)}


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def calling(name, arguments="{}", **more):
    return assistant(
        None, tool_calls=[{"type": "function", "function": {"name": name, "arguments": arguments}, **more}]
    )


RESULT = {"role": "tool", "content": "7"}
# --- formats


FORMATS = {
    "messages": {"messages": HELLO},
    "ShareGPT": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]},
    "ShareGPT with roles": {"conversations": HELLO},
    "roles and values": {"messages": [{"role": "user", "value": "Hi"}, {"role": "gpt", "value": "Hello."}]},
    "both pairs": {"messages": [{"value": "x", **user("Hi")}, {"from": "gpt", "content": "Hello.", "value": "x"}]},
    "ShareGPT under messages": {"messages": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]},
    "prompt and completion": {"prompt": "Hi", "completion": "Hello."},
    "prompt and completion, messages": {"prompt": HELLO[:1], "completion": HELLO[1:]},
    "Alpaca": {"instruction": "Hi", "input": "", "output": "Hello."},
    "text parts": {"messages": [user([{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]), HELLO[1]]},
}


@pytest.mark.parametrize("row", FORMATS.values(), ids=FORMATS.keys())
def test_each_format_is_read_with_and_without_a_system_prompt(read, row):
    beside = {"system": "Be brief.", "tools": [], "function_call": None}
    plain, prompted = read(row, {**row, **beside})
    assert [{"role": message["role"], "content": message["content"]} for message in plain] == HELLO
    assert plain[-1]["train"]
    assert [message["content"] for message in prompted] == ["Be brief.", "Hi", "Hello."]


def test_alpaca_puts_the_input_below_the_instruction(read):
    (messages,) = read({"system": "Be brief.", "instruction": "Translate.", "input": "Hund", "output": "Dog"})
    assert [message["role"] for message in messages] == ["system", "user", "assistant"]
    assert [message["content"] for message in messages] == ["Be brief.", "Translate.\n\nHund", "Dog"]


ARRAY = json.dumps([GOOD, GOOD], indent=1).encode()
SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]
SEQUENCES = {
    "two arrays on two lines": (lines([GOOD, GOOD], [GOOD]), 3),
    "an array and lines": (lines([GOOD, GOOD], GOOD), 3),
    "a list of messages on each line": (lines(HELLO, HELLO, SHAREGPT), 3),
    "an array of lists of messages": (json.dumps([HELLO, SHAREGPT], indent=1).encode(), 2),
    "one list of messages": (json.dumps(HELLO, indent=1).encode(), 1),
}


@pytest.mark.parametrize(("content", "count"), SEQUENCES.values(), ids=SEQUENCES)
def test_arrays_and_lists_of_messages_are_read(tmp_path, content, count):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    assert read_file(path) == [READ] * count


def test_a_syntax_error_in_an_array_is_never_skipped(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(ARRAY[:-2] + b",\n{]")
    with pytest.raises(UserError, match="--skip-bad-rows cannot tell where the next row begins"):
        read_file(path, skip_bad_rows=0.9)


def test_only_the_completion_is_trained(read):
    (messages,) = read({"prompt": [*HELLO, user("And?")], "completion": [assistant("So.")]})
    assert [message["train"] for message in messages] == [False, False, False, True]


def test_roles_may_come_in_any_order(read):
    roles = ["assistant", "system", "user", "user", "tool", "assistant", "system", "user"]
    (messages,) = read({"messages": [{"role": role, "content": role} for role in roles]})
    assert [message["role"] for message in messages] == roles


def test_unused_columns_are_reported(read):
    report, named = ReadReport(), {"messages": [{**HELLO[0], "name": "Ada"}, HELLO[1]]}
    read({**GOOD, "id": 1, "none": None}, named, report=report)
    assert (report.rows, dict(report.formats)) == (2, {"messages": 2})
    assert sorted(report.ignored) == ["id", "messages[].name"]


# --- tools and thoughts


SCHEMA = {"type": "function", "function": {"name": "f", "description": "Does it."}}
CALLS = {  # the same conversation, as different people write it
    "OpenAI": {"messages": [user("q"), calling("f", '{"a": 1}'), RESULT, assistant("So.")], "tools": [SCHEMA]},
    "objects": {
        "messages": [
            user("q"),
            assistant("", tool_calls=[{"name": "f", "arguments": {"a": 1}}]),
            RESULT,
            assistant("So."),
        ],
        "tools": json.dumps([SCHEMA["function"]]),
    },
    "ShareGPT": {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "7"},
            {"from": "gpt", "value": "So."},
        ],
        "tools": json.dumps([SCHEMA]),
    },
}


@pytest.mark.parametrize("row", CALLS.values(), ids=CALLS)
def test_tool_calls_are_the_same_however_they_are_written(read, row):
    report = ReadReport()
    (messages,) = read(row, report=report)
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    assert messages == [
        {**user("q"), "train": True, "tools": [SCHEMA]},
        {**assistant(""), "train": True, "tool_calls": [call]},
        {**RESULT, "train": True, "name": "f"},
        {**assistant("So."), "train": True},
    ]
    assert not report.ignored


def test_parallel_results_are_matched_by_their_ids(read):
    calls = [{"id": name, "function": {"name": name, "arguments": ""}} for name in "ab"]
    results = [{"role": "tool", "content": name, "tool_call_id": name} for name in "ba"]
    chat = [user("q"), assistant(None, tool_calls=calls), *results, assistant("x", weight=0)]
    messages = read(GOOD, {"messages": chat})[1]
    assert [message.get("name") for message in messages] == [None, None, "b", "a", None]
    assert [call["id"] for call in messages[1]["tool_calls"]] == ["a", "b"]
    assert messages[1]["tool_calls"][0]["function"]["arguments"] == {}


def test_reasoning_has_three_names(read):
    names = ("thinking", "reasoning_content", "reasoning")
    for messages in read(*({"messages": [user("q"), assistant("x", **{name: "Hm."})]} for name in names)):
        assert messages[1] == {**assistant("x"), "train": True, "thinking": "Hm."}


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({**GOOD, "tools": [SCHEMA]}, ":1: --chat-template chatml has no tools; use --chat-template model"),
        ({"messages": [user("q"), calling("f")]}, ":1: message 2: --chat-template chatml has no tools"),
        (
            {"messages": [user("q"), assistant("x", thinking="Hm.")]},
            ":1: message 2: --chat-template chatml has no reasoning",
        ),
    ],
)
def test_chatml_has_no_tools_and_no_reasoning(tmp_path, row, why):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(row, *[GOOD] * 9))
    with pytest.raises(UserError) as raised:
        read_file(path, plain=True)
    assert str(raised.value).startswith(f"{path}{why}")
    assert len(read_file(path, plain=True, skip_bad_rows=0.1)) == 9


def test_nulls_of_a_table_are_dropped_from_arguments(tmp_path):
    rows = [
        {"messages": [user("q"), assistant("", tool_calls=[{"name": "f", "arguments": arguments}])]}
        for arguments in ({"a": 1}, {"b": 2})
    ]
    write_parquet(tmp_path / "a.parquet", rows)
    found = [messages[1]["tool_calls"][0]["function"]["arguments"] for messages in read_file(tmp_path / "a.parquet")]
    assert found == [{"a": 1}, {"b": 2}]


# --- files


def write_array(path, rows):
    path.write_text(json.dumps(rows, indent=2))


def write_parquet(path, rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


FILES = {
    "a.jsonl": lambda path, rows: path.write_bytes(lines(*rows)),
    "bom.jsonl": lambda path, rows: path.write_bytes(b"\xef\xbb\xbf" + lines(*rows)),
    "windows.jsonl": lambda path, rows: path.write_bytes(lines(*rows).replace(b"\n", b"\r\n\r\n")),
    "no_newline.jsonl": lambda path, rows: path.write_bytes(lines(*rows).rstrip()),
    "array.json": write_array,
    "lines.json": lambda path, rows: path.write_bytes(lines(*rows)),
    "a.parquet": write_parquet,
    "a.parquet.gz": lambda path, rows: (write_parquet(path, rows), path.write_bytes(gzip.compress(path.read_bytes()))),
    "a.jsonl.gz": lambda path, rows: path.write_bytes(gzip.compress(lines(*rows))),
    "a.json.gz": lambda path, rows: path.write_bytes(gzip.compress(json.dumps(rows).encode())),
    "a.jsonl.zst": lambda path, rows: path.write_bytes(pyarrow.Codec("zstd").compress(lines(*rows), asbytes=True)),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_read_by_what_it_is(tmp_path, name):
    FILES[name](tmp_path / name, [GOOD, GOOD])
    assert read_file(tmp_path / name) == [READ, READ]


def test_a_directory_is_its_files_in_order(tmp_path):
    (tmp_path / "b.jsonl").write_bytes(lines(GOOD))
    (tmp_path / "a.json").write_text(json.dumps([{"prompt": "1", "completion": "2"}]))
    (tmp_path / "c.JSONL").write_bytes(lines(GOOD))
    for name in ("notes.txt", "._a.jsonl", "d.jsonl.bak"):
        (tmp_path / name).write_text("not read")
    assert [path.name for path in find_files(tmp_path)] == ["a.json", "b.jsonl", "c.JSONL"]
    assert [messages[0]["content"] for messages in read_file(tmp_path)] == ["1", "Hi", "Hi"]


def test_rows_of_an_array_over_many_lines_are_numbered(tmp_path):
    write_array(tmp_path / "a.json", [GOOD, GOOD])
    locations = [location for location, _, _ in read_conversations([Source(str(tmp_path / "a.json"))])]
    assert locations == [f"{tmp_path}/a.json row 0", f"{tmp_path}/a.json row 1"]


PLACES = {  # rows in a file: where each of them is
    "lines": (lines(GOOD, GOOD), [":1", ":2"]),
    "blank lines before": (b"\n\n" + lines(GOOD, HELLO), [":3", ":4"]),
    "an array on one line": (lines([GOOD, HELLO, GOOD]), [":1 row 0", ":1 row 1", ":1 row 2"]),
    "arrays on lines": (lines([GOOD, GOOD], [GOOD], HELLO), [":1 row 0", ":1 row 1", ":2", ":3"]),
    "an array over many lines": (b"\n\n" + ARRAY, [" row 0", " row 1"]),
    "an object over many lines": (json.dumps(GOOD, indent=1).encode(), [" row 0"]),
}


@pytest.mark.parametrize(("content", "places"), PLACES.values(), ids=PLACES)
def test_each_row_has_a_place_of_its_own(tmp_path, content, places):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    assert [location for location, _, _ in read_conversations([Source(str(path))])] == [f"{path}{at}" for at in places]


def test_a_syntax_error_below_blank_lines_has_its_own_line(tmp_path):
    (tmp_path / "a.json").write_bytes(b"\n\n" + ARRAY[:-2] + b",\n{]")
    with pytest.raises(UserError, match=rf"a\.json:{2 + len(ARRAY.splitlines())}: column 2, "):
        read_file(tmp_path / "a.json")


def test_lists_of_messages_on_lines_are_read_line_by_line(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(HELLO) * 100_000)
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_rows(Source(str(tmp_path / "a.jsonl")), "train")) == 100_000
        assert tracemalloc.get_traced_memory()[1] < 1e6  # of 9 MB
    finally:
        tracemalloc.stop()


def test_an_existing_name_has_no_quantity(tmp_path):
    path = tmp_path / "a.jsonl:2"
    path.touch()
    assert parse_source(str(path)) == Source(str(path))


MISUNDERSTOOD = ":0 #0 :1.2.3 :50% :x2 :-1 :1e3 :nan #-1 #1.5 :en :2:3 #5:2".split()


@pytest.mark.parametrize("text", [f"a.jsonl{amount}" for amount in MISUNDERSTOOD])
def test_an_invalid_quantity_is_refused(text):
    with pytest.raises(UserError, match=r"^--dataset a\.jsonl"):
        parse_source(text)


# --- broken files: each with the line it must give


NO_FORMAT = "no known format: it has none of messages, conversations, prompt+completion, instruction+output, "
NO_FORMAT += "input_ids+labels, text"
NO_REPLY = "no message is the assistant's: nothing would be supervised"
DEEP = b'{"a":' * 100_000
BROKEN_ROWS = [  # a row, and the line it must give after the file's and the row's number
    ({**GOOD, "images": ["a.png"]}, '"images" is not supported'),
    (
        chat(user("Hi"), assistant("x", reasoning_content="Hm.", thinking="Oh.")),
        "message 2: more than one of thinking, reasoning_content, reasoning",
    ),
    (chat(user("Hi"), assistant("x", thinking=1)), "message 2: its reasoning is not a string"),
    ({**GOOD, "tools": "f()"}, '"tools" is not valid JSON'),
    ({**GOOD, "functions": [{"name": "f"}]}, '"functions" is not supported'),
    (chat(user("Hi"), assistant("", function_call={"name": "f"})), 'message 2: "function_call" is not supported'),
    ({**GOOD, "tools": {"name": "f"}}, '"tools" is not a list of tools'),
    ({**GOOD, "tools": [{"name": ""}]}, "tool 1: not an object with the name of a function"),
    (
        {"messages": [user("Hi"), calling("g")], "tools": [{"name": "f"}]},
        "message 2, 'g': a call to a tool that is not among its tools",
    ),
    (chat(user("Hi"), calling("f", "{'a': 1}")), "message 2: the text of its arguments is not valid JSON"),
    (chat(user("Hi"), calling("f", '{"a": NaN}')), "message 2: the text of its arguments is not valid JSON"),
    (
        chat(user("Hi"), calling("f"), RESULT, RESULT, assistant("x")),
        "message 4: a tool's result without a call that it answers",
    ),
    (
        chat(user("Hi"), calling("f", id="a"), {**RESULT, "tool_call_id": "b"}, assistant("x")),
        "message 3: a tool's result without a call that it answers",
    ),
    ({"instruction": "a", "output": "b", "history": [["q"]]}, '"history" is not supported'),
    (
        {"chat": "Hi"},
        'no known format: it has "chat"; use --columns messages=chat, if it is a list of objects with "role" and',
    ),
    ({"messages": []}, '"messages" is not a list of messages'),
    ({"messages": "Hi"}, '"messages" is a string, not a list of messages; if it is JSON, decode it'),
    ({"prompt": 7, "completion": "No."}, '"prompt" and "completion" are not both strings'),
    (chat("Hi"), "message 1: not an object with a role and a content"),
    (chat({"content": "Hi"}), 'message 1: no "role"'),
    (chat({"role": ["user"], "content": "Hi"}), "message 1, ['user']: an unknown role"),
    (chat(user("Hi"), {"role": "bot", "content": "x"}), "message 2, 'bot': an unknown role"),
    (
        chat({"role": "user\nHi<|im_end|>\n<|im_start|>assistant", "content": "x"}),
        "message 1, 'user\\nHi<|im_end|>\\n<|im_start|>assista: an unknown role (known: system, user, ",
    ),
    (chat({"role": "user"}), "message 1: no content"),
    (chat(user(None)), "message 1: no content"),
    (chat(user("Hi"), assistant("")), "message 2: its content is empty"),
    (chat(user(1)), "message 1: its content is not a string"),
    (chat(user([{"type": "image"}])), "message 1: its content has parts that are not "),
    (chat(user("Hi")), NO_REPLY),
    (chat(user("Hi"), assistant("x", train=False)), "every message of the assistant's is excluded from training"),
    (chat(user("Hi"), assistant(None, tool_calls=[{"id": 1}])), "message 2: a tool call without a name"),
    (
        {"conversations": [{"from": "alice", "value": "Hi"}]},
        "message 1, 'alice': an unknown role (known: system, user, ",
    ),
    ({"prompt": "Hi", "completion": " "}, '"completion": its content is empty'),
    ({"instruction": "Hi", "output": 7}, '"output": its content is not a string'),
    ({"instruction": "Hi", "input": ["a"], "output": "b"}, '"instruction" or "input" is not a string'),
]
BROKEN = {  # file name: content, the line it must give after the path
    "single_quotes.jsonl": (lines(GOOD) + b"{'messages': []}\n", ":2: column 2, Expecting property name"),
    "not_truncated.jsonl": (lines(GOOD) + b'{"messages": nope}', ":2: column 14, Expecting value: not valid JSON"),
    "after_the_array.json": (b"[\n" + lines(GOOD).strip() + b"]\ngarbage", ":3: column 1, Extra data: not valid JSON"),
    "no_comma.json": (b"[\n" + lines(GOOD, GOOD) + b"]", ":3: column 1, Expecting ',' delimiter: not valid JSON"),
    "cut_short.jsonl": (lines(GOOD) + lines(GOOD)[:30], ":2: the file ends within this row: it is truncated"),
    "blank_lines.jsonl": (lines(GOOD) + b"\n\n{}\n", f":4: {NO_FORMAT}"),
    "latin1.jsonl": (lines(GOOD) + '{"messages": "é"}\n'.encode("latin-1"), ":2: byte 15: not UTF-8"),
    "binary.jsonl": (b"\x00\x01\x02\n", ":1: column 1, "),
    "deep.jsonl": (DEEP + b"\n", ":1: not valid JSON: maximum recursion depth"),
    "half_emoji.jsonl": (
        lines(GOOD) + b'{"messages": [{"role": "user", "content": "\\ud83d"}]}\n',
        ":2: message 1: its content has half a surrogate pair, which is not valid Unicode",
    ),
    "array.json": (b"[\n" + lines(GOOD).strip() + b",\n{}\n]", f" row 1: {NO_FORMAT}"),
    "array_broken.json": (b"[\n" + lines(GOOD).strip() + b",\n{]", ":3: column 2, "),
    "array_cut.json": (b"[\n" + lines(GOOD).strip() + b",\n", ":2: the file ends within this row: it is truncated"),
    "array_latin1.json": (b'[\n"\xe9"]', ":2: byte 2: not UTF-8"),
    "object.json": (b'{"data": []}', f":1: keys data: {NO_FORMAT}"),
    "object_of_lines.json": (b'{\n"data": []\n}', f" row 0: keys data: {NO_FORMAT}"),
    "objects_of_lines.json": (b'{\n"text": "a"\n}\n' * 2, ":4: column 1, Extra data: not valid JSON"),
}


BROKEN |= {f"row {number}.jsonl": (lines(GOOD, row), f":2: {why}") for number, (row, why) in enumerate(BROKEN_ROWS)}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named_by_file_and_line(tmp_path, name):
    content, complaint = BROKEN[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as raised:
        read_file(path)
    assert str(raised.value).startswith(f"{path}{complaint}")
    advice = r"correct that row(, or leave out such rows with --skip-bad-rows 0\.\d+)?"
    advice += "|where the next row begins|correct the file"
    assert re.search(rf"({advice})$", str(raised.value))
    assert "\n" not in str(raised.value)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
UNREADABLE = {
    "nothing.jsonl": (b"", r"--dataset .*/nothing.jsonl: it has no valid conversations"),
    "nothing.json": (b"[]", r"it has no valid conversations"),
    "cut.jsonl.gz": (gzip.compress(lines(GOOD) * 99)[:-20], r"/cut.jsonl.gz: cannot be read: "),
    "not_gzip.jsonl.gz": (lines(GOOD), r"/not_gzip.jsonl.gz: cannot be read: "),
    "not_parquet.parquet": (b"PAR1", r"/not_parquet.parquet: cannot be read: "),
    "sheet.xlsx": (b"a,b\n", r"not a .jsonl, .json, .parquet, .csv, .tsv file"),
    "wide.jsonl": (lines(GOOD).decode().encode("utf-16"), r"not UTF-8"),
    "zipped.jsonl": (gzip.compress(lines(GOOD)), r"not UTF-8"),
    "columns.json": (b"PAR1....PAR1", r"not valid JSON"),
    "pointer.parquet": (POINTER, r"/pointer.parquet: a git-lfs pointer, not the file itself; run: git lfs pull"),
    "pointer.jsonl": (POINTER, r"/pointer.jsonl: a git-lfs pointer"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name):
    content, complaint = UNREADABLE[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=complaint):
        read_file(tmp_path / name)


@pytest.mark.parametrize("name", ["nowhere.jsonl", "nowhere.json.gz", "./nowhere", "nowhere.csv"])
def test_a_missing_file_is_named(name):
    with pytest.raises(UserError, match=f"--dataset {name}: there is no such file"):
        read_file(name)


def test_a_directory_without_conversations_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no \.jsonl, \.json, \.parquet, \.csv, \.tsv file in this directory"):
        read_file(tmp_path)
    for name in ("state.json", "dataset_info.json"):  # as `save_to_disk` writes them
        (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=r"no \.jsonl, \.json, \.parquet, \.csv, \.tsv file in this directory"):
        read_file(tmp_path)


COMMANDS = {
    "train.py": lambda *flags: train_command.main(["--model", "acme/none", *flags]),
    "data.py": lambda *flags: data_command.main(["--model", "acme/none", *flags]),
    "eval.py": lambda *flags: eval_command.main(["acme/none", *flags]),
}
MISSING = {  # a source: why it is not one
    "nowhere.jsonl": "there is no such file",
    "empty": r"no .* file in this directory",
    "acme/chats": "not on this disk, and the Hub does not answer",
}


@pytest.mark.parametrize("source", MISSING)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_missing_dataset_is_reported_before_the_model_is_looked_for(command, source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "connection_error", lambda: OSError("offline"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.jsonl").write_bytes(lines(GOOD))
    with pytest.raises(UserError, match=rf"^--dataset (.*/)?{source}: {MISSING[source]}"):
        COMMANDS[command]("--dataset", source)
    with pytest.raises(UserError, match=rf"^--eval-dataset (.*/)?{source}: {MISSING[source]}"):
        COMMANDS[command]("--dataset", "a.jsonl", "--eval-dataset", source)


def test_a_pipe_a_url_and_a_name_that_is_not_utf8_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(UserError, match=r"pipe\.jsonl: not a regular file"):
        read_file(tmp_path / "pipe.jsonl")
    with pytest.raises(UserError, match=r"pipe\.jsonl: not a regular file"):
        read_file(tmp_path)
    with pytest.raises(UserError, match=r"https://host/a\.jsonl: there is no such file"):
        read_file("https://host/a.jsonl")
    name = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jsonl")
    with open(name, "wb") as file:
        file.write(lines(GOOD))
    with pytest.raises(UserError, match=r"\.jsonl: cannot be read: 'utf-8' codec can't encode"):
        read_file(name)


def test_notes_name_the_files_of_a_directory(tmp_path):
    (tmp_path / "b.jsonl").write_bytes(lines(GOOD))
    (tmp_path / "a.json").write_bytes(lines(GOOD))
    (tmp_path / "dataset_info.json").write_text("{\n}")
    (tmp_path / "README.md").write_text("Words.")
    (tmp_path / "more").mkdir()
    assert len(read_file(tmp_path)) == 2
    assert list(notes_on_directories([Source(str(tmp_path)), Source(str(tmp_path / "b.jsonl"))])) == [
        f"{tmp_path}: a.json, b.jsonl read; not read: README.md, dataset_info.json, more/"
    ]


# --- many bad rows


def test_equal_errors_are_one_line_with_a_count_and_the_first_locations(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        lines(*[GOOD] * 20, *[{}] * 12, {"messages": [*HELLO, user("")]}, {"messages": [user("")]}, {"messages": 1})
    )
    with pytest.raises(UserError) as raised:
        read_file(path)
    assert str(raised.value).splitlines() == [
        "15 of 35 rows are invalid; correct them, or leave out such rows with --skip-bad-rows 0.43",
        f"  12 × {NO_FORMAT}: {path}:21, {path}:22, {path}:23, …",
        f"  2 × its content is empty: {path}:33 (message 3), {path}:34 (message 1)",
        f'  {path}:35: "messages" is not a list of messages',
    ]


def test_of_many_different_errors_the_first_ten_are_shown():
    report = ReadReport(rows=30)
    for number in range(24):
        report.add_bad_row(InvalidRow(f"reason {number % 12}"), f"a.jsonl:{number}")
    with pytest.raises(UserError) as raised:
        report.check(0.0)
    assert len(str(raised.value).splitlines()) == 12
    assert str(raised.value).endswith("  2 × reason 9: a.jsonl:9, a.jsonl:21\n  … and 4 more")


def test_bad_rows_are_skipped_up_to_a_share(tmp_path):
    path, report = tmp_path / "a.jsonl", ReadReport()
    path.write_bytes(lines(*[GOOD] * 18, {}, {"messages": [user("Hi")]}))
    assert len(read_file(path, skip_bad_rows=0.1, report=report)) == 18
    assert dict(report.bad) == {NO_FORMAT: 1, NO_REPLY: 1}
    assert report.rows == report.formats.total() + report.bad.total()
    with pytest.raises(
        UserError, match=r"^2 of 20 rows are invalid, more than --skip-bad-rows 0\.09; .* with --skip-bad-rows 0\.1"
    ):
        read_file(path, skip_bad_rows=0.09)


def test_the_advised_share_of_bad_rows_is_enough():
    for rows in (2, 3, 7, 29, 97, 100, 150):
        for bad in range(1, rows):
            report = ReadReport(rows=rows, bad=Counter({"bad": bad}), locations={"bad": [("a.jsonl:1", "")]})
            with pytest.raises(UserError) as raised:
                report.check(0.0)
            advised = re.search(r"--skip-bad-rows (0\.\d+)", str(raised.value))
            if advised or bad < 0.99 * rows:
                report.check(float(advised[1]))


def test_a_dataset_without_valid_rows_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines({}))
    with pytest.raises(UserError, match="it has no valid conversations"):
        read_file(path, skip_bad_rows=1.0)
    with pytest.raises(UserError, match=r"labels, text; correct that row$"):
        read_file(path)
    path.write_bytes(lines({}, {}))
    with pytest.raises(UserError, match=r"^2 of 2 rows are invalid; correct them: 2 × no known format.*jsonl:2$"):
        read_file(path)
