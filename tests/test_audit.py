"""What an audit finds in ids and labels: each fault that is put into a clean row, and in clean rows nothing."""

import json

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import data as data_command
from config import UserError
from conversations.audit import FAULTS, judge, load_markers, parse_columns
from conversations.masking import IGNORE, encode
from conversations.tokenizer import load_tokenizer
from tests.conftest import write_rows
from tests.families import TEMPLATES, save_model
from tests.test_masking import HOSTILE
from tests.test_templates import CHATS, TABLE, tokenizer_of

ANSWERS = st.lists(
    st.sampled_from(["Hi", " there", " the quick", "42", ".\n", " naïve", " 🙂"]), min_size=3, max_size=8
).map("".join)


@st.composite
def chats(draw, text=ANSWERS):
    """A conversation that ends with an answer, some of whose answers are not to be supervised."""
    roles = draw(st.sampled_from([[], ["system"]])) + ["user", "assistant"] * draw(st.integers(1, 3))
    chat = [{"role": role, "content": draw(text), "train": True} for role in roles]
    for message in chat[:-1]:
        message["train"] = draw(st.integers(0, 3)) > 0
    return chat


def prepare(chat, tokenizer):
    """The rows of our own preparation, dicts of lists."""
    return [{"input_ids": ids.tolist(), "labels": labels.tolist()} for ids, labels in encode([chat], tokenizer)]


def pack(rows, how):
    """One row of several, with the boundaries in a column of some kind."""
    packed = {name: [number for row in rows for number in row[name]] for name in ("input_ids", "labels")}
    lengths = [len(row["input_ids"]) for row in rows]
    if how == "position_ids":
        packed["position_ids"] = [position for length in lengths for position in range(length)]
    elif how == "seq_lengths":
        packed["seq_lengths"] = lengths
    elif how == "attention_mask":
        packed["attention_mask"] = [number for number, length in enumerate(lengths, 1) for _ in range(length)]
    return packed


PACKINGS = ["position_ids", "seq_lengths", "attention_mask"]


def audit(row, tokenizer):
    """The faults of a row: a dict of the numbers of the tokens that have each."""
    markers, left_out, _ = load(tokenizer)
    assert not left_out
    found = judge(parse_columns(row, len(tokenizer)), markers)
    return {fault: at.tolist() for fault, at in found.items() if fault != "bare answers"}


def load(tokenizer, known={}):  # noqa: B006 (kept on purpose: it takes a while)
    return known.get(id(tokenizer)) or known.setdefault(id(tokenizer), load_markers(tokenizer))


# --- our own rows


@settings(max_examples=150)
@given(st.lists(chats(HOSTILE), min_size=1, max_size=3), st.sampled_from(PACKINGS))
def test_our_own_rows_have_no_fault(real_tokenizer, conversations, how):
    rows = [row for chat in conversations for row in prepare(chat, real_tokenizer)]
    for row in rows:
        length = len(row["input_ids"])
        assert audit(row, real_tokenizer) == {}
        assert audit({**row, "attention_mask": [1] * length, "position_ids": [*range(length)]}, real_tokenizer) == {}
        padded = {"input_ids": row["input_ids"] + [0] * 3, "labels": row["labels"] + [IGNORE] * 3}
        assert audit(padded, real_tokenizer) == {}
        assert audit({**padded, "attention_mask": [1] * length + [0] * 3}, real_tokenizer) == {}
    assert audit(pack(rows, how), real_tokenizer) == {}


