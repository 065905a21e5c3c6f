"""What the plan says of compiled layers is what happens, for any precision, GPU, layout, and recomputed activations."""

import itertools
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import PreTrainedModel

import train
from compute import self_check
from compute.layers import compiled_graphs
from compute.self_check import choose_layout
from config import Config, UserError
from model import Precision, token_loss
from running import setup
from tests import fake_cuda
from tests.conftest import one_batch, tiny_llama

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def quick_backend(monkeypatch):
    """Inductor takes its time."""
    compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **how: compile(module, **how, backend="eager"))


def graphs_of_an_update(model, precision, layout, window):
    """The number of graphs that a training pass is made of."""
    torch.compiler.reset()
    before = compiled_graphs()
    model.train()
    with precision.autocast():
        loss = token_loss(model, one_batch(window, packed=layout.packed))
    loss.backward()
    return compiled_graphs() - before


CASES = itertools.product(
    ("fp32", "bf16", "fp16"), ("older GPU", "Ampere"), ("packed", "padded"), (True, False), (16, 10)
)


@pytest.mark.parametrize(
    ("dtype", "gpu", "layout", "recomputed", "heads"),  # widths of heads; the kernel takes whole eights
    [
        pytest.param(*case, marks=() if case[0] != "fp16" and case[2:4] == ("packed", True) else pytest.mark.slow)
        for case in CASES
    ],
)
def test_compiled_is_what_the_plan_says(monkeypatch, ragged_window, dtype, gpu, layout, recomputed, heads):
    if gpu == "Ampere":
        fake_cuda.varlen_attention(monkeypatch)
    model, precision = (
        tiny_llama(259, hidden_size=4 * heads, num_hidden_layers=1),
        Precision(dtype, torch.device("cpu")),
    )
    config = Config(compile=True, layout=layout, gradient_checkpointing=recomputed)
    in_one_kernel = gpu == "Ampere" and heads == 16 and dtype != "fp32"
    is_older = not hasattr(PreTrainedModel, "activation_checkpointing_enable")  # what came before compiles more
    if recomputed and layout == "packed" and not in_one_kernel and not is_older:
        with pytest.raises(UserError, match=r"^--compile and --gradient-checkpointing: "):
            choose_layout(model, token_loss, config, 0, precision)
        return
    chosen = choose_layout(model, token_loss, config, 0, precision)
    assert "compiled" in chosen.describe()
    assert graphs_of_an_update(model, precision, chosen, ragged_window) > 0


def test_a_model_of_which_nothing_is_compiled_is_refused():
    model = tiny_llama(259)
    model._no_split_modules = []  # some models do not name their layers
    with pytest.raises(UserError, match=r"^--compile: nothing of mine can be compiled; leave it out$"):
        choose_layout(model, token_loss, Config(model="mine", compile=True), 0, Precision("fp32", CPU))


