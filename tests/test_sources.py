"""What is read from where: names of sources, renamed columns, CSV, texts, token ids, several evaluation datasets."""

import csv
import gzip
import io
import json
import re
from pathlib import Path

import datasets
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_conversations import GOOD, READ, lines
from test_corpus import prepared, texts
from test_templates import QWEN3, QWEN_TOKENS, tokenizer_with
from tokenizers import processors

import data as data_command
import eval as eval_command
import train as train_command
from config import UserError, with_absolute_paths
from conversations import sources
from conversations.formats import ReadReport, parse_columns
from conversations.sources import Source, name_sources, parse_source, read_rows
from conversations.tokenizer import load_tokenizer
from evaluation.facts import run_facts
from storage.records import read_metrics
from tests.conftest import a_chat, encode_each, read_file, to_flags

# --- names


@pytest.mark.parametrize("amount", ["", ":2", ":0.5", "#500"])
@pytest.mark.parametrize("split", ["", "@train", "@train[:50%]+test", "@train[10:20]", "@test[-1:]"])
@pytest.mark.parametrize("config", ["", ":all", ":v1.0-en", ":20231101.en"])
@pytest.mark.parametrize("revision", ["", "~main", "~v1.0", "~refs/convert/parquet", f"~{'0123abcd' * 5}"])
def test_each_part_of_a_hub_name_is_read_as_it_is_written(revision, config, split, amount):
    weight, count = {"": (1.0, None), ":2": (2.0, None), ":0.5": (0.5, None), "#500": (1.0, 500)}[amount]
    expected = Source("acme/chats", config[1:] or None, weight, count, split[1:] or None, revision[1:] or None)
    assert parse_source(f"acme/chats{revision}{config}{split}{amount}") == expected


FILES = ["a.jsonl", "a b.jsonl", "a#1.jsonl", "a@b.jsonl", "a~b.csv", "v1@2/a.tsv.gz", "a:b@c~d#e.json"]


@pytest.mark.parametrize("name", FILES)
def test_what_ends_as_a_file_is_a_file_whatever_is_in_its_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for amount, more in (("", {}), (":2", {"weight": 2.0}), (":0.5", {"weight": 0.5}), ("#7", {"count": 7})):
        assert parse_source(name + amount) == Source(name, **more)
        assert parse_source(f"{tmp_path}/{name}{amount}") == Source(f"{tmp_path}/{name}", **more)


@pytest.mark.parametrize("name", ["C:/chats.jsonl", r"C:\chats.jsonl"])
def test_a_drive_is_not_a_quantity(name):
    assert parse_source(name) == Source(name)


def test_what_exists_is_a_file_and_has_no_split(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("chats@v1").mkdir()
    assert parse_source("chats@v1#3") == Source("chats@v1", count=3)
    for name in ("mine.jsonl@train", "mine.jsonl~v1", "chats@v1@train", "chats@v1~v2#3"):
        with pytest.raises(UserError, match=r"is not a quantity; .*; a file has no split and no revision$"):
            parse_source(name)
    named = {"dataset": ("chats@v1", "acme/chats~v1:all@train#3"), "eval_dataset": ("chats@v1#3",)}
    assert with_absolute_paths(named) == {
        "dataset": (f"{tmp_path}/chats@v1", "acme/chats~v1:all@train#3"),
        "eval_dataset": (f"{tmp_path}/chats@v1#3",),
    }


# --- renamed columns


PAIR = {"prompt": "q", "completion": "a", "system": "s", "tools": [{"name": "f"}]}
RENAMED = [
    (PAIR, ("prompt", "completion")),
    (PAIR, ("prompt", "completion", "system", "tools")),
    ({"instruction": "q", "input": "i", "output": "a", "system_prompt": "s"}, ("instruction", "input", "output")),
    ({"messages": GOOD["messages"], "chat_template_kwargs": {"a": 1}}, ("messages", "chat_template_kwargs")),
    ({"conversations": [{"from": "gpt", "value": "a"}]}, ("conversations",)),
    ({"text": "t"}, ("text",)),
    ({"input_ids": [5, 6], "labels": [-100, 6], "attention_mask": [1, 1]}, ("input_ids", "labels", "attention_mask")),
]


@pytest.mark.parametrize(("row", "names"), RENAMED, ids=str)
def test_a_renamed_column_is_read_as_if_it_had_that_name(read, row, names):
    theirs = {f"their {name}" if name in names else name: value for name, value in row.items()}
    flags = [f"{name}=their {name}" for name in names]
    assert read({**theirs, "more": 1}, columns=flags) == read(row)
    assert read(row, columns=flags) == read(row)  # rows that have it already, as of another source


def test_columns_can_swap_their_names(read):
    swapped = {"prompt": "a", "completion": "q"}
    found = read(swapped, columns=["prompt=completion", "completion=prompt"])
    assert found == read({"prompt": "q", "completion": "a"})


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["question=prompt"], "--columns question=prompt: it is new=old, .* the new names are .*messages, .*prompt"),
        (["prompt"], "--columns prompt: it is new=old"),
        (["prompt="], "--columns prompt=: it is new=old"),
        (["prompt=a", "prompt=b"], "--columns prompt=b: prompt is named twice"),
        (["prompt=a", "completion=a"], "--columns completion=a: a is named twice"),
    ],
)
def test_names_that_are_not_known_or_not_clear_are_refused(flags, reason):
    with pytest.raises(UserError, match=reason):
        parse_columns(flags)


