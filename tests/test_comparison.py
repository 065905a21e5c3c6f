"""Comparisons: paired by conversation, of the losses that an evaluation reports, with intervals that mean something."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import eval as eval_command
from compute.self_check import use_layout
from conversations.masking import Example
from eval import evaluate
from evaluation import comparison
from evaluation.comparison import (
    BLOCK,
    compare,
    compare_texts,
    difference,
    mean_over_runs,
    smallest_difference,
    turn_numbers,
)
from evaluation.format import format_report, side_by_side
from model import Precision
from tests.conftest import CONTROL, byte_tokenizer, layout_of, tiny_llama
from tests.faults.harness import some

FP32 = Precision("fp32", torch.device("cpu"))
PLAIN_TEXT = Path(__file__).parents[1] / "examples" / "plain_text.txt"


def example(*labels):
    return Example(torch.arange(len(labels)), torch.tensor(labels))


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_an_evaluation_has_the_losses_of_each_conversation_in_their_order(ragged_window, packed):
    model = tiny_llama(259)
    use_layout(model, layout_of(packed))
    whole = evaluate(model, ragged_window, layout_of(packed, 60), FP32)
    assert [len(losses) for losses in whole.token_losses] == [one.supervised_tokens for one in ragged_window]
    assert sum(losses.sum() for losses in whole.token_losses).item() == pytest.approx(whole.loss_sum, rel=1e-12)
    for one, losses in zip(ragged_window, whole.token_losses, strict=True):
        alone = evaluate(model, [one], layout_of(packed), FP32)
        torch.testing.assert_close(losses, alone.token_losses[0], rtol=1e-5, atol=1e-5)


def test_a_difference_is_that_of_the_losses_per_token():
    found = difference([10.0, 4.0], [8.0, 5.0], [10, 2])
    assert (found["before"], found["after"]) == (14 / 12, 13 / 12)
    assert found["difference"] == pytest.approx(-1 / 12)
    assert found["interval"] is None  # two conversations are too few
    assert (found["conversations"], found["tokens"]) == (2, 12)


def world(random, n):
    """Loss sums before and after, and tokens, of `n` conversations from a population whose difference is -0.05."""
    tokens = random.integers(5, 200, n)
    level = random.gamma(4.0, 0.6, n)
    return level * tokens, (level + random.normal(-0.05, 0.15, n)) * tokens, tokens


@pytest.mark.parametrize("n", [40, 100])
def test_the_interval_covers_the_true_difference_in_about_95_of_100_trials(monkeypatch, n):
    monkeypatch.setattr(comparison, "RESAMPLES", 500)
    random, covered = np.random.default_rng(0), 0
    for _ in range(300):
        low, high = difference(*world(random, n))["interval"]
        covered += low <= -0.05 <= high
    assert 0.91 <= covered / 300 <= 0.98


def test_an_interval_over_independent_tokens_covers_far_less(monkeypatch):
    """The control: tokens of one conversation are not independent."""
    monkeypatch.setattr(comparison, "RESAMPLES", 500)
    random, covered = np.random.default_rng(0), 0
    for _ in range(60):
        before, after, tokens = world(random, 40)
        change = np.repeat((after - before) / tokens, tokens)
        low, high = difference(np.zeros(len(change)), change, np.ones(len(change)))["interval"]
        covered += low <= -0.05 <= high
    assert covered / 60 < 0.6


def rate_of_mistakes(n, correlation, trials=400):
    """How often two models that are equally good differ by the `smallest_difference` that one of them promises."""
    random, mistakes = np.random.default_rng(0), 0
    for _ in range(trials):
        tokens = np.ceil(random.lognormal(4.0, 1.0, n))
        one, noise = random.standard_normal((2, n))
        levels = [one, correlation * one + (1 - correlation**2) ** 0.5 * noise]
        losses = [3 * np.exp(0.4 * level) * tokens for level in levels]
        mistakes += abs(difference_of(*losses, tokens)) >= smallest_difference(losses[0], tokens)
    return mistakes / trials


def difference_of(before, after, tokens):
    return (after - before).sum() / tokens.sum()


@pytest.mark.parametrize("n", some([5, 100, 20], fast=2))
def test_a_difference_that_is_not_chance_is_promised_on_the_safe_side(n):
    """Nearly 95 % even of models with nothing in common, and at least 95 % of those whose losses are alike at all."""
    assert rate_of_mistakes(n, 0) <= 0.11
    assert rate_of_mistakes(n, 0.5) <= 0.05
    assert rate_of_mistakes(n, 0.9) <= 0.01
    assert rate_of_mistakes(n, -0.9) > 0.11  # the control: what it takes for granted


def test_the_smallest_difference_scales_as_a_difference_does_and_needs_five_conversations():
    losses, tokens = world(np.random.default_rng(0), 40)[1:]
    smallest = smallest_difference(losses, tokens)
    assert smallest_difference(2 * losses, tokens) == pytest.approx(2 * smallest, rel=1e-12)
    assert smallest_difference(losses + 7 * tokens, tokens) == pytest.approx(smallest, rel=1e-9)  # a level is no spread
    assert smallest_difference(5 * losses, 5 * tokens) == pytest.approx(smallest, rel=1e-12)  # nor are longer ones more
    low, high = difference(0 * losses, losses, tokens)["interval"]
    assert smallest == pytest.approx((high - low) / 2**0.5, rel=0.15)  # of one model's loss, for two
    for n in range(5):
        assert smallest_difference(losses[:n], tokens[:n]) is None
    assert smallest_difference(losses[:5], tokens[:5]) > 0


def test_turns_are_counted_by_supervised_answers():
    assert turn_numbers(example(-100, 1, 2, -100, 4, -100, -100, 7, 8)).tolist() == [1, 1, 2, 3, 3]
    assert turn_numbers(example(0, 1, -100, 3)).tolist() == [1, 2]  # the first token is never scored


def test_a_comparison_shows_what_got_better_and_worse():
    examples = [example(-100, 1, 2), example(-100, 1, -100, 3), example(-100, 1, 2, 3, 4)]
    before = [torch.tensor(losses) for losses in ([2.0, 2.0], [3.0, 3.0], [1.0, 1.0, 1.0, 1.0])]
    after = [torch.tensor(losses) for losses in ([1.0, 1.0], [3.0, 4.0], [1.0, 1.0, 1.0, 1.0])]
    found = compare(before, after, examples, ["a:1", "a:2", "b row 1"], ["one", "two", "three"])
    assert (found["won"], found["lost"], found["tied"]) == (1, 1, 1)
    assert found["better"] == [{"location": "a:1", "opening": "one", "before": 2.0, "after": 1.0}]
    assert [row["location"] for row in found["worse"]] == ["a:2"]
    turns = {group["name"]: (group["difference"], group["tokens"]) for group in found["by_turn"]}
    assert turns == {"turn 1": (-2 / 7, 7), "turn 2": (1.0, 1)}
    sources = {group["name"]: group["difference"] for group in found["by_source"]}
    assert sources == {"a": -1 / 4, "b": 0.0}
    json.dumps(found)


@pytest.fixture
def noisy_dir(tiny_model, tiny_tokenizer, tmp_path):
    """The tiny model with noise on its weights."""
    with torch.no_grad():
        for weights in tiny_model.parameters():
            weights += 0.05 * torch.randn(weights.shape, generator=torch.Generator().manual_seed(1))
    tiny_model.save_pretrained(tmp_path / "noisy")
    tiny_tokenizer.save_pretrained(tmp_path / "noisy")
    return tmp_path / "noisy"


def run(capsys, *arguments):
    """The report of `eval.py --json`, and its warnings."""
    arguments = [*map(str, arguments), "--greedy", "--max-new-tokens", "2", "--json"]
    assert eval_command.main(arguments) == 0
    printed = capsys.readouterr()
    return json.loads(printed.out), printed.err


def test_a_model_is_compared_with_a_noisy_copy_of_it(tiny_model_dir, noisy_dir, chats, capsys):
    report, _ = run(capsys, noisy_dir, "--against", tiny_model_dir, "--dataset", chats, "--text", PLAIN_TEXT)
    found = report["comparison"]["all"]
    assert found["after"] == pytest.approx(report["splits"]["all"]["loss"], rel=1e-12)
    assert found["before"] == pytest.approx(report["against"]["splits"]["all"]["loss"], rel=1e-12)
    assert found["won"] + found["lost"] + found["tied"] == found["conversations"] == 40
    assert found["interval"][0] <= found["difference"] <= found["interval"][1]
    assert found["better"][0]["location"].startswith(f"{chats}:")
    assert "Count to" in found["better"][0]["opening"]
    forgetting = report["forgetting"]
    assert report["text"]["file"] == str(PLAIN_TEXT)
    assert forgetting["after"] == pytest.approx(report["text"]["loss"], rel=1e-6)
    assert forgetting["before"] == pytest.approx(report["against"]["text"]["loss"], rel=1e-6)
    assert forgetting["interval"][0] <= forgetting["difference"] <= forgetting["interval"][1]

    text = format_report(report)
    for part in ("95 % interval [", "got better most", "  answers of /", " | "):
        assert part in text
    assert text.count("  text  loss ") == 2
    answers = [*report["answers"], *report["against"]["answers"]]
    assert text.count(" …") == len(answers) - sum(answer["finished"] for answer in answers) > len(report["answers"])
    assert f"\n  text: {noisy_dir} against {tiny_model_dir}\n    loss " in text


def test_models_that_read_other_tokens_are_not_compared(tiny_model_dir, chats, tmp_path, capsys):
    tokenizer = byte_tokenizer([*CONTROL, "<|other|>"])
    tokenizer.save_pretrained(tmp_path / "other")
    tiny_llama(len(tokenizer)).save_pretrained(tmp_path / "other")
    arguments = [tiny_model_dir, "--against", tmp_path / "other", "--dataset", chats, "--text", PLAIN_TEXT]
    report, warnings = run(capsys, *arguments)
    assert report["comparison"] == {}
    assert "forgetting" not in report
    for name in ("all", "text"):
        assert f"warning: {name}: not compared, as the two models read it differently (tokenizer" in warnings


def test_forgetting_is_compared_over_blocks_of_the_text():
    before = [torch.ones(5 * BLOCK), torch.ones(10)]
    after = [torch.full((5 * BLOCK,), 1.5), torch.full((10,), 1.5)]
    found = compare_texts(before, after)
    assert (found["before"], found["after"], found["difference"]) == (1.0, 1.5, 0.5)
    assert (found["blocks"], found["tokens"]) == (6, 5 * BLOCK + 10)
    assert found["interval"] == [0.5, 0.5]


def test_runs_have_a_mean_and_a_spread(tiny_model_dir, noisy_dir, chats, capsys):
    arguments = [noisy_dir, tiny_model_dir, "--against", tiny_model_dir, "--dataset", chats, "--text", PLAIN_TEXT]
    report, _ = run(capsys, *arguments)
    first, second = report["runs"]
    loss = report["over_runs"]["all loss"]
    assert loss["values"] == [first["splits"]["all"]["loss"], second["splits"]["all"]["loss"]]
    assert loss["mean"] == pytest.approx(sum(loss["values"]) / 2)
    assert loss["std"] == pytest.approx(abs(loss["values"][0] - loss["values"][1]) / 2**0.5)
    assert loss["difference"]["values"] == [first["comparison"]["all"]["difference"], 0.0]
    assert report["over_runs"]["text loss"]["difference"]["values"][0] == first["forgetting"]["difference"]

    text = format_report(report)
    assert f"over 2 runs                 mean      std   difference from {tiny_model_dir}" in text
    assert f"  all loss               {loss['mean']:9.4f} {loss['std']:8.4f}   " in text


def test_a_loss_that_one_run_lacks_has_no_mean():
    one = {"splits": {"test": {"loss": 1.0}, "eval": {"loss": 2.0}}}
    assert mean_over_runs([one, {"splits": {"test": {"loss": 2.0}}}]) == {
        "test loss": {"values": [1.0, 2.0], "mean": 1.5, "std": pytest.approx(0.5**0.5), "difference": None}
    }


def test_columns_are_wrapped():
    assert side_by_side("a b", "c", width=1) == ["  a | c", "  b |"]


def test_a_report_shows_control_characters_instead_of_obeying_them():
    answer = {"prompt": "\x1b[31mHi", "text": "a\x07\tb\nc", "finished": True, "greedy": True}
    report = {"model": "m", "precision": "fp32", "dataset": [], "splits": {}, "answers": [answer], "finished": 1}
    shown = format_report(report)
    assert "> \\x1b[31mHi\n" in shown
    assert "a\\x07\tb\nc" in shown
