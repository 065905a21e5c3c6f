"""Rows as others write them: read for what they mean, or refused by name, and never something else without a word."""

import datetime
import decimal
import json
import re
import uuid

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_conversations import GOOD, HELLO, READ, assistant, calling, lines, user

from config import UserError
from conversations.formats import ReadReport, parse_columns, read_conversations
from conversations.sources import Source
from storage import hub
from tests.conftest import read_file


def refusal(read, *rows, **options):
    """The line by which rows are refused, without the file's name."""
    with pytest.raises(UserError) as raised:
        read(*rows, **options)
    assert "\n" not in str(raised.value)
    return re.sub(r"/\S*/", "", str(raised.value))


# --- tables


def one_list(array):
    """An Arrow array of one value: a list of the values of another."""
    return pyarrow.ListArray.from_arrays([0, len(array)], array)


def one_struct(**fields):
    """An Arrow array of one struct."""
    fields = {name: pyarrow.array([field]) if isinstance(field, str) else field for name, field in fields.items()}
    return pyarrow.StructArray.from_arrays(list(fields.values()), list(fields))


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": [1, "two"], "default": None}}}
OTHER = {"type": "object", "properties": {"c": {"type": "array", "items": {"type": "string"}}}, "required": ["c"]}
MIXED = [  # rows whose keys and types differ, so that `datasets` writes some columns, at any depth, as JSON
    {
        "messages": [user("q"), {**calling("f", {"a": 1, "b": [1, "x"]}), "content": ""}],
        "tools": [{"type": "function", "function": {"name": "f", "description": "", "parameters": SCHEMA}}],
        "chat_template_kwargs": {"enable_thinking": True, "python_tools": []},
    },
    {
        "messages": [user('{"a": 1}'), assistant("7", weight=0.0), {**calling("g", {"c": {"z": "1"}}), "content": ""}],
        "tools": [{"type": "function", "function": {"name": "g", "description": "[]", "parameters": OTHER}}],
        "chat_template_kwargs": {"enable_thinking": "no", "custom_instructions": "Be brief."},
    },
]


def write_by_datasets(rows, path):
    datasets.Dataset.from_list(rows, on_mixed_types="use_json").to_parquet(path)


def write_from_json(rows, path):
    path.with_suffix(".jsonl").write_bytes(lines(*rows))
    source, cache = str(path.with_suffix(".jsonl")), str(path.parent / "cache")
    datasets.load_dataset("json", data_files=source, split="train", cache_dir=cache).to_parquet(path)


def write_columns_of_json(rows, path, **options):
    columns = {name: pyarrow.array([json.dumps(row[name]) for row in rows], pyarrow.json_()) for name in rows[0]}
    pyarrow.parquet.write_table(pyarrow.table(columns), path, **options)


WRITERS = {
    "datasets": write_by_datasets,
    "datasets, from JSON": write_from_json,
    "columns of JSON": write_columns_of_json,
    "Parquet's own JSON": lambda rows, path: write_columns_of_json(rows, path, store_schema=False),
}


@pytest.mark.parametrize("write_table", WRITERS.values(), ids=WRITERS)
def test_json_in_a_table_is_what_it_is_in_json_lines(read, tmp_path, monkeypatch, write_table):
    expected = read(*MIXED)
    write_table(MIXED, tmp_path / "a.parquet")
    assert read_file(tmp_path / "a.parquet") == expected
    dataset = datasets.Dataset.from_parquet(str(tmp_path / "a.parquet"), cache_dir=str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "load_hub_dataset", lambda *_: dataset)
    assert [messages for _, _, messages in read_conversations([Source("acme/chats")])] == expected


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=3), values, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=JSON, text=JSON.map(json.dumps))
def test_json_is_decoded_by_the_schema_at_any_depth(tmp_path, value, text):
    """`arrow.json` is decoded, and a string is a string, whatever it looks like."""
    arguments = one_struct(json=pyarrow.array([json.dumps(value)], pyarrow.json_()), text=text)
    calls = one_list(one_struct(name="f", arguments=arguments))
    messages = one_list(one_struct(role="assistant", content=text, tool_calls=calls))
    pyarrow.parquet.write_table(pyarrow.table({"messages": messages}), tmp_path / "a.parquet")
    ((message,),) = read_file(tmp_path / "a.parquet")
    assert message["content"] == text
    assert message["tool_calls"][0]["function"]["arguments"] == {"json": value, "text": text}