def test_a_renamed_column_replaces_none_and_is_read(read):
    with pytest.raises(UserError, match='1: --columns: it has a "prompt" already; --drop-columns prompt'):
        read({"prompt": "x", "question": "q", "completion": "a"}, columns=["prompt=question"])
    renamed = read({"prompt": "x", "question": "q", "completion": "a"}, columns=["prompt=question"], drop=("prompt",))
    assert renamed == read({"prompt": None, "question": "q", "completion": "a"}, columns=["prompt=question"])
    flags = ["prompt=question", "completion=answer"]
    with pytest.raises(
        UserError, match='"completion" is not read where the row is one of messages; --drop-columns mes'
    ):
        read({**GOOD, "question": "q", "answer": "a"}, columns=flags)
    assert read({**GOOD, "question": "q", "answer": "a"}, columns=flags, drop=("messages",)) == renamed


def test_renamed_columns_are_a_setting_of_the_data(tiny_tokenizer, write):
    pairs = [{"prompt": f"{n}", "completion": "Yes."} for n in range(20)]
    path = write("a.jsonl", [{"question": row["prompt"], "answer": row["completion"]} for row in pairs])
    plain, flags = write("plain.jsonl", pairs), ["prompt=question", "completion=answer"]
    renamed = prepared(tiny_tokenizer, path, columns=flags, eval_dataset=[plain + "#4"])
    assert renamed.fingerprint == prepared(tiny_tokenizer, plain, eval_dataset=[plain + "#4"]).fingerprint
    for _ in range(2):  # read, and then from the cache
        with pytest.raises(UserError, match=r"^--columns system=sytsem: no row has such a column$"):
            prepared(tiny_tokenizer, path, columns=[*flags, "system=sytsem"])


# --- CSV


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".csv.gz"])
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(
    pairs=st.lists(st.tuples(*[st.text(st.characters(codec="utf-8"), min_size=1)] * 2), min_size=1),
    bom=st.booleans(),
    end=st.sampled_from(["\n", "\r\n"]),
)
def test_a_table_of_texts_is_read_as_it_was_written(tmp_path, suffix, pairs, bom, end):
    pairs = [pair for pair in pairs if all(map(str.strip, pair))] or [("q", "a")]
    text = io.StringIO()
    # Where lines end with "\n" alone, it would not quote a "\r".
    quoting = csv.QUOTE_ALL if "\r" in str(pairs).replace("\\r", "\r") else csv.QUOTE_MINIMAL
    writer = csv.writer(text, quoting=quoting, delimiter="\t" if suffix == ".tsv" else ",", lineterminator=end)
    writer.writerows([("prompt", "completion"), *pairs])
    content = text.getvalue().encode("utf-8-sig" if bom else "utf-8")
    (tmp_path / f"a{suffix}").write_bytes(gzip.compress(content) if suffix.endswith(".gz") else content)
    read = read_file(tmp_path / f"a{suffix}")
    assert [tuple(message["content"] for message in messages) for messages in read] == pairs


def test_cells_are_strings_and_an_empty_one_is_none(tmp_path):
    content = ',instruction,input,output,system\n0,12,,007,\n\n1,"say ""a, b""\nplease",,true,s\n'
    (tmp_path / "a.csv").write_text(content)
    report = ReadReport()
    one, two = read_file(tmp_path, report=report)
    assert [message["content"] for message in one] == ["12", "007"]
    assert [message["content"] for message in two] == ["s", 'say "a, b"\nplease', "true"]
    assert list(report.ignored) == ["column 1"]
    long = "x" * 200_000
    (tmp_path / "a.csv").write_text(f"prompt,completion\n{long},a\n")
    assert read_file(tmp_path / "a.csv")[0][0]["content"] == long