LEFT_OUT = {"DeepSeek": {"begins inside a turn"}}  # its system message begins with no control token
TEXT_ONLY = ("Llama 2", "Mistral 0.1", "Zephyr", "Vicuna", "Alpaca", "OpenChat", "OLMo 2")


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("family", ["Llama 3", "Llama 2"])
def test_with_other_templates_too_and_what_cannot_be_judged_is_named(family, name, tmp_path):
    template, control, eos = TEMPLATES[name]
    save_model(family, template, control, eos, tmp_path)
    tokenizer = load_tokenizer(str(tmp_path), True, "model" if template else "chatml")
    markers, left_out, why = load_markers(tokenizer)
    chat = [{"role": role, "content": text} for role, text in [("user", "Hi <s>"), ("assistant", "Yes, 12.")] * 2]
    rows = [judge(parse_columns(row, len(tokenizer)), markers).keys() for row in prepare(chat, tokenizer)]
    if name in TEXT_ONLY:
        assert "no control token begins an answer" in why
        assert "prompts supervised" in left_out
    else:
        assert set(left_out) == LEFT_OUT.get(name, set())
        assert all(found <= {"bare answers"} for found in rows)


# What looks like a fault in TRL's templates: the end of a text, a call's own stop token, the second header of a turn.
LEFT_OUT_OF_TRL = {"cohere2": {"forged turn"}, "gemma4_v5": {"forged turn"}, "gptoss": {"headers supervised"}}
LEFT_OUT_OF_TRL |= {"phi3": {"forged turn"}, "phi3_5": {"forged turn"}}


@pytest.mark.parametrize("name", [name for name, (ends, *row) in TABLE.items() if isinstance(row[0], int)])
def test_with_templates_of_well_known_models(name):
    tokenizer = tokenizer_of(name)
    markers, left_out, _ = load_markers(tokenizer)
    assert set(left_out) == LEFT_OUT_OF_TRL.get(name, set())
    for chat, expected in zip(CHATS.values(), TABLE[name][1:], strict=True):
        for row in prepare(chat, tokenizer) if isinstance(expected, int) else ():
            assert judge(parse_columns(row, len(tokenizer)), markers).keys() <= {"bare answers", *left_out}


# --- faults, each put into a row


class Parts:
    """Where the turns of a row of ChatML are, found by another way: from each <|im_start|> to the next <|im_end|>."""

    def __init__(self, row, tokenizer):
        self.start, self.end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
        ids = row["input_ids"]
        begins = [at for at, number in enumerate(ids) if number == self.start]
        ends = [at for at, number in enumerate(ids) if number == self.end]
        self.turns = list(zip(begins, ends, strict=True))
        header = [self.start, *tokenizer("assistant\n", add_special_tokens=False)["input_ids"]]
        self.header = len(header)  # longer than those of others
        self.answers = [turn for turn in self.turns if ids[turn[0] : turn[0] + self.header] == header]
        self.trained = [turn for turn in self.answers if row["labels"][turn[1]] != IGNORE]
        self.others = [turn for turn in self.turns if turn not in self.answers]


def supervise(row, at):
    row["labels"][at] = row["input_ids"][at]


def insert(row, at, number):
    row["labels"].insert(at, IGNORE if row["labels"][at] == IGNORE else number)
    row["input_ids"].insert(at, number)


def cut(row, begin, end):
    for name in ("input_ids", "labels"):
        row[name] = row[name][begin:end]


def prompts_supervised(row, parts, draw):
    begin, end = draw(st.sampled_from(parts.others))
    first = draw(st.integers(begin + parts.header, end - 1))
    for at in range(first, end):
        supervise(row, at)
    return [*range(first, end)]


def headers_supervised(row, parts, draw):
    begin, _ = draw(st.sampled_from(parts.answers))
    for at in range(begin, begin + parts.header):
        supervise(row, at)
    return [*range(begin, begin + parts.header)]


def stop_not_supervised(row, parts, draw):
    _, end = draw(st.sampled_from(parts.trained))
    row["labels"][end] = IGNORE
    return [end]


def gap_in_an_answer(row, parts, draw):
    begin, end = draw(st.sampled_from(parts.trained))
    at = draw(st.integers(begin + parts.header + 1, end - 1))
    row["labels"][at] = IGNORE
    return [at]


def truncated_answer(row, parts, draw):
    begin, end = parts.trained[-1]
    stop = draw(st.integers(begin + parts.header + 1, end))
    cut(row, 0, stop)
    return [stop - 1]


