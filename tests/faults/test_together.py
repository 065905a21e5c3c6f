"""Several processes: whatever happens to one of them ends all, within seconds, with one line, and the run goes on."""

import json
import os
import re
import shutil
import signal
from functools import partial

import pytest

import train as train_command
from tests.conftest import tiny_llama
from tests.faults.harness import assert_same, lines, some, steps_saved
from tests.faults.inject import (
    ask_for_too_much,
    fail,
    full_disk,
    give_memory_back,
    hang,
    kill,
    kill_at_system_call,
    little_memory,
    on_call,
    pretend,
    send,
    spoil_gradient,
)

SIGNALS = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 138}


def goes_on(lives, run, unbroken_together):
    again = lives(2, ["--resume", run])
    assert again.wait() == [0, 0], again.complained
    assert_same(run, unbroken_together)


def test_two_processes_leave_what_one_does(unbroken, unbroken_together):
    ours, alone = lines(unbroken_together), lines(unbroken)
    assert len(ours) == len(alone)
    for line, line_alone in zip(ours, alone, strict=True):
        assert line.keys() - {"largest_share", "empty_share"} == line_alone.keys()
        for name in line_alone.keys() - {"loss", "perplexity", "grad_norm"}:
            assert line[name] == line_alone[name], name
        assert line["loss"] == pytest.approx(line_alone["loss"], rel=1e-5)
    answers = [json.loads((run / "answers.json").read_text()) for run in (unbroken_together, unbroken)]
    assert answers[0] == answers[1]
    said = (unbroken_together.parent / "stdout").read_text()
    assert said.count("updates, ") == 1 + said.count("updates, each")
    assert "2 processes, each on cpu" in said
    assert (unbroken_together.parent / "stderr").read_text() == ""


# --- killed


MOMENTS = [("train.train_step", 5), ("train.token_loss", 8), ("train.save", 2), ("eval.loss_and_correct", 6)]


@pytest.mark.parametrize(("moment", "rank"), some([(moment, rank) for moment in MOMENTS for rank in (1, 0)], fast=2))
def test_one_is_killed_and_all_leave(flags, lives, unbroken_together, tmp_path, moment, rank):
    run = tmp_path / "run"
    group = lives(2, [*flags, "--output-dir", run], (rank, partial(on_call, *moment, kill)))
    statuses = group.wait()
    assert statuses[rank] == 137
    assert statuses[1 - rank] == 1
    pid = group.each[rank].process.pid
    assert re.fullmatch(
        rf"error: after update \d+: process {rank} of 2 \(pid {pid}\) was killed or has crashed; "
        rf"(--resume {run} continues after update \d+|there is no checkpoint yet)\n",
        group.complained,
    )
    goes_on(lives, run, unbroken_together)


@pytest.mark.parametrize("rank", some([0, 1], fast=1))
def test_one_is_killed_while_another_is_blocked(flags, lives, tmp_path, rank):
    """As in a library that no signal reaches; its own thread ends it."""
    faults = [(each, partial(on_call, "train.train_step", 3, kill if each == rank else hang)) for each in (0, 1)]
    group = lives(2, [*flags, "--output-dir", tmp_path / "run"], *faults)
    assert group.wait() == [137 if each == rank else 1 for each in (0, 1)]
    assert re.fullmatch(rf"error: process {rank} of 2 \(pid \d+\) was killed or has crashed\n", group.complained)


@pytest.mark.slow
def test_the_first_is_killed_at_every_change_that_a_save_makes_to_the_disk(flags, lives, unbroken_together, tmp_path):
    saving, counted = [*flags, "--save-every", "1", "--keep", "1"], tmp_path / "count"
    assert lives(
        2, [*saving, "--output-dir", tmp_path / "all"], (0, partial(kill_at_system_call, 0, counted))
    ).wait() == [0, 0]
    for number in range(1, int(counted.read_text()) + 1):
        run = tmp_path / str(number)
        assert lives(2, [*saving, "--output-dir", run], (0, partial(kill_at_system_call, number))).wait() == [137, 1]
        goes_on(lives, run, unbroken_together)