BAD_CSV = {
    b"a,b,c\n": r"a\.csv:5: it has 3 cells, and the header 2; correct that row",
    b"a\n": r"a\.csv:5: it has 1 cells, and the header 2; correct that row",
    b"\xff,a\n": r"a\.csv:5: not UTF-8; correct that row",
    b'"a\nb,c\n': r"a\.csv:5: not valid CSV: unexpected end of data; correct the file; --skip-bad-rows cannot",
    b'"a"b,c\n': r"a\.csv:5: not valid CSV: ',' expected after '\"'; correct the file",
}


@pytest.mark.parametrize("row", BAD_CSV)
def test_a_row_that_is_not_one_is_named_by_its_first_line(tmp_path, row):
    (tmp_path / "a.csv").write_bytes(b'prompt,completion\n"1\n2",b\nq,a\n' + row)
    with pytest.raises(UserError, match=BAD_CSV[row]):
        read_file(tmp_path / "a.csv")


@pytest.mark.parametrize("header", [b"a,b,a", b"a,\xff", "prompt,completion".encode("utf-16")])
def test_a_header_that_is_not_one_is_refused(tmp_path, header):
    (tmp_path / "a.csv").write_bytes(header + b"\n1,2,3\n")
    with pytest.raises(UserError, match=r"a\.csv:1: (two columns are named 'a'|not UTF-8; save it as UTF-8)$"):
        read_file(tmp_path / "a.csv")


def test_a_directory_may_hold_tables_beside_other_files(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(GOOD))
    (tmp_path / "b.csv").write_text("prompt,completion\nq,a\n")
    (tmp_path / "c.tsv").write_text("text\tlabel\nt\t1\n")
    assert [messages[0]["content"] for messages in read_file(tmp_path)] == ["Hi", "q", "t"]
    (tmp_path / "b.csv").write_text("prompt,completion,label\nq,a,False\n")
    with pytest.raises(UserError, match=r'b\.csv:2: "label": false, which says that the completion is not wanted'):
        read_file(tmp_path)


# --- texts


def with_bos(directory):
    """A tokenizer that writes a BOS, as Llama's does."""
    tokenizer = load_tokenizer(str(directory), local_files_only=True)
    tokenizer.add_special_tokens({"bos_token": "<|im_start|>"})
    bos = ("<|im_start|>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[bos]
    )
    return tokenizer


@pytest.mark.parametrize("length", [2, 3, 7, 8, 9, 64])
@pytest.mark.parametrize("bos", [False, True])
def test_a_text_is_all_supervised_and_a_long_one_is_cut_so_that_nothing_is_lost(tiny_model_dir, bos, length):
    tokenizer = with_bos(tiny_model_dir) if bos else load_tokenizer(str(tiny_model_dir), local_files_only=True)
    for text in ("a", "abcdef", "abcdefg", "x <|im_end|> y <|endoftext|>" * 3):
        content = [token for token in tokenizer.convert_tokens_to_ids([*text.replace(" ", "Ġ")])]
        expected = [tokenizer.bos_token_id] * bos + content + [tokenizer.eos_token_id]
        (examples,) = encode_each([[{"role": "text", "content": text}]], tokenizer, "last", length)
        assert all(2 <= len(example.input_ids) <= length for example in examples)
        predicted = [token for ids, labels in examples for token in labels[1:].tolist()]
        assert predicted == expected[1:]  # each once
        assert torch.cat([ids[min(number, 1) :] for number, (ids, _) in enumerate(examples)]).tolist() == expected
        assert (examples[0].labels[0] == -100) == bos


