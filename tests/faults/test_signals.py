"""A signal stops a run after it has saved; a second one ends it at once. Either way it resumes exactly."""

import os
import signal
from functools import partial
from pathlib import Path

import pytest

from storage.cache import cache_directory
from tests.faults.harness import assert_same, lines, on_dataset, some, steps_saved
from tests.faults.inject import kill, on_call, send, send_and_hang

SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129, signal.SIGUSR1: 138}
STOPPING = "stopping after this update; press Ctrl-C again to quit now"


def stopped(process, run, status, step):
    """Assert that a process ended by a signal and printed how to resume."""
    assert process.wait() == status, process.stderr
    assert process.stderr.splitlines()[-2:] == [
        STOPPING,
        f"stopped after update {step}; to resume: python train.py --resume {run}",
    ]


def assert_resumes(start_process, run, uninterrupted):
    assert start_process(["--resume", run]).wait() == 0
    assert_same(run, uninterrupted)


@pytest.mark.parametrize("number", some(SIGNALS, fast=3))
def test_a_signal_in_an_update_finishes_it_and_saves(flags, uninterrupted, start_process, tmp_path, number):
    run = tmp_path / "run"
    process = start_process(
        [*flags, "--output-dir", run], partial(on_call, "train.train_step", 5, partial(send, number))
    )
    stopped(process, run, SIGNALS[number], 5)
    assert steps_saved(run) == [4, 5]
    assert_resumes(start_process, run, uninterrupted)


def test_a_signal_in_an_evaluation_abandons_it_until_resumed(flags, uninterrupted, start_process, tmp_path):
    run, term = tmp_path / "run", partial(send, signal.SIGTERM)
    # Before the first update the eval split takes two micro-batches and the test split one; update 4 has the next two.
    process = start_process([*flags, "--output-dir", run], partial(on_call, "eval.loss_and_correct", 4, term))
    stopped(process, run, 143, 4)
    assert steps_saved(run) == [3, 4]
    assert [line["step"] for line in lines(run, "eval")] == [0]
    assert_resumes(start_process, run, uninterrupted)


def test_a_checkpoint_that_a_resumed_evaluation_finds_to_be_the_best_gets_its_card(flags, start_process, tmp_path):
    run, term = tmp_path / "run", partial(send, signal.SIGTERM)
    process = start_process([*flags, "--output-dir", run], partial(on_call, "eval.loss_and_correct", 4, term))
    stopped(process, run, 143, 4)
    assert not (run / "checkpoints" / "step-4" / "model" / "README.md").exists()
    start_process(["--resume", run], partial(on_call, "train.train_step", 2, kill)).wait()
    assert (run / "best").resolve() == run / "checkpoints" / "step-4" / "model"
    (evaluated,) = (line["loss"] for line in lines(run, "eval") if line["step"] == 4)
    assert f"| {evaluated:.4f} |" in (run / "best" / "README.md").read_text()


@pytest.mark.parametrize(
    "function",
    some(["running.checkpoint.save_model", "storage.durable.write_manifest", "storage.durable.verify"], fast=1),
)
def test_a_signal_in_a_save_finishes_it(flags, uninterrupted, start_process, tmp_path, function):
    run, term = tmp_path / "run", partial(send, signal.SIGTERM)
    number = 2 if function.endswith("verify") else 1  # first of all, the corpus in the cache is verified
    stopped(start_process([*flags, "--output-dir", run], partial(on_call, function, number, term)), run, 143, 3)
    assert steps_saved(run) == [3]
    assert_resumes(start_process, run, uninterrupted)


@pytest.mark.parametrize(
    "function", some(["running.validation.evaluate", "running.validation.generate_greedy_and_sampled"], fast=1)
)
def test_a_signal_before_the_first_update_saves_nothing(flags, uninterrupted, start_process, tmp_path, function):
    run, term = tmp_path / "run", partial(send, signal.SIGTERM)
    process = start_process([*flags, "--output-dir", run], partial(on_call, function, 1, term))
    assert process.wait() == 143
    assert steps_saved(run) == []
    assert_resumes(start_process, run, uninterrupted)


@pytest.mark.parametrize(
    "function",
    some(
        [
            "running.validation.generate_greedy_and_sampled",
            "running.validation.load_on_ranks",
            "running.metrics.Log.save_answers",
        ],
        fast=1,
    ),
)
def test_a_signal_at_the_end_is_repeated_when_resumed(interrupted, uninterrupted, start_process, function):
    call = {
        "running.validation.load_on_ranks": 1,
        "running.validation.generate_greedy_and_sampled": 1,
        "running.metrics.Log.save_answers": 2,
    }[function]
    process = start_process(["--resume", interrupted], partial(on_call, function, call, partial(send, signal.SIGINT)))
    stopped(process, interrupted, 130, 10)
    assert_resumes(start_process, interrupted, uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_tokenizing_leaves_nothing(flags, start_process, conversations, tmp_path, number):
    data, run = tmp_path / "new.jsonl", tmp_path / "run"
    data.write_text(conversations.read_text().replace("Count", f"Count {number}"))
    before = corpora()
    process = start_process(
        [*on_dataset(flags, data), "--output-dir", run],
        partial(on_call, "conversations.masking.encode_chatml", 1, partial(send, number)),
    )
    assert process.wait() == SIGNALS[number]
    assert (
        process.stderr
        == "\nstopping after this update; press Ctrl-C again to quit now\nstopped before training began\n"
    )
    assert not run.exists()
    assert corpora() == before


def corpora():
    return sorted(path for path in (cache_directory() / "corpora").glob("*") if not path.name.endswith(".lock"))


HANGING = [("torch.save", 2), ("train.train_step", 5), ("storage.durable.sync", 20)]


@pytest.mark.parametrize(("function", "call"), some(HANGING, fast=2))
def test_a_second_signal_exits_at_once_and_leaves_no_partial_checkpoint(
    flags, uninterrupted, start_process, tmp_path, function, call
):
    run = tmp_path / "run"
    hang = partial(on_call, function, call, partial(send_and_hang, signal.SIGTERM))
    process = start_process([*flags, "--output-dir", run], hang)
    assert process.wait_for(lambda: "press Ctrl-C again" in process.stderr)
    process.signal(signal.SIGTERM)
    assert process.wait() == 143
    assert_resumes(start_process, run, uninterrupted)


def ignore_hangups():
    """As nohup does."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def test_a_hangup_that_was_ignored_at_the_start_stays_ignored(flags, uninterrupted, start_process, tmp_path):
    run, hangup = tmp_path / "run", partial(send, signal.SIGHUP)
    process = start_process(
        [*flags, "--output-dir", run], ignore_hangups, partial(on_call, "train.train_step", 5, hangup)
    )
    assert process.wait() == 0
    assert_same(run, uninterrupted)


def close_output(*_, **__):
    """The reader of stdout and stderr goes away."""
    reader, writer = os.pipe()
    os.close(reader)
    for descriptor in (1, 2):
        os.dup2(writer, descriptor)


def test_a_reader_of_the_output_that_vanishes_does_not_end_the_run(flags, uninterrupted, start_process, tmp_path):
    run = tmp_path / "run"
    process = start_process([*flags, "--output-dir", run], partial(on_call, "train.train_step", 2, close_output))
    assert process.wait() == 0
    assert_same(run, uninterrupted)


def children(process):
    return Path(f"/proc/{process}/task/{process}/children").read_text().split()


def is_zombie(process):
    return " Z " in Path(f"/proc/{process}/stat").read_text()
