"""What `--dry-run` says a run would take, and that it touches nothing."""

import re

import pytest
import torch

import train as train_command
from running import estimate as estimate_module


@pytest.fixture
def flags(tiny_model_dir, chats, tmp_path):
    """A run of 12 updates, two evaluations after the first, two checkpoints kept."""
    settings = {"model": tiny_model_dir, "dataset": chats, "eval-fraction": 0.2, "test-fraction": 0.05, "batch-size": 5}
    settings |= {
        "eval-every": 6,
        "dtype": "fp32",
        "lr": 1e-2,
        "micro-batch-tokens": 100,
        "output-dir": tmp_path / "run",
    }
    return [str(part) for name, value in settings.items() for part in (f"--{name}", value)]


@pytest.fixture
def found(flags, monkeypatch, capsys):
    """Its run, the estimate of it, and what was printed."""
    kept, estimate = [], estimate_module.estimate
    monkeypatch.setattr(train_command, "estimate", lambda run, step: kept.extend((run, estimate(run, step))) or kept[1])
    assert train_command.main([*flags, "--dry-run"]) == 0
    return *kept, capsys.readouterr().out


def test_it_says_what_a_run_takes_and_touches_nothing(found, tiny_model, tmp_path):
    run, said, printed = found
    parameters = sum(weights.numel() for weights in tiny_model.parameters())
    assert (said.weights, said.gradients, said.moments) == (4 * parameters, 4 * parameters, 8 * parameters)
    assert said.disk == 3 * 12 * parameters + 4 * parameters
    assert said.weights < said.peak < said.device
    assert re.search(r"^  memory    \d+\.\d GB at the peak of \d+\.\d GB \(weights 0.0 GB, gradients", printed, re.M)
    assert re.search(r"^  time      about \d+ s, \d+ s of it for evaluations", printed, re.M)
    assert re.search(r"^  disk      up to 0.0 GB of \d+\.\d GB that are free$", printed, re.M)
    assert not (tmp_path / "run").exists()
    for name, weights in run.model.named_parameters():
        assert torch.equal(weights, dict(tiny_model.named_parameters())[name])


def test_seconds_are_those_of_all_updates_and_evaluations(flags, monkeypatch):
    """With a clock by which a token's update takes 3 s, an optimizer's step 5 s and a token's evaluation 1 s."""
    clock = [0.0]
    monkeypatch.setattr(estimate_module.time, "perf_counter", lambda: clock[0])
    step, evaluate = train_command.train_step, estimate_module.evaluate

    def timed_step(model, optimizer, window, lr, **settings):
        assert lr == 0
        hook = optimizer.register_step_pre_hook(lambda *_: clock.__setitem__(0, clock[0] + 5))
        step(model, optimizer, window, lr, **settings)
        hook.remove()
        clock[0] += 3 * sum(batch.tokens for batch in window)

    def timed_evaluate(model, examples, layout, precision):
        clock[0] += estimate_module.tokens_of(examples)
        return evaluate(model, examples, layout, precision)

    monkeypatch.setattr(train_command, "train_step", timed_step)
    monkeypatch.setattr(estimate_module, "evaluate", timed_evaluate)
    kept, real = [], estimate_module.estimate
    monkeypatch.setattr(train_command, "estimate", lambda run, step: kept.extend((run, real(run, step))) or kept[1])
    assert train_command.main([*flags, "--dry-run"]) == 0
    run, said = kept
    assert run.total_steps == 12
    assert said.training == pytest.approx(3 * 2 * run.data.train.tokens + 12 * 5)
    assert said.evaluating == pytest.approx(3 * run.data.eval.tokens + 2 * run.data.test.tokens)


def test_what_does_not_fit_is_said(found):
    _, said, _ = found
    small = {**vars(said), "device": said.peak, "free": 0}
    text = str(estimate_module.Estimate(**small))
    assert "hardly fits, use a lower --micro-batch-tokens" in text
    assert "not enough, use a lower --keep" in text


def test_too_little_memory_is_one_line(flags, monkeypatch):
    def full(*_, **__):
        raise MemoryError

    monkeypatch.setattr(train_command, "train_step", full)
    with pytest.raises(train_command.UserError, match="out of memory in a micro-batch of"):
        train_command.main([*flags, "--dry-run"])
