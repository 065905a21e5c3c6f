"""Ways to run a model: compiled, with recomputed activations, deterministic, without dropout or a router's loss."""

import contextlib

import torch
from torch.func import functional_call
from transformers.integrations.moe import ExpertsInterface, grouped_mm_experts_forward

EXPERTS = "grouped_mm_in_autocast"  # the name for `model.set_experts_implementation`
EXTRA_LOSSES = ("output_router_logits", "z_loss_coefficient")  # settings of models; `Trainer` adds what they ask for


def list_extra_losses(model):
    """The settings by which a model would add another loss to the cross-entropy; none is computed.

    They are means over all tokens of a forward pass, so they depend on how a window is cut into micro-batches.
    """
    return [name for name in EXTRA_LOSSES if getattr(model.config.get_text_config(), name, None)]


def without_router_loss(model):
    """The argument of a forward pass with which a mixture does not compute its router's loss."""
    return {"output_router_logits": False} if "output_router_logits" in list_extra_losses(model) else {}


def experts_in_autocast(experts, *inputs, **named):
    """transformers' experts as grouped products, which autocast does not cover, in autocast's precision.

    In fp32 a GPU has no kernel for them: the CPU waits for the numbers of tokens in each layer.
    """
    device_type = next(experts.parameters()).device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        others = {name: weights for name, weights in experts.named_parameters() if weights.dtype != dtype}
        rows_are_aligned = all(size % 8 == 0 for weights in others.values() for size in weights.shape[1:])
        if others and rows_are_aligned:  # to 16 bytes, as the kernel requires
            return functional_call(experts, {name: w.to(dtype) for name, w in others.items()}, inputs, named)
    return grouped_mm_experts_forward(experts, *inputs, **named)


ExpertsInterface.register(EXPERTS, experts_in_autocast)


def use_autocast_in_experts(model):
    """Have a mixture's grouped products follow autocast, if its experts are computed by grouped products."""
    if getattr(model.config.get_text_config(), "_experts_implementation", None) == "grouped_mm":
        model.set_experts_implementation(EXPERTS)


def checkpoint_activations(model):
    """Make a model recompute its activations in the backward pass instead of keeping them."""
    older = model.gradient_checkpointing_enable  # the only one in transformers 5.17
    getattr(model, "activation_checkpointing_enable", older)({"use_reentrant": False})


def compile_layers(model):
    """Compile each of a model's layers when it is first called; as they are alike, they share a few graphs."""
    # Two dimensions that are equal by chance, such as the numbers of conversations and of heads, are not always equal.
    torch.fx.experimental._config.use_duck_shape = False
    for layer in get_layers(model):
        layer.compile(dynamic=True)


def undo_compiling(model):
    """Make a model's layers run as they did before `compile_layers`."""
    for layer in get_layers(model):
        layer._compiled_call_impl = None


def get_layers(model):
    """The layers of a model, by transformers' list of their classes. FSDP puts a prefix before a class's name."""
    for module in model.modules():
        if type(module).__name__.removeprefix("FSDP") in (model._no_split_modules or ()):
            yield module


def compiled_graphs():
    """The number of graphs that `torch.compile` has made in this process; constant after the first update."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@contextlib.contextmanager
def deterministic_algorithms(wanted):
    """Make a GPU add in one order; for updates only, as the sampling of answers has no deterministic algorithm."""
    torch.use_deterministic_algorithms(wanted)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def in_eval_mode(model):
    """Switch a model to eval mode, without dropout, and then back to its mode."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
