"""Checkpoints and `best/` that a thread writes while the run goes on, as on a GPU: as safe as those it waits for."""

import re
import signal
from functools import partial

import pytest
import torch

from tests.faults.harness import assert_same, some, steps_saved
from tests.faults.inject import (
    corrupt_gradient,
    full_disk,
    hold_checkpoint,
    kill,
    kill_in_background,
    on_call,
    saving_in_background,
    send,
)


def assert_resumes(start_process, flags, run, uninterrupted):
    """Resume a run, or begin again where it had not yet begun, and compare."""
    begun = (run / "config.json").exists()
    process = start_process(["--resume", run] if begun else [*flags, "--output-dir", run], saving_in_background)
    assert process.wait() == 0, process.stderr
    assert_same(run, uninterrupted)


def test_saving_in_the_background_changes_nothing(flags, uninterrupted, start_process, tmp_path):
    run = tmp_path / "run"
    process = start_process([*flags, "--output-dir", run], saving_in_background, partial(hold_checkpoint, 3, 8))
    assert process.wait() == 0, process.stderr
    assert_same(run, uninterrupted)
    assert steps_saved(run)[-1] == 10  # 9 is saved only if 8 is written by then
    states = [torch.load(each / "checkpoints/step-10/training.pt", weights_only=True) for each in (run, uninterrupted)]
    logs = [{**state.pop("log"), "digest": "of lines with their timings"} for state in states]
    assert logs[0] == logs[1]
    torch.testing.assert_close(*states, rtol=0, atol=0)
    for part in ("best", "checkpoints/step-10/model"):
        ours, theirs = [{path.name: path for path in (each / part).iterdir()} for each in (run, uninterrupted)]
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"README.md"}:
            assert ours[name].read_bytes() == theirs[name].read_bytes(), name


def test_two_processes_train_while_rank_0_saves(flags, uninterrupted_group, start_group, tmp_path):
    run = tmp_path / "run"
    faults = [(0, saving_in_background), (1, saving_in_background), (0, partial(hold_checkpoint, 1, 4))]
    group = start_group(2, [*flags, "--output-dir", run], *faults)
    assert group.wait() == [0, 0], group.stderr
    assert_same(run, uninterrupted_group)


@pytest.mark.parametrize(
    ("step", "which", "until"), [(6, 3, ("train.train_step", 8)), (3, 1, ("running.checkpoint.save", 2))]
)
def test_killed_while_a_checkpoint_is_written_in_the_background(
    flags, uninterrupted, start_process, tmp_path, step, which, until
):
    """The first one, too, when its run has logged a later update already."""
    run, (name, number) = tmp_path / "run", until
    killing = partial(on_call, "storage.durable.write_manifest", 1, kill)
    hold = partial(hold_checkpoint, which, number, killing, name)
    assert start_process([*flags, "--output-dir", run], saving_in_background, hold).wait() == 137
    (partial_path,) = run.glob("checkpoints/.step-*.partial-*")  # a due one waits for the one before it
    assert int(re.search(r"step-(\d+)", partial_path.name)[1]) >= step
    assert_resumes(start_process, flags, run, uninterrupted)


@pytest.mark.slow
def test_killed_at_changes_that_the_background_makes_to_the_disk(flags, uninterrupted, start_process, tmp_path):
    counted, argv = tmp_path / "count", [*flags, "--keep", "1"]
    process = start_process(
        [*argv, "--output-dir", tmp_path / "all"], saving_in_background, partial(kill_in_background, 0, counted)
    )
    assert process.wait() == 0
    count = int(counted.read_text())
    assert count > 100
    ended = []
    for number in range(1, count, 4):
        run = tmp_path / str(number)
        fault = partial(kill_in_background, number)
        ended.append(start_process([*argv, "--output-dir", run], saving_in_background, fault).wait())
        if ended[-1] == 0:  # a due checkpoint waited for the one before it, so that there were fewer changes
            continue
        assert ended[-1] == 137
        assert_resumes(start_process, flags, run, uninterrupted)
    assert ended.count(137) > len(ended) / 2


def test_a_full_disk_in_the_background_is_reported(flags, uninterrupted, start_process, tmp_path):
    run = tmp_path / "run"
    process = start_process(
        [*flags, "--output-dir", run], saving_in_background, partial(hold_checkpoint, 3, 7, full_disk)
    )
    assert process.wait() == 1
    assert re.fullmatch(
        rf"error: {run}, after update [789]: No space left on device; --resume {run} continues after update 4\n",
        process.stderr,
    )
    assert steps_saved(run) == [3, 4]
    assert_resumes(start_process, flags, run, uninterrupted)


def test_a_full_disk_in_the_background_is_reported_soon(flags, start_process, tmp_path):
    """Not only when something else is saved."""
    run = tmp_path / "run"
    argv = [*flags, "--output-dir", run, "--eval-every", "100", "--save-every", "6"]
    process = start_process(argv, saving_in_background, partial(hold_checkpoint, 1, 7, full_disk))
    assert process.wait() == 1
    assert re.fullmatch(
        rf"error: {run}, after update [789]: No space left on device; there is no checkpoint yet\n", process.stderr
    )


@pytest.mark.parametrize(("number", "status"), some([(signal.SIGTERM, 143), (signal.SIGINT, 130)], fast=1))
def test_a_signal_while_the_background_writes_waits_for_it(
    flags, uninterrupted, start_process, tmp_path, number, status
):
    run = tmp_path / "run"
    hold = partial(hold_checkpoint, 3, 8, partial(send, number))
    process = start_process([*flags, "--output-dir", run], saving_in_background, hold)
    assert process.wait() == status
    (step,) = re.findall(rf"stopped after update (\d+); to resume: python train.py --resume {run}\n", process.stderr)
    assert int(step) >= 8
    assert steps_saved(run)[-1] == int(step)
    assert_resumes(start_process, flags, run, uninterrupted)


def test_a_failed_update_waits_for_the_background_and_names_its_checkpoint(
    flags, uninterrupted, start_process, tmp_path
):
    run = tmp_path / "run"
    faults = [partial(hold_checkpoint, 3, 8), partial(on_call, "train.train_step", 8, corrupt_gradient)]
    process = start_process([*flags, "--output-dir", run], saving_in_background, *faults)
    assert process.wait() == 1
    # It is that of update 6, or of 7 where 6 had to wait for the one before it.
    assert re.search(rf"--resume {re.escape(str(run))} continues after update [67]; its conversations:", process.stderr)
    assert_resumes(start_process, flags, run, uninterrupted)
