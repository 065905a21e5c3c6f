"""A resumed run ends as the uninterrupted one did: metrics, curves, answers, weights, optimizer, to the last bit."""

import importlib
import json
import shutil
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from tests.faults.harness import assert_same, lines, some, steps_saved
from tests.faults.inject import fewer_bits_of_scale, forget, inexact, kill, on_call, pretend, shift_the_order
from tests.mixture import tiny_mixture


def register_mixture():
    """Make a process know the tiny mixture of experts by its name."""
    importlib.import_module("tests.mixture")


@pytest.mark.parametrize("step", some([4, 5, 3, 1, 7, 9], fast=2))
def test_exact_from_any_step(flags, uninterrupted, start_process, tmp_path, step):
    """In the middle of an epoch, between two logged updates (1, 3, 7, 9), before the short last window of an epoch
    (4, 9) and at the end of one (5)."""
    run = tmp_path / "run"
    start_process(
        [*flags, "--output-dir", run, "--save-every", "1"], partial(on_call, "train.train_step", step + 1, kill)
    ).wait()
    assert steps_saved(run)[-1] == step
    process = start_process(["--resume", run])
    assert process.wait() == 0, process.stderr
    assert f"resuming {run} from step-{step}\n" in process.stdout
    assert_same(run, uninterrupted)


@pytest.mark.parametrize("step", some([3, 5], fast=1))
@pytest.mark.parametrize(
    "fault", [shift_the_order, partial(forget, "optimizer")], ids=["order shifted by one", "fresh optimizer"]
)
def test_the_comparison_notices_a_wrong_resume(flags, uninterrupted, start_process, tmp_path, step, fault):
    run = tmp_path / "run"
    start_process(
        [*flags, "--output-dir", run, "--save-every", "1"], partial(on_call, "train.train_step", step + 1, kill)
    ).wait()
    assert start_process(["--resume", run], fault).wait() == 0
    with pytest.raises(AssertionError):
        assert_same(run, uninterrupted)


@pytest.fixture(scope="module")
def dropping_out(tiny_model_dir, tmp_path_factory):
    """The tiny model, with dropout: its training hangs on the random state."""
    directory = tmp_path_factory.mktemp("dropout")
    shutil.copytree(tiny_model_dir, directory, dirs_exist_ok=True)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.2}))
    assert LlamaForCausalLM.from_pretrained(directory).config.attention_dropout == 0.2
    return directory


def test_the_random_state_is_resumed(flags, start_process, dropping_out, tmp_path):
    flags = [*flags, "--model", dropping_out]
    assert start_process([*flags, "--output-dir", tmp_path / "uninterrupted"]).wait() == 0
    for name, faults in (("right", ()), ("wrong", (partial(forget, "random"),))):
        run = tmp_path / name
        start_process([*flags, "--output-dir", run], partial(on_call, "train.train_step", 8, kill)).wait()
        assert start_process(["--resume", run], *faults).wait() == 0
    assert_same(tmp_path / "right", tmp_path / "uninterrupted")
    with pytest.raises(AssertionError):
        assert_same(tmp_path / "wrong", tmp_path / "uninterrupted")


def test_weights_that_no_update_reached_have_no_moments_when_resumed(flags, start_process, tiny_model_dir, tmp_path):
    directory = Path(shutil.copytree(tiny_model_dir, tmp_path / "mixture"))
    tiny_mixture(259).save_pretrained(directory)
    flags = [*flags, "--model", directory]  # a later flag wins
    assert start_process([*flags, "--output-dir", tmp_path / "uninterrupted"], register_mixture).wait() == 0
    run = tmp_path / "run"
    start_process([*flags, "--output-dir", run], register_mixture, partial(on_call, "train.train_step", 8, kill)).wait()
    process = start_process(["--resume", run], register_mixture)
    assert process.wait() == 0, process.stderr
    assert_same(run, tmp_path / "uninterrupted")
    moments = torch.load(run / "checkpoints" / "step-10" / "training.pt", weights_only=True)["optimizer"]
    unreached = dict(tiny_mixture(259).named_parameters()).keys() - moments.keys()
    assert {name.split(".")[3] for name in unreached} == {"unused", "mlp"}
    assert {moment["step"].item() for moment in moments.values()} > {10.0}


