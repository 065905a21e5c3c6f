"""Numbers that are not finite stop a run before they are applied, and their conversations are named."""

import json
import math
import re
import shutil
from functools import partial

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.faults.harness import assert_same, lines, on_dataset, steps_saved
from tests.faults.inject import corrupt_gradient, corrupt_weights, fewer_bits_of_scale, on_call


@pytest.mark.parametrize(
    ("fault", "numbers"),
    [
        (partial(corrupt_weights, math.nan), "loss nan, gradient norm nan"),
        (partial(corrupt_weights, math.inf), "loss nan, gradient norm nan"),
        (corrupt_gradient, r"loss \d\.\d+, gradient norm (nan|inf)"),
    ],
    ids=["a weight that is no number", "an infinite weight", "an infinite gradient of a finite loss"],
)
def test_an_update_that_is_not_finite(flags, uninterrupted, start_process, conversations, tmp_path, fault, numbers):
    run = tmp_path / "run"
    process = start_process([*flags, "--output-dir", run], partial(on_call, "train.train_step", 8, fault))
    assert process.wait() == 1
    first, *window = process.stderr.splitlines()
    assert re.fullmatch(
        rf"error: update 8: {numbers}: not finite, so the update was not applied; "
        rf"--resume {run} continues after update 6; its conversations:",
        first,
    )
    assert len(window) == 7
    loss = "nan" if "loss nan" in numbers else r"\d\.\d{4}"
    assert all(re.fullmatch(rf"  loss {loss} {re.escape(str(conversations))}:\d+", line) for line in window)
    assert steps_saved(run) == [4, 6]
    assert [line["step"] for line in lines(run, "train")] == [2, 4, 6]
    assert start_process(["--resume", run]).wait() == 0
    assert_same(run, uninterrupted)


def test_of_a_large_window_the_worst_are_named(flags, start_process, tmp_path):
    fault = partial(on_call, "train.train_step", 1, corrupt_gradient)
    process = start_process([*flags, "--output-dir", tmp_path / "run", "--batch-size", "20"], fault)
    assert process.wait() == 1
    *_, tenth, rest = process.stderr.splitlines()
    highest = float(tenth.split()[1])
    assert float(re.fullmatch(r"  and 10 more, with losses up to (\d\.\d{4})", rest).group(1)) <= highest


def test_an_evaluation_that_is_not_finite(flags, start_process, conversations, tmp_path):
    run = tmp_path / "run"
    fault = partial(on_call, "running.validation.explain_failure", 4, partial(corrupt_weights, math.nan))
    process = start_process([*flags, "--output-dir", run], fault)  # the evaluation after update 8
    assert process.wait() == 1
    first, *worst = process.stderr.splitlines()
    assert first == f"error: after update 8: eval loss nan; --resume {run} continues after update 6; its conversations:"
    assert all(re.fullmatch(rf"  loss nan {re.escape(str(conversations))}:\d+", line) for line in worst)
    assert len(worst) == 8
    assert steps_saved(run) == [4, 6]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_refused(flags, start_process, tiny_model_dir, tmp_path, value):
    directory = shutil.copytree(tiny_model_dir, tmp_path / "corrupt")
    model = LlamaForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 4] = value
    model.save_pretrained(directory)
    process = start_process([*flags, "--model", directory, "--output-dir", tmp_path / "run"])
    assert process.wait() == 1
    assert process.stderr == (
        f"error: --model {directory}: weight model.layers.1.mlp.down_proj.weight contains NaN or Inf\n"
    )
    assert not (tmp_path / "run").exists()


def test_an_fp16_overflow_moves_neither_the_step_nor_the_schedule(flags, start_process, tmp_path):
    flags = [*flags, "--dtype", "fp16", "--log-every", "1"]
    for name, bits in (("plain", 8), ("overflowing", 24)):
        assert start_process([*flags, "--output-dir", tmp_path / name], partial(fewer_bits_of_scale, bits)).wait() == 0
    plain, overflowing = (lines(tmp_path / name, "train") for name in ("plain", "overflowing"))
    assert overflowing[0]["overflows"] > 1
    assert [line["overflows"] for line in overflowing] == sorted(line["overflows"] for line in overflowing)
    for name in ("step", "lr", "tokens", "epoch"):
        assert [line[name] for line in overflowing] == [line[name] for line in plain]
    assert overflowing[-1]["loss"] == pytest.approx(plain[-1]["loss"], rel=0.01)


def test_conversations_with_nothing_supervised_are_left_out_and_counted(flags, start_process, tmp_path):
    """So no window is ever without a supervised token: here, three windows' worth of them in a row."""
    data = tmp_path / "chats.jsonl"
    with open(data, "w") as file:
        for number in range(60):
            question = f"Say {number}" + "!" * (100 if 10 <= number < 31 else 0)
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": f"{number}"}]
            file.write(json.dumps({"messages": messages}) + "\n")
    process = start_process([*on_dataset(flags, data), "--output-dir", tmp_path / "run", "--max-length", "60"])
    assert process.wait() == 0, process.stderr
    assert "21 dropped: nothing supervised" in process.stdout
    assert all(line["supervised_tokens"] for line in lines(tmp_path / "run", "train"))