def test_texts_stand_beside_conversations(tiny_tokenizer, write, tmp_path, tiny_model_dir, capsys):
    chats = write("chats.jsonl", [a_chat(f"{number}") for number in range(20)])
    own = write("texts.jsonl", [{"text": f"Text {number}. " * (1 + 5 * number), "label": 1} for number in range(20)])
    data = prepared(tiny_tokenizer, chats, own, max_length=64)
    alone = prepared(tiny_tokenizer, chats, max_length=64)
    assert {*texts(alone.train, tiny_tokenizer)} <= {
        t for split in data.splits.values() for t in texts(split, tiny_tokenizer)
    }
    assert data.notes[0] == "40 rows, 20 as messages, 20 as text"
    assert re.search(r"40 conversations, \d+ examples: a text longer than 64 tokens is cut", data.notes[2])
    assert not any(split.truncated for split in data.splits.values())
    assert all(split.has_stop for split in data.splits.values())
    qwen = tokenizer_with(QWEN3, QWEN_TOKENS, tmp_path / "qwen")
    assert prepared(qwen, chats, own, max_length=64, chat_template="model").train.has_stop
    flags = ["--model", str(tiny_model_dir), "--dataset", own, "--max-length", "64", "--show", "2"]
    assert data_command.main(flags) == 0
    assert re.search(r"\[\[Text \d+\.", capsys.readouterr().out)


def test_a_text_beside_another_shape_is_not_what_the_row_is_about(read):
    assert read({**GOOD, "text": "rendered"}) == [READ]
    for row in ({"question": "q", "answer": "a"}, {"chat": [1]}, {"input_ids": [1, 2]}):
        with pytest.raises(UserError, match="1: no known format: it has "):
            read({**row, "text": "t"})
        assert read({**row, "text": "t"}, drop=tuple(row))[0][0]["content"] == "t"
    for row in ({"prompt": "q", "completion": None}, {"instruction": "q", "input": None, "output": None}):
        with pytest.raises(UserError, match=r'1: "(completion|output)": its content is empty'):
            read({**row, "text": "t"})
        assert read({**dict.fromkeys(row), "text": "t"})[0][0]["content"] == "t"  # a table's row of another format
    for row, reason in (({"text": " "}, '"text": its content is empty'), ({"text": 1}, "is not a string")):
        with pytest.raises(UserError, match=reason):
            read(row)


def test_rows_of_two_configurations_on_the_hub_have_places_of_their_own(monkeypatch):
    rows = datasets.Dataset.from_list([GOOD, GOOD])
    monkeypatch.setattr(sources, "load_from_hub", lambda *_: rows)
    places = [place for name in ("o/n:a", "o/n:b", "o/n") for place, _ in read_rows(parse_source(name), "test")]
    assert places == [f"{name} (test) row {number}" for name in ("o/n:a", "o/n:b", "o/n") for number in range(2)]


# --- token ids


def test_rows_of_tokens_are_the_examples_that_they_were_made_of(tiny_tokenizer, write):
    chats = write("chats.jsonl", [a_chat(f"{number}", "Yes. " * number) for number in range(1, 21)])
    expected = prepared(tiny_tokenizer, chats, max_length=64)
    conversations = [json.loads(line)["messages"] for line in Path(chats).read_text().splitlines()]
    encoded = [example for (example,) in encode_each(conversations, tiny_tokenizer)]
    rows = [{"input_ids": ids.tolist(), "labels": labels.tolist()} for ids, labels in encoded]
    padded = [
        {
            "input_ids": row["input_ids"] + [0] * 3,
            "labels": row["labels"] + [-100] * 3,
            "attention_mask": [1] * len(row["labels"]) + [0] * 3,
        }
        for row in rows
    ]
    for number, each in enumerate((rows, padded)):
        data = prepared(tiny_tokenizer, write(f"{number}.jsonl", each), max_length=64)
        assert data.fingerprint == expected.fingerprint
        assert data.train.has_stop
        assert data.notes[0] == "20 rows, 20 as tokens"


ROW = {"input_ids": [3, 4, 5, 6], "labels": [-100, 4, 5, 6]}
BAD_TOKENS = {
    '"labels" and "input_ids" have different lengths': {"labels": [-100, 4, 5]},
    '"attention_mask" and "input_ids" have different lengths': {"attention_mask": [1]},
    '"input_ids" is not a list of integers': {"input_ids": [3, 4, 5.5, 6]},
    '"input_ids" is not a list of integers;': {"input_ids": "3 4 5 6"},
    '"labels" is not a list of integers': {"labels": [-100, True, 5, 6]},
    '"attention_mask" is not 1 for all': {"attention_mask": [0, 1, 1, 1]},
    '"attention_mask" is not 1 for all tokens': {"attention_mask": [1, 0, 1, 1]},
    '"attention_mask" is not 1 for all tokens, nor': {"attention_mask": [1, 1, 2, 2]},
    '"input_ids"; they are not shifted here': {"labels": [4, 5, 6, -100]},
    'a label is neither -100 nor the token at its place in "input_ids";': {"labels": [-100, 4, 5, 7]},
    "nothing would be supervised": {"labels": [3, -100, -100, -100]},
    "nothing would be supervised;": {"labels": [-100] * 4},
    "nothing would be supervised; correct": {"attention_mask": [1, 0, 0, 0]},
    "nothing would be supervised; correct that row": {"input_ids": [], "labels": []},
    "a token id is not from 0 to 9, as": {"input_ids": [3, 4, 5, 10], "labels": [-100, 4, 5, 10]},
    "a token id is not from 0 to 9, as the": {"input_ids": [-1, 4, 5, 6]},
    '"loss_mask" does not tell clearly': {"loss_mask": [0, 1, 1, 1]},
}


