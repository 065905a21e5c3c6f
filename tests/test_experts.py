"""A mixture's experts in autocast's precision: grouped products of 16 bits, and nothing is read from the device."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from compute.layers import EXPERTS, use_autocast_in_experts
from compute.self_check import use_layout
from model import Precision, load_model, save_model, token_loss
from tests import fake_cuda
from tests.conftest import layout_of, one_batch
from tests.test_self_check import CPU, GROUPED, tiny
from tests.test_self_check import EXPERTS as QWEN

MIXTURES = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": QWEN,
    "flex_olmo": {"num_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 8},  # with biases
}
WIDE = {"head_dim": 16}  # as small as the attention kernel takes


class Products(TorchDispatchMode):
    """Lists the dtypes of grouped products, forward and backward."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket is torch.ops.aten._grouped_mm:
            self.dtypes += [args[0].dtype, args[1].dtype]
        return function(*args, **kwargs or {})


def result(model, batch, precision):
    """Loss and gradients of a micro-batch."""
    with precision.autocast():
        loss = token_loss(model, batch)
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return [loss.detach(), *gradients]


@pytest.mark.parametrize("name", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("kind", MIXTURES)
def test_grouped_products_are_in_autocasts_precision_and_nothing_is_read(monkeypatch, ragged_window, kind, name):
    model, precision = tiny(kind, GROUPED | MIXTURES[kind] | WIDE), Precision(name, CPU)
    use_layout(model, layout_of(packed=True))
    use_autocast_in_experts(model)
    batch = one_batch(ragged_window, packed=True)
    fake_cuda.varlen_attention(monkeypatch)
    with Products() as products, fake_cuda.Reads() as reads:
        result(model, batch, precision)
    assert reads.found == []
    assert set(products.dtypes) == {precision.dtype or torch.float32}
    assert len(products.dtypes) == 2 * 2 * 3 * 2  # layers, products, each with two in the backward pass, operands


@pytest.mark.parametrize("kind", MIXTURES)
def test_in_fp32_they_are_the_models_own_bit_for_bit(ragged_window, kind):
    model, batch = tiny(kind, GROUPED | MIXTURES[kind]), one_batch(ragged_window)
    expected = result(model, batch, Precision("fp32", CPU))
    use_autocast_in_experts(model)
    assert all(map(torch.equal, result(model, batch, Precision("fp32", CPU)), expected))


@pytest.mark.parametrize(("name", "tolerance"), [("bf16", 2e-2), ("fp16", 3e-3)])
@pytest.mark.parametrize("kind", MIXTURES)
def test_experts_round_as_autocast_does(kind, name, tolerance):
    """Output and gradients of the experts alone, so that no router chooses others."""
    torch.manual_seed(0)
    model = tiny(kind, GROUPED | MIXTURES[kind])
    experts = next(
        module for module in model.modules() if hasattr(module, "down_proj") and hasattr(module, "num_experts")
    )
    inputs = torch.randn(50, 32), torch.randint(experts.num_experts, (50, 2)), torch.rand(50, 2)

    def outputs():
        with Precision(name, CPU).autocast():
            output = experts(*inputs)
        return [output.detach(), *torch.autograd.grad(output.float().square().sum(), list(experts.parameters()))]

    expected = outputs()  # transformers' own are in fp32
    use_autocast_in_experts(model)
    for ours, theirs in zip(outputs(), expected, strict=True):
        assert 0 < (ours - theirs).norm() < tolerance * theirs.norm()


def test_rows_that_are_not_aligned_stay_as_they_are(ragged_window):
    model = tiny("mixtral", GROUPED | MIXTURES["mixtral"] | {"intermediate_size": 36})
    use_autocast_in_experts(model)
    with Products() as products:
        result(model, one_batch(ragged_window), Precision("bf16", CPU))
    assert set(products.dtypes) == {torch.float32}


def test_a_loaded_mixture_is_one_of_them_and_its_files_do_not_say_so(tmp_path, tiny_tokenizer):
    save_model(tiny("mixtral", GROUPED | MIXTURES["mixtral"]), tiny_tokenizer, tmp_path)
    model = load_model(str(tmp_path), tiny_tokenizer, CPU, local_files_only=True)
    assert model.config._experts_implementation == EXPERTS
    save_model(model, tiny_tokenizer, tmp_path / "again")
    assert EXPERTS not in (tmp_path / "again" / "config.json").read_text()
