"""The estimate of `--dry-run`, which changes nothing."""

import re
from types import SimpleNamespace

import pytest
import torch

import train as train_command
from compute.layout import random_examples
from config import Config
from evaluation.facts import format_duration
from model import Precision
from running import estimate as estimate_module
from tests.conftest import layout_of, to_flags


@pytest.fixture
def flags(tiny_model_dir, chats, tmp_path):
    """A dry run of 12 updates, two evaluations after the first, two checkpoints kept."""
    settings = {"model": tiny_model_dir, "dataset": chats, "eval-fraction": 0.2, "test-fraction": 0.05, "batch-size": 5}
    settings |= {"eval-every": 6, "dtype": "fp32", "lr": 1e-2, "micro-batch-tokens": 100}
    return [*to_flags({**settings, "output-dir": tmp_path / "run"}), "--dry-run"]


@pytest.fixture
def clock(monkeypatch):
    """A clock by which a token takes 300 s in an update; lists the learning rates it saw."""
    now, rates, step = [0.0], [], train_command.train_step

    def timed_step(model, optimizer, window, lr, **settings):
        now[0] += 300 * sum(batch.tokens for batch in window)
        rates.append(lr)
        return step(model, optimizer, window, lr, **settings)

    monkeypatch.setattr(estimate_module.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(train_command, "train_step", timed_step)
    return rates


def test_memory_time_and_disk_are_estimated_and_nothing_is_touched(
    flags, clock, tiny_model, capsys, tmp_path, monkeypatch
):
    runs, real = [], estimate_module.estimate
    monkeypatch.setattr(train_command, "estimate", lambda run, step: runs.append(run) or real(run, step))
    monkeypatch.setattr(estimate_module, "format_bytes", lambda count: f"{count} B")
    assert train_command.main(flags) == 0
    printed, (run,) = capsys.readouterr().out, runs
    parameters = sum(weights.numel() for weights in tiny_model.parameters())
    peak, device = map(int, re.search(r"^  memory    (\d+) B at the peak of (\d+) B$", printed, re.M).groups())
    assert 16 * parameters < peak < device
    assert re.search(rf"^  disk      up to {4 * 12 * parameters} B, \d+ B free$", printed, re.M)
    assert f"  time      about {format_duration(300 * 2 * run.data.train.tokens)}; starting, " in printed
    assert set(clock) == {0.0}
    assert not (tmp_path / "run").exists()
    for name, weights in run.model.named_parameters():
        assert torch.equal(weights, dict(tiny_model.named_parameters())[name])


@pytest.mark.usefixtures("clock")
def test_too_little_memory_and_disk_are_reported(flags, monkeypatch, capsys):
    monkeypatch.setattr(estimate_module, "device_memory", lambda _: estimate_module.peak_memory(torch.device("cpu")))
    monkeypatch.setattr(estimate_module.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    assert train_command.main(flags) == 0
    printed = capsys.readouterr().out
    assert ": may not fit, use a lower --micro-batch-tokens\n" in printed
    assert " 0.0 GB free: not enough, use a lower --keep or another --output-dir\n" in printed


def test_the_memory_of_a_gpu_is_what_other_processes_leave(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (30, 80))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 20)  # of this process
    assert estimate_module.device_memory(torch.device("cuda")) == 50


@pytest.mark.parametrize(
    ("lengths", "batch_size", "per_token"),
    [([10] * 64, 32, 0.1482), ([10] * 64, 32, 0.01), ([10] * 3, 3, 1.0), ([10, 30], 1, 0.5)],
)
def test_an_average_update_is_extrapolated_from_the_last_two(monkeypatch, lengths, batch_size, per_token):
    """By a clock on which an update takes a second, so much a token, and each a little longer than the last."""
    now, calls = [0.0], [0]

    def timed_step(_model, _optimizer, window, _lr, **_settings):
        calls[0] += 1
        tokens = sum(batch.tokens for batch in window)
        now[0] += 1 + per_token * tokens + 0.01 * calls[0]
        return {"tokens": tokens}

    monkeypatch.setattr(estimate_module.time, "perf_counter", lambda: now[0])
    per_update = sum(lengths) / len(lengths) * batch_size
    run = SimpleNamespace(
        config=Config(batch_size=batch_size),
        data=SimpleNamespace(train=SimpleNamespace(examples=random_examples(lengths, 100))),
        precision=Precision("fp32", torch.device("cpu")),
        model=torch.nn.Identity(),
        optimizer=None,
        layout=layout_of(packed=True),
        step=0,
        tokens_per_update=per_update,
    )
    seconds, _ = estimate_module.measure_update(run, timed_step)
    assert seconds == pytest.approx(1 + per_token * per_update, rel=0.1)


def test_too_little_memory_is_one_line(flags, monkeypatch):
    def full(*_, **__):
        raise MemoryError

    monkeypatch.setattr(train_command, "train_step", full)
    with pytest.raises(train_command.UserError, match="out of memory in a micro-batch of"):
        train_command.main(flags)