def test_a_map_is_an_object_and_a_category_a_string(tmp_path):
    arguments = pyarrow.array([[("a", 1), ("b", 2)]], pyarrow.map_(pyarrow.string(), pyarrow.int64()))
    calls = one_list(one_struct(name="f", arguments=arguments))
    messages = one_list(one_struct(role=pyarrow.array(["assistant"]).dictionary_encode(), tool_calls=calls))
    pyarrow.parquet.write_table(pyarrow.table({"messages": messages}), tmp_path / "a.parquet")
    ((message,),) = read_file(tmp_path / "a.parquet")
    assert message["tool_calls"][0]["function"]["arguments"] == {"a": 1, "b": 2}


NOT_JSON = {
    "date": pyarrow.array([datetime.date(2024, 1, 1)]),
    "time": pyarrow.array([datetime.time(1, 2)]),
    "timestamp": pyarrow.array([datetime.datetime(2024, 1, 1)]),
    "nanoseconds": pyarrow.array([1], pyarrow.timestamp("ns")),
    "year 148112": pyarrow.array([2**62], pyarrow.timestamp("us")),
    "unknown time zone": pyarrow.array([1], pyarrow.timestamp("us", tz="Mars/Olympus")),
    "duration": pyarrow.array([datetime.timedelta(1)]),
    "long duration": pyarrow.array([2**62], pyarrow.duration("s")),
    "decimal": pyarrow.array([decimal.Decimal("1.5")]),
    "bytes": pyarrow.array([b"x"]),
    "NaN": pyarrow.array([float("nan")]),
    "infinity": pyarrow.array([float("inf")]),
    "UUID": pyarrow.array([uuid.UUID(int=1).bytes], pyarrow.uuid()),
    "not UTF-8": pyarrow.array([b"\xff"]).view(pyarrow.string()),
    "not JSON": pyarrow.array(["{"], pyarrow.json_()),
    "a number JSON has not": pyarrow.array(["[NaN]"], pyarrow.json_()),
    "a key twice": pyarrow.StructArray.from_arrays([pyarrow.array([1]), pyarrow.array([2])], ["a", "a"]),
    "in a list": one_list(pyarrow.array([datetime.date(2024, 1, 1)])),
    "in a map": pyarrow.array([[("a", b"x")]], pyarrow.map_(pyarrow.string(), pyarrow.binary())),
}
REPLY = one_struct(role="assistant", content="a")
PLACES = {
    "arguments": lambda value: {
        "messages": one_list(
            one_struct(
                role="assistant",
                content="",
                tool_calls=one_list(one_struct(name="f", arguments=one_struct(when=value))),
            )
        )
    },
    "tools": lambda value: {
        "messages": one_list(REPLY),
        "tools": one_list(one_struct(name="f", parameters=one_struct(default=value))),
    },
    "chat_template_kwargs": lambda value: {
        "messages": one_list(REPLY),
        "chat_template_kwargs": one_struct(today=value),
    },
    "content": lambda value: {"messages": one_list(one_struct(role="assistant", content=value))},
    "role": lambda value: {"messages": one_list(one_struct(role=value, content="a"))},
    "thinking": lambda value: {"messages": one_list(one_struct(role="assistant", content="a", thinking=value))},
    "weight": lambda value: {"messages": one_list(one_struct(role="assistant", content="a", weight=value))},
    "system": lambda value: {"messages": one_list(REPLY), "system": value},
    "a column": lambda value: {"messages": value},
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", NOT_JSON)
def test_what_json_cannot_have_is_an_invalid_row(tmp_path, kind, place):
    table = pyarrow.table(PLACES[place](NOT_JSON[kind]))
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet")
    (tmp_path / "a.jsonl").write_bytes(lines(GOOD))
    with pytest.raises(UserError, match=r"^/\S*b\.parquet row 0: [^\n]*; correct that row, or leave out such rows"):
        read_file(tmp_path)
    assert read_file(tmp_path, skip_bad_rows=0.5) == [READ]


def test_a_value_that_cannot_be_read_names_its_column_and_how_to_drop_it(tmp_path):
    far = pyarrow.array([2**62], pyarrow.timestamp("us"))
    pyarrow.parquet.write_table(pyarrow.table({"messages": one_list(REPLY), "at": far}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r'row 0: "at": a value that cannot be read .*, or --drop-columns at; correct'):
        read_file(tmp_path / "a.parquet")
    assert len(read_file(tmp_path / "a.parquet", drop=("at",))) == 1


# --- arguments of the template


@pytest.mark.parametrize("beside", [{}, {"system": "s"}, {"tools": [{"name": "f"}]}], ids=["alone", "system", "tools"])
def test_a_rows_arguments_of_the_template_are_in_its_first_message(read, beside):
    given = {"enable_thinking": False, "custom_instructions": "Be brief.", "xml_tools": ["x"]}
    empty = {"python_tools": [], "documents": None, "date": ""}
    for value in (given, json.dumps(given), {**given, **empty}):
        report = ReadReport()
        (messages,) = read({**GOOD, **beside, "chat_template_kwargs": value}, report=report)
        assert messages[0]["template_options"] == given
        assert not any("template_options" in message for message in messages[1:])
        assert not report.ignored
    for value in (None, {}, "", "{}", empty):
        assert read({**GOOD, "chat_template_kwargs": value}, plain=True) == [READ]


def test_arguments_of_the_template_that_are_none_or_have_no_place_are_refused(read):
    for value in ("x=1", [1], "[1]", '{"a": NaN}', 7):
        assert '1: "chat_template_kwargs" is not ' in refusal(read, {**GOOD, "chat_template_kwargs": value})
    row = {**GOOD, "chat_template_kwargs": {"enable_thinking": False}}
    line = refusal(read, row, plain=True)
    assert "1: --chat-template chatml has no chat_template_kwargs; use --chat-template model, or a file" in line
    assert "--drop-columns chat_template_kwargs" in line
    assert read(row, plain=True, drop=("chat_template_kwargs",)) == [READ]


# --- flags of training


LEFT_OUT = {  # flags that leave a message out: each as somebody writes it
    **dict.fromkeys("train training trainable is_trainable learn supervise supervised loss".split(), False),
    **dict.fromkeys(("weight", "loss_weight"), 0.0),
    **dict.fromkeys("masked is_masked ignore ignored no_loss".split(), True),
}
UNCLEAR = {
    **dict.fromkeys("mask isMasked skip exclude excluded do_not_train no_train dontTrain unsupervised".split(), True),
    **dict.fromkeys(
        "loss_mask step_loss_mask lossMask compute_loss has_loss train_on_turn is_training keep".split(), 0
    ),
    **{"loss_scale": 0.0, "sample_weight": 0.3, "weight": 0.5, "loss": 2.1, "train": "false", "masked": "true"},
    **{"train_detail": [{"begin_offset": 0, "end_offset": 1, "train": False}], "loss_masks": [0, 1], "mask_": "User"},
}
UNCLEAR["mask"] = "assistant"


def replies(answer):
    return {"messages": [user("q"), assistant("kept"), user("q"), answer]}


@pytest.mark.parametrize("plain", [True, False], ids=["ChatML", "a template"])
@pytest.mark.parametrize("name", LEFT_OUT)
def test_a_flag_with_one_meaning_is_read(read, name, plain):
    out = LEFT_OUT[name]
    for value in (bool(out), int(out), float(out)):
        (messages,) = read(replies(assistant("x", **{name: value})), plain=plain)
        assert [message["train"] for message in messages] == [True, True, True, False]
        (messages,) = read(replies(assistant("x", **{name: not value})), plain=plain)
        assert messages[-1]["train"]
        assert messages == read(replies(assistant("x", **{name: None})))[0]


@pytest.mark.parametrize("name", UNCLEAR)
def test_another_flag_is_refused_by_name(read, name):
    value = UNCLEAR[name]
    if name == "mask_":
        name = "mask"
    line = refusal(read, replies(assistant("x", **{name: value})))
    assert f'1: message 4: "{name}" does not tell clearly whether to train on it; write "train"' in line
    line = refusal(read, {**GOOD, name: value})
    assert f'1: "{name}" does not tell clearly' in line
    assert f"(--drop-columns {name})" in line
    assert read({**GOOD, name: value}, drop=(name,)) == [READ]


def test_flags_that_contradict_each_other_are_refused_and_those_that_agree_are_read(read):
    line = refusal(read, replies(assistant("x", train=True, weight=0)))
    assert "message 4: train and weight contradict each other" in line
    assert not read(replies(assistant("x", train=False, weight=0, masked=True)))[0][-1]["train"]


def test_a_row_and_a_part_of_a_message_can_be_left_out(read):
    for name, value in {**LEFT_OUT, "label": False, "kto_tag": False}.items():
        assert f'1: "{name}": {str(value).lower()}, which says that the' in refusal(read, {**GOOD, name: value})
        assert read({**GOOD, name: value}, drop=(name,)) == [READ]
        assert read({**GOOD, name: not value}) == [READ]
    parts = [{"type": "text", "text": "a", "train": False}, {"type": "text", "text": "b", "train": True}]
    assert "message 4: its content has a part that is not to be trained on" in refusal(read, replies(assistant(parts)))
    assert read(replies(assistant([{**part, "train": True} for part in parts])))[0][-1]["content"] == "ab"


def test_what_is_not_a_flag_of_training_is_only_listed(read):
    report = ReadReport()
    message = assistant("x", toxic=True, redacted=False, prefix=1, learning_objective="fractions", loss_note="none yet")
    row = {**replies(message), "skip_prompt_formatting": False, "constraints": ["c"], "used_in_training": "no"}
    assert read(row, report=report)[0][-1]["train"]
    assert len(report.ignored) == 8


# --- switches and system texts


@pytest.mark.parametrize("name", ["reasoning", "thinking", "reasoning_content", "enable_thinking", "reasoning_effort"])
def test_a_switch_beside_the_messages_is_not_a_thought(read, name):
    report = ReadReport()
    values = ["on", "off", "ON", True, False, "true", "high", "", None]
    assert read(*({**GOOD, name: value} for value in values), report=report) == [READ] * len(values)
    assert list(report.ignored) == [name]
    if not name.startswith(("enable", "reasoning_e")):
        thought = {**GOOD, name: "The user greets me, so I greet back."}
        assert f'1: "{name}" is not supported; write it into the content, or remove it (--drop-col' in refusal(
            read, thought
        )


NONE = ("", " \n", None, [{"type": "text", "text": ""}])


@pytest.mark.parametrize("text", NONE, ids=map(repr, NONE))
def test_an_empty_system_text_is_none(read, text):
    system = {"role": "system", "content": text}
    assert read({"messages": [system, *HELLO]}, {**GOOD, "system": text}) == [READ, READ]
    assert read({"messages": [HELLO[0], system, HELLO[1]], "system_prompt": text}) == [READ]
    assert read({"prompt": [system, HELLO[0]], "completion": HELLO[1:]})[0][-1] == READ[-1]
    (messages,) = read({"messages": [system, *HELLO], "system": "s"})
    assert messages == [{"role": "system", "content": "s", "train": True}, *READ]
    line = refusal(read, {"messages": [system, user("q"), assistant("x", thinking="Hm.")]}, plain=True)
    assert "1: message 3: --chat-template chatml has no reasoning" in line


def test_one_system_text_in_several_places_is_one_and_two_are_refused(read):
    among = {"messages": [{"role": "system", "content": "s"}, *HELLO]}
    one = [{"role": "system", "content": "s", "train": True}, *READ]
    beside = {"system": "s", "system_prompt": "s"}
    assert read(among, {**among, "system": "s"}, {**among, **beside}, {**GOOD, **beside}) == [one] * 4
    for row in ({**among, "system": "t"}, {**GOOD, "system": "s", "system_prompt": "t"}):
        assert "1: different system texts" in refusal(read, row)


# --- shapes that are not read


TURNS = ["conversation", "dialog", "dialogue", "chat", "turns", "items"]
PAIRS = [
    {"question": "q", "answer": "a"},
    {"query": "q", "response": "a", "original_question": "q"},
    {"input": "q", "output": "a"},
    {"inputs": "q", "targets": "a", "task": "t"},
    {"kind": "k", "input": "q", "target": "a"},
    {"prompt": "q", "response": "a"},
    {"problem": "q", "solution": "a"},
    {"instruction": "q", "response": "a"},
    {"instruction": "q", "context": "", "response": "a", "category": "open_qa"},
]
SHAPES = [*PAIRS, *({name: HELLO, "turn": 1} for name in TURNS), {"chosen": HELLO, "rejected": HELLO}]
SHAPES.append({"prompt": "q", "chosen": "a", "rejected": "b"})


@pytest.mark.parametrize("row", SHAPES, ids=lambda row: "+".join(row))
def test_a_file_of_another_shape_is_one_line_and_its_advice_works(read, row):
    line = refusal(read, *[row] * 12)
    assert line.startswith('12 of 12 rows are invalid; correct them: 12 × no known format: it has "')
    assert line.endswith(": a.jsonl:1, a.jsonl:2, a.jsonl:3, …")
    names = re.search(r"--columns ((\w+=\w+ ?)+)", line)[1].split()
    if "chosen" in row:
        names = ["completion=chosen" if "prompt" in row else "messages=chosen"]
        assert "--columns messages=chosen if it is a list of messages, or --columns completion=chosen if it" in line
    assert not parse_columns(names).keys() - row.keys()
    (messages,) = read(row, columns=names)
    assert [message["content"] for message in messages] in (["q", "a"], ["Hi", "Hello."])


def test_shapes_without_turns_say_so(read):
    assert 'it has "input_ids"; it needs "labels"' in refusal(read, {"input_ids": [1]})
    assert "it has none of messages, conversations, " in refusal(read, {"question": ["q"], "answer": {"text": "a"}})
    assert "message 1: not an object with a role and a content" in refusal(read, {"conversations": ["q", "a"]})


# --- well-known datasets


def shared(*texts, **more):
    return [{"from": role, "value": text, **more} for role, text in zip(("human", "gpt"), texts, strict=True)]


KNOWN = {  # rows as these datasets have them: the texts trained on, or a part of the line that refuses them
    "UltraChat": ({**GOOD, "prompt": "Hi", "prompt_id": "ab"}, ["Hello."]),
    "Tulu 3, personas": ({**GOOD, "id": "x", "prompt": "Hi", "constraints": ["No commas."]}, ["Hello."]),
    "OpenHermes 2.5": (
        {"conversations": shared("q", "a", weight=None), "system_prompt": None, "skip_prompt_formatting": False},
        ["a"],
    ),
    "SlimOrca": (
        {
            "conversations": [
                {"from": "system", "value": "", "weight": None},
                {"from": "human", "value": "q", "weight": 0.0},
                {"from": "gpt", "value": "a", "weight": 1.0},
            ]
        },
        ["a"],
    ),
    "Magpie": ({"instruction": "q", "response": "a", "conversations": shared("q", "a"), "repeat_count": 0}, ["a"]),
    "Nemotron": ({**GOOD, "reasoning": "off", "version": "v1", "metadata": "{}", "tools": []}, ["Hello."]),
    "UltraFeedback": ({**GOOD, "prompt": "Hi", "chosen": HELLO, "rejected": HELLO, "score_chosen": 9.0}, ["Hello."]),
    "SmolTalk 2": (
        {**GOOD, "chat_template_kwargs": {"enable_thinking": False, "xml_tools": []}, "source": "x"},
        ["Hello."],
    ),
    "OpenThoughts": ({"system": "s", "conversations": shared("q", "<think>h</think>a")}, ["<think>h</think>a"]),
    "WildChat, renamed": ({"messages": [{**message, "toxic": False} for message in HELLO], "toxic": False}, ["Hello."]),
    "Dolly": ({"instruction": "q", "context": "c", "response": "a"}, "use --columns input=context output=response"),
    "LMSYS": (
        {"conversation_id": "x", "conversation": HELLO, "openai_moderation": []},
        '"conversation"; use --columns messages=conversation',
    ),
    "xLAM": ({"id": 1, "query": "q", "answers": "[]", "tools": "[]"}, "none of messages, conversations, "),
    "Fireworks' weights": ({**GOOD, "weight": 2.0}, '"weight" does not tell'),
    "NeMo": ({"mask": "User", "conversations": shared("q", "a"), "system": ""}, '"mask" does not tell'),
}


@pytest.mark.parametrize("name", KNOWN)
def test_a_known_dataset_is_read_or_refused_in_one_line(read, name):
    row, expected = KNOWN[name]
    if isinstance(expected, str):
        assert expected in refusal(read, row, row)
    else:
        assert [m["content"] for m in read(row)[0] if m["role"] == "assistant" and m["train"]] == expected