def begins_inside_a_turn(row, parts, draw):
    cut(row, draw(st.integers(1, parts.turns[0][1])), None)
    return [0]


def typed_stop(row, parts, draw):
    """Where a stop token is put inside, the turn seems to end there, and the next one is one too many."""
    begin, end = draw(st.sampled_from(parts.turns))
    insert(row, draw(st.integers(begin + parts.header, end - 1)), parts.end)
    return [end + 1]


def typed_opener(row, parts, draw):
    begin, end = draw(st.sampled_from(parts.turns))
    at = draw(st.integers(begin + parts.header, end - 1))
    insert(row, at, parts.start)
    return [at]


def typed_control_token(row, parts, draw):
    begin, end = draw(st.sampled_from(parts.turns))
    at = draw(st.integers(begin + parts.header, end - 1))
    insert(row, at, 0)
    return [at]


def missing_stop(row, parts, draw):
    number = draw(st.integers(0, len(parts.turns) - 2))
    end = parts.turns[number][1]
    for name in ("input_ids", "labels"):
        del row[name][end]
    return [parts.turns[number + 1][0] - 1]


def boundary_missing(row, parts, draw):
    begin, _ = draw(st.sampled_from(parts.turns[1:]))
    row["input_ids"].insert(begin, 0)
    row["labels"].insert(begin, IGNORE)
    return [begin]


INJECTED = {
    "prompts supervised": [prompts_supervised],
    "headers supervised": [headers_supervised],
    "stop not supervised": [stop_not_supervised],
    "gap in an answer": [gap_in_an_answer],
    "truncated answer": [truncated_answer],
    "begins inside a turn": [begins_inside_a_turn],
    "forged turn": [typed_stop, typed_opener, typed_control_token, missing_stop],
    "boundary missing": [boundary_missing],
}


@pytest.mark.parametrize(("fault", "inject"), [(name, inject) for name, all_ in INJECTED.items() for inject in all_])
@settings(max_examples=60)
@given(st.data())
def test_a_fault_is_found_where_it_is_and_no_other(real_tokenizer, fault, inject, data):
    row, before, after = (prepare(data.draw(chats()), real_tokenizer)[0] for _ in range(3))
    expected = inject(row, Parts(row, real_tokenizer), data.draw)
    assume(any(label != IGNORE for label in row["labels"][1:]))
    assert audit(row, real_tokenizer) == {fault: expected}
    how, length = data.draw(st.sampled_from(PACKINGS)), len(before["input_ids"])
    packed = pack([before, row, after], how)
    assert audit(packed, real_tokenizer) == {fault: [length + at for at in expected]}


@settings(max_examples=60)
@given(st.lists(chats(), min_size=2, max_size=4), st.sampled_from(PACKINGS), st.data())
def test_faults_of_packed_rows(real_tokenizer, conversations, how, data):
    rows = [prepare(chat, real_tokenizer)[0] for chat in conversations]
    packed = pack(rows, how)
    length = len(packed["input_ids"])
    starts = np.cumsum([len(row["input_ids"]) for row in rows])[:-1].tolist()
    everything = {
        **packed,
        "labels": [IGNORE if at in [0, *starts] else packed["input_ids"][at] for at in range(length)],
    }
    assert audit(everything, real_tokenizer) == {"everything supervised": [0]}
    assert audit({**packed, "labels": [IGNORE] * length}, real_tokenizer) == {"nothing supervised": [0]}
    if how != "attention_mask":
        assert audit({**packed, "attention_mask": [1] * length}, real_tokenizer) == {"shared attention": starts}
    one = pack(rows, "position_ids")
    assert audit({**one, "seq_lengths": [length]}, real_tokenizer) == {"boundaries differ": starts}
    begin = data.draw(st.sampled_from(starts))
    one["position_ids"] = [position + (at >= begin) for at, position in enumerate(one["position_ids"])]
    wrong = [at for at in starts if at >= begin]
    assert audit(one, real_tokenizer) == {"boundaries differ": wrong}
    turn = data.draw(st.sampled_from(Parts(packed, real_tokenizer).turns))
    at = data.draw(st.integers(turn[0] + 1, turn[1]))
    bounds = np.unique([0, *starts, at, length])
    inside = {**pack(rows, ""), "seq_lengths": np.diff(bounds).tolist()}
    assert audit(inside, real_tokenizer) == {"begins inside a turn": [at]}


