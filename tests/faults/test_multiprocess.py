"""Several processes: whatever happens to one of them ends all, with one line that explains, and the run can resume."""

import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import running.distributed
import running.resume
import running.setup
import running.validation
from config import UserError
from running.distributed import run_distributed
from tests.conftest import tiny_llama, tiny_moe
from tests.faults.harness import BOUND, TrainProcess, assert_same, lines, some, steps_saved
from tests.faults.inject import (
    ask_for_too_much,
    corrupt_gradient,
    fail,
    full_disk,
    give_memory_back,
    kill,
    kill_at_system_call,
    little_memory,
    on_call,
    pretend,
    send,
)
from tests.faults.test_signals import STOPPING, children, is_zombie

ROOT = Path(__file__).parents[2]
LOST = r"another process ended \(torchrun's summary names it\), or did not answer for 30 minutes"
SIGNALS = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 138}


def answer_nothing():
    """An answer of three processes that share the weights takes as long as many updates."""
    running.validation.DEFAULT_PROMPTS = ()


def assert_resumes(start_group, run, uninterrupted_group):
    again = start_group(2, ["--resume", run])
    assert again.wait() == [0, 0], again.stderr
    assert_same(run, uninterrupted_group)


def test_two_processes_write_what_one_does(uninterrupted, uninterrupted_group):
    ours, alone = lines(uninterrupted_group), lines(uninterrupted)
    assert len(ours) == len(alone)
    for line, line_alone in zip(ours, alone, strict=True):
        assert line.keys() - {"largest_share", "empty_share"} == line_alone.keys()
        for name in line_alone.keys() - {"loss", "perplexity", "grad_norm"}:
            assert line[name] == line_alone[name], name
        assert line["loss"] == pytest.approx(line_alone["loss"], rel=1e-5)
    answers = [json.loads((run / "answers.json").read_text()) for run in (uninterrupted_group, uninterrupted)]
    assert answers[0] == answers[1]
    message = (uninterrupted_group.parent / "stdout").read_text()
    assert message.count("updates, ") == 1 + message.count("updates, each")
    assert "2 processes, each on cpu" in message
    assert (uninterrupted_group.parent / "stderr").read_text() == ""


# --- killed


KILLS = [
    (("train.train_step", 5), 1),
    (("train.token_loss", 8), 0),
    (("running.checkpoint.save", 2), 0),
    (("eval.loss_and_correct", 6), 1),
]


@pytest.mark.parametrize(("moment", "rank"), some(KILLS, fast=2))
def test_one_is_killed_and_all_end(flags, start_group, uninterrupted_group, tmp_path, moment, rank):
    run = tmp_path / "run"
    group = start_group(2, [*flags, "--output-dir", run], (rank, partial(on_call, *moment, kill)))
    statuses = group.wait()
    assert statuses[rank] == 137
    assert statuses[1 - rank] == 1
    assert re.fullmatch(
        rf"error: {run}, after update \d+: {LOST}; "
        rf"(--resume {run} continues after update \d+|there is no checkpoint yet)\n",
        group.stderr,
    )
    assert_resumes(start_group, run, uninterrupted_group)


@pytest.mark.slow
def test_rank_0_is_killed_at_every_change_that_a_save_makes(flags, start_group, uninterrupted_group, tmp_path):
    saving, counted = [*flags, "--save-every", "1", "--keep", "1"], tmp_path / "count"
    assert start_group(
        2, [*saving, "--output-dir", tmp_path / "all"], (0, partial(kill_at_system_call, 0, counted))
    ).wait() == [0, 0]
    for number in range(1, int(counted.read_text()) + 1):
        run = tmp_path / str(number)
        assert start_group(2, [*saving, "--output-dir", run], (0, partial(kill_at_system_call, number))).wait() == [
            137,
            1,
        ]
        assert_resumes(start_group, run, uninterrupted_group)


# --- signalled


@pytest.mark.parametrize(("number", "rank"), some(zip(SIGNALS, (1, 0, 1), strict=True), fast=2))
def test_a_signal_to_one_stops_all_after_the_same_update(
    flags, start_group, uninterrupted_group, tmp_path, number, rank
):
    run = tmp_path / "run"
    sends = partial(on_call, "train.train_step", 5, partial(send, number))
    group = start_group(2, [*flags, "--output-dir", run], (rank, sends))
    assert group.wait() == [SIGNALS[number]] * 2
    message = f"\n{STOPPING}\n" if rank == 0 else ""
    assert group.stderr == f"{message}stopped after update 5; to resume: python train.py --resume {run}\n"
    assert steps_saved(run) == [4, 5]
    assert_resumes(start_group, run, uninterrupted_group)


