"""A resumed run ends as the unbroken one did: metrics, curves, answers, weights, optimizer, to the last bit."""

import json
import shutil
from functools import partial

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.faults.harness import assert_same, lines, some, steps_saved
from tests.faults.inject import fewer_bits_of_scale, forget, kill, on_call, pretend, shift_the_order


@pytest.mark.parametrize("step", some([3, 4, 5, 1, 7, 9], fast=3))
def test_exact_from_any_step(flags, unbroken, live, tmp_path, step):
    """In the middle of an epoch, between two logged updates (1, 3, 7, 9), before the short last window of an epoch
    (4, 9) and at the end of one (5)."""
    run = tmp_path / "run"
    live(
        [*flags, "--output-dir", run, "--save-every", "1"], partial(on_call, "train.train_step", step + 1, kill)
    ).wait()
    assert steps_saved(run)[-1] == step
    life = live(["--resume", run])
    assert life.wait() == 0, life.complained
    assert f"resuming {run} from step-{step}\n" in life.said
    assert_same(run, unbroken)


@pytest.mark.parametrize("step", some([3, 5], fast=1))
@pytest.mark.parametrize(
    "fault", [shift_the_order, partial(forget, "optimizer")], ids=["order shifted by one", "fresh optimizer"]
)
def test_the_comparison_notices_a_wrong_resume(flags, unbroken, live, tmp_path, step, fault):
    run = tmp_path / "run"
    live(
        [*flags, "--output-dir", run, "--save-every", "1"], partial(on_call, "train.train_step", step + 1, kill)
    ).wait()
    assert live(["--resume", run], fault).wait() == 0
    with pytest.raises(AssertionError):
        assert_same(run, unbroken)


@pytest.fixture(scope="module")
def dropping_out(tiny_model_dir, tmp_path_factory):
    """The tiny model, with dropout: its training hangs on the random state."""
    directory = tmp_path_factory.mktemp("dropout")
    shutil.copytree(tiny_model_dir, directory, dirs_exist_ok=True)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.2}))
    assert LlamaForCausalLM.from_pretrained(directory).config.attention_dropout == 0.2
    return directory


def test_the_random_state_is_resumed(flags, live, dropping_out, tmp_path):
    flags = [*flags, "--model", dropping_out]
    assert live([*flags, "--output-dir", tmp_path / "unbroken"]).wait() == 0
    for name, faults in (("right", ()), ("wrong", (partial(forget, "random"),))):
        run = tmp_path / name
        live([*flags, "--output-dir", run], partial(on_call, "train.train_step", 8, kill)).wait()
        assert live(["--resume", run], *faults).wait() == 0
    assert_same(tmp_path / "right", tmp_path / "unbroken")
    with pytest.raises(AssertionError):
        assert_same(tmp_path / "wrong", tmp_path / "unbroken")


def test_the_fp16_scale_and_the_overflow_count_are_resumed(flags, live, tmp_path):
    flags, overflow = [*flags, "--dtype", "fp16"], partial(fewer_bits_of_scale, 24)
    assert live([*flags, "--output-dir", tmp_path / "unbroken"], overflow).wait() == 0
    run = tmp_path / "run"
    live([*flags, "--output-dir", run], overflow, partial(on_call, "running.checkpoint.save", 3, kill)).wait()
    assert live(["--resume", run], overflow).wait() == 0
    assert_same(run, tmp_path / "unbroken")
    assert lines(run, "train")[-1]["overflows"] > 0


@pytest.mark.parametrize("flag", [["--micro-batch-tokens", "1"], ["--layout", "padded"], ["--gradient-checkpointing"]])
def test_another_layout_or_budget_is_equal_within_rounding(interrupted, unbroken, live, flag):
    assert live(["--resume", interrupted, *flag]).wait() == 0
    for ours, theirs in zip(lines(interrupted, "train"), lines(unbroken, "train"), strict=True):
        assert ours.pop("kind") == theirs.pop("kind") == "train"
        assert ours == pytest.approx(theirs, rel=1e-5)
    weights = [load_model_weights(run / "best") for run in (interrupted, unbroken)]
    apart = torch.cat([(ours - theirs).abs().flatten() for ours, theirs in zip(*weights, strict=True)])
    assert apart.mean() < 1e-8  # one weight may be a learning rate apart: AdamW makes full steps of rounding errors


