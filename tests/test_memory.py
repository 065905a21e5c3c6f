"""The measured micro-batch budget, against an allocator of the tests' own that counts live storages on the CPU."""

import weakref
from dataclasses import replace

import pytest
import torch
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from compute import memory
from compute.layers import checkpoint_activations
from compute.layout import Layout, random_examples
from compute.self_check import use_layout
from config import Config, UserError
from model import Precision, token_loss
from tests.conftest import tiny_llama

FP32 = Precision("fp32", torch.device("cpu"))
GPU = Precision("bf16", torch.device("cuda"))
FREE = 60e6
LONGEST = 128


class Allocator(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, for as long as these live; in the place of CUDA's."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.live, self.now, self.peak = {}, 0, 0
        instead = {
            "memory_allocated": lambda _: self.now,
            "max_memory_allocated": lambda _: self.peak,
            "reset_peak_memory_stats": lambda _: setattr(self, "peak", self.now),
            "mem_get_info": lambda _: (FREE - self.now, FREE),
            "empty_cache": lambda: None,
        }
        for name, function in instead.items():
            monkeypatch.setattr(torch.cuda, name, function)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        given = {each.untyped_storage()._cdata for each in _pytree.tree_leaves(args) if isinstance(each, torch.Tensor)}
        for tensor in _pytree.tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in given | self.live.keys():
                storage = tensor.untyped_storage()
                self.live[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.free, storage._cdata)
        return output

    def free(self, storage):
        self.now -= self.live.pop(storage)


def model_of(kind):
    model = tiny_llama(259, hidden_size=64, max_position_embeddings=2048)
    layout = Layout(kind != "quadratic attention" and kind != "own logits", 2**20, 0, own_logits=kind == "own logits")
    use_layout(model, layout)
    if kind == "quadratic attention":
        model.set_attn_implementation("eager")
    if kind == "checkpointed":
        checkpoint_activations(model)
    return model.eval(), layout


@pytest.fixture(autouse=True)
def small_sample(monkeypatch):
    monkeypatch.setattr(memory, "SAMPLE", 512)


@pytest.mark.parametrize("kind", ["packed", "checkpointed", "own logits", "quadratic attention"])
def test_the_budget_fits_and_is_not_much_too_small(monkeypatch, kind):
    model, layout = model_of(kind)
    with Allocator(monkeypatch) as allocator:
        tokens = memory.measure_micro_batch_budget(model, token_loss, layout, FP32, LONGEST, training=True)
        assert LONGEST < tokens < memory.GPU_TOKENS
        assert allocator.now == 0
        assert not model.training
        model.train()
        count = tokens // LONGEST
        for lengths in ([LONGEST] * count, [LONGEST] * (count // 2) + [100] * (tokens // 2 // LONGEST) * 2):
            for batch in replace(layout, tokens=tokens).micro_batches(random_examples(lengths, 259)):
                token_loss(model, batch).backward()
    moments = 8 * sum(p.numel() for p in model.parameters())
    assert 0.6 * FREE < allocator.peak + moments < FREE


def test_checkpointing_and_the_longest_conversation_change_what_fits(monkeypatch):
    def tokens(kind, longest=LONGEST, training=True):
        model, layout = model_of(kind)
        with Allocator(monkeypatch):
            return memory.measure_micro_batch_budget(model, token_loss, layout, FP32, longest, training)

    assert tokens("checkpointed") > 1.5 * tokens("packed")
    assert tokens("quadratic attention", longest=256) < 0.8 * tokens("quadratic attention", longest=64)
    assert tokens("own logits", training=False) > 1.5 * tokens("own logits")


def test_a_conversation_that_does_not_fit_by_itself_is_one_line(monkeypatch):
    model, layout = model_of("packed")

    def too_large(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with (
        Allocator(monkeypatch),
        pytest.raises(UserError, match=r"a conversation of 128 tokens does not fit .* --gradient-checkpointing"),
    ):
        memory.measure_micro_batch_budget(model, too_large, layout, FP32, LONGEST, training=True)


def test_a_model_that_cannot_be_trained_is_refused_before_it_is_loaded(monkeypatch, tiny_model_dir):
    parameters = sum(weights.numel() for weights in tiny_llama(259).parameters())
    needed, arguments = 16 * parameters + 6 * 259 * 32, (tiny_model_dir, True, GPU)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (needed, 2 * needed))
    memory.check_model_fits(*arguments, Config(model="mine"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (needed - 1, 2 * needed))
    with pytest.raises(UserError, match=r"--model mine: .* GB free; use a smaller model, or .* with --shard 2"):
        memory.check_model_fits(*arguments, Config(model="mine"))
    memory.check_model_fits(*arguments, Config(model="mine", shard=2))
