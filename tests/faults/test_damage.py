"""Damage to the files of a run: it is named and skipped, or the run is refused."""

import json
import pickle
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

import eval as eval_command
from config import UserError
from storage.durable import MANIFEST, sha256, write_checksummed
from tests.faults.harness import assert_same, lines, some, steps_saved, tensors_in
from tests.faults.inject import kill, on_call


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "a bit of the weights": (
        "model/model.safetensors",
        flip_a_bit,
        r"model/model\.safetensors is corrupt \(another SHA-256\)",
    ),
    "state missing": ("training.pt", Path.unlink, r"training\.pt is missing"),
    "manifest truncated": (MANIFEST, truncate, r"MANIFEST\.json is corrupt \(not what was written\)"),
    "nothing left": ("", lambda path: (shutil.rmtree(path), path.mkdir()), r"MANIFEST\.json is missing"),
    "weights truncated": (
        "model/model.safetensors",
        truncate,
        r"model/model\.safetensors is corrupt \([\d,]+ bytes of [\d,]+\)",
    ),
    "weights missing": ("model/model.safetensors", Path.unlink, r"model/model\.safetensors is missing"),
    "state truncated": ("training.pt", truncate, r"training\.pt is corrupt \([\d,]+ bytes of [\d,]+\)"),
    "a bit of the state": ("training.pt", flip_a_bit, r"training\.pt is corrupt \(another SHA-256\)"),
    "state empty": (
        "training.pt",
        lambda path: path.write_bytes(b""),
        r"training\.pt is corrupt \(0 bytes of [\d,]+\)",
    ),
    "tokenizer missing": ("model/tokenizer.json", Path.unlink, r"model/tokenizer\.json is missing"),
    "manifest missing": (MANIFEST, Path.unlink, r"MANIFEST\.json is missing"),
    "a bit of the manifest": (MANIFEST, flip_a_bit, r"MANIFEST\.json is corrupt \(not what was written\)"),
    "manifest of another kind": (
        MANIFEST,
        lambda path: path.write_text("[]"),
        r"MANIFEST\.json is corrupt \(not what was written\)",
    ),
}


@pytest.mark.parametrize("damage", some(DAMAGES, fast=4))
def test_a_damaged_checkpoint_is_named_and_skipped(interrupted, uninterrupted, start_process, damage):
    name, do, why = DAMAGES[damage]
    do(interrupted / "checkpoints" / "step-6" / name)
    process = start_process(["--resume", interrupted])
    assert process.wait() == 0, process.stderr
    assert re.search(rf"^skipped: step-6: {interrupted}/checkpoints/step-6/{why}", process.stderr, re.MULTILINE)
    assert f"resuming {interrupted} from step-4\n" in process.stdout
    assert_same(interrupted, uninterrupted)


def test_no_valid_checkpoint_is_an_error_and_changes_nothing(interrupted, start_process):
    for checkpoint in (interrupted / "checkpoints").iterdir():
        truncate(checkpoint / "training.pt")
    before = (interrupted / "metrics.jsonl").read_bytes()
    process = start_process(["--resume", interrupted])
    assert process.wait() == 1
    assert process.stderr.count("skipped: ") == 2
    assert process.stderr.splitlines()[-1] == (
        f"error: --resume {interrupted}: none of its checkpoints is valid; start a new run in another directory"
    )
    assert (interrupted / "metrics.jsonl").read_bytes() == before
    assert steps_saved(interrupted) == [4, 6]


def test_lost_checkpoints_are_no_reason_to_begin_again(flags, start_process, tmp_path):
    run = tmp_path / "run"
    process = start_process(
        [*flags, "--output-dir", run, "--save-every", "2"], partial(on_call, "train.train_step", 8, kill)
    )
    assert process.wait() == 137
    shutil.rmtree(run / "checkpoints")
    before = (run / "metrics.jsonl").read_bytes()
    process = start_process(["--resume", run])
    assert process.wait() == 1
    assert "it logged update 6 but has no checkpoint; restore them, or start a new run" in process.stderr
    assert (run / "metrics.jsonl").read_bytes() == before


class Payload:
    """A pickle of this leaves a file behind when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def payload(path, mark):
    """Put a program where a checkpoint's state was."""
    state = torch.load(path, weights_only=True)
    state["scaler"] = Payload(mark)
    torch.save(state, path)


def test_a_program_in_a_state_file_is_noticed_by_its_hash(interrupted, uninterrupted, start_process, tmp_path):
    payload(interrupted / "checkpoints" / "step-6" / "training.pt", tmp_path / "ran")
    process = start_process(["--resume", interrupted])
    assert process.wait() == 0, process.stderr
    assert "step-6/training.pt is corrupt" in process.stderr
    assert not (tmp_path / "ran").exists()
    assert_same(interrupted, uninterrupted)


