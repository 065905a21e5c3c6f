"""A replay says "equal" of a run that is equal to the last bit, and names what differs of any other."""

import json
import re
import shutil

import pytest
from safetensors.torch import load_file, save_file

import train as train_command
from compute import layout
from config import UserError
from running import resume
from tests.conftest import a_chat, to_flags, write_rows

WORDS = "alpha beta gamma delta epsilon zeta eta theta".split()


@pytest.fixture(scope="module")
def made(tiny_model_dir, tmp_path_factory):
    """A place with a model, data, and a finished run of 12 updates on them, which tests copy."""
    place = tmp_path_factory.mktemp("made")
    shutil.copytree(tiny_model_dir, place / "model")
    rows = [a_chat(f"Word {number}?", " ".join(WORDS[number % 8 :])) for number in range(40)]
    write_rows(place / "chats.jsonl", rows)
    settings = {"model": place / "model", "dataset": place / "chats.jsonl", "eval-fraction": 0.2, "batch-size": 5}
    settings |= {"test-fraction": 0.05, "warmup-steps": 2, "eval-every": 4, "save-every": 6, "dtype": "fp32"}
    settings |= {"lr": 1e-2, "max-steps": 12, "micro-batch-tokens": 200, "output-dir": place / "run"}
    assert train_command.main(to_flags(settings)) == 0
    return place


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    """A copy of that, whose paths are its own."""
    shutil.copytree(made, tmp_path / "place", symlinks=True)
    for path in (tmp_path / "place").rglob("*.json"):
        path.write_text(path.read_text().replace(str(made), str(tmp_path / "place")))
    for manifest in (tmp_path / "place").rglob("MANIFEST.json"):
        manifest.unlink()  # of other paths
    monkeypatch.chdir(tmp_path)
    return tmp_path / "place"


def replay(capsys, place, *more):
    """The exit status of a replay, and the lines of its verdict."""
    capsys.readouterr()
    status = train_command.main(["--replay", str(place / "run"), *map(str, more)])
    return status, capsys.readouterr().out.rstrip().rpartition("\n\n")[2]


def refusal(place, *more):
    with pytest.raises(UserError) as raised:
        train_command.main(["--replay", str(place / "run"), *map(str, more)])
    return str(raised.value)


def change(path, function):
    """Change what is in a JSON file, or in a file of safetensors."""
    if path.suffix == ".json":
        content = json.loads(path.read_text())
        function(content)
        path.write_text(json.dumps(content))
    else:
        content = load_file(path)
        function(content)
        save_file(content, path, {"format": "pt"})


def files(place):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in place.rglob("*")}


def test_a_run_is_equal_to_itself_and_nothing_is_written(place, capsys):
    before = files(place)
    status, verdict = replay(capsys, place)
    assert (status, verdict) == (
        0,
        "equal to update 12: loss, grad_norm, lr, tokens, supervised_tokens of 12 logged updates, bit for bit",
    )
    assert files(place) == before
    assert [path.name for path in place.parent.iterdir()] == ["place"]
    assert replay(capsys, place, "--updates", 3)[1].startswith("equal to update 3: ")
    assert replay(capsys, place, "--updates", 99)[1].startswith("equal to update 12: ")


def test_a_run_that_was_resumed_and_logs_every_third_update(place, capsys, monkeypatch):
    settings = json.loads((place / "run" / "config.json").read_text())["config"]
    settings |= {"log_every": 3, "max_steps": 7, "save_every": 3, "dataset": settings["dataset"][0]}
    settings["output_dir"] = place / "other"
    names = "model dataset dtype lr batch_size micro_batch_tokens log_every max_steps save_every eval_fraction".split()
    flags = to_flags({name.replace("_", "-"): settings[name] for name in [*names, "output_dir"]})
    real, steps = train_command.train_step, iter(range(5))
    monkeypatch.setattr(train_command, "train_step", lambda *a, **o: (next(steps), real(*a, **o))[1])
    with pytest.raises(RuntimeError):  # a generator's words for StopIteration
        train_command.main(flags)
    monkeypatch.setattr(train_command, "train_step", real)
    assert train_command.main(["--resume", str(place / "other")]) == 0
    shutil.rmtree(place / "run")
    (place / "other").rename(place / "run")
    assert replay(capsys, place) == (
        0,
        "equal to update 6: loss, grad_norm, lr, tokens, supervised_tokens of 2 logged updates, bit for bit",
    )
    assert refusal(place, "--updates", 2) == f"--updates 2: the first update in the log of {place / 'run'} is 3"


