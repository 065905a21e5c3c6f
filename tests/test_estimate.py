"""What `--dry-run` says a run would take, and that it touches nothing."""

import re
from types import SimpleNamespace

import pytest
import torch

import train as train_command
from running import estimate as estimate_module


@pytest.fixture
def flags(tiny_model_dir, chats, tmp_path):
    """A dry run of 12 updates, two evaluations after the first, two checkpoints kept."""
    settings = {"model": tiny_model_dir, "dataset": chats, "eval-fraction": 0.2, "test-fraction": 0.05, "batch-size": 5}
    settings |= {
        "eval-every": 6,
        "dtype": "fp32",
        "lr": 1e-2,
        "micro-batch-tokens": 100,
        "output-dir": tmp_path / "run",
    }
    return [*(str(part) for name, value in settings.items() for part in (f"--{name}", value)), "--dry-run"]


@pytest.fixture
def clock(monkeypatch):
    """A clock by which a token takes 300 s in an update and 60 s in an evaluation; lists the learning rates it saw."""
    now, rates, step, evaluate = [0.0], [], train_command.train_step, estimate_module.evaluate

    def timed_step(model, optimizer, window, lr, **settings):
        now[0] += 300 * sum(batch.tokens for batch in window)
        rates.append(lr)
        return step(model, optimizer, window, lr, **settings)

    def timed_evaluate(model, examples, layout, precision):
        now[0] += 60 * sum(len(example.input_ids) for example in examples)
        return evaluate(model, examples, layout, precision)

    monkeypatch.setattr(estimate_module.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(train_command, "train_step", timed_step)
    monkeypatch.setattr(estimate_module, "evaluate", timed_evaluate)
    return rates


def test_it_says_what_a_run_takes_and_touches_nothing(flags, clock, tiny_model, capsys, tmp_path, monkeypatch):
    runs, real = [], estimate_module.estimate
    monkeypatch.setattr(train_command, "estimate", lambda run, step: runs.append(run) or real(run, step))
    monkeypatch.setattr(estimate_module, "format_bytes", lambda count: f"{count} B")
    assert train_command.main(flags) == 0
    printed, (run,) = capsys.readouterr().out, runs
    parameters = sum(weights.numel() for weights in tiny_model.parameters())
    found = re.search(
        r"^  memory    (\d+) B at the peak of (\d+) B \(weights (\d+) B, gradients (\d+) B, AdamW (\d+) B, "
        r"activations and the rest (\d+) B\)$",
        printed,
        re.M,
    )
    peak, device, *parts = map(int, found.groups())
    assert parts[:3] == [4 * parameters, 4 * parameters, 8 * parameters]
    assert sum(parts) == peak < device
    assert re.search(rf"^  disk      up to {4 * 12 * parameters} B, \d+ B free$", printed, re.M)
    updates = 300 * 2 * run.data.train.tokens
    evaluations = 60 * (3 * run.data.eval.tokens + 2 * run.data.test.tokens)
    hours, minutes = divmod(round((updates + evaluations) / 60), 60)
    assert f"  time      about {hours} h {minutes} min, {evaluations // 3600} h " in printed
    assert set(clock) == {0.0}
    assert not (tmp_path / "run").exists()
    for name, weights in run.model.named_parameters():
        assert torch.equal(weights, dict(tiny_model.named_parameters())[name])


@pytest.mark.usefixtures("clock")
def test_what_does_not_fit_is_said(flags, monkeypatch, capsys):
    monkeypatch.setattr(estimate_module, "device_memory", lambda _: estimate_module.peak_memory(torch.device("cpu")))
    monkeypatch.setattr(estimate_module.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    assert train_command.main(flags) == 0
    printed = capsys.readouterr().out
    assert ": hardly fits, use a lower --micro-batch-tokens (" in printed
    assert " 0.0 GB free: not enough, use a lower --keep or another --output-dir\n" in printed


def test_too_little_memory_is_one_line(flags, monkeypatch):
    def full(*_, **__):
        raise MemoryError

    monkeypatch.setattr(train_command, "train_step", full)
    with pytest.raises(train_command.UserError, match="out of memory in a micro-batch of"):
        train_command.main(flags)