def load_model_weights(directory):
    return [weights.detach() for weights in LlamaForCausalLM.from_pretrained(directory).parameters()]


def test_a_moved_run_resumes(interrupted, unbroken, live, tmp_path):
    elsewhere = tmp_path / "other" / "place"
    elsewhere.parent.mkdir()
    shutil.move(interrupted, elsewhere)
    assert live(["--resume", elsewhere]).wait() == 0
    assert_same(elsewhere, unbroken)


def test_killed_before_its_first_checkpoint_it_begins_again(flags, unbroken, live, tmp_path):
    run = tmp_path / "run"
    live([*flags, "--output-dir", run], partial(on_call, "train.train_step", 3, kill)).wait()
    assert lines(run, "train")
    life = live(["--resume", run])
    assert life.wait() == 0, life.complained
    assert f"resuming {run} from its beginning: it has no checkpoint\n" in life.said
    assert_same(run, unbroken)


def test_killed_again_before_anything_new_was_saved(interrupted, unbroken, live):
    for _ in range(3):
        live(["--resume", interrupted], partial(on_call, "train.train_step", 2, kill)).wait()
    assert live(["--resume", interrupted]).wait() == 0
    assert_same(interrupted, unbroken)


INTERRUPTIONS = [
    ("running.validation.evaluate", 2),
    ("storage.records.write_answers", 2),
    ("running.validation.evaluate", 3),
    ("eval.generate_answers", 2),
]


@pytest.mark.parametrize(("function", "call"), some(INTERRUPTIONS, fast=2))
def test_killed_in_an_evaluation_or_an_answer(interrupted, unbroken, live, function, call):
    """At the eval split after update 10, writing the answers, the test split at the end, the second answer."""
    life = live(["--resume", interrupted], partial(on_call, function, call, kill))
    assert life.wait() == 128 + 9
    assert live(["--resume", interrupted]).wait() == 0
    assert_same(interrupted, unbroken)


def test_a_truncated_last_line_of_the_log(interrupted, unbroken, live):
    with open(interrupted / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "kind": "tr')
    assert live(["--resume", interrupted]).wait() == 0
    assert_same(interrupted, unbroken)


def test_lines_missing_from_the_log(interrupted, unbroken, live):
    (interrupted / "metrics.jsonl").unlink()
    life = live(["--resume", interrupted])
    assert life.wait() == 0, life.complained
    assert "metrics.jsonl was changed: its first 6 lines are not what was logged" in life.complained
    assert lines(interrupted) == lines(unbroken)[6:]


def test_a_damaged_line_in_the_log(interrupted, live):
    log = (interrupted / "metrics.jsonl").read_text().splitlines()
    log[2] = log[2][:-9]
    (interrupted / "metrics.jsonl").write_text("\n".join(log) + "\n")
    life = live(["--resume", interrupted])
    assert life.wait() == 1
    assert life.complained == (
        f"error: {interrupted}/metrics.jsonl:3: damaged; delete that line to continue without it\n"
    )


def test_a_finished_run_says_so(unbroken, live):
    before = {path: path.stat().st_mtime_ns for path in unbroken.rglob("*")}
    life = live(["--resume", unbroken])
    assert life.wait() == 0, life.complained
    assert life.said.startswith(f"{unbroken} is finished already\n")
    assert {path: path.stat().st_mtime_ns for path in unbroken.rglob("*")} == before


def test_another_precision_on_another_machine_is_a_change(flags, live, tmp_path):
    """`--dtype auto` is bf16 where the processor has it and fp32 elsewhere."""
    run, native = tmp_path / "run", partial(pretend, "torch.cpu.get_capabilities", {"avx512_bf16": True})
    flags = [*flags, "--dtype", "auto", "--output-dir", run]
    live(flags, native, partial(on_call, "train.train_step", 5, kill)).wait()
    life = live(["--resume", run], partial(pretend, "torch.cpu.get_capabilities", {"avx512_bf16": False}))
    assert life.wait() == 1
    assert life.complained.splitlines()[1].strip() == "forward pass in bf16 -> fp32 (--dtype)"
    assert live(["--resume", run], native).wait() == 0