@pytest.mark.parametrize("reason", BAD_TOKENS)
def test_token_ids_and_labels_are_checked(read, reason):
    assert len(read(ROW, vocabulary=10)) == 1
    with pytest.raises(UserError, match=f"1: .*{re.escape(reason)}"):
        read({**ROW, **BAD_TOKENS[reason]}, vocabulary=10)
    assert len(read(ROW, {**ROW, **BAD_TOKENS[reason]}, vocabulary=10, skip_bad_rows=0.5)) == 1


# --- several evaluation datasets


def test_names_of_sources(tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).touch()
    named = [f"{tmp_path}/a.jsonl#3", f"{tmp_path}/b.jsonl", "acme/chats~v1:all@test", "acme/chats"]
    assert name_sources(named) == ["a.jsonl", "b.jsonl", "acme/chats:all@test", "acme/chats"]
    assert name_sources([named[0], f"{tmp_path}/a.jsonl:0.5"]) == [named[0], f"{tmp_path}/a.jsonl:0.5"]


def test_each_of_several_evaluation_datasets_has_a_curve_and_a_row(tiny_model_dir, write, tmp_path, capsys):
    chats = write("chats.jsonl", [a_chat(f"{number}") for number in range(20)])
    own = [write(f"{name}.jsonl", [a_chat(f"{name} {n}", name * n) for n in range(1, 6)]) for name in ("x", "yy")]
    flags = {"model": tiny_model_dir, "max-steps": 2, "eval-every": 1, "lr": 1e-2, "warmup-steps": 0, "dtype": "fp32"}
    flags = to_flags(flags)
    runs = {}
    for name, files in (("both", own), ("one", own[:1]), ("two", own[1:])):
        runs[name] = tmp_path / name
        command = ["--dataset", chats, "--eval-dataset", *files, "--output-dir", str(runs[name])]
        assert train_command.main([*flags, *command]) == 0
    out = capsys.readouterr().out
    assert "--eval-dataset: 5 of x.jsonl, 5 of yy.jsonl; the loss over all their tokens selects the best model" in out
    logs = {name: [line for line in read_metrics(run) if line["kind"] == "eval"] for name, run in runs.items()}
    assert [line["step"] for line in logs["both"]] == [0, 1, 2]
    for both, one, two in zip(*logs.values(), strict=True):
        if both["step"] == 0:  # later the models differ, as the splits of training do
            assert both["loss/x.jsonl"] == pytest.approx(one["loss"])
            assert both["loss/yy.jsonl"] == pytest.approx(two["loss"])
        tokens = [one["supervised_tokens"], two["supervised_tokens"]]
        of_each = (both["loss/x.jsonl"] * tokens[0] + both["loss/yy.jsonl"] * tokens[1]) / sum(tokens)
        assert both["loss"] == pytest.approx(of_each)
        assert not any(name.startswith("loss/") for name in [*one, *two])
    facts, page = run_facts(runs["both"]), (runs["both"] / "report.html").read_text()
    for name, loss in facts["source_losses"].items():
        assert re.search(rf"^  loss on {name} +{loss['before']:.4f} +{loss['after']:.4f}", out, re.M)
        assert re.search(rf"<td>loss on {name}<td>{loss['before']:.4f}<td>{loss['after']:.4f}", page)
        assert f"<figcaption>loss on {name}" in page
    assert list(facts["source_losses"]) == ["x.jsonl", "yy.jsonl"]
    assert eval_command.main([str(runs["both"]), "--max-new-tokens", "1"]) == 0
    write("yy.jsonl", [a_chat("yy" * 300)])
    with pytest.raises(UserError, match=f"--eval-dataset {own[1]}: nothing in it is supervised"):
        train_command.main([*flags, "--dataset", chats, "--eval-dataset", *own, "--output-dir", str(tmp_path / "no")])