def test_a_forwarded_signal_counts_once(flags, start_group, tmp_path):
    """A batch system sends it to every process, and torchrun forwards its own."""
    run, term = tmp_path / "run", partial(send, signal.SIGTERM)
    faults = [(rank, partial(on_call, "train.train_step", 5, term)) for rank in (0, 1)]
    faults += [(rank, partial(on_call, "running.checkpoint.save", 3, term)) for rank in (0, 1)]
    group = start_group(2, [*flags, "--output-dir", run], *faults)
    assert group.wait() == [143, 143]
    assert group.stderr.endswith(f"stopped after update 5; to resume: python train.py --resume {run}\n")
    assert steps_saved(run) == [4, 5]


def test_a_signal_during_the_all_reduce_of_signals_is_not_lost(flags, start_group, uninterrupted_group, tmp_path):
    """Sent when every rank has entered the all-reduce with no signal."""
    run, term = tmp_path / "run", partial(send, signal.SIGTERM)
    faults = [(rank, partial(on_call, "running.signals.all_reduce_max", 12, term)) for rank in (0, 1)]
    group = start_group(2, [*flags, "--output-dir", run], *faults)
    assert group.wait() == [143, 143]
    (step,) = re.findall(r"stopped after update (\d+); to resume", group.stderr)
    assert 0 < int(step) < 10
    assert steps_saved(run)[-1] == int(step)
    assert_resumes(start_group, run, uninterrupted_group)


def test_a_signal_in_an_evaluation_stops_all_of_them_before_its_end(flags, start_group, tmp_path):
    run, term = tmp_path / "run", partial(send, signal.SIGTERM)
    # Before the first update each process has one micro-batch of the eval split, and one of the test split.
    group = start_group(
        2,
        [*flags, "--output-dir", run, "--micro-batch-tokens", "60"],
        (1, partial(on_call, "running.validation.evaluate", 3, partial(on_call, "eval.loss_and_correct", 1, term))),
    )
    assert group.wait() == [143, 143]
    assert group.stderr == f"stopped after update 4; to resume: python train.py --resume {run}\n"
    assert [line["step"] for line in lines(run, "eval")] == [0]
    assert steps_saved(run) == [3, 4]


def test_a_signal_before_training_stops_all(flags, start_group, tmp_path):
    run = tmp_path / "run"
    sends = partial(on_call, "running.setup.load_tokenizer", 1, partial(send, signal.SIGTERM))
    group = start_group(2, [*flags, "--output-dir", run], (1, sends))
    assert group.wait() == [1, 143]  # torchrun would send it to the other one too
    assert group.stderr == "stopped before training began\n"
    assert not run.exists()


# --- failing


FAILURES = {
    "an exception": (partial(on_call, "train.train_step", 5, fail), "RuntimeError: a bug"),
    "too little memory": (
        partial(on_call, "train.train_step", 5, partial(on_call, "train.token_loss", 1, ask_for_too_much)),
        r"error: update 5: out of memory in a micro-batch of \d+ tokens",
    ),
    "a full disk": (
        partial(on_call, "train.train_step", 5, full_disk),
        "error: .*, after update 4: No space left on device; --resume .* continues after update 4\n",
    ),
}


@pytest.mark.parametrize(("name", "rank"), some(zip(FAILURES, (1, 0, 1), strict=True), fast=2))
def test_one_fails_and_explains_itself(flags, start_group, uninterrupted_group, tmp_path, name, rank):
    run = tmp_path / "run"
    fault, message = FAILURES[name]
    group = start_group(2, [*flags, "--output-dir", run], (rank, fault))
    assert group.wait() == [1, 1]
    assert re.search(message, group.stderr)
    assert group.stderr.count("rror: ") == 1
    assert_resumes(start_group, run, uninterrupted_group)


def test_an_update_that_is_not_finite_is_explained_once(flags, start_group, uninterrupted_group, tmp_path):
    run = tmp_path / "run"
    group = start_group(
        2, [*flags, "--output-dir", run], (1, partial(on_call, "train.train_step", 8, corrupt_gradient))
    )
    assert group.wait() == [1, 1]
    first, *window = group.stderr.splitlines()
    assert first.startswith("error: update 8: loss ")
    assert first.endswith(f"--resume {run} continues after update 6; its conversations:")
    assert len(window) == 7
    assert_resumes(start_group, run, uninterrupted_group)