@given(chats(), st.integers(2, 5), st.data())
def test_labels_of_padding_and_other_labels(real_tokenizer, chat, count, data):
    row = prepare(chat, real_tokenizer)[0]
    length = len(row["input_ids"])
    padded = {name: values + [0] * count for name, values in row.items()}
    assert audit(padded, real_tokenizer) == {"padding supervised": [*range(length + 1, length + count)]}
    padded["attention_mask"] = [1] * length + [0] * count
    assert audit(padded, real_tokenizer) == {"padding supervised": [*range(length, length + count)]}
    left = {name: [0] * count + values for name, values in row.items()}
    left["attention_mask"] = [0] * count + [1] * length
    assert audit(left, real_tokenizer) == {"padding supervised": [*range(1, count)]}
    at = data.draw(st.integers(0, length - 1))
    for label in (row["input_ids"][at] + 1, -1, -101):
        changed = {**row, "labels": [*row["labels"][:at], label, *row["labels"][at + 1 :]]}
        assert audit(changed, real_tokenizer) == {"labels differ": [at]}


@pytest.fixture(scope="module")
def llama_tokenizer(tmp_path_factory):
    """A small one that puts a BOS before each text, with Llama 3's template."""
    directory = tmp_path_factory.mktemp("llama")
    template, control, eos = TEMPLATES["Llama 3"]
    save_model("Llama 3", template, control, eos, directory)
    return load_tokenizer(str(directory), True, "model")


@settings(max_examples=20)
@given(chats(), chats())
def test_a_doubled_bos(llama_tokenizer, chat, other):
    """As of a tokenizer that adds one to a rendered template that has it."""
    row, second = (prepare(each, llama_tokenizer)[0] for each in (chat, other))
    assert audit(row, llama_tokenizer) == {}
    assert audit(pack([row, second], "position_ids"), llama_tokenizer) == {}
    length = len(row["input_ids"])
    assert audit(pack([row, second], ""), llama_tokenizer) == {"boundary missing": [length]}  # its BOS
    insert(second, 0, llama_tokenizer.bos_token_id)
    assert audit(second, llama_tokenizer) == {"doubled BOS": [0]}
    assert audit(pack([row, second], "seq_lengths"), llama_tokenizer) == {"doubled BOS": [length]}


def test_labels_are_made_of_the_masks_of_trl(real_tokenizer):
    row = prepare([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}], real_tokenizer)[0]
    mask = [int(label != IGNORE) for label in row["labels"]]
    ids, ones = row["input_ids"], [1] * len(mask)
    for masks in ({"assistant_masks": mask}, {"assistant_masks": ones, "completion_mask": mask}):
        columns = parse_columns({"input_ids": ids, **masks}, len(real_tokenizer))
        assert columns["labels"].tolist() == row["labels"]
    assert audit({"input_ids": [ids], "labels": [row["labels"]]}, real_tokenizer) == {}  # a batch of one
    assert audit({"input_ids": ids, "assistant_masks": ones}, real_tokenizer) == {"everything supervised": [0]}


@settings(max_examples=30)
@given(chats(), chats(), ANSWERS)
def test_a_system_message_again_is_another_conversation(real_tokenizer, chat, other, text):
    system = {"role": "system", "content": text}
    chat, other = ([system, *(message for message in each if message["role"] != "system")] for each in (chat, other))
    rows = [prepare(each, real_tokenizer)[0] for each in (chat, other)]
    length = len(rows[0]["input_ids"])
    packed = pack(rows, "")
    assert audit(packed, real_tokenizer) == {"boundary missing": [length]}
    assert audit(pack(rows, "seq_lengths"), real_tokenizer) == {}
    stream = {name: (3 * values)[3:] for name, values in rows[0].items()}  # of which rows are cut out
    assert audit(stream, real_tokenizer) == {"begins inside a turn": [0], "boundary missing": [2 * length - 3]}
    cut(packed, 0, length + 1)  # only its <|im_start|>
    assert audit(packed, real_tokenizer) == {}
    asked_again = [*chat, *chat[1:]]
    assert audit(prepare(asked_again, real_tokenizer)[0], real_tokenizer) == {}
    another_system = [*chat, {"role": "system", "content": text + "!"}, *chat[1:]]
    assert audit(prepare(another_system, real_tokenizer)[0], real_tokenizer) == {}