def test_shards_that_resume_a_run_have_no_moments_of_what_no_update_reached(
    flags, start_process, start_group, tiny_model_dir, tmp_path
):
    directory, run = Path(shutil.copytree(tiny_model_dir, tmp_path / "model")), tmp_path / "run"
    tiny_mixture(259, separate_experts=0).save_pretrained(directory)
    flags = [*flags, "--model", directory, "--output-dir", run]
    start_process(flags, register_mixture, partial(on_call, "train.train_step", 8, kill)).wait()
    faults = [(rank, register_mixture) for rank in range(2)]
    group = start_group(2, ["--resume", run, "--shard", "2"], *faults)
    assert group.wait(60) == [0, 0], group.stderr
    last = run / "checkpoints" / "step-10"
    moments = torch.load(last / "training.pt", weights_only=True)["optimizer"]
    initial = dict(tiny_mixture(259, separate_experts=0).named_parameters())
    assert {name.rpartition(".")[0] for name in initial.keys() - moments.keys()} == {"model.layers.0.unused"}
    assert {moment["step"].item() for moment in moments.values()} == {10.0}
    name = "model.layers.0.unused.weight"
    assert torch.equal(load_file(last / "model" / "model.safetensors")[name], initial[name])


def test_the_fp16_scale_and_the_overflow_count_are_resumed(flags, start_process, tmp_path):
    flags, overflow = [*flags, "--dtype", "fp16"], partial(fewer_bits_of_scale, 24)
    assert start_process([*flags, "--output-dir", tmp_path / "uninterrupted"], overflow).wait() == 0
    run = tmp_path / "run"
    start_process([*flags, "--output-dir", run], overflow, partial(on_call, "running.checkpoint.save", 3, kill)).wait()
    assert start_process(["--resume", run], overflow).wait() == 0
    assert_same(run, tmp_path / "uninterrupted")
    assert lines(run, "train")[-1]["overflows"] > 0


@pytest.mark.parametrize("flag", [["--micro-batch-tokens", "1"], ["--layout", "padded"], ["--gradient-checkpointing"]])
def test_another_layout_or_budget_is_equal_within_rounding(interrupted, uninterrupted, start_process, flag):
    assert start_process(["--resume", interrupted, *flag]).wait() == 0
    for ours, theirs in zip(lines(interrupted, "train"), lines(uninterrupted, "train"), strict=True):
        assert ours.pop("kind") == theirs.pop("kind") == "train"
        assert ours == pytest.approx(theirs, rel=1e-5)
    weights = [load_model_weights(run / "best") for run in (interrupted, uninterrupted)]
    apart = torch.cat([(ours - theirs).abs().flatten() for ours, theirs in zip(*weights, strict=True)])
    assert apart.mean() < 1e-8  # one weight may be a learning rate apart: AdamW makes full steps of rounding errors


def load_model_weights(directory):
    return [weights.detach() for weights in LlamaForCausalLM.from_pretrained(directory).parameters()]


def test_a_moved_run_resumes(interrupted, uninterrupted, start_process, tmp_path):
    elsewhere = tmp_path / "other" / "place"
    elsewhere.parent.mkdir()
    shutil.move(interrupted, elsewhere)
    assert start_process(["--resume", elsewhere]).wait() == 0
    assert_same(elsewhere, uninterrupted)


def test_killed_before_its_first_checkpoint_it_begins_again(flags, uninterrupted, start_process, tmp_path):
    run = tmp_path / "run"
    start_process([*flags, "--output-dir", run], partial(on_call, "train.train_step", 3, kill)).wait()
    assert lines(run, "train")
    process = start_process(["--resume", run])
    assert process.wait() == 0, process.stderr
    assert f"resuming {run} from its beginning: it has no checkpoint\n" in process.stdout
    assert_same(run, uninterrupted)


def set_clock_back(days):
    """A machine's clock is wrong after a reboot."""
    real = time.time
    time.time = lambda: real() - days * 86_400


def test_a_clock_that_was_set_back(interrupted, uninterrupted, start_process):
    """TensorBoard reads its files in the order of the seconds in their names."""
    start_process(["--resume", interrupted], partial(set_clock_back, 9), partial(on_call, "train.fit", 1, kill)).wait()
    assert start_process(["--resume", interrupted], partial(set_clock_back, 99)).wait() == 0
    assert_same(interrupted, uninterrupted)


def test_a_run_without_an_evaluation_ends_without_its_base_model(flags, start_process, tiny_model_dir, tmp_path):
    """The card of its last checkpoint, which has the license of the base model, stays as it was written."""
    base, run = Path(shutil.copytree(tiny_model_dir, tmp_path / "base")), tmp_path / "run"
    (base / "README.md").write_text("---\nlicense: mit\n---\n")
    flags = [*flags, "--model", base, "--eval-fraction", "0", "--output-dir", run]
    start_process(flags, partial(on_call, "train.evaluate_best", 1, kill)).wait()
    shutil.rmtree(base)
    process = start_process(["--resume", run])
    assert process.wait() == 0, process.stderr
    assert "license: mit" in (run / "best" / "README.md").read_text()


def test_killed_again_before_anything_new_was_saved(interrupted, uninterrupted, start_process):
    for _ in range(3):
        start_process(["--resume", interrupted], partial(on_call, "train.train_step", 2, kill)).wait()
    assert start_process(["--resume", interrupted]).wait() == 0
    assert_same(interrupted, uninterrupted)


