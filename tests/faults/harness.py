"""Processes of `train.py` that can be killed, forked from one that has imported everything, so that each takes a second
or two; and the comparison of two runs."""

import gc
import json
import multiprocessing
import os
import sys
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import distributed

import train as train_command
from config import run_command
from running.checkpoint import list_checkpoints
from tests.conftest import shorten_runs

BOUND = 15  # seconds between the end of a first process and that of the last
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.faults.harness"])
TIMINGS = ("tokens_per_second", "waiting_seconds", "seconds", "seconds_data", "seconds_optimizer", "peak_memory")


def program(argv, output, faults, environment):
    """`python train.py` with its output in a directory, and some faults that are prepared before it starts."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(Path(output) / name, os.O_WRONLY | os.O_APPEND), number)
    torch.set_num_threads(1)
    gc.freeze()
    shorten_runs()
    os.environ.update(environment)
    for fault in faults:
        fault()
    sys.argv = ["train.py", *argv]
    run_command(train_command.main)


def some(cases, fast):
    """Cases of which the first few belong to every test run; the others are slow."""
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=[] if i < fast else pytest.mark.slow)
        for i, case in enumerate(cases)
    ]


class TrainProcess:
    """One process of `train.py`, from its start to whatever end."""

    def __init__(self, argv, output, faults=(), environment=()):
        self.output = Path(output)
        for name in ("stdout", "stderr"):
            (self.output / name).open("a" if environment else "w").close()
        arguments = (list(map(str, argv)), str(output), faults, dict(environment))
        self.child = CONTEXT.Process(target=program, args=arguments)
        self.child.start()

    def wait(self, seconds=120):
        """Wait for the end; returns the exit status, that of a signal as a shell says it."""
        self.child.join(seconds)
        assert self.child.exitcode is not None, "it does not end"
        return 128 - self.child.exitcode if self.child.exitcode < 0 else self.child.exitcode

    def kill(self):
        """Kill it by SIGKILL; returns the exit status."""
        self.child.kill()
        return self.wait()

    def signal(self, number):
        os.kill(self.child.pid, number)

    def wait_for(self, condition, seconds=60):
        """Wait until a condition holds or the process has ended; whether it holds."""
        end = time.monotonic() + seconds
        while not (held := condition()) and self.child.is_alive() and time.monotonic() < end:
            time.sleep(0.0005)  # a save takes some hundredths of a second
        return held

    @property
    def stdout(self):
        """What it printed."""
        return (self.output / "stdout").read_text()

    @property
    def stderr(self):
        """What it printed on stderr."""
        return (self.output / "stderr").read_text()


class ProcessGroup:
    """Processes of `train.py` that run together, as torchrun would start them, until all have ended."""

    def __init__(self, size, argv, output, faults=()):
        """Start them.

        Args:
            faults: pairs of a rank and a fault of the process that has it.
        """
        self.output = Path(output)
        for name in ("stdout", "stderr"):
            (self.output / name).write_text("")
        self.store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        common = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "GROUP_RANK": 0, "MASTER_ADDR": "127.0.0.1"}
        common |= {"MASTER_PORT": self.store.port, "TORCHELASTIC_USE_AGENT_STORE": True}
        self.each = []
        for rank in range(size):
            environment = {name: str(value) for name, value in (common | {"RANK": rank, "LOCAL_RANK": rank}).items()}
            own = [fault for of, fault in faults if of == rank]
            self.each.append(TrainProcess(argv, output, own, environment))

    def wait(self, seconds=BOUND):
        """Wait for them to end, as long for the last as for the first; returns their exit statuses, by rank."""
        while all(process.child.exitcode is None for process in self.each):
            time.sleep(0.01)
        end = time.monotonic() + seconds
        return [process.wait(max(0, end - time.monotonic())) for process in self.each]

    def kill(self):
        for process in self.each:
            process.child.kill()
            process.child.join()

    stdout, stderr = TrainProcess.stdout, TrainProcess.stderr


def lines(run, kind=None):
    """A run's metrics, without the timings."""
    logged = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if name not in TIMINGS}
        for line in logged
        if kind in (None, line["kind"])
    ]


def assert_same(run, uninterrupted):
    """Assert that a run ended as another did: metrics, curves, answers, weights and optimizer, to the last bit."""
    run, uninterrupted = Path(run), Path(uninterrupted)
    assert lines(run) == lines(uninterrupted)
    assert curves(run) == curves(uninterrupted)
    assert (run / "report.html").exists()
    assert (run / "answers.json").read_bytes() == (uninterrupted / "answers.json").read_bytes()
    assert tensors_in(run / "best") == tensors_in(uninterrupted / "best") != {}
    ours = list(list_checkpoints(run).values())[-1]
    theirs = uninterrupted / "checkpoints" / ours.name
    assert tensors_in(ours / "model") == tensors_in(theirs / "model") != {}
    states = [torch.load(path / "training.pt", weights_only=True) for path in (ours, theirs)]
    logs = [{**state.pop("log"), "digest": "of lines with their timings"} for state in states]
    assert logs[0] == logs[1]
    torch.testing.assert_close(*states, rtol=0, atol=0)
    assert not [path for path in run.rglob(".*") if path.name not in (".lock", ".owner")]


def tensors_in(directory):
    """The files of weights, and of moments, in a directory, with their content."""
    return {path.name: path.read_bytes() for path in directory.glob("*.safetensors")}


def on_dataset(flags, data):
    """The flags of a run on another dataset."""
    at = flags.index("--dataset")
    return [*flags[:at], "--dataset", data, *flags[at + 2 :]]


def steps_saved(run):
    """The steps of a run's checkpoints, and a check that nothing unfinished lies beside them."""
    assert not [path for path in Path(run).rglob("*.partial-*")]
    return list(list_checkpoints(run))


def curves(run):
    """What TensorBoard draws: of each curve the steps, which never go back, with their values."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    drawn = {}
    for tag in events.Tags()["scalars"]:
        if tag.startswith(("train/", "eval/", "test/", "final/")) and not tag.endswith(TIMINGS):
            points = [(event.step, event.value) for event in events.Scalars(tag)]
            assert [step for step, _ in points] == sorted({step for step, _ in points}), f"{tag} has a fold: {points}"
            drawn[tag] = points
    return drawn
