"""A run resumes with the same settings and data, or with changes that are allowed."""

import importlib.metadata
import json
import signal
from functools import partial

import pytest
from safetensors.torch import load_file

from storage.durable import MANIFEST, write_checksummed
from tests.faults.harness import assert_same, lines, on_dataset, steps_saved
from tests.faults.inject import kill, on_call, send

CHANGES = {  # flags, and the lines that name them
    "--lr 0.02": "--lr 0.01 -> 0.02",
    "--epochs 3": "--epochs 2 -> 3",
    "--dtype bf16": "forward pass in fp32 -> bf16 (--dtype fp32 keeps it)",
    "--seed 4": "--seed 3 -> 4",
    "--batch-size 6": "--batch-size 7 -> 6",
    "--weight-decay 0": "--weight-decay 0.1 -> 0.0",
    "--max-length 50": "--max-length 0 -> 50",
    "--eval-every 5": "--eval-every 4 -> 5",
}


def test_changed_settings_are_named_and_refused(interrupted, start_process):
    process = start_process(["--resume", interrupted, *" ".join(CHANGES).split()])
    assert process.wait() == 1
    first, *named = process.stderr.splitlines()
    assert first == (
        f"error: --resume {interrupted}: it would be a different run; leave that out, or allow it with --allow-changes"
    )
    changed = {line.strip() for line in named}
    assert changed >= {*CHANGES.values()}
    assert all(line.startswith("data ") for line in changed - {*CHANGES.values()})  # the length cuts conversations
    assert steps_saved(interrupted) == [4, 6]


def test_an_allowed_change_is_printed_applied_and_recorded(interrupted, uninterrupted, start_process):
    changes = ["--lr", "0.02", "--weight-decay", "0.0"]
    process = start_process(["--resume", interrupted, *changes, "--allow-changes"])
    assert process.wait() == 0, process.stderr
    changed = ["--lr 0.01 -> 0.02", "--weight-decay 0.1 -> 0.0"]
    assert [
        line.removeprefix("changed: ") for line in process.stdout.splitlines() if line.startswith("changed: ")
    ] == changed
    record = json.loads((interrupted / "config.json").read_text())
    assert record["changes"] == [{"step": 6, "changed": changed}]
    assert (record["config"]["lr"], record["config"]["weight_decay"]) == (0.02, 0.0)
    ours, theirs = (lines(run, "train")[3:] for run in (interrupted, uninterrupted))
    assert [line["lr"] for line in ours] == pytest.approx([2 * line["lr"] for line in theirs])


def test_an_allowed_change_is_not_asked_for_again(interrupted, start_process):
    """The run is stopped before it has a checkpoint with the change."""
    term = partial(on_call, "train.fit", 1, partial(send, signal.SIGTERM))
    assert start_process(["--resume", interrupted, "--lr", "0.02", "--allow-changes"], term).wait() == 143
    assert steps_saved(interrupted) == [4, 6]
    assert start_process(["--resume", interrupted, "--lr", "0.03"]).wait() == 1
    process = start_process(["--resume", interrupted])
    assert process.wait() == 0, process.stderr
    assert "changed: --lr 0.01 -> 0.02\n" in process.stdout
    record = json.loads((interrupted / "config.json").read_text())
    assert record["changes"] == [{"step": 6, "changed": ["--lr 0.01 -> 0.02"]}]


def test_a_changed_weight_decay_is_applied(interrupted, uninterrupted, start_process):
    """The optimizer's state brings its moments along, not its settings."""
    assert start_process(["--resume", interrupted, "--weight-decay", "50", "--allow-changes"]).wait() == 0
    sizes = [sum(float(w.square().sum()) for w in weights_of(run)) for run in (interrupted, uninterrupted)]
    assert sizes[0] < 0.9 * sizes[1]


def weights_of(run):
    return load_file(run / "checkpoints" / "step-9" / "model" / "model.safetensors").values()


def test_an_edited_dataset_is_noticed_by_its_fingerprint(flags, start_process, conversations, tmp_path):
    data = tmp_path / "mine.jsonl"
    data.write_bytes(conversations.read_bytes())
    run = tmp_path / "run"
    assert start_process([*on_dataset(flags, data), "--output-dir", run, "--max-steps", "3"]).wait() == 0
    (run / "answers.json").unlink()  # as if it had died before its end
    data.write_text(data.read_text().replace("Count to 7", "Count to 8"))
    process = start_process(["--resume", run])
    assert process.wait() == 1
    assert process.stderr.splitlines()[1].strip().startswith("data ")
    assert process.stderr.splitlines()[1].endswith("(30/8/2 conversations)")
    assert start_process(["--resume", run, "--allow-changes"]).wait() == 0


def test_settings_edited_by_hand_are_noticed(interrupted, start_process):
    path = interrupted / "config.json"
    path.write_text(path.read_text().replace('"lr": 0.01', '"lr": 0.5'))
    process = start_process(["--resume", interrupted])
    assert process.wait() == 1
    assert "--lr 0.01 -> 0.5" in process.stderr


def test_other_library_versions_are_reported_and_the_run_resumes(interrupted, uninterrupted, start_process):
    checkpoint = interrupted / "checkpoints" / "step-6"
    content = json.loads((checkpoint / MANIFEST).read_text())
    del content["sha256"]
    content["versions"]["torch"] = "2.9.0"
    write_checksummed(checkpoint / MANIFEST, content)
    process = start_process(["--resume", interrupted])
    assert process.wait() == 0, process.stderr
    now = importlib.metadata.version("torch")
    assert f"library versions differ (torch 2.9.0 -> {now}): results are equal within rounding" in process.stdout
    assert_same(interrupted, uninterrupted)


def test_a_finished_run_can_be_extended_on_purpose(flags, start_process, tmp_path):
    """And is not taken for finished when it dies on the way."""
    run = tmp_path / "run"
    assert start_process([*flags, "--output-dir", run, "--epochs", "1"]).wait() == 0
    assert start_process(["--resume", run, "--epochs", "2"]).wait() == 1
    longer = start_process(
        ["--resume", run, "--epochs", "2", "--allow-changes"], partial(on_call, "train.train_step", 4, kill)
    )
    assert longer.wait() == 128 + 9
    process = start_process(["--resume", run])
    assert process.wait() == 0, process.stderr
    assert "is finished already" not in process.stdout
    assert [line["step"] for line in lines(run, "train")] == [2, 4, 6, 8, 10]
    assert len(lines(run, "test")) == 2  # before and after