def test_a_learning_rate_off_by_a_trillionth(place, capsys, monkeypatch):
    real = train_command.learning_rate
    monkeypatch.setattr(train_command, "learning_rate", lambda *a: real(*a) * (1 + 1e-12))
    status, verdict = replay(capsys, place)
    assert status == 1
    assert re.fullmatch(r"differs at update 2: lr 0\.005 -> 0\.0050000000\d+ \(by 1\.0e-12\)", verdict)


def test_another_order(place, capsys, monkeypatch):
    real = layout.window_at
    monkeypatch.setattr(layout, "window_at", lambda step, *rest: real(step + 1, *rest))
    status, verdict = replay(capsys, place)
    assert status == 1
    assert re.match(r"differs at update 1: loss \S+ -> \S+ \(by .*\), grad_norm .*, tokens \d+ -> \d+ ", verdict)


def test_a_number_of_the_log_in_its_last_bit(place, capsys):
    log = place / "run" / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    for line in lines:
        if (line["kind"], line["step"]) == ("train", 7):
            line["grad_norm"] *= 1 + 2**-52
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    status, verdict = replay(capsys, place)
    assert status == 1
    assert re.fullmatch(r"differs at update 7: grad_norm \S+ -> \S+ \(by [12]\.\de-16\)", verdict)
    assert replay(capsys, place, "--updates", 6)[0] == 0


def test_a_changed_seed(place, capsys):
    status, verdict = replay(capsys, place, "--seed", 5)
    assert status == 1
    assert verdict.startswith("differs at update 1: loss ")
    assert "\n  then -> now: --seed 42 -> 5\n" in verdict
    assert "\n  then -> now: data " in verdict


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        ("seed", 5, r"differs at update 1: loss .*\n  then -> now: data "),
        ("lr", 2e-2, r"differs at update 2: lr 0.005 -> 0.01 \(by 1.0e\+00\)$"),
    ],
)
def test_settings_that_were_edited_by_hand(place, capsys, name, value, found):
    change(place / "run" / "config.json", lambda record: record["config"].update({name: value}))
    status, verdict = replay(capsys, place)
    assert (status, bool(re.search(found, verdict, re.DOTALL))) == (1, True)
    change(place / "run" / "config.json", lambda record: record["config"].update(max_steps=9))
    assert "update 12 is logged, but there are 9 in all" in refusal(place)


def test_one_altered_weight_of_the_base(place):
    def alter(weights):
        weights["model.norm.weight"][3] += 1e-6

    change(place / "model" / "model.safetensors", alter)
    changed = f"its base model {place / 'model'} has changed since (model.safetensors)"
    assert refusal(place) == f"--replay {place / 'run'}: {changed}; put that back, or start a new run"


def test_one_changed_word_in_the_data(place, capsys):
    data = place / "chats.jsonl"
    data.write_text(data.read_text().replace("alpha", "alphb", 1))
    status, verdict = replay(capsys, place)
    assert status == 1
    assert re.search(r"\n  then -> now: data \w{8} \([\d/]+ conversations\) -> \w{8} \(", verdict)