# --- signalled


@pytest.mark.parametrize(("number", "rank"), some([(number, rank) for number in SIGNALS for rank in (1, 0)], fast=2))
def test_a_signal_to_one_stops_all_after_the_same_update(flags, lives, unbroken_together, tmp_path, number, rank):
    run = tmp_path / "run"
    sends = partial(on_call, "train.train_step", 5, partial(send, number))
    group = lives(2, [*flags, "--output-dir", run], (rank, sends))
    assert group.wait() == [SIGNALS[number]] * 2
    said = "\nstopping; once more to leave at once\n" if rank == 0 else ""
    assert group.complained == f"{said}stopped after update 5; to resume: python train.py --resume {run}\n"
    assert steps_saved(run) == [3, 5]
    goes_on(lives, run, unbroken_together)


def test_a_signal_that_is_passed_on_too_counts_once(flags, lives, tmp_path):
    """A batch system sends it to every process, and torchrun passes its own on."""
    run, term = tmp_path / "run", partial(send, signal.SIGTERM)
    faults = [(rank, partial(on_call, "train.train_step", 5, term)) for rank in (0, 1)]
    faults += [(rank, partial(on_call, "train.save", 2, term)) for rank in (0, 1)]
    group = lives(2, [*flags, "--output-dir", run], *faults)
    assert group.wait() == [143, 143]
    assert group.complained.endswith(f"stopped after update 5; to resume: python train.py --resume {run}\n")
    assert steps_saved(run) == [3, 5]


def test_a_signal_while_they_ask_each_other_for_one_is_not_lost(flags, lives, unbroken_together, tmp_path):
    """All of them have just said that they had none."""
    run, term = tmp_path / "run", partial(send, signal.SIGTERM)
    faults = [(rank, partial(on_call, "running.signals.largest", 12, term)) for rank in (0, 1)]
    group = lives(2, [*flags, "--output-dir", run], *faults)
    assert group.wait() == [143, 143]
    (step,) = re.findall(r"stopped after update (\d+); to resume", group.complained)
    assert 0 < int(step) < 10
    assert steps_saved(run)[-1] == int(step)
    goes_on(lives, run, unbroken_together)


def test_a_signal_in_an_evaluation_stops_all_of_them_before_its_end(flags, lives, tmp_path):
    run, term = tmp_path / "run", partial(send, signal.SIGTERM)
    # Before the first update each process has one micro-batch of the eval split, and one of the test split.
    group = lives(
        2,
        [*flags, "--output-dir", run, "--micro-batch-tokens", "60"],
        (1, partial(on_call, "train.evaluate", 3, partial(on_call, "eval.loss_and_correct", 1, term))),
    )
    assert group.wait() == [143, 143]
    assert group.complained == f"stopped after update 4; to resume: python train.py --resume {run}\n"
    assert [line["step"] for line in lines(run, "eval")] == [0]
    assert steps_saved(run) == [3, 4]


@pytest.mark.parametrize("rank", some([1, 0], fast=1))
def test_a_signal_before_training_stops_all(flags, lives, tmp_path, rank):
    run = tmp_path / "run"
    sends = partial(on_call, "train.load_tokenizer", 1, partial(send, signal.SIGTERM))
    group = lives(2, [*flags, "--output-dir", run], (rank, sends))
    assert group.wait() == [143, 143]
    assert group.complained.count("stopped before training began\n") == 1
    assert not run.exists()


# --- failing


FAILURES = {
    "an exception": (partial(on_call, "train.update", 5, fail), "RuntimeError: a bug"),
    "too little memory": (
        partial(on_call, "train.update", 5, partial(on_call, "train.token_loss", 1, ask_for_too_much)),
        r"error: after update 4: out of memory in a micro-batch of \d+ tokens",
    ),
    "a full disk": (
        partial(on_call, "train.update", 5, full_disk),
        "error: .*, after update 4: No space left on device; --resume .* continues after update 3\n",
    ),
}


