"""Disks that are full or read-only, directories that are taken, memory that runs out: one line, and nothing lost."""

import json
import re
import shutil
import subprocess
from functools import partial

import pytest

from tests.faults.harness import assert_same, curves, lines, on_dataset, some, steps_saved
from tests.faults.inject import (
    ask_for_too_much,
    fill_disk,
    full_disk,
    give_memory_back,
    hang,
    little_memory,
    on_call,
    pretend,
)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, of 16 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("a file system of a test's own wants root")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


# --- disks


@pytest.mark.parametrize("left", some([150_000, 0, 4096, 300_000], fast=2))
def test_a_full_disk(flags, uninterrupted, start_process, small_disk, left):
    """So full that not a line of the log, no small file, not the weights, or not the optimizer's state fits."""
    run = small_disk / "run"
    process = start_process(
        [*flags, "--output-dir", run], partial(on_call, "train.train_step", 6, partial(fill_disk, small_disk, left))
    )
    assert process.wait() == 1
    assert re.fullmatch(
        r"(warning: cannot write for TensorBoard .*\n)?"
        rf"error: {run}, after update [56]: .*No space left on device.*; "
        rf"--resume {run} continues after update 4\n",
        process.stderr,
    )
    assert steps_saved(run) == [3, 4]
    (small_disk / "filling").unlink()
    assert start_process(["--resume", run]).wait() == 0
    assert_same(run, uninterrupted)


FAILING_WRITES = [
    ("running.checkpoint.save_model", 3),
    ("running.checkpoint.link_best", 3),
    ("running.metrics.Log.write", 8),
    ("running.metrics.replace_file", 10),  # the answers at the end
    ("running.report.replace_file", 1),
    ("torch.save", 3),
    ("storage.durable.write_manifest", 3),
    ("storage.durable.sync", 35),
    ("running.metrics.Log.sync", 3),
]


@pytest.mark.parametrize(("function", "call"), some(FAILING_WRITES, fast=6))
def test_a_write_that_fails(flags, uninterrupted, start_process, tmp_path, function, call):
    run = tmp_path / "run"
    process = start_process([*flags, "--output-dir", run], partial(on_call, function, call, full_disk))
    assert process.wait() == 1
    assert re.fullmatch(
        r"(warning: cannot write for TensorBoard .*\n)?"
        rf"error: {run}, after update \d+: No space left on device; "
        rf"--resume {run} continues after update \d+\n",
        process.stderr,
    )
    assert steps_saved(run)
    assert start_process(["--resume", run]).wait() == 0
    assert_same(run, uninterrupted)


def test_a_disk_that_cannot_be_written(flags, interrupted, uninterrupted, start_process, small_disk):
    shutil.copytree(interrupted, small_disk / "run")
    shutil.copytree(uninterrupted, small_disk / "finished")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    process = start_process([*flags, "--output-dir", small_disk / "new"])
    assert process.wait() == 1
    assert process.stderr == (f"error: --output-dir {small_disk}/new: cannot write to it (Read-only file system)\n")
    process = start_process(["--resume", small_disk / "run"])
    assert process.wait() == 1
    assert process.stderr == f"error: {small_disk}/run: cannot write to it (Read-only file system)\n"
    assert start_process(["--resume", small_disk / "finished"]).wait() == 0


def test_a_failure_of_tensorboard_does_not_end_the_run(flags, uninterrupted, start_process, tmp_path):
    run = tmp_path / "run"
    write = "tensorboard.summary.writer.record_writer.RecordWriter.write"
    process = start_process([*flags, "--output-dir", run], partial(on_call, write, 40, full_disk))
    assert process.wait() == 0, process.stderr
    assert process.stderr == (
        "warning: cannot write for TensorBoard any more ([Errno 28] No space left on device); training continues\n"
    )
    assert lines(run) == lines(uninterrupted)
    assert curves(run).keys() <= curves(uninterrupted).keys()


# --- another process


def test_a_run_is_trained_by_one_process(interrupted, uninterrupted, start_process):
    first = start_process(["--resume", interrupted], partial(on_call, "train.train_step", 2, hang))
    assert first.wait_for(lambda: "resuming" in first.stdout and "schedule" in first.stdout)
    second = start_process(["--resume", interrupted])
    assert second.wait() == 1
    assert re.fullmatch(
        rf"error: {interrupted}: another process is training in it \(process {first.child.pid} on .+\); "
        "wait for it, or stop it\n",
        second.stderr,
    )
    first.kill()  # and its lock is gone
    assert start_process(["--resume", interrupted]).wait() == 0
    assert_same(interrupted, uninterrupted)


def test_of_two_new_runs_in_one_directory_one_trains(flags, uninterrupted, start_process, tmp_path):
    run = tmp_path / "run"
    both = [start_process([*flags, "--output-dir", run]) for _ in range(2)]
    assert sorted(each.wait() for each in both) == [0, 1]
    assert_same(run, uninterrupted)


# --- memory


@pytest.mark.parametrize(
    ("flags_too", "largest", "advice"),
    [
        ((), "172", r"a --micro-batch-tokens below 172 \(now 200\)"),
        (("--micro-batch-tokens", "1"), "45", "--gradient-checkpointing"),
        (("--micro-batch-tokens", "1", "--gradient-checkpointing"), "45", "a lower --max-length"),
    ],
    ids=["several conversations", "one", "one, and nothing kept of it"],
)
def test_too_little_memory(flags, start_process, tmp_path, flags_too, largest, advice):
    run = tmp_path / "run"
    fault = partial(on_call, "train.train_step", 4, partial(on_call, "train.token_loss", 1, ask_for_too_much))
    process = start_process([*flags, "--output-dir", run, *flags_too], fault)
    assert process.wait() == 1
    assert re.fullmatch(
        rf"error: update 4: out of memory in a micro-batch of {largest} tokens, its longest conversation 45: "
        rf"use {advice}; --resume {run} continues after update 3\n",
        process.stderr,
    )
    assert steps_saved(run) == [3]


@pytest.mark.slow
def test_a_machine_with_too_little_memory(flags, start_process, tmp_path):
    """As above, but the process may really have no more."""
    data, run = tmp_path / "long.jsonl", tmp_path / "run"
    with open(data, "w") as file:
        for number in range(15):
            messages = [{"role": "user", "content": f"Say {number}"}, {"role": "assistant", "content": "word " * 2000}]
            file.write(json.dumps({"messages": messages}) + "\n")
    flags = [*on_dataset(flags, data), "--output-dir", run, "--micro-batch-tokens", "90000", "--save-every", "1"]
    flags += ["--batch-size", "3", "--max-length", "8192"]
    keep_none = partial(pretend, "running.setup.keep_freed_memory", None)
    process = start_process(
        flags, keep_none, give_memory_back, partial(on_call, "train.train_step", 3, partial(little_memory, 1))
    )
    assert process.wait() == 1
    assert "update 3: out of memory in a micro-batch of 24576 tokens, its longest conversation 8192" in process.stderr
    assert steps_saved(run) == [1, 2]
