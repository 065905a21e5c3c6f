"""Runs that train adapters: killed, resumed, with another base model, by several processes, on a full disk."""

import json
import re
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

import eval as eval_command
from config import UserError
from tests.conftest import byte_tokenizer, tiny_llama
from tests.faults.harness import TrainProcess, assert_same, lines, some, steps_saved
from tests.faults.inject import full_disk, kill, on_call

ADAPTERS = ["--lora-rank", "4", "--lora-alpha", "8"]


@pytest.fixture(scope="module")
def adapted(flags):
    return [*flags, *ADAPTERS]


@pytest.fixture(scope="module")
def base(tiny_model_dir, tmp_path_factory):
    """A copy of the tiny model, to be damaged."""
    return Path(shutil.copytree(tiny_model_dir, tmp_path_factory.mktemp("base") / "model"))


@pytest.fixture(scope="module")
def uninterrupted_adapters(adapted, tmp_path_factory):
    run = tmp_path_factory.mktemp("adapters") / "run"
    process = TrainProcess([*adapted, "--output-dir", run, "--save-every", "1", "--keep", "100"], run.parent)
    assert process.wait() == 0, process.stderr
    return run


@pytest.mark.parametrize(("step", "flag"), some([(5, ()), (3, ()), (9, ("--gradient-checkpointing",))], fast=1))
def test_a_killed_run_resumes_to_the_last_bit(adapted, uninterrupted_adapters, start_process, tmp_path, step, flag):
    run, expected = tmp_path / "run", uninterrupted_adapters
    if flag:
        expected = tmp_path / "expected"
        assert start_process([*adapted, *flag, "--output-dir", expected, "--save-every", "1"]).wait() == 0
    arguments = [*adapted, *flag, "--output-dir", run, "--save-every", "1"]
    start_process(arguments, partial(on_call, "train.train_step", step + 1, kill)).wait()
    assert steps_saved(run)[-1] == step
    process = start_process(["--resume", run])
    assert process.wait() == 0, process.stderr
    assert_same(run, expected)


def test_checkpoints_hold_adapters_and_their_moments_alone(uninterrupted_adapters):
    checkpoint = uninterrupted_adapters / "checkpoints" / "step-10"
    names = {path.name for path in (checkpoint / "model").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "base_model.json", "tokenizer.json"} <= names
    assert not {"config.json", "model.safetensors"} & names
    weights = (checkpoint / "model" / "adapter_model.safetensors").stat().st_size
    assert (checkpoint / "training.pt").stat().st_size < 4 * weights + 50_000  # AdamW's moments twice, and names


@pytest.mark.parametrize("count", [1, 2], ids=["whole", "sharded"])
def test_two_processes_train_the_same_adapters_and_resume(
    adapted, uninterrupted_adapters, start_group, tmp_path, count
):
    run = tmp_path / "run"
    flags = [*adapted, "--output-dir", run, "--shard", count]
    group = start_group(2, flags, (0, partial(on_call, "train.train_step", 8, kill)))
    assert group.wait()[0] == 128 + signal.SIGKILL
    assert steps_saved(run) == [4, 6]
    group = start_group(2, ["--resume", run])
    assert group.wait(60) == [0, 0], group.stderr
    for ours, theirs in zip(lines(run, "train"), lines(uninterrupted_adapters, "train"), strict=True):
        for name in ("loss", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4)


def change(base, what):
    """Change a base model or remove it; returns what the error says."""
    if what == "changed":
        weights = base / "model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
        return f"its base model {base} has changed, model.safetensors is not what the adapters were trained on"
    shutil.rmtree(base)
    return f"its base model {base} is missing; put it there again"