def test_the_end_of_an_answer_alone_is_no_everything(real_tokenizer):
    row = prepare([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "One, two."}], real_tokenizer)[0]
    cut(row, Parts(row, real_tokenizer).trained[0][1] - 3, None)
    assert audit(row, real_tokenizer) == {"begins inside a turn": [0]}


@settings(max_examples=20)
@given(chats(), st.integers(2, 4), st.booleans())
def test_padding_with_the_stop_token(real_tokenizer, chat, count, is_trained):
    """Where the stop token pads, and labels of padding are left out, those of the last answer's stop often are, too."""
    row = prepare(chat, real_tokenizer)[0]
    stop = Parts(row, real_tokenizer).trained[-1][1]
    cut(row, 0, stop + 1)
    padded = {"input_ids": row["input_ids"] + [2] * count, "labels": row["labels"] + [IGNORE] * count}
    padded["labels"][stop] = 2 if is_trained else IGNORE
    assert audit(padded, real_tokenizer) == ({} if is_trained else {"stop not supervised": [stop]})


@settings(max_examples=20)
@given(chats(), st.sampled_from([0, 2]))
def test_a_token_after_all_that_has_no_label(real_tokenizer, chat, token):
    """As the end of a text after a truncated answer, and as padding that is a conversation of its own."""
    row = prepare(chat, real_tokenizer)[0]
    length = len(row["input_ids"])
    padded = {"input_ids": [*row["input_ids"], token], "labels": [*row["labels"], IGNORE]}
    assert audit({**padded, "position_ids": [*range(length), 0]}, real_tokenizer) == {}
    stop = Parts(row, real_tokenizer).trained[-1][1]
    cut(row, 0, stop)
    ended = {"input_ids": [*row["input_ids"], 0], "labels": [*row["labels"], 0]}
    assert audit(ended, real_tokenizer) == {"truncated answer": [stop]}


@given(chats(), st.data())
def test_positions_that_jump(real_tokenizer, chat, data):
    row = prepare(chat, real_tokenizer)[0]
    at = data.draw(st.sampled_from(Parts(row, real_tokenizer).turns[1:]))[0]
    row["position_ids"] = [number + 3 * (number >= at) for number in range(len(row["input_ids"]))]
    assert audit(row, real_tokenizer) == {"boundaries differ": [at]}


def test_every_fault_is_put_into_a_row_here():
    of_rows = {"labels differ", "padding supervised", "nothing supervised", "everything supervised", "no turns"}
    of_packing = {"boundaries differ", "shared attention", "doubled BOS"}
    assert INJECTED.keys() | of_rows | of_packing == FAULTS.keys()


# --- the command


def run(capsys, *arguments):
    """The exit status of `data.py --audit` and what it printed."""
    capsys.readouterr()
    status = data_command.main(["--audit", *map(str, arguments)])
    return status, capsys.readouterr().out


@pytest.fixture
def rows(tiny_tokenizer):
    """Forty rows, three of which have a fault, one of them two."""
    chat = [{"role": "user", "content": "Count."}, {"role": "assistant", "content": "One, two."}]
    rows = [prepare(chat, tiny_tokenizer)[0] for _ in range(40)]
    parts = Parts(rows[0], tiny_tokenizer)
    for number in (3, 7):
        rows[number]["labels"][parts.answers[0][1]] = IGNORE
    for number in (7, 9):
        supervise(rows[number], parts.turns[0][0] + parts.header)
    return rows


