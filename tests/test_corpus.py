"""A corpus on disk, its cache, and how its rows become splits."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from test_templates import GEMMA, GEMMA_TOKENS, QWEN3, QWEN_TOKENS, tokenizer_with
from transformers import MambaConfig

import data as data_command
import eval as eval_command
import train as train_command
from config import UserError, resolve
from conversations import corpus
from conversations.masking import encode
from conversations.tokenizer import load_tokenizer
from data import load_data, load_split
from storage.cache import cache_directory
from storage.records import read_record
from tests.conftest import a_chat, write_rows
from tests.families import TEMPLATES, save_model


def prepared(tokenizer, *files, **named):
    settings = {"dataset": files, "eval_fraction": 0.2, "test_fraction": 0.1} | named
    return load_data(resolve(settings, "none"), tokenizer)


def texts(split, tokenizer):
    return [tokenizer.decode(example.input_ids) for example in split.examples]


def test_the_corpus_has_the_rows_of_encode(tiny_tokenizer, write):
    rows = [a_chat(f"{number}", "Yes. " * number) for number in range(1, 30)]
    data = prepared(tiny_tokenizer, write("a.jsonl", rows), supervise="last")
    expected = {
        tuple(ids.tolist()): labels for ids, labels in encode([row["messages"] for row in rows], tiny_tokenizer)
    }
    seen = [example for split in data.splits.values() for example in split.examples]
    assert len(seen) == 29
    assert all(torch.equal(expected[tuple(ids.tolist())], labels) for ids, labels in seen)
    assert data.train.tokens == sum(len(example.input_ids) for example in data.train.examples)
    assert data.train.supervised == sum(example.supervised_tokens for example in data.train.examples)


def test_a_corpus_is_read_from_the_cache(tiny_tokenizer, write, monkeypatch):
    path = write("a.jsonl", [a_chat(f"{number}") for number in range(20)])
    first = prepared(tiny_tokenizer, path)

    def never(*_):
        raise AssertionError("encoded again")

    monkeypatch.setattr(corpus, "make_corpus", never)
    again = prepared(tiny_tokenizer, path)
    assert again.fingerprint == first.fingerprint
    assert again.notes == first.notes == ["20 rows, 20 as messages"]


@pytest.mark.parametrize(
    "change",
    [{"max_length": 30}, {"supervise": "last"}, {"max_examples": 19}, {"skip_bad_rows": 0.1}],
    ids=lambda change: next(iter(change)),
)
def test_another_option_has_another_cache_entry(tiny_tokenizer, write, change):
    path = write("a.jsonl", [a_chat(f"{number}") for number in range(20)])
    before = cache_directory() / "corpora"
    prepared(tiny_tokenizer, path)
    known = set(before.glob("[!.]*"))
    prepared(tiny_tokenizer, path, **change)
    assert len(set(before.glob("[!.]*")) - known) == 1


def test_columns_are_dropped_before_the_rows_are_read(tiny_tokenizer, write):
    chats = [a_chat(f"{number}") for number in range(20)]
    plain = write("plain.jsonl", chats)
    path = write("a.jsonl", [{**chat, "images": ["a.png"], "system": "s", "id": 1} for chat in chats])
    with pytest.raises(UserError, match=r'"images" is not supported; .*, or remove it \(--drop-columns images\)'):
        prepared(tiny_tokenizer, path)
    dropped = prepared(tiny_tokenizer, path, drop_columns=["images", "system"])
    assert dropped.fingerprint == prepared(tiny_tokenizer, plain).fingerprint
    assert dropped.fingerprint != prepared(tiny_tokenizer, path, drop_columns=["images"]).fingerprint
    own = prepared(tiny_tokenizer, path, drop_columns=["images", "system"], eval_dataset=[plain + "#4"])
    assert len(own.eval.examples) == 4  # whose rows have neither
    for _ in range(2):  # read, and then from the cache
        for load in (load_data, load_split):
            config = resolve({"dataset": [path], "drop_columns": ["images", "imagse"]}, "none")
            with pytest.raises(UserError, match=r"^--drop-columns imagse: no row has such a column$"):
                load(config, tiny_tokenizer)


def test_dropped_columns_are_a_setting_of_a_run(chats, tiny_model_dir, tmp_path, capsys):
    rows = [{**json.loads(line), "history": ["x"], "note": 1} for line in Path(chats).read_text().splitlines()]
    path = write_rows(tmp_path / "more.jsonl", rows)
    flags = ["--model", str(tiny_model_dir), "--dataset", str(path), "--drop-columns", "history", "note"]
    assert data_command.main([*flags, "--show", "1"]) == 0
    assert "not used" not in capsys.readouterr().out
    run = tmp_path / "run"
    assert train_command.main([*flags, "--max-steps", "1", "--device", "cpu", "--output-dir", str(run)]) == 0
    assert read_record(run)["config"]["drop_columns"] == ["history", "note"]
    assert eval_command.main([str(run)]) == 0
    assert eval_command.main([str(run), "--dataset", str(chats)]) == 0  # which has no such columns
    with pytest.raises(UserError, match="--drop-columns"):
        train_command.main(["--resume", str(run), "--drop-columns", "history"])


def test_a_changed_file_template_or_code_is_encoded_again(tiny_tokenizer, tiny_model_dir, write, monkeypatch):
    path = write("a.jsonl", [a_chat(f"{number}") for number in range(20)])
    first = prepared(tiny_tokenizer, path)
    write("a.jsonl", [a_chat(f"{number}!") for number in range(20)])
    assert prepared(tiny_tokenizer, path).fingerprint != first.fingerprint
    known = set((cache_directory() / "corpora").glob("[!.]*"))
    changed = load_tokenizer(str(tiny_model_dir), local_files_only=True)
    changed.bos_token = "<|im_start|>"  # which a template may write
    other = load_tokenizer(str(tiny_model_dir), local_files_only=True)
    other.chat_template += " "
    monkeypatch.setattr(corpus, "make_corpus", lambda directory, *_: (_ for _ in ()).throw(LookupError(directory)))
    for tokenizer in (changed, other):
        with pytest.raises(LookupError):
            prepared(tokenizer, path)
    monkeypatch.setattr(corpus, "SOURCE_FILES", [*corpus.SOURCE_FILES, "train.py"])
    with pytest.raises(LookupError):
        prepared(tiny_tokenizer, path)
    assert set((cache_directory() / "corpora").glob("[!.]*")) == known  # nothing half made is left there


def test_duplicates_are_never_in_two_splits(tiny_tokenizer, write):
    rows = [a_chat(f"{number % 25}") for number in range(100)]
    data = prepared(tiny_tokenizer, write("a.jsonl", rows))
    train, evaluated, test = (set(texts(split, tiny_tokenizer)) for split in data.splits.values())
    assert not train & evaluated
    assert not train & test
    assert not evaluated & test
    assert sum(len(split.examples) for split in data.splits.values()) == 100
    assert "75 are duplicates of another, always in the same split as it" in data.notes


def test_an_eval_dataset_is_left_out_of_training(tiny_tokenizer, write):
    train = write("train.jsonl", [a_chat(f"{number}") for number in range(20)])
    own = write("eval.jsonl", [a_chat(f"{number}") for number in range(18, 24)])
    data = prepared(tiny_tokenizer, train, eval_dataset=[own], test_fraction=0.0)
    assert (len(data.train.examples), len(data.eval.examples), len(data.test.examples)) == (18, 6, 0)
    assert not set(texts(data.train, tiny_tokenizer)) & set(texts(data.eval, tiny_tokenizer))
    assert "2 left out of training because they are in --eval-dataset" in data.notes


def test_an_error_in_an_eval_dataset_names_that_flag(tiny_tokenizer, write):
    with pytest.raises(UserError, match=r"^--eval-dataset nowhere\.jsonl: there is no such file"):
        prepared(
            tiny_tokenizer,
            write("a.jsonl", [a_chat(f"{number}") for number in range(9)]),
            eval_dataset=["nowhere.jsonl"],
        )


def test_shares_counts_and_weights_of_files(tiny_tokenizer, write):
    one = write("one.jsonl", [a_chat(f"one {number}") for number in range(40)])
    two = write("two.jsonl", [a_chat(f"two {number}") for number in range(40)])
    data = prepared(tiny_tokenizer, f"{one}:0.5", f"{two}#10")
    every = [text for split in data.splits.values() for text in texts(split, tiny_tokenizer)]
    counts = [sum(name in text for text in every) for name in ("one", "two")]
    assert counts == [20, 10]
    assert f"{one}: 20 of 40 conversations used" in data.notes
    assert len(load_split(resolve({"dataset": (f"{two}#10",)}, "none"), tiny_tokenizer).examples) == 10
    data = prepared(tiny_tokenizer, one, f"{two}:2.5", test_fraction=0.0)
    assert f"{two}: 40 of 40 conversations used, 2.5 times an epoch in training" in data.notes
    train = texts(data.train, tiny_tokenizer)
    of_two = [text for text in train if "two" in text]
    assert len(of_two) == round(2.5 * len(set(of_two)))
    assert len(set(train) - set(of_two)) == len(train) - len(of_two)
    assert len(texts(data.eval, tiny_tokenizer)) == 16  # twice over is for training


def test_a_count_above_the_rows_is_refused(tiny_tokenizer, write):
    with pytest.raises(UserError, match=r"#50: 20 conversations of it were read"):
        prepared(tiny_tokenizer, write("a.jsonl", [a_chat(f"{number}") for number in range(20)]) + "#50")


def test_tokens_lost_to_max_length_are_counted(tiny_tokenizer, write):
    rows = [a_chat(f"{number}", "y" * 50) for number in range(10, 20)]
    rows += [a_chat(f"{number}" + "x" * 300) for number in range(10)]
    data = prepared(tiny_tokenizer, write("a.jsonl", rows), max_length=60, test_fraction=0.0)
    assert sum(split.truncated for split in data.splits.values()) == 20
    assert sum(split.dropped for split in data.splits.values()) == 10
    example = encode([rows[0]["messages"]], tiny_tokenizer)[0]
    lost = example.supervised_tokens - int((example.labels[1:60] != -100).sum())
    assert sum(split.supervised_lost for split in data.splits.values()) == 10 * lost + 10 * len("Yes.<\n")
    stop, losing, truncated = data.warnings
    assert stop == "no answer ends within --max-length, so the model will not learn to stop"
    share = data.train.supervised_lost / (data.train.supervised_lost + data.train.supervised)
    assert losing.startswith(f"{share:.0%} of the supervised tokens are lost to --max-length")
    assert truncated.endswith("training conversations are truncated by --max-length")


@pytest.mark.parametrize("longest", [0, 2**62 - 1])
def test_a_model_without_a_limit_of_positions_truncates_nothing(tiny_model_dir, write, tmp_path, longest):
    shutil.copytree(tiny_model_dir, tmp_path / "model")
    MambaConfig(vocab_size=259).save_pretrained(tmp_path / "model")  # as Bloom's, it has no max_position_embeddings
    tokenizer = load_tokenizer(str(tmp_path / "model"), local_files_only=True)
    chats = write("a.jsonl", [a_chat(f"{number}", f"{number} " * 300) for number in range(20)])
    data = prepared(tokenizer, chats, write("texts.jsonl", [{"text": "Once. " * 300}]), max_length=longest)
    assert [len(split.examples) for split in data.splits.values()] == [13, 5, 3]
    assert not any(split.truncated for split in data.splits.values())
    assert not data.leaks


def test_settings_without_effect_are_warned_about(tiny_tokenizer, write):
    chats = write("a.jsonl", [a_chat(f"{number}", "y" * 50) for number in range(20)])
    assert not prepared(tiny_tokenizer, chats).warnings
    tokenizer = copy.copy(tiny_tokenizer)
    tokenizer.model_max_length = 40
    too_long, split = prepared(tokenizer, chats, max_length=10_000, split="test").warnings
    assert too_long.startswith("--max-length: there are conversations of ")
    assert too_long.endswith(" tokens; the context length is 40")
    assert split == "--split test has no effect: files have no splits"
    empty = write("empty.jsonl", [])
    for files, flags in (([chats, empty], {}), ([chats, chats, empty], {}), ([chats, empty], {"max_examples": 20})):
        (unused,) = prepared(tiny_tokenizer, *files, **flags).warnings
        assert unused.startswith(f"no conversation of {empty} is used: ")


def test_an_implausible_share_is_warned_about(tiny_tokenizer, write):
    chats = write("a.jsonl", [a_chat(f"{number}" + "x" * 450, "a") for number in range(8)])
    (warning,) = prepared(tiny_tokenizer, chats).warnings
    assert warning.startswith("0.6% of the training tokens are supervised; look at them")


def test_the_page_shows_every_token(tiny_model_dir, write, tmp_path, capsys):
    path = write("a.jsonl", [a_chat(f"<b>{number}</b>", "🙂 & so on") for number in range(20)])
    arguments = ["--model", str(tiny_model_dir), "--dataset", path, "--show", "2"]
    assert data_command.main([*arguments, "--html", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().out == f"written to {tmp_path}/page.html\n"
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert text.count(">&lt;</span>") == 4  # nobody's text is markup
    assert "><</span>" not in text
    assert text.count(">🙂</span>") == 2  # its four tokens, shown as the one character they are
    assert text.count('<span class=t title="&#x27;&lt;|im_end|&gt;&#x27;, id 2') == 2
    assert text.count('<span class=c title="&#x27;&lt;|im_end|&gt;&#x27;, id 2') == 2
    assert "http" not in text  # self-contained
    assert "<tr><td>train<td>18<td>" in text


def test_a_dataset_of_one_conversation_repeated_is_refused(tiny_tokenizer, write):
    with pytest.raises(UserError, match=r"the eval split is empty, as all of its conversations are duplicates"):
        prepared(tiny_tokenizer, write("a.jsonl", [a_chat("x")] * 50))


def test_a_refusal_names_its_conversation(tmp_path, write):
    chats = [a_chat(f"{number}") for number in range(300)]
    chats[250]["messages"].insert(0, {"role": "assistant", "content": "Welcome!"})
    tokenizer = tokenizer_with(GEMMA, GEMMA_TOKENS, tmp_path / "model")
    with pytest.raises(
        UserError, match=r"a\.jsonl:251: .* in a conversation of assistant, user, it does not take them"
    ):
        prepared(tokenizer, write("a.jsonl", chats), chat_template="model")


def test_a_partial_corpus_is_removed(tiny_tokenizer, write):
    """By the next that wants the same corpus; another may be at work on another."""
    path, corpora = write("a.jsonl", [a_chat(f"dead {number}") for number in range(20)]), cache_directory() / "corpora"
    prepared(tiny_tokenizer, path)
    made = max(corpora.glob("[!.]*"), key=lambda directory: directory.stat().st_mtime_ns)
    shutil.rmtree(made)
    half, another = corpora / f".{made.name}.partial-x", corpora / ".0123456789abcdef.partial-x"
    half.mkdir()
    another.mkdir()
    prepared(tiny_tokenizer, path)
    assert made.exists()
    assert not half.exists()
    assert another.exists()


@pytest.mark.parametrize("damage", ["truncated", "a bit flipped", "removed"])
def test_a_corrupt_corpus_is_made_again(tiny_tokenizer, write, monkeypatch, tmp_path, capsys, damage):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    chats = write("a.jsonl", [a_chat(f"{number}") for number in range(20)])
    before = prepared(tiny_tokenizer, chats)
    (rows,) = cache_directory().glob("corpora/*/rows.arrow")
    content = rows.read_bytes()
    if damage == "removed":
        rows.unlink()
    else:
        half = len(content) // 2
        flipped = content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :]
        rows.unlink()
        rows.write_bytes(content[:half] if damage == "truncated" else flipped)
    assert prepared(tiny_tokenizer, chats).fingerprint == before.fingerprint
    assert "the cached corpus is corrupt and is made again: " in capsys.readouterr().err
    assert rows.read_bytes() == content


def test_quantities_of_an_eval_dataset(tiny_tokenizer, write):
    chats = write("a.jsonl", [a_chat(f"{number}") for number in range(20)])
    others = write("b.jsonl", [a_chat(f"other {number}") for number in range(12)])
    for amount, count in (("", 12), ("#5", 5), (":0.5", 6)):
        data = prepared(tiny_tokenizer, chats, eval_dataset=[others + amount], max_examples=8, test_fraction=0.0)
        assert (len(data.train.examples), len(data.eval.examples)) == (8, count)
    with pytest.raises(UserError, match=r"--eval-dataset .*b\.jsonl:2: an evaluation uses each conversation once"):
        prepared(tiny_tokenizer, chats, eval_dataset=[others + ":2"])


def test_a_page_overwrites_only_an_earlier_page(tiny_model_dir, write, tmp_path):
    chats = write("a.jsonl", [a_chat(f"{number}") for number in range(20)])
    before = Path(chats).read_bytes()
    arguments = ["--model", str(tiny_model_dir), "--dataset", chats, "--html"]
    with pytest.raises(UserError, match=r"--html .*a\.jsonl: it exists and is not an earlier page"):
        data_command.main([*arguments, chats])
    assert Path(chats).read_bytes() == before
    for target, why in ((tmp_path, "it exists and is not"), (tmp_path / "no" / "page.html", "there is no directory")):
        with pytest.raises(UserError, match=why):
            data_command.main([*arguments, str(target)])
    for _ in range(2):
        assert data_command.main([*arguments, str(tmp_path / "page.html")]) == 0


def test_a_cache_that_cannot_be_written_says_how_to_move_it(tiny_tokenizer, write, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot be written \(Not a directory\); set XDG_CACHE_HOME"):
        prepared(tiny_tokenizer, write("a.jsonl", [a_chat(f"{number}") for number in range(20)]))


def test_a_conversation_of_several_examples_is_one_conversation(write, tmp_path):
    """Splits, amounts and copies are of conversations, windows of examples; both are counted."""
    tokenizer = tokenizer_with(QWEN3, QWEN_TOKENS, tmp_path / "model")
    chats = [a_chat(f"{number}") for number in range(10)]
    for number in range(20):
        chats.append({"messages": a_chat(f"one {number}")["messages"] + a_chat(f"two {number}")["messages"]})
    path = write("a.jsonl", [*chats, chats[-1]])
    data = prepared(tokenizer, path, chat_template="model", template_option=())
    assert sum(split.conversations for split in data.splits.values()) == 31
    assert sum(len(split.examples) for split in data.splits.values()) == 10 + 2 * 21
    assert "1 are duplicates of another, always in the same split as it" in data.notes
    assert (
        "31 conversations, 52 examples: the template writes an earlier answer differently from the last" in data.notes
    )
    for number in range(20):
        homes = [
            name for name, split in data.splits.items() for text in texts(split, tokenizer) if f"one {number}<" in text
        ]
        assert len(set(homes)) == 1
    assert len(prepared(tokenizer, path + "#5", chat_template="model", test_fraction=0.0).notes) > 0


def test_an_answer_that_chatml_cannot_write_is_a_bad_row(write, tmp_path):
    """The others of its batch are encoded all the same."""
    save_model("T5", *TEMPLATES["ChatML"], tmp_path)
    tokenizer = load_tokenizer(str(tmp_path), True)
    answers = ["猫" if number in (4, 9) else "no" + " so" * number for number in range(30)]
    path = write("a.jsonl", [a_chat("Hi", answer) for answer in answers])
    with pytest.raises(UserError, match=r"a\.jsonl:5: .*message 2: the ids of an answer do not decode .*: 猫»"):
        prepared(tokenizer, path)
    data = prepared(tokenizer, path, skip_bad_rows=0.1, test_fraction=0.0)
    assert sum(len(split.examples) for split in data.splits.values()) == 28
    assert any(note.startswith("2 rows left out") for note in data.notes)


def test_answers_that_join_with_their_header_are_noted(real_tokenizer, write):
    chats = [a_chat(f"{number}", "\n\nYes.") for number in range(20)]
    for number in range(5):
        chats[number]["messages"] += a_chat("So?")["messages"]
    data = prepared(real_tokenizer, write("a.jsonl", chats))
    assert "20 conversations, 25 examples: the tokenizer joins some answers with their header" in data.notes


def test_tools_and_reasoning_reach_the_template(write, tmp_path):
    tokenizer = tokenizer_with(QWEN3, QWEN_TOKENS, tmp_path / "model")
    call = {"function": {"name": "f", "arguments": '{"a": "Ünï"}'}}
    answer = {"role": "assistant", "content": None, "reasoning_content": "Hm.", "tool_calls": [call]}
    chats = [a_chat(f"{number}") for number in range(10)]
    for number in range(10):
        chats[number]["messages"][1:] = [
            answer,
            {"role": "tool", "content": "7"},
            {"role": "assistant", "content": "So."},
        ]
        chats[number]["tools"] = [{"name": "f", "description": "Does it."}]
    data = prepared(tokenizer, write("a.jsonl", chats), chat_template="model", max_length=2000)
    for text in texts(data.train, tokenizer):
        assert '<tool_call>\n{"name": "f", "arguments": {"a": "Ünï"}}\n</tool_call>' in text
        assert "<think>\nHm.\n</think>" in text
        assert "Does it." in text
        assert "<tool_response>\n7\n" in text
    with pytest.raises(
        UserError, match=r"10 of 10 rows are invalid(.|\n)*10 × --chat-template chatml has no tools.*b\.jsonl:1, "
    ):
        prepared(tokenizer, write("b.jsonl", chats))


def test_rows_that_a_template_refuses_can_be_skipped(write, tmp_path):
    tokenizer = tokenizer_with(QWEN3, QWEN_TOKENS, tmp_path / "model")
    chats = [a_chat(f"{number}") for number in range(28)]
    chats[3:3], chats[9:9] = [a_chat("a", "<tool_call>{</tool_call>")], [a_chat("b", "<tool_call>[]</tool_call>")]
    path = write("a.jsonl", chats)
    with pytest.raises(UserError, match=r"a\.jsonl:4: --chat-template: .* message 2: what stands in <tool_call>"):
        prepared(tokenizer, path, chat_template="model")
    with pytest.raises(UserError, match=r"2 of 30 rows are invalid, more than --skip-bad-rows 0\.05(.|\n)*a\.jsonl:10"):
        prepared(tokenizer, path, chat_template="model", skip_bad_rows=0.05)
    data = prepared(tokenizer, path, chat_template="model", skip_bad_rows=0.1)
    assert sum(len(split.examples) for split in data.splits.values()) == 28
    left_out = '--chat-template: what stands in <tool_call> is not {"name": …, "arguments": {…}} in JSON'
    assert f"2 rows left out (2 × {left_out})" in data.notes