def test_a_mistake_is_reported_once_and_nothing_is_left(flags, start_group, tmp_path):
    group = start_group(2, [*flags, "--output-dir", tmp_path / "run", "--lr", "-1"])
    assert group.wait() == [1, 1]
    assert group.stderr == "error: --lr must be 0 or more, not -1.0\n"
    group = start_group(2, [*flags, "--output-dir", tmp_path / "run", "--model", tmp_path])
    assert group.wait() == [1, 1]
    assert len(group.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("rank", "fault"), some([(1, kill), (0, fail), (2, ask_for_too_much)], fast=1))
def test_a_failure_of_one_ends_all_with_shards_too(flags, start_group, tmp_path, rank, fault):
    run = tmp_path / "run"
    faulty = partial(on_call, "train.train_step", 5, partial(on_call, "model.supervised_states", 1, fault))
    silent = [(each, answer_nothing) for each in range(3)]
    group = start_group(3, [*flags, "--output-dir", run, "--shard", 3], (rank, faulty), *silent)
    assert group.wait() == [137 if fault is kill and each == rank else 1 for each in range(3)]
    assert group.stderr.count("rror: ") == 1
    assert steps_saved(run) == [3, 4]
    again = start_group(3, ["--resume", run])  # with answers: torch 2.11's shards need the head's own pass after a save
    assert again.wait() == [0, 0, 0], again.stderr


def test_a_shard_that_the_processes_cannot_be_divided_by_is_refused(flags, start_group, start_process, tmp_path):
    group = start_group(3, [*flags, "--output-dir", tmp_path / "run", "--shard", 2])
    assert group.wait() == [1, 1, 1]
    assert group.stderr == "error: --shard 2: 3 processes cannot be divided by it; use one of 1, 3\n"
    process = start_process([*flags, "--output-dir", tmp_path / "run", "--shard", 2])
    assert process.wait() == 1
    assert process.stderr == (
        "error: --shard 2: it takes several processes; start them with torchrun, or use --shard 1\n"
    )
    assert not (tmp_path / "run").exists()


def test_a_head_that_only_the_configuration_ties_is_not_sharded(flags, start_group, tiny_model_dir, tmp_path):
    """Rank 0 alone reads the weights; the others know the configuration."""
    path = shutil.copytree(tiny_model_dir, tmp_path / "model") / "model.safetensors"
    weights = load_file(path)
    head = {"lm_head.weight": weights["model.embed_tokens.weight"] + 1}
    save_file(weights | head, path, metadata={"format": "pt"})
    group = start_group(2, [*flags, "--model", path.parent, "--output-dir", tmp_path / "run", "--shard", 2])
    assert group.wait() == [1, 1]
    assert group.stderr.endswith("correct tie_word_embeddings there, or use --shard 1\n")
    assert len(group.stderr.splitlines()) == 1