@pytest.mark.parametrize("what", ["changed", "missing"])
def test_another_base_model_is_one_line_and_nothing_is_lost(flags, base, start_process, tmp_path, what):
    model, run = Path(shutil.copytree(base, tmp_path / "model")), tmp_path / "run"
    arguments = [*flags, "--model", model, *ADAPTERS, "--output-dir", run]
    start_process(arguments, partial(on_call, "train.train_step", 8, kill)).wait()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".owner"}
    message = change(model, what)
    process = start_process(["--resume", run])
    assert process.wait() == 1
    assert process.stderr.count("\n") == 1
    assert message in process.stderr
    assert {path: path.read_bytes() for path in before} == before
    with pytest.raises(UserError, match=re.escape(message)):
        run_eval(run)
    shutil.rmtree(model, ignore_errors=True)
    shutil.copytree(base, model)
    process = start_process(["--resume", run])
    assert process.wait() == 0, process.stderr


def run_eval(*argv):
    """The status of `python eval.py`; `UserError`s are raised."""
    return eval_command.main(list(map(str, argv)))


def test_a_base_model_that_changed_before_the_first_checkpoint_is_one_line(flags, base, start_process, tmp_path):
    model, run = Path(shutil.copytree(base, tmp_path / "model")), tmp_path / "run"
    arguments = [*flags, "--model", model, *ADAPTERS, "--output-dir", run]
    start_process(arguments, partial(on_call, "train.train_step", 2, kill)).wait()
    assert steps_saved(run) == []
    change(model, "changed")
    process = start_process(["--resume", run])
    assert process.wait() == 1
    assert (
        f"--resume {run}: its base model {model} has changed since (model.safetensors); put that back" in process.stderr
    )


@pytest.mark.parametrize("flag", [("--lora-rank", "8"), ("--lora-alpha", "16"), ("--lora-rank", "0")])
def test_adapters_cannot_change_on_resuming(adapted, start_process, tmp_path, flag):
    run = tmp_path / "run"
    start_process([*adapted, "--output-dir", run], partial(on_call, "train.train_step", 8, kill)).wait()
    process = start_process(["--resume", run, "--allow-changes", *flag])
    assert process.wait() == 1
    assert process.stderr.count("\n") == 1


def test_a_full_disk_leaves_the_checkpoint_before(adapted, start_process, tmp_path):
    run = tmp_path / "run"
    process = start_process([*adapted, "--output-dir", run], partial(on_call, "model.save_file", 2, full_disk))
    assert process.wait() == 1
    assert process.stderr.count("\n") == 1
    assert steps_saved(run) != []
    assert start_process(["--resume", run]).wait() == 0


def test_merging_writes_an_ordinary_model_once_and_judges_it(uninterrupted_adapters, tmp_path, capsys):
    for stored, flags in (("fp32", ["--dtype", "fp32"]), ("bf16", [])):
        target = tmp_path / stored
        assert run_eval(uninterrupted_adapters, "--export", target, *flags) == 0
        out = capsys.readouterr().out.splitlines()[0]
        as_trained, read_back, merged = (
            float(word) for word in out.split() if word.count(".") == 1 and word[0].isdigit()
        )
        assert as_trained == read_back == lines_of_best(uninterrupted_adapters)
        assert merged == pytest.approx(as_trained, abs=2e-4 if stored == "fp32" else 0.05)
        assert (
            str(AutoModelForCausalLM.from_pretrained(target).dtype)
            == f"torch.{'float32' if stored == 'fp32' else 'bfloat16'}"
        )
        assert not (target / "adapter_config.json").exists()
        with pytest.raises(UserError, match=f"--export {target}: it exists already; name a new directory"):
            run_eval(uninterrupted_adapters, "--export", target)


def test_adapters_apart_from_their_run_are_merged_too(uninterrupted_adapters, tmp_path, capsys):
    best = Path(shutil.copytree(uninterrupted_adapters / "best", tmp_path / "adapters"))
    assert run_eval(best, "--export", tmp_path / "merged") == 0
    assert "merged; eval loss: not known, without a run and its eval split" in capsys.readouterr().out
    assert run_eval(uninterrupted_adapters / "best", "--export", tmp_path / "again") == 0
    assert "as trained" in capsys.readouterr().out
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("merged", "again")]
    assert files[0] == files[1]


def lines_of_best(run):
    """The eval loss that chose the best model of a run, rounded as it is printed."""
    return round(min(line["loss"] for line in lines(run, "eval") if line["step"]), 4)


