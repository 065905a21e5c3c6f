"""The command line that scripts rely on, and one clear line for every mistake."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import data as data_command
import eval as eval_command
import train as train_command
from config import (
    PRESETS,
    RUN_FORMAT,
    Config,
    Parser,
    UserError,
    protect_output,
    report_error,
    resolve,
    run_command,
    with_absolute_paths,
)
from conversations.tokenizer import load_tokenizer
from running import setup
from storage import hub
from storage.records import read_record

ROOT = Path(__file__).parent.parent

TRAIN_FLAGS = """
--preset --model --dataset --eval-dataset --split --max-examples --max-length --skip-bad-rows --chat-template
--template-option --drop-columns --columns --supervise --eval-fraction --test-fraction --epochs --max-steps
--exclude-leaks --batch-size --lr --schedule --warmup-steps --min-lr --decay-fraction --adam-beta2
--weight-decay --max-grad-norm --lora-rank --lora-alpha --seed --device --dtype --layout --micro-batch-tokens
--shard --compile --deterministic --gradient-checkpointing
--output-dir --log-every --eval-every --save-every --keep --resume --allow-changes --dry-run --config --write-config
--replay --updates
"""
DATA_FLAGS = """
--preset --model --dataset --eval-dataset --split --max-examples --max-length --skip-bad-rows --chat-template
--template-option --drop-columns --columns --supervise --eval-fraction --test-fraction --seed --show --json --html
--exclude-leaks --leaks --audit --config
"""
EVAL_FLAGS = """
--preset --dataset --eval-dataset --split --max-examples --max-length --skip-bad-rows --chat-template --template-option
--drop-columns --columns --supervise --eval-fraction --test-fraction --seed --device --dtype
--layout --micro-batch-tokens --against --prompts --greedy --max-new-tokens --html --json
--chat --system --temperature --top-p --repetition-penalty --text --served --export --push-to-hub --config --exact
"""


@pytest.mark.parametrize(
    ("command", "flags"), [(train_command, TRAIN_FLAGS), (data_command, DATA_FLAGS), (eval_command, EVAL_FLAGS)]
)
def test_the_command_line_is_frozen(command, flags, capsys):
    with pytest.raises(SystemExit) as exited:
        command.main(["--help"])
    assert exited.value.code == 0
    shown = {
        word.strip("[],:") for word in capsys.readouterr().out.split("options:")[1].split() if word.startswith("--")
    }
    assert shown - {
        "--help",
        "--no-compile",
        "--no-deterministic",
        "--no-exclude-leaks",
        "--no-gradient-checkpointing",
    } == set(flags.split())


GROUPS = {
    "data": "--preset --model --dataset --eval-dataset --supervise --test-fraction",
    "what is learned": "--epochs --batch-size --lr --adam-beta2 --seed",
    "memory and speed": "--device --dtype --micro-batch-tokens --shard --compile",
    "the run": "--output-dir --log-every --eval-every --save-every --keep --resume --allow-changes --dry-run",
}


@pytest.mark.parametrize("command", [train_command, data_command, eval_command])
def test_the_help_has_its_flags_in_four_groups(command, capsys):
    with pytest.raises(SystemExit):
        command.main(["--help"])
    groups = dict(re.findall(r"^(\w[\w ]*):\n((?:(?:  .*)?\n)+)", capsys.readouterr().out, re.M))
    groups.pop("positional arguments", None)
    placed = {flag: name for name, text in groups.items() for flag in re.findall(r"^  (--[\w-]+)", text, re.M)}
    for name, flags in GROUPS.items():
        assert {placed.get(flag, name) for flag in flags.split()} == {name}
    named = [name for name in groups if name != "options"]  # those are the command's own
    assert named == [name for name in GROUPS if name in placed.values()]
    if command is train_command:
        assert "options" not in placed.values()


def test_every_flag_has_a_help_text_and_its_default(capsys):
    with pytest.raises(SystemExit):
        train_command.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "conversations an update sees: its window (default 32, quickstart: 8)" in text
    assert "peak learning rate (default 0.0002)" in text


def test_a_flag_cannot_be_abbreviated():
    with pytest.raises(UserError, match="unrecognized arguments: --batch 3"):
        train_command.main(["--batch", "3"])


def test_the_ultrachat_preset_is_the_reference_experiment():
    config = resolve({}, "ultrachat")
    assert (config.model, config.dataset) == ("HuggingFaceTB/SmolLM2-135M", ("HuggingFaceH4/ultrachat_200k",))
    assert (config.split, config.max_examples, config.seed) == ("test_sft", 2000, 42)
    assert (config.epochs, config.batch_size, config.lr, config.warmup_steps) == (2, 32, 2e-4, 12)
    assert (config.weight_decay, config.max_grad_norm) == (0.1, 1.0)
    assert (config.eval_every, config.save_every, config.keep) == (10, 10, 2)


MODEL, DATASET = {"model": "mine"}, {"dataset": ("mine.jsonl",)}


@pytest.fixture(params=[False, True], ids=["no GPU", "GPU"])
def gpu(request, monkeypatch):
    """With and without a GPU; the Hub answers."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: request.param)
    monkeypatch.setattr(hub, "find_commit", lambda *_: ("c0ffee", False))
    return request.param


