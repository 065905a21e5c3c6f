"""One update, and what decides it: the window, never the way it is cut."""

import copy
import math

import pytest
import torch
from transformers import (
    TrainingArguments,
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup,
    get_linear_schedule_with_warmup,
    get_polynomial_decay_schedule_with_warmup,
    get_wsd_schedule,
)

from compute.layers import checkpoint_activations
from compute.self_check import use_layout
from config import count_updates
from conversations.masking import Example
from model import Precision
from tests.conftest import layout_of, one_batch, tiny_llama
from train import learning_rate, make_optimizer, train_step

CPU = torch.device("cpu")
BUDGETS = (1, 30, 64, 130, 200, 10_000)


def update(model, window, budget, precision="fp32", steps=3, max_grad_norm=1.0, packed=False):
    """The numbers of a few updates over one window, and the weights after them."""
    precision = Precision(precision, CPU)
    model, scaler = copy.deepcopy(model), precision.grad_scaler()
    optimizer = make_optimizer(model, weight_decay=0.1)
    use_layout(model, layout_of(packed))
    window = list(layout_of(packed, budget).micro_batches(window))
    settings = {"precision": precision, "scaler": scaler, "max_grad_norm": max_grad_norm}
    logged = [train_step(model, optimizer, window, 2e-4, **settings) for _ in range(steps)]
    return logged, torch.cat([weights.detach().flatten() for weights in model.parameters()])


# --- the law: any cut of a window gives the same update


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_any_cut_of_a_window_in_any_layout_gives_the_same_update(ragged_window, budget, packed, dtype, tolerance):
    model = tiny_llama(259).to(dtype)
    whole, whole_weights = update(model, ragged_window, budget=len(ragged_window) * 64)
    logged, weights = update(model, ragged_window, budget, packed=packed)
    if dtype == torch.float64:  # in fp32 AdamW makes a full step of a gradient that is a rounding error
        assert (weights - whole_weights).abs().max() <= tolerance
    for ours, theirs in zip(logged, whole, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=tolerance)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=tolerance)


def test_the_cuts_above_run_from_single_conversations_to_the_whole_window(ragged_window):
    cuts = {
        packed: [len(layout_of(packed, budget).plan_micro_batches(ragged_window)) for budget in BUDGETS]
        for packed in (False, True)
    }
    assert cuts == {False: [8, 6, 4, 3, 2, 1], True: [8, 5, 3, 2, 1, 1]}


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_the_gradient_is_that_of_the_mean_over_the_windows_tokens(ragged_window, packed):
    model = tiny_llama(259).double()
    loss_sum, tokens = 0.0, 0
    for ids, labels in ragged_window:  # one at a time, by the model's own forward pass
        logits = model(ids[None]).logits[0, :-1]
        loss_sum += torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum")
        tokens += (labels[1:] != -100).sum().item()
    loss = loss_sum / tokens
    loss.backward()
    norm = torch.nn.utils.get_total_norm([weights.grad for weights in model.parameters()])
    model.zero_grad()
    logged, _ = update(model, ragged_window, budget=30, steps=1, packed=packed)
    assert logged[0]["loss"] == pytest.approx(loss.item(), rel=1e-12)
    assert logged[0]["grad_norm"] == pytest.approx(norm.item(), rel=1e-12)
    assert logged[0]["tokens"] == sum(len(example.input_ids) for example in ragged_window)
    assert logged[0]["supervised_tokens"] == tokens


def test_a_conversation_with_nothing_supervised_changes_nothing(ragged_window):
    model = tiny_llama(259).double()
    without = [example for example in ragged_window if example.supervised_tokens]
    assert len(without) == len(ragged_window) - 1
    assert torch.equal(update(model, ragged_window, budget=1)[1], update(model, without, budget=1)[1])


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_gradient_checkpointing_changes_nothing(ragged_window, packed):
    model = tiny_llama(259).double().train()
    _, expected = update(model, ragged_window, budget=100)
    checkpoint_activations(model)
    _, weights = update(model, ragged_window, budget=100, packed=packed)
    assert (weights - expected).abs().max() <= 1e-12


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.02), ("fp16", 0.005)])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_16_bit_losses_are_near_the_exact_one(ragged_window, precision, tolerance, packed):
    exact, _ = update(tiny_llama(259), ragged_window, budget=100)
    logged, _ = update(tiny_llama(259), ragged_window, budget=100, precision=precision, packed=packed)
    assert [step["loss"] for step in logged] == pytest.approx([step["loss"] for step in exact], rel=tolerance)


# --- clipping, decay, schedule