SUMMARY = {"stop not supervised": (2, [4, 8]), "prompts supervised": (2, [8, 10])}


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved", "saved with its splits"])
def test_the_faults_of_a_file_are_counted_and_named(rows, kind, tiny_model_dir, tmp_path, capsys):
    if kind == "jsonl":
        place = write_rows(tmp_path / "rows.jsonl", rows)
    if kind == "parquet":
        place = tmp_path / "rows.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), place)
    if kind.startswith("saved"):
        saved, place = datasets.Dataset.from_list(rows), tmp_path / "saved"
        (datasets.DatasetDict({"train": saved}) if kind.endswith("splits") else saved).save_to_disk(place)
    status, out = run(capsys, place, "--model", tiny_model_dir, "--json")
    *found, summary = map(json.loads, out.splitlines())
    assert status == 1
    assert len(found) == 4
    assert summary["rows"] == 40
    assert summary["tokens"] == sum(len(row["input_ids"]) for row in rows)
    assert summary["supervised"] == sum(label != IGNORE for row in rows for label in row["labels"])
    assert {fault: (of["rows"], of["tokens"]) for fault, of in summary["faults"].items()} == {
        fault: (count, count) for fault, (count, _) in SUMMARY.items()
    }
    for fault, (_, numbers) in SUMMARY.items():
        places = summary["faults"][fault]["first"]
        if kind == "jsonl":
            assert places == [f"{place}:{number}" for number in numbers]
        else:
            assert [int(each.rpartition(" row ")[2]) for each in places] == [number - 1 for number in numbers]
        assert places == [each["location"] for each in found if each["fault"] == fault]


def test_a_row_of_each_fault_is_shown(rows, tiny_model_dir, tmp_path, capsys):
    path = write_rows(tmp_path / "rows.jsonl", rows)
    status, out = run(capsys, path, "--model", tiny_model_dir, "--show", 1)
    assert status == 1
    assert out.count("--- ") == 2
    assert f"--- {path}:4: stop not supervised (token " in out
    assert "[[One, two.]]<|im_end|>" in out
    assert "stop not supervised: 2 rows, 2 tokens" in out
    assert "\nnot judged: where conversations begin within 40 rows" in out
    assert "no faults" not in out


def test_a_clean_file_exits_with_0_and_says_what_was_not_judged(rows, tiny_model_dir, tmp_path, capsys):
    path = write_rows(tmp_path / "rows.jsonl", rows[10:])
    status, out = run(capsys, path, "--model", tiny_model_dir)
    assert status == 0
    assert out.splitlines()[1:] == [
        "not judged: where conversations begin within 30 rows without position_ids and seq_lengths",
        "no faults in what was judged",
    ]
    text = {"input_ids": [10, 11, 12], "labels": [10, 11, 12], "position_ids": [0, 1, 2]}
    unlabelled = {**rows[0], "labels": [IGNORE] * 5 + rows[0]["labels"][5:]}
    path = write_rows(tmp_path / "rows.jsonl", [text, rows[0], unlabelled])
    status, out = run(capsys, path, "--model", tiny_model_dir)
    assert status == 0
    assert "not judged: the turns of 1 rows, which have none of the template" in out