@pytest.mark.parametrize("named", [{}, MODEL], ids=["nothing", "a model"])
def test_without_a_dataset_of_ones_own_the_machine_chooses_a_whole_experiment(gpu, named):
    expected = "ultrachat" if gpu else "quickstart"
    preset, _ = hub.choose_preset(named)
    assert preset == expected
    assert resolve(named, preset) == Config(**{**PRESETS[expected], **named, "preset": expected})


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("named", [DATASET, DATASET | MODEL | {"lr": 1.0}], ids=["a dataset", "both"])
def test_a_dataset_of_ones_own_starts_from_the_documented_defaults_on_any_machine(named):
    preset, _ = hub.choose_preset(named)
    assert resolve(named, preset) == Config(**named, preset="none")


@pytest.mark.parametrize("preset", ["ultrachat", "quickstart"])
def test_a_preset_gives_another_dataset_its_model_and_nothing_else(preset):
    config = resolve({"preset": preset, **DATASET}, preset)
    assert config == Config(preset=preset, model=PRESETS[preset]["model"], **DATASET)
    same = resolve({"dataset": PRESETS[preset]["dataset"]}, preset)
    assert same == resolve({}, preset)


def test_a_run_of_another_version_is_refused_in_one_line(tmp_path):
    config = dataclasses.asdict(Config(preset="none"))
    record = {"config": config, "format": RUN_FORMAT, "precision": "", "data": {}, "versions": {}}
    for changed in ({**record, "format": 1}, {**record, "format": None}, {**record, "config": {"lr": 1.0}}):
        (tmp_path / "config.json").write_text(json.dumps(changed))
        with pytest.raises(UserError, match=r"^[^\n]*made by another version of this program[^\n]*$"):
            read_record(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(record))
    assert read_record(tmp_path) == json.loads(json.dumps(record))


def test_config_cannot_be_changed():
    with pytest.raises(AttributeError):
        Config().lr = 1


BAD_VALUES = {
    "--batch-size": ["0", "-1", "two", "1.5", str(2**63)],
    "--seed": [str(2**63)],
    "--micro-batch-tokens": ["-1"],
    "--epochs": ["0"],
    "--max-steps": ["-1"],
    "--max-examples": ["-5"],
    "--max-length": ["-1"],
    "--lr": ["-1e-4", "nan", "inf", "1e400"],
    "--weight-decay": ["-0.1"],
    "--max-grad-norm": ["-1"],
    "--warmup-steps": ["-1"],
    "--eval-fraction": ["1", "-0.5", "nan"],
    "--test-fraction": ["1", "-0.1"],
    "--keep": ["0"],
    "--eval-every": ["-1", "1.5", "x"],
    "--save-every": ["2.5"],
    "--dtype": ["int8"],
    "--preset": ["llama"],
    "--device": ["cuda:7", "abacus"],
    "--model": ["./nowhere"],
    "--dataset": ["./nowhere.jsonl", ".", ""],
    "--resume": ["nowhere", ""],
    "--output-dir": [""],
}


