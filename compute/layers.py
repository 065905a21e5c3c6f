"""Ways to run a model's layers: compiled, with recomputed activations, deterministic, without dropout."""

import contextlib

import torch


def checkpoint_activations(model):
    """Make a model recompute its activations in the backward pass instead of keeping them."""
    newer = getattr(model, "activation_checkpointing_enable", None)  # transformers 5.17 has only the older one
    enable = newer or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def compile_layers(model, **options):
    """Compile a model's layers with `torch.compile` when they are first called.

    Each layer is compiled by itself; as they are alike they share a few graphs, and 30 compile as fast as one.

    Args:
        options: more arguments of `torch.compile`.
    """
    # Two dimensions that are equal by chance, such as the numbers of conversations and of heads, are not always equal.
    torch.fx.experimental._config.use_duck_shape = False
    for layer in get_layers(model):
        layer.compile(dynamic=True, **options)


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
    """Use torch's deterministic algorithms, so that a GPU adds in one order, as in FlashAttention's backward pass.

    For updates only: the sampling of answers has no deterministic algorithm.
    """
    torch.use_deterministic_algorithms(wanted)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def in_eval_mode(model):
    """Switch a model to eval mode, without dropout, and afterwards back to the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