@pytest.mark.slow
def test_a_sharded_mixture_of_experts_is_saved_as_transformers_reads_it(flags, start_group, tiny_model_dir, tmp_path):
    """Its experts are joined in memory and apart in the files."""
    directory = shutil.copytree(tiny_model_dir, tmp_path / "model")
    tiny_moe(259).save_pretrained(directory)
    flags, run = [*flags, "--model", directory], tmp_path / "run"
    kill_one = (1, partial(on_call, "train.train_step", 8, kill))
    assert start_group(2, [*flags, "--output-dir", run, "--shard", 2], kill_one).wait() == [1, 137]
    group = start_group(2, ["--resume", run])
    assert group.wait() == [0, 0], group.stderr
    whole = start_group(2, [*flags, "--output-dir", tmp_path / "whole"])
    assert whole.wait() == [0, 0], whole.stderr
    for line, expected in zip(lines(run), lines(tmp_path / "whole"), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    _, report = AutoModelForCausalLM.from_pretrained(run / "best", output_loading_info=True)
    assert not any(report.values())


@pytest.mark.parametrize("count", [1, 2])
def test_a_dry_run_estimates_each_process(flags, start_group, tmp_path, count):
    group = start_group(2, [*flags, "--output-dir", tmp_path / "run", "--shard", count, "--dry-run"])
    assert group.wait() == [0, 0], group.stderr
    memory, time, disk = re.findall("^  (?:memory|time|disk)  .*", group.stdout, re.M)
    half = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2e9
    assert re.search(rf"\d GB at the peak of a process of {half:.1f} GB$", memory)
    assert "about" in time
    assert "up to" in disk
    assert not (tmp_path / "run").exists()


# --- agreement


def other_settings():
    """This process was started with another learning rate."""
    real = running.setup.resolve
    running.setup.resolve = lambda named, preset: real({**named, "lr": 0.5}, preset)


def test_ranks_with_different_settings_are_refused(flags, start_group, tmp_path):
    run = tmp_path / "run"
    group = start_group(2, [*flags, "--output-dir", run], (1, other_settings))
    assert group.wait() == [1, 1]
    assert group.stderr == "error: the processes do not agree on --lr: 0.01 in the first, 0.5 in process 1\n"
    assert not (run / "config.json").exists()


def pass_time_quickly():
    """A process that waits for a file to appear looks for it four times instead of ten seconds long."""
    running.resume.time = SimpleNamespace(monotonic=itertools.count(step=3).__next__, sleep=lambda _: None)


def test_a_directory_that_one_rank_cannot_read_is_refused(flags, start_group, tmp_path):
    run = tmp_path / "run"
    blind = partial(pretend, "running.resume.read_owner", "")
    group = start_group(2, [*flags, "--output-dir", run], (1, blind), (1, pass_time_quickly))
    assert group.wait() == [1, 1]
    assert group.stderr == (
        f"error: --output-dir {run}: process 1 does not see it; "
        "name a directory on a file system that all processes share\n"
    )


# --- resumed


# How many processes, and how many of them share a copy of the weights, in each of three starts.
CHANGES = [
    ((2, 2), (1, 1), (3, 1)),
    ((1, 1), (3, 3), (1, 1)),
    ((2, 1), (1, 1), (3, 1)),
    ((1, 1), (2, 1), (2, 2)),
    ((4, 2), (2, 2), (2, 1)),
    ((3, 1), (4, 4), (4, 2)),
]


@pytest.mark.parametrize("changes", some([(change,) for change in CHANGES], fast=2), ids=str)
def test_a_run_is_resumed_by_another_number_of_processes(
    flags, start_group, start_process, uninterrupted, tmp_path, changes
):
    run = tmp_path / "run"
    for start, (size, count) in enumerate(changes):
        argv = [*(["--resume", run] if start else [*flags, "--output-dir", run]), "--shard", count]
        faults = [] if start == 2 else [partial(on_call, "train.train_step", 4, partial(send, signal.SIGTERM))]
        if size == 1:
            assert start_process(argv, *faults).wait() == (0 if start == 2 else 143)
        else:
            group = start_group(size, argv, *((size - 1, fault) for fault in faults))
            assert group.wait() == [0 if start == 2 else 143] * size, group.stderr
    assert steps_saved(run)[-1] == 10
    ours, alone = lines(run), lines(uninterrupted)
    assert [(line["kind"], line["step"]) for line in ours] == [(line["kind"], line["step"]) for line in alone]
    for line, line_alone in zip(ours, alone, strict=True):
        assert line["loss"] == pytest.approx(line_alone["loss"], rel=1e-5)


def test_resume_auto_begins_continues_and_ends(flags, start_process, uninterrupted, tmp_path):
    run = tmp_path / "run"
    argv = [*flags, "--output-dir", run, "--resume", "auto"]
    assert (
        start_process(argv, partial(on_call, "running.run.replace_file", 1, kill)).wait() == 137
    )  # before there is a run
    assert start_process(argv, partial(on_call, "train.train_step", 8, kill)).wait() == 137
    process = start_process(argv)
    assert process.wait() == 0, process.stderr
    assert f"resuming {run} from step-6\n" in process.stdout
    assert_same(run, uninterrupted)
    process = start_process(argv)
    assert process.wait() == 0
    assert process.stdout.startswith(f"{run} is finished already\n")
    process = start_process([*flags, "--resume", "auto"])
    assert process.wait() == 1
    assert process.stderr == "error: --resume auto needs --output-dir, by which it finds the run again\n"


# --- torchrun


ENDLESS = ("--epochs", "500")
LONG = ("--epochs", "12", "--log-every", "10")  # 60 updates


class Torchrun:
    """A torchrun and the processes of `train.py` that it has started."""

    def __init__(self, options, argv, output):
        command = [sys.executable, "-m", "torch.distributed.run", *map(str, options), str(ROOT / "train.py")]
        self.output = open(output, "w")  # noqa: SIM115
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if "--nnodes" in options:
            environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        self.process = subprocess.Popen(
            [*command, *map(str, argv)], stdout=self.output, stderr=self.output, env=environment
        )

    def wait(self, seconds=120):
        """Wait for its end; returns its exit status."""
        return self.process.wait(seconds)

    @property
    def printed(self):
        return Path(self.output.name).read_text()

    def workers(self):
        """The process IDs of its ranks, by rank."""
        environments = {int(pid): Path(f"/proc/{pid}/environ").read_text() for pid in children(self.process.pid)}
        return sorted(environments, key=lambda pid: re.search(r"\0RANK=(\d+)", "\0" + environments[pid])[1])

    def wait_for_update(self, run, step):
        """Wait until a run has logged an update."""
        end = time.monotonic() + 120
        while not (run / "metrics.jsonl").exists() or not any(line["step"] >= step for line in lines(run, "train")):
            assert self.process.poll() is None, self.printed
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


TWO = ("--standalone", "--nproc-per-node", "2")


def assert_all_gone(workers):
    """Assert that processes end within the bound."""
    assert workers
    end = time.monotonic() + BOUND
    while any(Path(f"/proc/{worker}").exists() and not is_zombie(worker) for worker in workers):
        assert time.monotonic() < end, "a process is left"
        time.sleep(0.02)


def test_a_mistake_under_torchrun_is_one_line_before_its_summary(flags, torchrun, tmp_path):
    agent = torchrun(TWO, [*flags, "--output-dir", tmp_path / "run", "--lr", "-1"])
    assert agent.wait() == 1
    assert agent.printed.count("error: --lr must be 0 or more, not -1.0\n") == 1
    assert "UserError" not in agent.printed  # no traceback of the mistake


@pytest.mark.slow
@pytest.mark.parametrize("blocked", [0, 1])
def test_torchrun_ends_a_blocked_process_when_another_is_killed(flags, torchrun, tmp_path, blocked):
    run = tmp_path / "run"
    agent = torchrun(TWO, [*flags, *ENDLESS, "--output-dir", run])
    agent.wait_for_update(run, 2)
    workers = agent.workers()
    os.kill(workers[blocked], signal.SIGSTOP)
    os.kill(workers[1 - blocked], signal.SIGKILL)
    assert agent.wait(BOUND + 30) == 1  # torchrun waits 30 s between SIGTERM and SIGKILL
    assert_all_gone(workers)
    assert re.search(rf"rank +: {1 - blocked} .*\n +exitcode +: -9 .*SIGKILL", agent.printed)


@pytest.mark.slow
def test_a_killed_torchrun_leaves_no_process(flags, torchrun, tmp_path):
    run = tmp_path / "run"
    agent = torchrun(TWO, [*flags, *ENDLESS, "--output-dir", run])
    agent.wait_for_update(run, 2)
    workers = agent.workers()
    agent.process.kill()
    assert_all_gone(workers)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_torchrun_stops_and_saves(flags, torchrun, tmp_path, number):
    run = tmp_path / "run"
    agent = torchrun([*TWO, "--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1"], [*flags, *ENDLESS, "--output-dir", run])
    agent.wait_for_update(run, 2)
    workers = agent.workers()
    agent.process.send_signal(number)
    assert agent.wait(60) == 1
    assert_all_gone(workers)
    (step,) = re.findall(r"stopped after update (\d+);", agent.printed)
    assert steps_saved(run)[-1] == int(step)


@pytest.mark.slow
def test_torchrun_restarts_the_processes_and_the_run_continues(flags, torchrun, tmp_path):
    flags, run, uninterrupted = [*flags, *LONG], tmp_path / "run", tmp_path / "uninterrupted"
    every = ["--save-every", "1", "--keep", "100"]  # its answers are as long as those of the processes below
    assert torchrun(TWO, [*flags, *every, "--output-dir", uninterrupted]).wait() == 0
    agent = torchrun([*TWO, "--max-restarts", "2"], [*flags, "--output-dir", run, "--resume", "auto"])
    for rank, step in enumerate((10, 30)):
        agent.wait_for_update(run, step)
        os.kill(agent.workers()[rank], signal.SIGKILL)
    assert agent.wait() == 0, agent.printed
    assert_same(run, uninterrupted)


def machines(torchrun, port, argv, restarts=2):
    """Two torchruns, as on two machines."""
    common = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--max-restarts", restarts]
    common += ["--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", str(port), "--local-addr", "127.0.0.1"]
    return [torchrun(common, argv) for _ in range(2)]


@pytest.mark.slow
def test_a_signal_to_one_of_two_torchruns_stops_both_and_saves(flags, torchrun, tmp_path):
    run = tmp_path / "run"
    both = machines(torchrun, 29513, [*flags, *ENDLESS, "--output-dir", run], restarts=0)
    both[0].wait_for_update(run, 2)
    workers = [worker for agent in both for worker in agent.workers()]
    both[1].process.send_signal(signal.SIGTERM)
    assert_all_gone(workers)
    assert [agent.wait(60) for agent in both] == [1, 1]
    (step,) = re.findall(r"stopped after update (\d+);", both[0].printed + both[1].printed)
    assert steps_saved(run)[-1] == int(step)


@pytest.mark.slow
def test_two_machines_lose_a_process_and_then_a_torchrun(flags, torchrun, tmp_path):
    flags, run, uninterrupted = [*flags, *LONG], tmp_path / "run", tmp_path / "uninterrupted"
    every = ["--save-every", "1", "--keep", "100"]  # its answers are as long as those of the processes below
    assert torchrun(TWO, [*flags, *every, "--output-dir", uninterrupted]).wait() == 0
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
    assert [agent.wait() for agent in both] == [0, 0], both[0].printed
    assert_same(run, uninterrupted)


# --- the environment


TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"RANK": None}, "environment variable RANK expected"),
        ({"LOCAL_RANK": None}, "'LOCAL_RANK' is not set; start them with torchrun"),
        ({"WORLD_SIZE": "two"}, "invalid literal .*'two'"),
        ({"MASTER_PORT": "70000"}, "port must have value from 0 to 65535"),
        ({}, "The client socket has timed out"),
    ],
    ids=str,
)
def test_a_wrong_environment_is_one_line(monkeypatch, changed, message):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])  # where nobody listens afterwards
    for name, value in {**TORCHRUN, "MASTER_PORT": port, **changed}.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(running.distributed, "die_with_parent", lambda: None)
    monkeypatch.setattr(running.distributed, "JOIN_TIMEOUT", timedelta(seconds=1))
    with pytest.raises(UserError, match=rf"^cannot join the other processes: .*{message}.*$"):
        run_distributed(lambda: 0)