def test_adapters_cannot_be_trained_on(uninterrupted_adapters, flags, start_process, tmp_path):
    best = uninterrupted_adapters / "best"
    process = start_process([*flags, "--model", best, "--output-dir", tmp_path / "run"])
    assert process.wait() == 1
    advice = f"merge them first: python eval.py {best} --export DIR --dtype fp32"
    assert f"--model {best}: these are adapters; {advice}" in process.stderr


def test_new_tokens_are_refused_and_the_advice_works(flags, start_process, tmp_path):
    """ChatML's tokens are missing in this model's tokenizer; its own template needs none."""
    model = tmp_path / "model"
    tokenizer = byte_tokenizer(["<|endoftext|>", "<s>", "</s>", "<unused>"])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<s>' + m.role + '\\n' + m.content + '</s>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<s>assistant\\n' }}{% endif %}"
    )
    tokenizer.save_pretrained(model)
    tiny_llama(len(tokenizer) + 10).save_pretrained(model)  # with rows to spare
    arguments = [*flags, "--model", model, *ADAPTERS, "--output-dir", tmp_path / "run"]
    process = start_process(arguments)
    assert process.wait() == 1
    assert "it has no <|im_start|> <|im_end|>; with --lora-rank no embedding of it would be trained" in process.stderr
    process = start_process([*arguments, "--chat-template", "model", "--max-steps", "2"])
    assert process.wait() == 0, process.stderr
    assert json.loads((tmp_path / "run" / "config.json").read_text())["base"]["model"] == str(model)


def pass_by(layer="down_proj"):
    """Let the model take the weight of a layer past its call, as Mamba's kernels do."""

    def forward(self, x):
        hidden = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        return torch.nn.functional.linear(hidden, getattr(self, layer).weight)

    LlamaMLP.forward = forward


def test_a_layer_that_the_model_passes_by_is_named(adapted, start_process, tmp_path):
    process = start_process([*adapted, "--output-dir", tmp_path / "run", "--max-steps", "3"], pass_by)
    assert process.wait() == 0, process.stderr
    (line,) = [line for line in process.stderr.splitlines() if line.startswith("warning:")]
    names = "model.layers.0.mlp.down_proj, model.layers.1.mlp.down_proj"
    assert line.endswith(f"not called by the model, so that their adapters stay without effect: {names}")


def test_the_plan_says_what_is_trained_and_at_which_rate(flags, start_process, tmp_path):
    without_rate = [
        part for name, part in zip(flags[::2], flags[1::2], strict=True) if name != "--lr" for part in (name, part)
    ]
    process = start_process([*without_rate, "--lora-rank", "32", "--output-dir", tmp_path / "run", "--max-steps", "1"])
    assert process.wait() == 0, process.stderr
    assert "to a learning rate of 0.002 (10 times the default of all weights)" in process.stdout
    assert " parameters, frozen\n" in process.stdout
    assert "of rank 32, alpha 32; " in process.stdout
    assert "; vLLM needs --max-lora-rank 32\n" in process.stdout
    assert json.loads((tmp_path / "run" / "config.json").read_text())["config"]["lr"] == 2e-3


def test_the_card_is_pefts_and_its_lines_stop(uninterrupted_adapters):
    best = uninterrupted_adapters / "best"
    card = ModelCard.load(best / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("peft", "text-generation")
    files = json.loads((best / "base_model.json").read_text())["files"]
    assert set(files) == {"config.json", "model.safetensors"}
    assert all(f"- {name}, SHA-256 {sha256}\n" in card.text for name, sha256 in files.items())
    code = re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1].replace("PATH_OR_ID_OF_THIS_DIRECTORY", str(best))
    names = {}
    exec(code.replace("print(", "str("), names)
    assert (
        names["settings"].eos_token_id
        == names["tokenizer"].eos_token_id
        == names["tokenizer"].convert_tokens_to_ids("<|im_end|>")
    )
    assert names["output"].shape[1] <= names["inputs"]["input_ids"].shape[1] + 100
