"""The loss in chunks: its value and its gradient against the whole in fp64, and what it never holds."""

import math
import resource
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from compute import cross_entropy as loss
from compute.cross_entropy import linear_cross_entropy, loss_and_correct, loss_and_correct_from_logits
from model import token_loss
from tests import fake_cuda
from tests.conftest import one_batch
from tests.worker_pool import CONTEXT


def problem(vocabulary, bias=False, rows=70, width=24):
    """Hidden states, an output head and targets, in fp32."""
    torch.manual_seed(0)
    head = nn.Linear(width, vocabulary, bias=bias)
    return (3 * torch.randn(rows, width)).requires_grad_(), head, torch.randint(vocabulary, (rows,))


def gradients(value, hidden, head):
    return value.detach(), *torch.autograd.grad(value, [hidden, *head.parameters()])


def exact(hidden, head, targets):
    """Loss and gradients by torch, all at once in fp64."""
    hidden, head = hidden.detach().double().requires_grad_(), copy_in_fp64(head)
    return gradients(F.cross_entropy(head(hidden), targets, reduction="sum"), hidden, head)


def copy_in_fp64(head):
    copy = nn.Linear(head.in_features, head.out_features, bias=head.bias is not None).double()
    copy.load_state_dict(head.state_dict())
    return copy


def differences(ours, theirs):
    """Of loss and each gradient: the norm of the difference, relative."""
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(ours, theirs, strict=True)]