def test_restarts_on_several_machines_need_a_store_of_their_own(monkeypatch):
    several = {"GROUP_WORLD_SIZE": "2", "TORCHELASTIC_MAX_RESTARTS": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, value in {**TORCHRUN, **several}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(running.distributed, "die_with_parent", lambda: None)
    with pytest.raises(UserError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        run_distributed(lambda: 0)


@pytest.mark.parametrize("environment", [(), {"WORLD_SIZE": "1", "RANK": "0"}], ids=str)
def test_one_process_needs_no_variables(flags, tmp_path, environment):
    run = tmp_path / "run"
    process = TrainProcess([*flags, "--output-dir", run, "--dry-run"], tmp_path, environment=environment)
    assert process.wait() == 0, process.stderr


# --- memory


@pytest.mark.slow
def test_a_model_too_large_for_one_process_trains_on_three(flags, start_process, start_group, tiny_model_dir, tmp_path):
    """Weights, gradient and moments are 16 bytes for each of 36 million numbers; a process may have 500 MB more than at
    its start."""
    directory, megabytes = shutil.copytree(tiny_model_dir, tmp_path / "large"), 500
    shape = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 9}
    tiny_llama(259, **shape).save_pretrained(directory)
    flags = [*flags, "--model", directory, "--max-steps", "2", "--eval-every", "100", "--save-every", "100"]
    limits = [
        answer_nothing,
        partial(pretend, "running.setup.keep_freed_memory", None),
        give_memory_back,
        partial(on_call, "running.setup.load_on_ranks", 1, partial(little_memory, megabytes)),
    ]
    process = start_process([*flags, "--output-dir", tmp_path / "whole"], *limits)
    assert process.wait(300) == 1
    assert "out of memory" in process.stderr
    group = start_group(
        3,
        [*flags, "--output-dir", tmp_path / "run", "--shard", 3],
        *((rank, limit) for rank in range(3) for limit in limits),
    )
    group.wait(600)
    assert [line["step"] for line in lines(tmp_path / "run", "train")] == [2], group.stderr