SCHEDULES = {  # by transformers, of an optimizer, updates of warm-up, updates in all, and of the decay of wsd
    "cosine": lambda opt, warmup, total, _decay: get_cosine_schedule_with_warmup(opt, warmup, total),
    "linear": lambda opt, warmup, total, _decay: get_linear_schedule_with_warmup(opt, warmup, total),
    "constant": lambda opt, warmup, _total, _decay: get_constant_schedule_with_warmup(opt, warmup),
    "wsd": lambda opt, warmup, total, decay: get_wsd_schedule(opt, warmup, decay, num_training_steps=total),
}
WITH_MIN_LR = {
    "cosine": lambda opt, warmup, total, _decay: get_cosine_with_min_lr_schedule_with_warmup(
        opt, warmup, total, min_lr_rate=0.1
    ),
    "linear": lambda opt, warmup, total, _decay: get_polynomial_decay_schedule_with_warmup(
        opt, warmup, total, lr_end=2e-5
    ),
    "wsd": lambda opt, warmup, total, decay: get_wsd_schedule(
        opt, warmup, decay, num_training_steps=total, min_lr_ratio=0.1
    ),
}


def rates_of(make_scheduler, warmup, total, decay):
    """The learning rates of a transformers' scheduler, update by update."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2e-4)
    scheduler = make_scheduler(optimizer, warmup, total, decay)
    for _ in range(total):
        yield scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(("warmup", "total"), [(0, 10), (5, 54), (12, 114), (5, 3), (1, 1)])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_schedules_are_those_of_transformers(schedule, warmup, total):
    if schedule == "wsd" and warmup + 1 > total:
        pytest.skip("transformers' has no room for a decay")
    expected = list(rates_of(SCHEDULES[schedule], warmup, total, math.ceil(0.1 * total)))
    found = [
        learning_rate(step, 2e-4, warmup, total, schedule, decay_steps=math.ceil(0.1 * total)) for step in range(total)
    ]
    assert found == expected


@pytest.mark.parametrize("schedule", WITH_MIN_LR)
def test_the_schedules_end_above_zero_as_those_of_transformers(schedule):
    expected = list(rates_of(WITH_MIN_LR[schedule], 5, 54, 11))
    found = [learning_rate(step, 2e-4, 5, 54, schedule, min_lr=0.1, decay_steps=11) for step in range(54)]
    assert found == pytest.approx(expected, rel=1e-15 if schedule != "linear" else 1e-12)


def test_a_warm_up_below_one_is_the_share_of_the_updates_that_trainer_takes(tmp_path):
    for total in (1, 7, 100, 1234):
        for share in (0.03, 0.07, 0.1, 0.5):
            arguments = TrainingArguments(str(tmp_path), warmup_steps=share)
            assert count_updates(share, total) == arguments.get_warmup_steps(total)


# --- numbers gone bad


@pytest.mark.parametrize("fused", [True, False])  # on the device, and for an optimizer that cannot tell there
def test_a_loss_that_is_not_finite_stops_before_the_weights_change(ragged_window, fused):
    model = tiny_llama(259)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = math.nan
    before = copy.deepcopy(model.state_dict())
    optimizer = make_optimizer(model, 0.1) if fused else torch.optim.SGD(model.parameters(), momentum=0.9)
    precision = Precision("fp32", CPU)
    settings = {"scaler": precision.grad_scaler(), "max_grad_norm": 1.0}
    with pytest.raises(FloatingPointError, match="not finite, so the update was not applied"):
        train_step(model, optimizer, [one_batch(ragged_window)], 1e-3, precision=precision, **settings)
    for name, weights in model.state_dict().items():
        torch.testing.assert_close(weights, before[name], rtol=0, atol=0, equal_nan=True)
    assert not any(value.any() for moments in optimizer.state.values() for value in moments.values())


def test_an_fp16_overflow_is_left_out_and_tried_again_at_a_lower_scale(ragged_window):
    model, precision = tiny_llama(259), Precision("fp16", CPU)
    before = copy.deepcopy(model.state_dict())
    optimizer = make_optimizer(model, 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    settings = {"precision": precision, "scaler": scaler, "max_grad_norm": 1.0}
    assert train_step(model, optimizer, [one_batch(ragged_window)], 1e-3, **settings) is None
    assert scaler.get_scale() == 2.0**39
    assert all(torch.equal(weights, before[name]) for name, weights in model.state_dict().items())
    for _ in range(40):
        logged = train_step(model, optimizer, [one_batch(ragged_window)], 1e-3, **settings)
        if logged:
            break
    assert math.isfinite(logged["grad_norm"])
    assert not all(torch.equal(weights, before[name]) for name, weights in model.state_dict().items())


def test_a_short_window_is_normalised_by_its_own_tokens():
    row = Example(torch.arange(3, 23), torch.arange(3, 23))
    model = tiny_llama(259).double()
    one, two = (update(model, [row] * copies, budget=1000, steps=1) for copies in (1, 2))
    assert one[0][0]["loss"] == pytest.approx(two[0][0]["loss"], rel=1e-14)
    assert (one[1] - two[1]).abs().max() <= 1e-12
