"""What only a GPU can run; everything here is skipped without one."""

import copy
import os

import pytest
import torch

from compute import cross_entropy
from compute.attention import packed_attention
from compute.layers import checkpoint_activations, compiled_graphs, deterministic_algorithms
from compute.layout import Layout
from compute.memory import measure_micro_batch_budget
from compute.self_check import choose_layout
from config import QUICKSTART_MODEL, Config
from eval import evaluate
from model import Precision, load_model, token_loss
from storage import hub
from tests.conftest import layout_of, tiny_llama
from tests.test_attention import a_row, boundaries, off, per_sequence, with_gradients
from train import make_optimizer, train_step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before cuBLAS is first used
GPU = torch.device("cuda")
SHAPE = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}  # heads of 16: as small as kernels take


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)], ids=str
)
def test_each_conversation_attends_to_itself_alone(dtype, tolerance):
    row = [tensor.detach().to(GPU).requires_grad_() for tensor in a_row(dtype)]
    there = boundaries()
    there["cu_seqlens"] = there["cu_seqlens"].to(GPU)
    assert off(with_gradients(packed_attention(None, *row, None, **there)[0], row), per_sequence(*row)) < tolerance


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
# AdamW divides by the gradient's size, so that after its first update rounding is no longer small in every weight
@pytest.mark.parametrize(("name", "tolerance"), [("fp32", 1e-4), ("bf16", 2e-2), ("fp16", 5e-3)])
def test_an_update_is_that_of_a_cpu(ragged_window, name, tolerance, compile):
    exact, there = tiny_llama(259, **SHAPE), Precision(name, GPU)
    model = copy.deepcopy(exact).to(GPU)
    layout = choose_layout(model, token_loss, Config(compile=compile, micro_batch_tokens=100), 0, there)
    assert layout.packed
    assert layout.pinned

    def numbers(model, precision, layout):
        optimizer, scaler = make_optimizer(model, 0.1), precision.grad_scaler()
        settings = {"precision": precision, "scaler": scaler, "max_grad_norm": 1.0}
        window = list(layout.micro_batches(ragged_window))
        updates = []
        while len(updates) < 3:
            update = train_step(model, optimizer, window, 2e-4, **settings)
            updates += [update] if update else []  # None: the fp16 scale was too high, and is halved
        return [(update["loss"], update["grad_norm"]) for update in updates]

    on_cpu = Precision("fp32", torch.device("cpu"))
    expected = numbers(exact, on_cpu, layout_of(packed=False))
    for ours, theirs in zip(numbers(model, there, layout), expected, strict=True):
        assert ours == pytest.approx(theirs, rel=tolerance)
    loss = evaluate(model, ragged_window, layout, there).loss
    assert loss == pytest.approx(evaluate(exact, ragged_window, layout_of(packed=False), on_cpu).loss, rel=tolerance)


def test_compiled_layers_are_not_recompiled_for_every_length(ragged_window):
    model, precision = tiny_llama(259, **SHAPE).to(GPU), Precision("bf16", GPU)
    layout = choose_layout(model, token_loss, Config(compile=True), 0, precision)
    counts = []
    for count in range(1, 9):
        for batch in layout.micro_batches(ragged_window[:count]):
            with precision.autocast():
                token_loss(model, batch.to(GPU)).backward()
        counts.append(compiled_graphs())
    assert counts[2:] == [counts[2]] * 6


def test_an_update_waits_for_the_gpu_once(ragged_window, monkeypatch):
    """Copying micro-batches and their forward and backward passes wait for nothing; what is read is read at the end."""
    monkeypatch.setattr(cross_entropy, "GPU_ROWS", 1)  # so that the head has several chunks
    monkeypatch.setattr(cross_entropy, "ROWS", 1)
    model, precision = tiny_llama(259, **SHAPE).to(GPU), Precision("bf16", GPU)
    layout = choose_layout(model, token_loss, Config(micro_batch_tokens=100), 0, precision)
    window = list(layout.micro_batches(ragged_window * 8))
    assert len(window) > 8
    model.train()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in window:
            with precision.autocast():
                token_loss(model, batch.to(GPU)).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def test_deterministic_updates_repeat_bit_for_bit(ragged_window, compile, checkpointing):
    precision, found = Precision("bf16", GPU), []
    for _ in range(2):
        model = tiny_llama(259, **SHAPE).to(GPU)
        if checkpointing:
            checkpoint_activations(model)
        layout = choose_layout(model, token_loss, Config(compile=compile, micro_batch_tokens=500), 0, precision)
        model.train()
        with deterministic_algorithms(True):
            for batch in layout.micro_batches(ragged_window * 4):
                with precision.autocast():
                    token_loss(model, batch.to(GPU)).backward()
        found.append([p.grad for p in model.parameters()])
    assert all(torch.equal(first, second) for first, second in zip(*found, strict=True))


def test_the_micro_batch_budget_is_measured():
    model, precision = tiny_llama(259, **SHAPE, max_position_embeddings=2048).to(GPU), Precision("bf16", GPU)
    tokens = measure_micro_batch_budget(model, token_loss, Layout(False, 2**20, 0), precision, 2048, training=True)
    assert tokens % 1024 == 0
    assert 1024 <= tokens <= 2**16


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_real_weights_are_packed(real_tokenizer, name):
    """A GPU's kernels round differently in each layout, and 30 layers multiply what they round."""
    path, local_files_only = hub.find_model(QUICKSTART_MODEL)
    model = load_model(path, real_tokenizer, GPU, local_files_only)
    layout = choose_layout(model, token_loss, Config(micro_batch_tokens=4096), 0, Precision(name, GPU))
    assert layout.packed, layout.why