@pytest.mark.parametrize(("flag", "value"), [(flag, value) for flag, values in BAD_VALUES.items() for value in values])
def test_a_nonsense_value_is_refused_by_name_before_anything_is_loaded(flag, value, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(setup, "load_on_ranks", None)
    arguments = [flag, value] if flag == "--preset" else ["--preset", "quickstart", flag, value]
    with pytest.raises(UserError, match=flag) as raised:
        train_command.main(arguments)
    assert "\n" not in str(raised.value).strip()
    assert not list(tmp_path.iterdir())


def refused(*arguments):
    """The message of the `UserError` that `train.py` raises."""
    with pytest.raises(UserError) as raised:
        train_command.main(["--preset", "quickstart", *map(str, arguments)])
    return str(raised.value)


def test_flags_that_contradict_each_other_are_refused(tmp_path):
    (tmp_path / "config.json").touch()
    assert "a resumed run stays in its own directory" in refused("--resume", tmp_path, "--output-dir", tmp_path / "a")
    assert "--allow-changes needs --resume" in refused("--allow-changes")


def test_data_that_leave_nothing_to_train_on_are_refused(tiny_model_dir, chats):
    data = "--model", tiny_model_dir, "--dataset", chats
    assert "of 2 conversations leave 0 to train on" in refused(*data, "--max-examples", 2)
    assert "nothing is supervised in the train split" in refused(*data, "--max-length", 4)


def test_a_directory_that_holds_a_run_or_cannot_be_one_is_refused(tmp_path):
    (tmp_path / "config.json").touch()
    assert "it holds a run already" in refused("--output-dir", tmp_path)
    assert "(Not a directory)" in refused("--output-dir", tmp_path / "config.json" / "run")
    assert "--output-dir /proc/run: cannot write to it (" in refused("--output-dir", "/proc/run")


def test_a_mistake_is_one_line_on_stderr_and_exit_status_1(tiny_model_dir, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text("{}\n")
    monkeypatch.setattr(sys, "argv", ["train.py", "--dataset", "bad.jsonl", "--model", str(tiny_model_dir)])
    with pytest.raises(SystemExit, match="1"):
        run_command(train_command.main)
    assert capfd.readouterr().err == (
        f"error: {tmp_path}/bad.jsonl:1: no known format: it has none of messages, conversations, prompt+completion, "
        "instruction+output, input_ids+labels, text; correct that row\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]


def test_a_message_of_several_lines_keeps_them(capsys):
    assert report_error(UserError("a  b\n c")) == 1
    assert capsys.readouterr().err == "error: a b\n  c\n"


@pytest.mark.parametrize("command", ["eval.py", "train.py"])
def test_a_directory_whose_name_is_not_utf8_is_one_line(tmp_path, tiny_model_dir, chats, command):
    load_tokenizer(str(tiny_model_dir), True).save_pretrained(tmp_path / "model")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny_model_dir / name, tmp_path / "model")
    flags = {"eval.py": ["--export"], "train.py": ["--dataset", chats, "--output-dir"]}[command]
    model = ["--model"] * (command == "train.py") + [tmp_path / "model"]
    arguments = [*model, *flags, os.fsencode(tmp_path / "new") + b"\xe9"]
    done = subprocess.run([sys.executable, ROOT / command, *arguments], capture_output=True, text=True)
    assert done.returncode == 1
    expected = r"error: a name or a text is not UTF-8: '.*new.*udce9.*; rename it, or write it in UTF-8\n"
    assert re.fullmatch(expected, done.stderr), done.stderr


def test_named_settings_are_separated_from_a_commands_own_options():
    parser = Parser()
    parser.add_argument("--show", type=int, default=3)
    parser.add_config_flags(["lr", "gradient_checkpointing"])
    assert parser.parse(["--lr", "1e-3"]) == ({"lr": 1e-3}, {"show": 3})
    assert parser.parse(["--no-gradient-checkpointing"])[0] == {"gradient_checkpointing": False}


def test_data_shows_conversations_as_text_and_as_json(chats, tiny_model_dir, capsys):
    arguments = ["--model", str(tiny_model_dir), "--dataset", str(chats), "--show", "2"]
    assert data_command.main(arguments) == 0
    shown = capsys.readouterr().out
    assert shown.count("[[") == 2
    assert re.search(r"^train \d+ \(0 truncated, 0 dropped\), eval \d+ \(0 truncated, 0 dropped\), test", shown, re.M)
    with pytest.raises(UserError, match="--html and --json: use one of them"):
        data_command.main([*arguments, "--json", "--html", "page.html"])
    assert data_command.main([*arguments, "--json"]) == 0
    encoded = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [set(example) for example in encoded] == [{"input_ids", "labels"}] * 2
    assert all(len(example["input_ids"]) == len(example["labels"]) for example in encoded)


def test_a_dataset_named_twice_is_both():
    parser = Parser()
    parser.add_config_flags(["dataset"])
    assert parser.parse(["--dataset", "a", "b", "--dataset", "c"])[0] == {"dataset": ["a", "b", "c"]}


def test_output_that_cannot_be_encoded_is_escaped(monkeypatch, tmp_path):
    with open(tmp_path / "output", "w", encoding="ascii") as output:
        monkeypatch.setattr(sys, "stdout", output)
        for closed in ("stdin", "stderr"):
            monkeypatch.setattr(sys, closed, None)
        protect_output()
        print("caf\u00e9 \u2026")
        print("nobody reads this", file=sys.stderr)
    assert (tmp_path / "output").read_bytes() == b"caf\\xe9 \\u2026\n"


def test_a_reader_that_vanishes_ends_nothing():
    """As with `| head` and a terminal that is closed."""
    program = (
        "import sys, config\ndef main(_):\n for _ in range(9): print(9 * 'x')\n return 7\nconfig.run_command(main)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert (process.wait(60), process.stderr.read()) == (7, b"")
    process.stderr.close()


def test_paths_of_a_run_are_absolute_and_other_names_are_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b: #1.jsonl"):
        (tmp_path / name).touch()
    named = {"dataset": ("a.jsonl", "a.jsonl:0.5", "b: #1.jsonl#7", "hub/id:part#3"), "model": "no/such", "lr": 1.0}
    assert with_absolute_paths(named) == {
        "dataset": (f"{tmp_path}/a.jsonl", f"{tmp_path}/a.jsonl:0.5", f"{tmp_path}/b: #1.jsonl#7", "hub/id:part#3"),
        "model": "no/such",
        "lr": 1.0,
    }


def test_a_library_that_fails_over_ctrl_c_is_interrupted_too(capfd):
    def main(_):
        try:
            raise KeyboardInterrupt
        finally:
            raise TimeoutError("of a worker")

    with pytest.raises(SystemExit, match="130"):
        run_command(main)
    assert capfd.readouterr().err == "interrupted\n"


def test_a_bug_is_a_traceback(capfd):
    with pytest.raises(SystemExit, match="1"):
        run_command(lambda _: 1 / 0)
    assert capfd.readouterr().err.endswith("\nZeroDivisionError: division by zero\n")


def test_a_command_for_one_process_refuses_torchrun(monkeypatch, capfd):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "argv", ["eval.py", "model"])
    with pytest.raises(SystemExit, match="1"):
        run_command(lambda _: pytest.fail("it has begun"), single_process=True)
    message = "error: eval.py works in one process; start it without torchrun: python eval.py ...\n"
    assert capfd.readouterr().err == message
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(SystemExit, match="0"):
        run_command(lambda _: 0, single_process=True)