ROW = {"input_ids": [5, 6], "labels": [5, 6]}
BAD = {
    "no labels": ({"input_ids": [5, 6]}, 'it needs "input_ids" and "labels"; write what the collator returns'),
    "no ids": ({"labels": [5, 6]}, 'it needs "input_ids" and "labels"'),
    "messages": ({"messages": []}, 'it needs "input_ids" and "labels"'),
    "empty": ({"input_ids": [], "labels": []}, 'it needs "input_ids" and "labels"'),
    "texts": ({**ROW, "labels": ["5", 6]}, '"labels" is not a list of integers'),
    "fractions": ({**ROW, "input_ids": [5.0, 6]}, '"input_ids" is not a list of integers'),
    "nothing among them": ({**ROW, "labels": [5, None]}, '"labels" is not a list of integers'),
    "a batch of two": ({**ROW, "input_ids": [[5, 6], [5, 6]]}, '"input_ids" is not a list of integers'),
    "a number": (7, "it is not an object"),
    "ragged": ({**ROW, "labels": [5]}, "its columns have different lengths"),
    "ragged mask": ({**ROW, "attention_mask": [1]}, "its columns have different lengths"),
    "lengths": ({**ROW, "seq_lengths": [1]}, "its columns have different lengths"),
    "all padding": ({**ROW, "attention_mask": [0, 0]}, 'its "attention_mask" is 0 everywhere'),
    "another tokenizer": ({**ROW, "input_ids": [5, 99_999]}, "it has ids that the tokenizer's 259 are not"),
    "negative": ({**ROW, "input_ids": [5, -1]}, "it has ids that the tokenizer's 259 are not"),
    "huge": ({**ROW, "input_ids": [5, 10**30]}, "it has ids that the tokenizer's 259 are not"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_row_that_cannot_be_judged_is_named_in_one_line(name, rows, tiny_model_dir, tmp_path, capsys):
    bad, reason = BAD[name]
    path = write_rows(tmp_path / "rows.jsonl", [rows[0], bad, bad])
    status, out = run(capsys, path, "--model", tiny_model_dir)
    (line,) = (line for line in out.splitlines() if line.startswith("invalid row"))
    assert status == 1
    assert reason in line
    assert f"2 rows, 2 tokens ({path}:2, {path}:3)" in line


def test_a_line_that_cannot_be_parsed(rows, tiny_model_dir, tmp_path, capsys):
    path = write_rows(tmp_path / "rows.jsonl", rows[:1])
    path.write_text(path.read_text() + "{nonsense\n")
    status, out = run(capsys, path, "--model", tiny_model_dir)
    assert status == 1
    assert f"invalid row, not valid JSON: 1 rows, 1 tokens ({path}:2)" in out


def test_what_cannot_be_audited_is_refused_in_one_line(rows, tiny_model_dir, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "data-00000-of-00001.arrow").write_text("nonsense")
    path = write_rows(tmp_path / "rows.jsonl", rows)
    for arguments, reason in (
        ([tmp_path / "empty.jsonl"], "it has no rows"),
        ([tmp_path / "none.jsonl"], "there is no such file"),
        (["owner/name"], "there is no such file"),
        ([tmp_path / "saved"], "cannot be read"),
        ([path, "--leaks"], "leave out --leaks"),
        ([path, "--max-length", 5], "leave out --max-length"),
        ([path, "--html", tmp_path / "page.html"], "--html and --audit: use one of them"),
    ):
        with pytest.raises(UserError, match=reason) as error:
            data_command.main(["--audit", *map(str, arguments), "--model", str(tiny_model_dir)])
        assert "\n" not in str(error.value)
        assert "--audit" in str(error.value)


def test_rows_of_another_template_are_no_clean_rows(tiny_model_dir, tmp_path, capsys):
    other = [{"input_ids": [number + 10 for number in range(20)]} for _ in range(4)]
    path = write_rows(tmp_path / "rows.jsonl", [{**row, "labels": [IGNORE, *row["input_ids"][1:]]} for row in other])
    status, out = run(capsys, path, "--model", tiny_model_dir)
    assert status == 1
    assert "no turns: 4 rows, 80 tokens" in out
    assert "try another --model or --chat-template" in out
    assert "no faults" not in out


def test_without_marks_of_turns_the_rest_is_judged(tmp_path, capsys):
    template, control, eos = TEMPLATES["Vicuna"]
    save_model("Llama 3", template, control, eos, tmp_path)
    path = write_rows(tmp_path / "rows.jsonl", [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}])
    status, out = run(capsys, path, "--model", tmp_path, "--chat-template", "model")
    assert status == 1
    assert "everything supervised: 1 rows" in out
    assert "not judged: doubled BOS, prompts supervised, " in out
    assert "no control token begins an answer" in out
