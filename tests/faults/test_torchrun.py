"""torchrun itself: killed, signalled, restarting its processes; two of them, as on two machines."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.harness import BOUND, assert_same, lines, some, steps_saved
from tests.faults.test_signals import children, is_zombie

ROOT = Path(__file__).parents[2]
LONG = ("--epochs", "12", "--log-every", "10")  # 60 updates
ENDLESS = ("--epochs", "500")


class Torchrun:
    """A torchrun and the processes of `train.py` that it has started."""

    def __init__(self, options, argv, output):
        command = [sys.executable, "-m", "torch.distributed.run", *map(str, options), str(ROOT / "train.py")]
        self.output = open(output, "w")  # noqa: SIM115
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [*command, *map(str, argv)], stdout=self.output, stderr=self.output, env=environment
        )

    def wait(self, seconds=120):
        """Wait for its end; returns its exit status."""
        return self.process.wait(seconds)

    def workers(self):
        """The processes it has started."""
        return [int(worker) for worker in children(self.process.pid)]

    def wait_for_update(self, run, step):
        """Wait until a run has logged an update."""
        end = time.monotonic() + 120
        while not (run / "metrics.jsonl").exists() or not any(line["step"] >= step for line in lines(run, "train")):
            assert self.process.poll() is None, Path(self.output.name).read_text()
            assert time.monotonic() < end
            time.sleep(0.02)


@pytest.fixture
def torchrun(tmp_path):
    """Start `torchrun OPTIONS train.py ARGV`; all that is left of it at the end is killed."""
    started = []

    def start(options, argv):
        started.append(Torchrun(options, argv, tmp_path / f"torchrun-{len(started)}.txt"))
        return started[-1]

    yield start
    for each in started:
        each.process.kill()
        each.process.wait()


def assert_all_gone(workers):
    """Assert that processes end within the bound."""
    assert workers
    end = time.monotonic() + BOUND
    while any(Path(f"/proc/{worker}").exists() and not is_zombie(worker) for worker in workers):
        assert time.monotonic() < end, "a process is left"
        time.sleep(0.02)


@pytest.mark.parametrize("count", some(["1", "2"], fast=1))
def test_a_killed_torchrun_leaves_no_process(flags, torchrun, tmp_path, count):
    run = tmp_path / "run"
    agent = torchrun(["--standalone", "--nproc-per-node", count], [*flags, *ENDLESS, "--output-dir", run])
    agent.wait_for_update(run, 2)
    workers = agent.workers()
    agent.process.kill()
    assert_all_gone(workers)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_torchrun_stops_and_saves(flags, torchrun, tmp_path, number):
    run = tmp_path / "run"
    options = ["--standalone", "--nproc-per-node", "2", "--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1"]
    agent = torchrun(options, [*flags, *ENDLESS, "--output-dir", run])
    agent.wait_for_update(run, 2)
    workers = agent.workers()
    agent.process.send_signal(number)
    assert agent.wait(60) == 1
    assert_all_gone(workers)
    said = Path(agent.output.name).read_text()
    assert said.count("stopped after update ") == 1
    assert steps_saved(run)[-1] == int(said.split("stopped after update ")[1].split(";")[0])


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1])
def test_torchrun_starts_them_again_and_the_run_goes_on(flags, torchrun, lives, tmp_path, which):
    flags, run, unbroken = [*flags, *LONG], tmp_path / "run", tmp_path / "unbroken"
    assert lives(2, [*flags, "--output-dir", unbroken, "--save-every", "1", "--keep", "100"]).wait() == [0, 0]
    options = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "2"]
    agent = torchrun(options, [*flags, "--output-dir", run, "--resume", "auto"])
    for step in (10, 30):
        agent.wait_for_update(run, step)
        os.kill(agent.workers()[which], signal.SIGKILL)
    assert agent.wait() == 0, Path(agent.output.name).read_text()
    assert_same(run, unbroken)


def machines(torchrun, port, argv, restarts=2):
    """Two torchruns, as on two machines."""
    common = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--max-restarts", restarts]
    common += ["--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", str(port), "--local-addr", "127.0.0.1"]
    return [torchrun(common, argv) for _ in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize(("which", "number"), [(1, signal.SIGTERM), (0, signal.SIGINT)])
def test_a_signal_to_one_of_two_torchruns_stops_both_and_saves(flags, torchrun, tmp_path, which, number):
    run = tmp_path / "run"
    both = machines(torchrun, 29513 + which, [*flags, *ENDLESS, "--output-dir", run], restarts=0)
    both[0].wait_for_update(run, 2)
    workers = [worker for agent in both for worker in agent.workers()]
    assert len(workers) == 2
    both[which].process.send_signal(number)
    assert_all_gone(workers)
    for agent in both:
        assert agent.wait(60) == 1
    said = "".join(Path(agent.output.name).read_text() for agent in both)
    assert said.count("stopped after update ") == 1
    assert steps_saved(run)[-1] == int(said.split("stopped after update ")[1].split(";")[0])


@pytest.mark.slow
def test_two_machines_lose_a_process_and_go_on_and_lose_a_torchrun_and_begin_again(flags, torchrun, lives, tmp_path):
    flags, run, unbroken = [*flags, *LONG], tmp_path / "run", tmp_path / "unbroken"
    assert lives(2, [*flags, "--output-dir", unbroken, "--save-every", "1", "--keep", "100"]).wait() == [0, 0]
    argv = [*flags, "--output-dir", run, "--resume", "auto"]

    both = machines(torchrun, 29511, argv)
    both[1].wait_for_update(run, 10)
    os.kill(both[1].workers()[0], signal.SIGKILL)  # started again, on both
    both[1].wait_for_update(run, 30)
    workers = [worker for agent in both for worker in agent.workers()]
    both[1].process.kill()  # a machine is lost
    assert_all_gone(workers[1:])
    both[0].process.kill()
    assert_all_gone(workers[:1])
    both = machines(torchrun, 29512, argv)
    assert [agent.wait() for agent in both] == [0, 0], Path(both[0].output.name).read_text()
    assert_same(run, unbroken)