@pytest.fixture
def small_chunks(monkeypatch):
    """So that a few tokens have several chunks, and several blocks in each."""
    monkeypatch.setattr(loss, "CHUNK", 2**9)
    monkeypatch.setattr(loss, "ROWS", 1)
    monkeypatch.setattr(loss, "BLOCK", 2**7)


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("vocabulary", [11, 256_000])
@pytest.mark.parametrize("chunk", [2**19, 2**25])
def test_loss_and_gradients_are_those_of_all_logits_at_once(monkeypatch, vocabulary, bias, chunk):
    monkeypatch.setattr(loss, "CHUNK", chunk)
    monkeypatch.setattr(loss, "ROWS", 1)
    monkeypatch.setattr(loss, "BLOCK", chunk // 4)
    hidden, head, targets = problem(vocabulary, bias)
    whole = exact(hidden, head, targets)
    in_fp32 = differences(gradients(linear_cross_entropy(hidden, head, targets), hidden, head), whole)
    assert in_fp32[0] < 1e-6
    assert max(in_fp32) < 5e-5  # a product of two rows with 256,000 columns is summed one by one
    with torch.autocast("cpu", torch.bfloat16):
        in_bf16 = linear_cross_entropy(hidden, head, targets)
    assert in_bf16.dtype == torch.float32
    off = differences(gradients(in_bf16, hidden, head), whole)
    assert off[0] < 2e-3
    assert max(off) < 2e-2


@pytest.mark.usefixtures("small_chunks")
def test_fp64_is_exact_and_scaled_by_the_upstream_gradient():
    hidden, head, targets = problem(99, bias=True)
    hidden, head = hidden.detach().double().requires_grad_(), copy_in_fp64(head)
    ours = gradients(linear_cross_entropy(hidden, head, targets) / 7, hidden, head)
    assert max(differences([7 * part for part in ours], exact(hidden, head, targets))) < 1e-14


def test_many_tokens_are_summed_in_fp32():
    """A bf16 sum of equal losses would stall near 512."""
    hidden, head, targets = torch.zeros(5000, 4), nn.Linear(4, 7, bias=False), torch.zeros(5000, dtype=torch.long)
    with torch.autocast("cpu", torch.bfloat16):
        total = linear_cross_entropy(hidden, head, targets)
    assert total.item() == pytest.approx(5000 * math.log(7), rel=1e-6)


def test_no_supervised_token_gives_zero_loss_and_gradient():
    hidden, head, _ = problem(99, rows=0)
    value, *grads = gradients(linear_cross_entropy(hidden, head, torch.zeros(0, dtype=torch.long)), hidden, head)
    assert value == 0
    assert not any(grad.any() for grad in grads)


@pytest.mark.usefixtures("small_chunks")
def test_the_evaluated_loss_is_the_same_and_correct_tokens_are_counted():
    hidden, head, targets = problem(99)
    with torch.no_grad():
        targets[:30] = head(hidden[:30]).argmax(-1)
        summed, correct = loss_and_correct(hidden, head, targets).sum(1)
        assert summed.item() == pytest.approx(linear_cross_entropy(hidden, head, targets).item(), rel=1e-6)
        assert correct == (head(hidden).argmax(-1) == targets).sum() >= 30
        assert torch.equal(loss_and_correct_from_logits(head(hidden), targets)[1].sum(), correct)


def test_tied_and_untied_heads_get_the_models_own_gradient(tiny_model, ragged_window):
    batch = one_batch(ragged_window)
    for tied in (True, False):
        if not tied:
            tiny_model.lm_head.weight = nn.Parameter(tiny_model.lm_head.weight.detach().clone())
        parameters = list(tiny_model.double().parameters())
        logits = tiny_model(**batch.inputs).logits.flatten(0, 1)[batch.predicting]
        own = F.cross_entropy(logits, batch.targets, reduction="sum")
        theirs, ours = (torch.autograd.grad(value, parameters) for value in (own, token_loss(tiny_model, batch)))
        assert max(differences(ours, theirs)) < 1e-13


@pytest.mark.parametrize("vocabulary", [1_000, 64_000])
def test_one_chunk_of_logits_at_a_time_by_deterministic_operations(monkeypatch, vocabulary):
    """`scatter_add_` of two dimensions is an error on a GPU under `--deterministic`."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            assert "scatter_add" not in str(function)
            result = function(*args, **(kwargs or {}))
            largest = max(largest, result.numel() if torch.is_tensor(result) else 0)
            return result

    monkeypatch.setattr(loss, "CHUNK", 128_000)
    monkeypatch.setattr(loss, "ROWS", 1)
    hidden, head, targets = problem(vocabulary, rows=300, width=2)
    with Watch():
        linear_cross_entropy(hidden, head, targets).backward()
    assert 100_000 < largest <= 128_000 < 300 * vocabulary


@pytest.mark.parametrize("gigabytes", [8, 24, 80])
@pytest.mark.parametrize("vocabulary", [32_000, 49_152, 128_256, 262_144])
def test_a_chunk_of_logits_takes_a_sixteenth_of_a_gpu_at_most(monkeypatch, gigabytes, vocabulary):
    card = SimpleNamespace(total_memory=gigabytes * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    rows = loss.chunk_rows(vocabulary, torch.device("cuda"))
    assert loss.ROWS <= rows <= loss.GPU_ROWS
    assert rows == loss.ROWS or rows * vocabulary * 6 <= card.total_memory / 16
    assert rows == loss.GPU_ROWS or (rows + 1) * vocabulary * 6 > card.total_memory / 16


def peak_after_each(counts):
    """The peak of this process's memory in GB after the loss of so many tokens, and then of so many."""
    head, peaks = nn.Linear(8, 100_000), []
    for tokens in counts:
        hidden = torch.zeros(tokens, 8, requires_grad=True)
        linear_cross_entropy(hidden, head, torch.zeros(tokens, dtype=torch.long)).backward()
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
    return peaks


@pytest.mark.skipif(sys.platform != "linux", reason="its unit is Linux's")
def test_memory_does_not_grow_with_the_tokens():
    """In a process of its own: small tensors that outlive large ones once kept the heap from being used again."""
    with CONTEXT.Pool(1) as pool:
        short, long = pool.apply(peak_after_each, [(600, 3_600)])
    assert long - short < 0.2  # GB; 3,600 x 100,000 logits are 1.4


def test_the_compiled_form_gives_the_same_loss_and_gradient():
    _, head, targets = problem(999)
    logits = head(torch.randn(70, 24)).detach().double() * 9
    ours, theirs = (logits.clone(), logits.new_zeros(70)), (logits.clone(), logits.new_zeros(70))
    loss.softmax_gradient(ours[0], targets, ours[1])
    loss.logits_to_gradients(theirs[0], targets, theirs[1])
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_summed_in_fp32_are_as_exact(monkeypatch, dtype):
    hidden, head, targets = problem(999, rows=600)
    whole = exact(hidden, head, targets)
    monkeypatch.setattr(loss, "CHUNK", 99_900)
    monkeypatch.setattr(loss, "ROWS", 1)

    def off():
        with torch.autocast("cpu", dtype):
            return differences(gradients(linear_cross_entropy(hidden, head, targets), hidden, head), whole)

    added = off()
    fake_cuda.calls.clear()
    monkeypatch.setattr(loss, "sums_in_fp32", lambda _: True)
    summed = off()
    assert fake_cuda.calls == ["addmm"] * 6
    assert summed[:2] == added[:2]
    assert summed[2] <= added[2]
