"""The measured micro-batch budget, against an allocator of the tests' own that counts live storages on the CPU."""

import re
import weakref
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from compute import memory
from compute.distributed import rank
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


# --- a card whose memory is a function of the tokens


@dataclass
class Card:
    """The memory of a GPU, in bytes, in the place of CUDA's: a pass takes what the output head or the layers need."""

    layers: int = 16
    hidden: int = 2048
    vocabulary: int = 128_256
    recomputed: bool = True
    free: float = 20e9  # with the weights in memory
    gradients: float = 0.5e9
    held: float = 0
    peak: float = 0
    asked: list = field(default_factory=list)  # the tokens of the passes

    def taken(self, tokens, training):
        """The peak of a pass: 16-bit copies, the head with a chunk of logits, or a layer's backward pass."""
        copies = 24 * self.layers * self.hidden**2
        kept = training * self.layers * self.hidden * (4 if self.recomputed else 60) * tokens
        chunk = min(tokens, 4096) * self.vocabulary * 6
        head = 6 * self.vocabulary * self.hidden + chunk + 8 * self.hidden * tokens
        return max(copies + kept + head, copies + kept + 200 * self.hidden * tokens)

    def room(self, training):
        """The share of the memory that a pass may take, with the gradients in memory and the moments to come."""
        return memory.GPU_SHARE * (self.free - 3 * self.gradients * training)

    def install(self, patch):
        instead = {
            "memory_allocated": lambda _: self.held,
            "max_memory_allocated": lambda _: self.peak,
            "reset_peak_memory_stats": lambda _: setattr(self, "peak", self.held),
            "mem_get_info": lambda _: (self.free - self.held, self.free),
            "empty_cache": lambda: None,
        }
        for name, function in instead.items():
            patch.setattr(torch.cuda, name, function)

    def token_loss(self, model, batch):
        """A pass, in the place of a model's."""
        self.asked.append(batch.inputs["input_ids"].numel())
        self.held = self.gradients if model.training else 0
        self.peak = max(self.peak, self.held + self.taken(self.asked[-1], model.training))
        if self.peak > self.free:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
        return torch.zeros((), requires_grad=True)

    def measure(self, longest, packed=True, training=True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(memory, "SAMPLE", 4096)
            self.install(patch)
            layout, there = Layout(packed, 2**20, 0), Precision("fp32", torch.device("cpu"))
            return memory.measure_micro_batch_budget(MODEL, self.token_loss, layout, there, longest, training)


MODEL = tiny_llama(259)
CARDS = st.builds(
    Card,
    layers=st.integers(2, 48),
    hidden=st.sampled_from([576, 1024, 2048, 4096]),
    vocabulary=st.sampled_from([32_000, 49_152, 128_256, 256_000]),
    recomputed=st.booleans(),
    free=st.sampled_from([0.5e9, 2e9, 4e9, 8e9, 16e9, 40e9]),
    gradients=st.sampled_from([0.0, 0.1e9, 1e9]),
)


@settings(max_examples=100, deadline=None)
@given(CARDS, st.sampled_from([64, 300, 1024, 2048, 8192, 40_000]), st.booleans(), st.booleans())
@example(Card(), 2048, True, True)  # a model of one billion parameters on a card with 40 GB
@example(Card(free=8e9), 2048, False, True)
@example(Card(free=0.4e9), 64, True, True)
@example(Card(free=1e9, gradients=1e9), 64, True, True)
def test_the_peak_at_the_budget_fits_and_a_much_larger_one_does_not(card, longest, packed, training):
    """Whether the head or the layers take the most memory, which changes with the number of tokens."""
    room = card.room(training)
    if card.taken(longest, training) > room / memory.GPU_SHARE:
        advice = "--gradient-checkpointing, a lower --max-length" if training else "a lower --max-length"
        with pytest.raises(
            UserError, match=rf"a conversation of {longest:,} tokens does not fit on cpu .* use {advice}"
        ):
            card.measure(longest, packed, training)
        return
    budget = card.measure(longest, packed, training)
    assert len(card.asked) <= memory.PROBES + 2
    if card.taken(longest, training) > room:
        assert budget == longest
        return
    assert card.taken(budget, training) <= room
    assert budget in card.asked
    low, high = longest, max(longest, memory.GPU_TOKENS)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if card.taken(middle, training) <= room else (low, middle)
    assert budget >= 0.7 * low - (0 if packed else longest)  # padded rows are as long as the longest


def measure_on_rank(frees):
    card = Card(free=frees[rank()])
    return card.measure(2048), card.asked


def test_ranks_measure_the_same_micro_batches(worker_pools):
    """Ranks that share weights wait for each other; one that has less memory lowers the budget of all."""
    for frees in ((30e9, 9e9), (9e9, 30e9)):
        first, second = worker_pools(2).call(measure_on_rank, frees)
        assert first == second == measure_on_rank((9e9,))


def test_running_out_of_memory_in_a_pass_of_shared_weights_is_no_smaller_budget(monkeypatch):
    """The other ranks wait in a collective for this one."""
    monkeypatch.setattr(memory, "is_sharded", lambda _: True)
    with pytest.raises(RuntimeError, match="CUBLAS_STATUS_ALLOC_FAILED"):
        Card(free=0.4e9).measure(2048)


# --- whether a model fits


@pytest.fixture
def card_of_80_gb(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80e9))


def least_memory(arguments, config, longest, monkeypatch):
    """The fewest bytes of a GPU on which a model may be trained."""
    low, high = 0, 2**34
    while high - low > 1:
        middle = (low + high) // 2
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=middle: (free, 2**40))
        try:
            memory.check_model_fits(*arguments, config, longest)
            high = middle
        except UserError:
            low = middle
    return high


@pytest.mark.usefixtures("card_of_80_gb")
@pytest.mark.parametrize("name", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("longest", [10, 2**40])
def test_a_model_that_cannot_be_trained_is_refused_before_it_is_loaded(monkeypatch, tiny_model_dir, name, longest):
    arguments = tiny_model_dir, True, replace(GPU, name=name)
    parameters = sum(weights.numel() for weights in tiny_llama(259).parameters())
    copies, of_a_logit = (0, 8) if name == "fp32" else (2 * parameters, 6)
    logits = min(longest, 4096) * 259 * of_a_logit
    needed = 16 * parameters + copies + 4 * 259 * 32 + logits  # and the gradient of the head in a micro-batch
    assert least_memory(arguments, Config(), longest, monkeypatch) == needed


@pytest.mark.usefixtures("card_of_80_gb")
@pytest.mark.parametrize("name", ["bf16", "fp32"])
def test_the_number_of_processes_that_is_advised_is_enough(monkeypatch, tiny_model_dir, name):
    arguments, advised = (tiny_model_dir, True, replace(GPU, name=name)), []
    needed = least_memory(arguments, Config(), 10, monkeypatch)
    for free in range(needed // 20, needed, needed // 20):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, free))
        with pytest.raises(UserError, match=r"--model mine: .* GB free; use a smaller model") as raised:
            memory.check_model_fits(*arguments, Config(model="mine"), 10)
        for count in re.findall(r"--shard (\d+)", str(raised.value)):
            memory.check_model_fits(*arguments, Config(model="mine", shard=int(count)), 10)
            advised.append(int(count))
    assert len(set(advised)) > 1