@pytest.mark.parametrize(("name", "rank"), some([(name, rank) for rank in (1, 0) for name in FAILURES], fast=2))
def test_one_fails_and_explains_itself(flags, lives, unbroken_together, tmp_path, name, rank):
    run = tmp_path / "run"
    fault, said = FAILURES[name]
    group = lives(2, [*flags, "--output-dir", run], (rank, fault))
    assert group.wait() == [1, 1]
    assert re.search(said, group.complained)
    assert group.complained.count("rror: ") == 1
    goes_on(lives, run, unbroken_together)


def test_an_update_that_is_not_finite_is_explained_once(flags, lives, unbroken_together, tmp_path):
    run = tmp_path / "run"
    group = lives(2, [*flags, "--output-dir", run], (1, partial(on_call, "train.update", 8, spoil_gradient)))
    assert group.wait() == [1, 1]
    first, *window = group.complained.splitlines()
    assert first.startswith("error: update 8: loss ")
    assert first.endswith(f"--resume {run} continues after update 6; its window:")
    assert len(window) == 7
    goes_on(lives, run, unbroken_together)


def test_a_mistake_is_told_once_and_nothing_is_left(flags, lives, tmp_path):
    group = lives(2, [*flags, "--output-dir", tmp_path / "run", "--lr", "-1"])
    assert group.wait() == [1, 1]
    assert group.complained == "error: --lr must be 0 or more, not -1.0\n"
    group = lives(2, [*flags, "--output-dir", tmp_path / "run", "--model", tmp_path])
    assert group.wait() == [1, 1]
    assert len(group.complained.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("rank", "fault"), some([(1, kill), (0, kill), (1, ask_for_too_much), (0, fail)], fast=1))
def test_where_the_weights_are_shared_too_all_leave(flags, lives, tmp_path, rank, fault):
    run = tmp_path / "run"
    faulty = partial(on_call, "train.update", 5, partial(on_call, "model.supervised_states", 1, fault))
    group = lives(3, [*flags, "--output-dir", run, "--shard", 3], (rank, faulty))
    assert group.wait() == [137 if fault is kill and each == rank else 1 for each in range(3)]
    assert group.complained.count("rror: ") == 1
    assert steps_saved(run) == [3]
    again = lives(3, ["--resume", run])
    assert again.wait() == [0, 0, 0], again.complained