INTERRUPTIONS = [
    ("running.validation.evaluate", 2),
    ("running.metrics.Log.save_answers", 2),
    ("running.report.page", 1),
    ("running.validation.evaluate", 3),
    ("eval.generate_answers", 2),
]


@pytest.mark.parametrize(("function", "call"), some(INTERRUPTIONS, fast=3))
def test_killed_in_an_evaluation_or_an_answer(interrupted, uninterrupted, start_process, function, call):
    """At the eval split after update 10, writing answers or page, the test split at the end, the second answer."""
    process = start_process(["--resume", interrupted], partial(on_call, function, call, kill))
    assert process.wait() == 128 + 9
    assert start_process(["--resume", interrupted]).wait() == 0
    assert_same(interrupted, uninterrupted)


def test_a_truncated_last_line_of_the_log(interrupted, uninterrupted, start_process):
    with open(interrupted / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "kind": "tr')
    assert start_process(["--resume", interrupted]).wait() == 0
    assert_same(interrupted, uninterrupted)


def test_lines_missing_from_the_log(interrupted, uninterrupted, start_process):
    (interrupted / "metrics.jsonl").unlink()
    process = start_process(["--resume", interrupted])
    assert process.wait() == 0, process.stderr
    assert "metrics.jsonl was changed: its first 6 lines are not what was logged" in process.stderr
    assert lines(interrupted) == lines(uninterrupted)[6:]


def test_a_damaged_line_in_the_log(interrupted, start_process):
    log = (interrupted / "metrics.jsonl").read_text().splitlines()
    log[2] = log[2][:-9]
    (interrupted / "metrics.jsonl").write_text("\n".join(log) + "\n")
    process = start_process(["--resume", interrupted])
    assert process.wait() == 1
    assert process.stderr == (
        f"error: {interrupted}/metrics.jsonl:3: damaged; delete that line to continue without it\n"
    )


def test_a_finished_run_says_so(uninterrupted, start_process):
    before = {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*")}
    process = start_process(["--resume", uninterrupted])
    assert process.wait() == 0, process.stderr
    assert process.stdout.startswith(f"{uninterrupted} is finished already\n")
    assert {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*")} == before


def test_another_precision_on_another_machine_is_a_change(flags, start_process, tmp_path):
    """`--dtype auto` is bf16 where the processor has it and fp32 elsewhere."""
    run, native = tmp_path / "run", partial(pretend, "torch.cpu.get_capabilities", {"avx512_bf16": True})
    flags = [*flags, "--dtype", "auto", "--output-dir", run]
    start_process(flags, native, partial(on_call, "train.train_step", 5, kill)).wait()
    process = start_process(["--resume", run], partial(pretend, "torch.cpu.get_capabilities", {"avx512_bf16": False}))
    assert process.wait() == 1
    assert process.stderr.splitlines()[1].strip() == "forward pass in bf16 -> fp32 (--dtype bf16 keeps it)"
    assert start_process(["--resume", run, "--dtype", "bf16"]).wait() == 0


# Packed, and packed with the model's own logits.
NO_PACKING = [partial(on_call, "compute.self_check.check_attention", call, inexact) for call in (1, 2)]


def test_the_layout_that_was_found_is_taken_again(flags, start_process, tmp_path):
    """A check that comes out otherwise when a run is resumed would pack it, and its numbers would round otherwise."""
    runs = tmp_path / "uninterrupted", tmp_path / "run"
    assert start_process([*flags, "--output-dir", runs[0]], *NO_PACKING).wait() == 0
    start_process([*flags, "--output-dir", runs[1]], *NO_PACKING, partial(on_call, "train.train_step", 8, kill)).wait()
    process = start_process(["--resume", runs[1]])
    assert process.wait() == 0, process.stderr
    assert "padded: conversations in rows, 200 tokens at a time (not packed: as a test wants it)" in process.stdout
    assert_same(runs[1], runs[0])
    layouts = [json.loads((run / "config.json").read_text())["layout"] for run in runs]
    assert layouts == [{"packed": False, "own_logits": False, "masked": False, "why": "as a test wants it"}] * 2


def test_a_layout_that_is_no_longer_exact_is_an_error(interrupted, uninterrupted, start_process):
    process = start_process(["--resume", interrupted], *NO_PACKING)
    assert process.wait() == 1
    (line,) = process.stderr.splitlines()
    assert line.startswith("error: --resume: the run's layout is no longer exact for ")
    assert line.endswith(", as a test wants it; change --layout")
    process = start_process(["--resume", interrupted, "--layout", "padded"])
    assert process.wait() == 0, process.stderr
    losses = [[line["loss"] for line in lines(run, "train")] for run in (interrupted, uninterrupted)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