def test_a_program_in_a_state_file_is_never_run(interrupted, start_process, tmp_path):
    """Even where somebody made the manifest fit."""
    checkpoint = interrupted / "checkpoints" / "step-6"
    payload(checkpoint / "training.pt", tmp_path / "ran")
    content = json.loads((checkpoint / MANIFEST).read_text())
    del content["sha256"]
    file = checkpoint / "training.pt"
    content["files"]["training.pt"] = {"size": file.stat().st_size, "sha256": sha256(file)}
    write_checksummed(checkpoint / MANIFEST, content)
    process = start_process(["--resume", interrupted])
    assert process.wait() == 1
    assert process.stderr == f"error: {file}: it holds more than tensors and numbers; do not trust it\n"
    assert not (tmp_path / "ran").exists()
    with pytest.raises(pickle.UnpicklingError):
        torch.load(file, weights_only=True)
    torch.load(file, weights_only=False)
    assert (tmp_path / "ran").exists()  # it would have run


@pytest.mark.parametrize(
    ("damage", "why"),
    [("removed", "MANIFEST.json is missing"), ("a bit", "model/model.safetensors is corrupt (another SHA-256)")],
)
def test_a_lost_best_model_is_a_warning(interrupted, uninterrupted, start_process, damage, why):
    best = interrupted / "checkpoints/step-4"
    shutil.rmtree(best) if damage == "removed" else flip_a_bit(best / "model/model.safetensors")
    process = start_process(["--resume", interrupted])
    assert process.wait() == 0, process.stderr
    assert process.stderr == (f"warning: {best}/{why}; the best model so far is lost; the best from here on is kept\n")
    assert lines(interrupted) == lines(uninterrupted)  # 10 is better than 4 in either
    assert tensors_in(interrupted / "best") == tensors_in(uninterrupted / "best")


def test_a_copy_of_the_lost_best_model_stays_until_there_is_a_better_one(interrupted, start_process):
    """The run was copied by a program that follows links."""
    run = Path(shutil.copytree(interrupted, interrupted.with_name("copied")))
    before = tensors_in(run / "best")
    flip_a_bit(run / "checkpoints/step-4/model/model.safetensors")
    assert start_process(["--resume", run], partial(on_call, "train.fit", 1, kill)).wait() == 128 + 9
    assert tensors_in(run / "best") == before
    process = start_process(["--resume", run])
    assert process.wait() == 0, process.stderr
    assert (run / "best").readlink() == Path("checkpoints/step-10/model")


def test_the_best_model_of_discarded_updates_is_not_the_best(interrupted, uninterrupted, start_process):
    """Killed after update 8 became the best; resumed from 6, whose best is 4, and it never comes to an 8 again."""
    start_process(["--resume", interrupted], partial(on_call, "train.train_step", 3, kill)).wait()
    assert (interrupted / "best").readlink() == Path("checkpoints/step-8/model")
    shutil.rmtree(interrupted / "checkpoints/step-8")
    again = shutil.copytree(interrupted, interrupted.with_name("again"), symlinks=True)
    assert start_process(["--resume", again]).wait() == 0
    assert_same(again, uninterrupted)
    process = start_process(["--resume", interrupted, "--max-steps", "7", "--lr", "1e3", "--allow-changes"])
    assert process.wait() == 0, process.stderr
    assert "best, update 4" in process.stdout
    assert (interrupted / "best").readlink() == Path("checkpoints/step-4/model")


def test_a_best_model_that_is_corrupt_at_the_end_is_an_error(interrupted, uninterrupted, start_process):
    damage = partial(flip_best, interrupted)
    process = start_process(["--resume", interrupted], partial(on_call, "train.evaluate_best", 1, damage))
    assert process.wait() == 1
    assert process.stderr == (
        f"error: {interrupted}, after update 10: {interrupted}/checkpoints/step-10/model/model.safetensors is corrupt "
        f"(another SHA-256); --resume {interrupted} continues after update 10\n"
    )
    assert start_process(["--resume", interrupted]).wait() == 0
    assert_same(interrupted, uninterrupted)


def test_a_corrupt_best_model_is_not_evaluated(interrupted):
    flip_a_bit(interrupted / "best" / "model.safetensors")
    path = interrupted / "checkpoints/step-4/model/model.safetensors"
    with pytest.raises(UserError) as raised:
        eval_command.main([str(interrupted), "--prompts", "Hi", "--max-new-tokens", "1"])
    assert str(raised.value) == f"{path} is corrupt (another SHA-256)"


def flip_best(run, *_):
    flip_a_bit(run / "best" / "model.safetensors")


def test_damaged_settings_are_an_error(interrupted, start_process):
    truncate(interrupted / "config.json")
    process = start_process(["--resume", interrupted])
    assert process.wait() == 1
    assert process.stderr == (
        f"error: {interrupted}/config.json: damaged; checkpoints/step-N/MANIFEST.json holds the same settings\n"
    )


def test_a_directory_without_a_run_is_an_error(start_process, tmp_path):
    process = start_process(["--resume", tmp_path / "nothing"])
    assert process.wait() == 1
    assert process.stderr == f"error: --resume {tmp_path}/nothing: there is no run in it\n"


def test_what_a_dead_process_left_is_cleaned_up(interrupted, uninterrupted, start_process):
    for left in (".best.partial-link", "checkpoints/.step-7.partial-x", ".config.json.partial-x"):
        (interrupted / left).mkdir()
    (interrupted / ".notes-of-mine").write_text("kept")
    assert start_process(["--resume", interrupted]).wait() == 0
    assert (interrupted / ".notes-of-mine").read_text() == "kept"
    (interrupted / ".notes-of-mine").unlink()
    assert_same(interrupted, uninterrupted)