def test_a_shard_that_the_processes_cannot_be_divided_by_is_refused(flags, lives, live, tmp_path):
    group = lives(3, [*flags, "--output-dir", tmp_path / "run", "--shard", 2])
    assert group.wait() == [1, 1, 1]
    assert group.complained == "error: --shard 2: 3 processes cannot be divided by it; use one of 1, 3\n"
    life = live([*flags, "--output-dir", tmp_path / "run", "--shard", 2])
    assert life.wait() == 1
    assert life.complained == (
        "error: --shard 2: it takes several processes; start them with torchrun, or use --shard 1\n"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("count", [1, 2])
def test_a_dry_run_says_what_each_process_takes(flags, lives, tmp_path, count):
    group = lives(2, [*flags, "--output-dir", tmp_path / "run", "--shard", count, "--dry-run"])
    assert group.wait() == [0, 0], group.complained
    memory, time, disk = re.findall("^  (?:memory|time|disk)  .*", group.said, re.M)
    half = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2e9
    assert re.search(rf"\d GB at the peak of a process of {half:.1f} GB ", memory)
    assert "about" in time
    assert "up to" in disk
    assert not (tmp_path / "run").exists()


# --- agreement


def other_settings():
    """This process was started with another learning rate."""
    real = train_command.resolve
    train_command.resolve = lambda named, preset: real({**named, "lr": 0.5}, preset)


def test_processes_that_would_not_do_the_same_are_refused(flags, lives, tmp_path):
    run = tmp_path / "run"
    group = lives(2, [*flags, "--output-dir", run], (1, other_settings))
    assert group.wait() == [1, 1]
    assert group.complained == "error: the processes do not agree on --lr: 0.01 in the first, 0.5 in process 1\n"
    assert not (run / "config.json").exists()


def test_a_directory_that_one_process_does_not_see_is_refused(flags, lives, tmp_path):
    run = tmp_path / "run"
    blind = partial(pretend, "running.resume.sees", False)
    group = lives(2, [*flags, "--output-dir", run], (1, blind))
    assert group.wait() == [1, 1]
    assert group.complained == (
        f"error: --output-dir {run}: process 1 does not see it; "
        "name a directory on a file system that all processes share\n"
    )


# --- resumed


# How many processes, and how many of them share a copy of the weights, in each of three lives.
CHANGES = [
    ((2, 2), (1, 1), (3, 1)),
    ((1, 1), (3, 3), (1, 1)),
    ((2, 1), (1, 1), (3, 1)),
    ((1, 1), (2, 1), (2, 2)),
    ((4, 2), (2, 2), (2, 1)),
    ((3, 1), (4, 4), (4, 2)),
]


@pytest.mark.parametrize("changes", some([(change,) for change in CHANGES], fast=2), ids=str)
def test_a_run_goes_on_under_another_number_of_processes(flags, lives, live, unbroken, tmp_path, changes):
    run = tmp_path / "run"
    for life, (size, count) in enumerate(changes):
        argv = [*(["--resume", run] if life else [*flags, "--output-dir", run]), "--shard", count]
        faults = [] if life == 2 else [partial(on_call, "train.update", 4, partial(send, signal.SIGTERM))]
        if size == 1:
            assert live(argv, *faults).wait() == (0 if life == 2 else 143)
        else:
            group = lives(size, argv, *((size - 1, fault) for fault in faults))
            assert group.wait() == [0 if life == 2 else 143] * size, group.complained
    assert steps_saved(run)[-1] == 9
    ours, alone = lines(run), lines(unbroken)
    assert [(line["kind"], line["step"]) for line in ours] == [(line["kind"], line["step"]) for line in alone]
    for line, line_alone in zip(ours, alone, strict=True):
        assert line["loss"] == pytest.approx(line_alone["loss"], rel=1e-5)


def test_resume_auto_begins_and_goes_on_and_ends(flags, live, unbroken, tmp_path):
    run = tmp_path / "run"
    argv = [*flags, "--output-dir", run, "--resume", "auto"]
    assert live(argv, partial(on_call, "storage.records.replace_file", 1, kill)).wait() == 137  # before there is a run
    assert live(argv, partial(on_call, "train.update", 8, kill)).wait() == 137
    life = live(argv)
    assert life.wait() == 0, life.complained
    assert f"resuming {run} from step-6\n" in life.said
    assert_same(run, unbroken)
    life = live(argv)
    assert life.wait() == 0
    assert life.said.startswith(f"{run} is finished already\n")
    life = live([*flags, "--resume", "auto"])
    assert life.wait() == 1
    assert life.complained == "error: --resume auto needs --output-dir, by which it finds the run again\n"


# --- memory


def answer_nothing():
    """An answer of three processes that share the weights takes as long as many updates."""
    train_command.VIBE_PROMPTS = ()


@pytest.mark.slow
def test_a_model_too_large_for_one_process_trains_on_three(flags, live, lives, tiny_model_dir, tmp_path):
    """Weights, gradient and moments are 16 bytes for each of 36 million numbers; a process may have 500 MB more than at
    its start."""
    directory, megabytes = shutil.copytree(tiny_model_dir, tmp_path / "large"), 500
    shape = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 9}
    tiny_llama(259, **shape).save_pretrained(directory)
    flags = [*flags, "--model", directory, "--max-steps", "2", "--eval-every", "100", "--save-every", "100"]
    limits = [
        answer_nothing,
        partial(pretend, "train.keep_freed_memory", None),
        give_memory_back,
        partial(on_call, "train.load", 1, partial(little_memory, megabytes)),
    ]
    life = live([*flags, "--output-dir", tmp_path / "whole"], *limits)
    assert life.wait(300) == 1
    assert "out of memory" in life.complained
    group = lives(
        3,
        [*flags, "--output-dir", tmp_path / "run", "--shard", 3],
        *((rank, limit) for rank in range(3) for limit in limits),
    )
    group.wait(600)
    assert [line["step"] for line in lines(tmp_path / "run", "train")] == [2], group.complained
