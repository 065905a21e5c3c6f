"""A small run that never stopped, and the means to start others like it."""

import shutil
import signal
from functools import partial
from pathlib import Path

import pytest

from tests.conftest import to_flags, write_chats
from tests.faults.harness import ProcessGroup, TrainProcess, lines, steps_saved
from tests.faults.inject import kill, on_call


@pytest.fixture(scope="session")
def conversations(tmp_path_factory):
    """A file of 40 small conversations."""
    return write_chats(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="session")
def flags(tiny_model_dir, conversations):
    """Ten updates: two epochs of 30 conversations in windows of 7, the last of 2; checkpoints after 3, 6 and 9, and
    after the evaluations of 4, 8 and 10, each of which is the best so far."""
    settings = {"model": tiny_model_dir, "dataset": conversations, "eval-fraction": 0.2}
    settings |= {"test-fraction": 0.05, "batch-size": 7, "warmup-steps": 2, "lr": 1e-2, "seed": 3, "dtype": "fp32"}
    settings |= {"micro-batch-tokens": 200, "eval-every": 4, "save-every": 3, "log-every": 2}
    return to_flags(settings)


@pytest.fixture(scope="session")
def uninterrupted(flags, tmp_path_factory):
    """The run of these flags that nothing happened to, with all of its checkpoints."""
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert TrainProcess([*flags, "--output-dir", run, "--save-every", "1", "--keep", "100"], run.parent).wait() == 0
    assert [line["step"] for line in lines(run, "train")] == [2, 4, 6, 8, 10]
    return run


@pytest.fixture(scope="session")
def killed(flags, tmp_path_factory):
    """A run of these flags, killed after seven updates; it has checkpoints of 4, its best, and 6."""
    run = tmp_path_factory.mktemp("killed") / "run"
    process = TrainProcess([*flags, "--output-dir", run], run.parent, [partial(on_call, "train.train_step", 8, kill)])
    assert process.wait() == 128 + signal.SIGKILL
    assert steps_saved(run) == [4, 6]
    return run


@pytest.fixture
def interrupted(killed, tmp_path):
    """A copy of the killed run, for a test of its own."""
    return Path(shutil.copytree(killed, tmp_path / "run", symlinks=True))


@pytest.fixture
def start_process(tmp_path):
    """Start a process of `train.py`: `start_process(flags, fault, …)`. At the end all are killed."""
    started = []

    def start(argv, *faults):
        started.append(TrainProcess(argv, tmp_path, faults))
        return started[-1]

    yield start
    for process in started:
        process.child.kill()
        process.child.join()


@pytest.fixture(scope="session")
def uninterrupted_group(flags, tmp_path_factory):
    """The run of these flags by two processes, that nothing happened to, with all of its checkpoints."""
    run = tmp_path_factory.mktemp("together") / "run"
    group = ProcessGroup(2, [*flags, "--output-dir", run, "--save-every", "1", "--keep", "100"], run.parent)
    assert group.wait() == [0, 0], group.stderr
    return run


@pytest.fixture
def start_group(tmp_path):
    """Start a group of processes of `train.py`: `start_group(2, flags, (1, fault), …)`. At the end all are killed."""
    groups = []

    def start(size, argv, *faults):
        groups.append(ProcessGroup(size, argv, tmp_path, faults))
        return groups[-1]

    yield start
    for group in groups:
        group.kill()