def test_data_that_changed_where_no_update_sees_it_are_not_called_equal(place, capsys):
    data = place / "chats.jsonl"
    for word in range(40):  # one of them is held out
        changed = data.read_text().replace(f"Word {word}?", f"Ward {word}?", 1)
        data.write_text(changed)
        status, verdict = replay(capsys, place, "--updates", 1)
        assert status == 1
        if verdict.startswith("up to update 1 nothing that is logged differs, but it is not the same run:\n"):
            break
        data.write_text(changed.replace(f"Ward {word}?", f"Word {word}?", 1))
    else:
        pytest.fail("each word is in the first window")


def test_a_place_that_moved_is_the_same_run(place, capsys):
    (place / "model").rename(place / "moved")
    (place / "chats.jsonl").rename(place / "moved.jsonl")
    with pytest.raises(UserError, match="there is no such"):
        train_command.main(["--replay", str(place / "run")])
    status, verdict = replay(capsys, place, "--model", place / "moved", "--dataset", place / "moved.jsonl")
    assert (status, verdict[:19]) == (0, "equal to update 12:")


def test_another_machine_is_named(place, capsys):
    def edit(record):
        record["versions"]["torch"] = "2.9.0"
        record |= {"processes": 2, "device": "cuda (NVIDIA H100), fp32"}
        del record["base"]

    change(place / "run" / "config.json", edit)
    status, verdict = replay(capsys, place, "--layout", "padded", "--device", "cpu")
    assert status == 1, "padded rows round otherwise"
    assert verdict.startswith("differs at update ")
    device = "device cuda (NVIDIA H100), fp32 -> cpu ("
    for line in ("torch 2.9.0 -> ", device, "processes 2 -> 1", "--layout auto -> padded"):
        assert f"\n  then -> now: {line}" in verdict
    assert "base model's files, which are not recorded" in verdict


def test_a_resumed_run_records_on_what_it_went_on(place, capsys, monkeypatch):
    answers = place / "run" / "answers.json"
    change(answers, lambda content: content.pop("after"))
    monkeypatch.setattr(resume, "list_version_changes", lambda *_: ["torch 2.9.0 -> 2.13.0"])
    shutil.rmtree(place / "run" / "checkpoints")
    (place / "run" / "metrics.jsonl").write_text("")
    assert train_command.main(["--resume", str(place / "run")]) == 0
    monkeypatch.undo()
    monkeypatch.chdir(place)
    status, verdict = replay(capsys, place)
    assert status == 0
    assert verdict.endswith("\n  when it was resumed after update 0: torch 2.9.0 -> 2.13.0")


def test_what_cannot_be_replayed_is_one_line(place):
    run = place / "run"
    assert refusal(place.parent) == f"--replay {place.parent / 'run'}: there is no run in it"
    for flag in (["--resume", run], ["--allow-changes"], ["--dry-run"], ["--write-config", "a.toml"]):
        assert "--replay trains nothing and writes nothing; leave --" in refusal(place, *flag)
    assert refusal(place, "--updates", 0) == "--updates must be at least 1"
    with pytest.raises(UserError, match="--updates needs --replay"):
        train_command.main(["--updates", "3"])
    log = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(log.replace('"grad_norm"', '"norm"', 1))
    assert "the line of update 1 in metrics.jsonl is damaged" in refusal(place)
    (run / "metrics.jsonl").write_text(log.replace("{", "[", 1))
    assert refusal(place) == f"{run}/metrics.jsonl:1: damaged; delete that line to continue without it"
    (run / "metrics.jsonl").write_text("")
    assert refusal(place) == f"--replay {run}: no update is in its log"
    (run / "metrics.jsonl").write_text(log)
    change(run / "config.json", lambda record: record["changes"].append({"step": 3, "changed": ["--lr 1 -> 2"]}))
    assert "it was resumed with other settings (--lr 1 -> 2), and the old ones are not recorded" in refusal(place)
    (run / "config.json").write_text("{")
    assert refusal(place).startswith(f"{run}/config.json: damaged")
