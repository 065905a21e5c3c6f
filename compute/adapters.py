"""Adapters (LoRA): beside each frozen matrix W two small ones, A and B, which together act as W + alpha / rank · B A.

Hu et al., 2021, https://arxiv.org/abs/2106.09685, for every matrix but the output head and the embeddings, as PEFT has
it with `target_modules="all-linear"`. Nothing is wrapped or renamed: A and B are children of the layer that holds W,
and a forward hook adds what they give. The experts of a mixture are often one tensor, and no such layer: they stay
frozen, and so do the layers of such a model that PEFT would take for its experts.
"""

import contextlib
import math
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from compute.distributed import full_tensor
from config import UserError

# The names of experts' matrices before transformers 5 made one tensor of them. PEFT (0.21) takes every layer of such a
# name for them, also dense layers and shared experts, and would drop the adapters of these.
EXPERT_NAMES = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}


@dataclass(frozen=True)
class Lora:
    """What adapters are made of, and the model that they belong to."""

    rank: int
    alpha: float
    seed: int = 0  # of the first values of A
    base: dict | None = None  # as `storage.adapter.describe_base` describes it

    @property
    def scale(self):
        return self.alpha / self.rank

    @classmethod
    def of(cls, config):
        """The adapters of a run with the settings of a `Config`; None where all weights are trained."""
        return cls(config.lora_rank, config.lora_alpha, config.seed) if config.lora_rank else None


def add_adapters(model, lora, frozen_dtype=None):
    """Freeze a model, and add adapters to it: A is drawn as PEFT draws it, and B is zero, so nothing changes at first.

    Args:
        frozen_dtype: autocast's, in which the frozen matrices are held, with the result of casting them at each use;
            what autocast does not cast, such as embeddings and norms, keeps its precision. None: all of it does.
    """
    model.lora, generator, frozen = lora, torch.Generator().manual_seed(lora.seed), {}
    model.requires_grad_(False)
    for layer in list_matrices(model).values():
        weight = layer.weight
        outputs, inputs = weight.shape[::-1] if isinstance(layer, Conv1D) else weight.shape
        options = {"bias": False, "device": "meta", "dtype": weight.dtype}
        layer.lora_A, layer.lora_B = nn.Linear(inputs, lora.rank, **options), nn.Linear(lora.rank, outputs, **options)
        if not weight.is_meta:
            first = torch.empty(lora.rank, inputs, dtype=weight.dtype)  # drawn on the CPU, alike for every device
            nn.init.kaiming_uniform_(first, a=math.sqrt(5), generator=generator)
            layer.lora_A.weight = nn.Parameter(first.to(weight.device))
            layer.lora_B.weight = nn.Parameter(weight.new_zeros(outputs, lora.rank))
        layer.lora_scale = lora.scale
        layer.lora_hook = layer.register_forward_hook(add_adapter_output)
        if frozen_dtype and weight not in frozen:  # layers may share a matrix
            frozen[weight] = nn.Parameter(weight.to(frozen_dtype), requires_grad=False)
        layer.weight = frozen.get(weight, weight)


def add_adapter_output(layer, inputs, output):
    """The forward hook of a layer with adapters; inputs and output are (…, features)."""
    return output + layer.lora_B(layer.lora_A(inputs[0])) * layer.lora_scale


def list_matrices(model):
    """The layers of a model that have adapters, or may, by name: products with a matrix but the head and embeddings."""
    left_out = EXPERT_NAMES if has_fused_experts(model) else ()
    ends = [each.weight for each in (model.get_input_embeddings(), model.get_output_embeddings()) if each is not None]
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and name.rpartition(".")[2] not in {"lora_A", "lora_B", *left_out}
        and all(module.weight is not end for end in ends)
    }


def has_fused_experts(model):
    """True for a mixture that keeps its experts as one tensor."""
    return any("expert" in name and weights.ndim > 2 for name, weights in model.named_parameters())


@contextlib.contextmanager
def frozen_as(model, precision):
    """A context in which a model's frozen matrices are in fp32, too, if that is the `Precision` it computes in."""
    widened = precision.dtype is None and frozen_dtype(model)
    held = {layer: layer.weight for layer in list_matrices(model).values() if widened}
    for layer, weight in held.items():
        layer.weight = nn.Parameter(weight.float(), requires_grad=False)
    try:
        yield
    finally:
        for layer, weight in held.items():
            layer.weight = weight


def merge_adapters(model):
    """Add to each matrix of a model, in fp32, what its adapters are together, and remove them.

    Raises:
        UserError: layers share a matrix, to which each would add its own.
    """
    layers = list_matrices(model)
    if len({layer.weight for layer in layers.values()}) < len(layers):
        raise UserError("--export: layers of this model share a matrix but not their adapters; use them as they are")
    for layer in layers.values():
        change = layer.lora_B.weight.data @ layer.lora_A.weight.data * layer.lora_scale  # (outputs, inputs)
        layer.weight.data += change.T if isinstance(layer, Conv1D) else change
        layer.lora_hook.remove()
        del layer.lora_A, layer.lora_B
    model.lora = None


def get_lora(model):
    """The `Lora` of a model with adapters; None for one without."""
    return getattr(model, "lora", None)


def trained_parameters(model):
    """The parameters of a model that are trained, by name: all of them, or those of its adapters."""
    return {name: weights for name, weights in model.named_parameters() if weights.requires_grad}


def list_untrained(model):
    """The layers whose B is still zero. After an update these are layers that the model passes by when it computes.

    Some take `layer.weight` instead of calling the layer. All ranks call this.
    """
    layers = list_matrices(model) if get_lora(model) else {}
    return [name for name, layer in layers.items() if not full_tensor(layer.lora_B.weight.detach()).any()]


def frozen_dtype(model):
    """The 16-bit dtype in which a model's frozen matrices are held, for which it needs autocast; None without any."""
    return next((p.dtype for p in model.parameters() if not p.requires_grad and p.dtype.itemsize == 2), None)