@pytest.mark.slow
@pytest.mark.parametrize("asked", [False, True], ids=["by default", "--compile"])
def test_a_machine_without_a_compiler_trains_unless_asked_to_compile(tiny_model_dir, chats, tmp_path, asked):
    """In a process of its own, as what is compiled once stays compiled."""
    program = f"""
import os, sys
os.environ |= {{"CXX": "no-such-compiler", "CC": "no-such-compiler", "PATH": ""}}
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
import train
from config import run_command
sys.argv = ["train.py", "--model", {str(tiny_model_dir)!r}, "--dataset", {str(chats)!r}, "--output-dir",
    {str(tmp_path / "run")!r}, "--max-steps", "1", "--dtype", "fp32", "--test-fraction", "0"] + {["--compile"] * asked}
run_command(train.main)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    if not asked:
        assert done.returncode == 0, done.stderr
        return
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: --compile: ")
    assert "compiler" in last
    assert last.endswith("; leave it out")


@pytest.mark.parametrize(
    ("compile", "long_run", "expected"), [(None, True, True), (None, False, False), (False, True, False)]
)
def test_a_long_run_is_compiled_unless_told_otherwise(ragged_window, compile, long_run, expected):
    model, precision = tiny_llama(259), Precision("fp32", CPU)
    chosen = choose_layout(model, token_loss, Config(compile=compile), 0, precision, long_run=long_run)
    assert chosen.compiled is expected
    assert (graphs_of_an_update(model, precision, chosen, ragged_window) > 0) is expected


@pytest.mark.slow
def test_a_long_run_that_cannot_be_compiled_trains_as_it_is(monkeypatch, capsys, ragged_window):
    compare = self_check.compare

    def compare_otherwise(model, loss_function, layout, expected):
        compare(model, loss_function, layout, expected)
        if layout.compiled:
            raise self_check.Mismatch("a loss is off by 7 %")

    monkeypatch.setattr(self_check, "compare", compare_otherwise)
    model, precision = tiny_llama(259), Precision("fp32", CPU)
    chosen = choose_layout(model, token_loss, Config(), 0, precision, long_run=True)
    assert chosen == choose_layout(tiny_llama(259), token_loss, Config(), 0, precision)
    assert capsys.readouterr().err == "warning: not compiled: --compile: a loss is off by 7 %\n"
    assert graphs_of_an_update(model, precision, chosen, ragged_window) == 0
    with pytest.raises(UserError, match=r"^--compile: a loss is off by 7 %; leave it out$"):
        choose_layout(tiny_llama(259), token_loss, Config(compile=True), 0, precision, long_run=True)


@pytest.mark.slow
def test_a_run_records_whether_it_compiles_and_resumes_as_it_began(monkeypatch, tiny_model_dir, chats, tmp_path):
    run = tmp_path / "run"
    flags = [
        "--model",
        tiny_model_dir,
        "--dataset",
        chats,
        "--output-dir",
        run,
        "--dtype",
        "fp32",
        "--test-fraction",
        "0",
    ]
    monkeypatch.setattr(setup, "compiling_pays", lambda _: True)
    assert train.main([*map(str, flags), "--max-steps", "1", "--save-every", "1"]) == 0
    monkeypatch.setattr(setup, "compiling_pays", lambda _: False)
    assert train.main(["--resume", str(run), "--max-steps", "2", "--allow-changes"]) == 0
    assert json.loads((run / "config.json").read_text())["config"]["compile"] is True
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(line["compiled_graphs"] for line in lines if line["kind"] == "train")


@pytest.mark.parametrize(
    ("device", "change", "pays"),
    [
        ("cuda", "none", True),
        ("cuda", "recomputed", True),
        ("cuda", "fp32", False),
        ("cuda", "no kernel", False),
        ("cuda", "short", False),
        ("cuda", "many processes", False),
        ("cuda", "large model", True),
        ("cuda", "small model", False),
        ("cpu", "none", True),
        ("cpu", "fp32", False),
        ("cpu", "recomputed", False),
        ("cpu", "short", False),
        ("cpu", "many processes", False),
        ("cpu", "small model", False),
    ],
)
def test_compiling_pays_in_a_long_run_of_which_packed_layers_are_compiled(monkeypatch, device, change, pays):
    monkeypatch.setattr(setup, "has_varlen_kernel", lambda device: device.type == "cuda" and change != "no kernel")
    monkeypatch.setattr(setup, "world_size", lambda: 2 if change == "many processes" else 1)
    tokens = setup.COMPILE_TOKENS[device] * (1 if change == "short" else 2)
    run = SimpleNamespace(
        total_steps=100,
        tokens_per_update=tokens / 100,
        precision=Precision("fp32" if change == "fp32" else "bf16", torch.device(device)),
        config=Config(gradient_checkpointing=change == "recomputed"),
    )
    sizes = {"small model": 10**6, "large model": 10**10}
    with torch.device("meta"):
        run.model = torch.nn.Linear(1, sizes.get(change, int(setup.MEASURED)), bias=False)
    assert setup.compiling_pays(run) is pays
