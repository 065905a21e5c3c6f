"""A run writes into a directory of its own, touches nothing else, and can be resumed and evaluated from anywhere."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import eval as eval_command
import train as train_command
from config import UserError
from running import directory

ROOT = Path(__file__).parent.parent


pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture
def here(tiny_model_dir, chats, monkeypatch):
    """A working directory that holds a model and a dataset, and nothing else."""
    monkeypatch.chdir(chats.parent)
    shutil.copytree(tiny_model_dir, "model")
    return chats.parent


FLAGS = ["--model", "model", "--dataset", "chats.jsonl", "--dtype", "fp32", "--max-steps", "2"]


def content(path):
    return {file: file.read_bytes() for file in Path(path).rglob("*") if file.is_file()}


def refused(*arguments, command=train_command):
    with pytest.raises(UserError) as raised:
        command.main(list(map(str, arguments)))
    assert "\n" not in str(raised.value)
    return str(raised.value)


def interrupted(monkeypatch, *flags):
    """A run that died in its second update, after a checkpoint."""
    real, steps = train_command.train_step, iter(range(1))
    with monkeypatch.context() as patch:
        patch.setattr(train_command, "train_step", lambda *a, **o: (next(steps), real(*a, **o))[1])
        with pytest.raises(RuntimeError):  # a generator's words for StopIteration
            train_command.main([*FLAGS, "--save-every", "1", "--eval-every", "1", *flags])


@pytest.mark.parametrize("name", ["best/x", "checkpoints/step-1/x", "metrics.jsonl", "answers.json", "notes.txt"])
def test_a_directory_that_holds_anything_is_refused(here, name):
    there = here / "mine" / name
    there.parent.mkdir(parents=True)
    there.write_text("mine")
    before = content(here)
    said = refused(*FLAGS, "--output-dir", "mine")
    assert said == f"--output-dir mine: it is not empty (it holds {name.split('/')[0]}); name a new directory"
    assert content(here) == before


def test_a_run_whose_settings_are_lost_is_not_overwritten():
    assert train_command.main([*FLAGS, "--output-dir", "run"]) == 0
    Path("run/config.json").unlink()
    before = content("run")
    assert "it is not empty" in refused(*FLAGS, "--output-dir", "run")
    assert "there is no run in it" in refused("--resume", "run")
    assert content("run") == before


def test_an_empty_directory_is_taken():
    Path("run").mkdir()
    assert train_command.main([*FLAGS, "--output-dir", "run"]) == 0


@pytest.mark.parametrize("name", ["a run; #1", "a:b", "-", "new\nline", "run'\""])
def test_any_name_will_do_and_printed_commands_are_quoted(name, capsys):
    os.replace("chats.jsonl", "my chats: #1.jsonl")
    flags = ["my chats: #1.jsonl" if flag == "chats.jsonl" else flag for flag in FLAGS]
    assert train_command.main([*flags, f"--output-dir={name}"]) == 0
    (ask,) = [line for line in capsys.readouterr().out.split("  ") if line.strip().startswith("python eval.py")]
    assert shlex.split(ask)[2] == name
    assert eval_command.main([f"./{name}", "--prompts", "Hi", "--max-new-tokens", "1"]) == 0


def test_two_runs_of_one_second_get_two_directories(monkeypatch):
    monkeypatch.setattr(directory.time, "strftime", lambda _: "now")
    for _ in range(2):
        assert train_command.main(FLAGS) == 0
    assert sorted(path.name for path in Path("runs").iterdir()) == ["chats-now", "chats-now-2"]


def test_a_run_is_resumed_from_another_directory_without_its_original_model(monkeypatch):
    interrupted(monkeypatch, "--output-dir", "run")
    shutil.rmtree("model")
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert train_command.main(["--resume", "../run"]) == 0
    logged = map(json.loads, Path("../run/metrics.jsonl").read_text().splitlines())
    assert [line["step"] for line in logged if line["kind"] == "train"] == [1, 2]


def test_a_home_directory_is_expanded(here, monkeypatch):
    monkeypatch.setenv("HOME", str(here / "home"))
    assert train_command.main([*FLAGS, "--output-dir=~/run"]) == 0
    assert (here / "home" / "run" / "best").is_dir()
    assert train_command.main(["--resume=~/run"]) == 0


def test_a_finished_run_answers_without_its_data(capsys):
    assert train_command.main([*FLAGS, "--output-dir", "run"]) == 0
    Path("chats.jsonl").unlink()
    capsys.readouterr()
    assert eval_command.main(["run", "--prompts", "Hi", "--max-new-tokens", "1"]) == 0
    printed = capsys.readouterr()
    assert "> Hi" in printed.out
    assert printed.err.startswith("warning: no losses, as the model's dataset is missing: ")
    assert "there is no such file" in refused("run", command=eval_command)


def test_a_run_and_a_model_have_no_mean_without_common_data():
    """Each on its own: the run's, and the quickstart's."""
    assert train_command.main([*FLAGS, "--output-dir", "run"]) == 0
    said = "model is not a run and has no data of its own; name runs alone, compare with it (--against), or say on what"
    assert refused("run", "model", command=eval_command).startswith(said)
    assert eval_command.main(["run", "model", "--dataset", "chats.jsonl", "--prompts", "Hi"]) == 0
    assert eval_command.main(["run", "run/best", "--prompts", "Hi", "--max-new-tokens", "1"]) == 0


def test_a_part_of_a_run_is_evaluated_on_the_data_of_the_run(here, monkeypatch, capsys):
    interrupted(monkeypatch, "--output-dir", "run")
    losses = []
    for part in ("run", "run/best", "run/checkpoints/step-1"):
        capsys.readouterr()
        assert eval_command.main([part, "--json", "--max-new-tokens", "1", "--against", "run"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["dataset"] == report["against"]["dataset"] == [str(here / "chats.jsonl")]
        losses.append(report["splits"]["eval"]["loss"])
    assert losses[0] == losses[1]


def test_only_a_run_is_resumed_and_a_run_is_not_a_model(here, monkeypatch):
    interrupted(monkeypatch, "--output-dir", "run")
    assert refused("--resume", "run/checkpoints/step-1") == "--resume run/checkpoints/step-1: there is no run in it"
    for part in ("run/best", "model"):
        assert "this is a model's, not a run's" in refused("--resume", part)
    assert refused("--model", "run", *FLAGS[2:]).endswith(
        "/run: this is a run; its best model is " + str(here / "run/best")
    )


def test_a_window_is_no_larger_than_the_conversations_are_many(capsys):
    assert train_command.main([*FLAGS, "--batch-size", "100000", "--dry-run"]) == 0
    assert "each over a window of 36 conversations" in capsys.readouterr().out


def test_a_run_writes_only_into_its_directory_and_the_cache(here):
    """Everything else is mounted read-only: a run that wrote anywhere else would fail."""
    (here / "run").mkdir()
    (here / "scratch").mkdir()
    writable = [here / "run", here / "scratch", os.environ["XDG_CACHE_HOME"]]
    command = [sys.executable, str(ROOT / "train.py"), *FLAGS, "--save-every", "1", "--output-dir", "run"]
    script = [*(f"mount --bind {shlex.quote(str(path))} {shlex.quote(str(path))}" for path in writable)]
    script += ["mount -o remount,ro,bind /", f"cd {shlex.quote(str(here))}", "! touch other 2>&1", shlex.join(command)]
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("a mount namespace wants root")
    before = content(here)
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-e", "-c", "\n".join(script)],
        env={**os.environ, "TMPDIR": str(here / "scratch")},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (here / "run" / "checkpoints" / "step-2" / "MANIFEST.json").exists()
    assert not list((here / "scratch").iterdir())
    assert {path: what for path, what in content(here).items() if here / "run" not in path.parents} == before
