"""How a model's layers run: compiled, with their activations recomputed, deterministically, without dropout."""

import contextlib

import torch


def checkpoint_activations(model):
    """Let a model recompute its activations in the backward pass instead of keeping them."""
    newer = getattr(model, "activation_checkpointing_enable", None)  # transformers 5.17 has only the older one
    enable = newer or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def compile_layers(model, **how):
    """Have `torch.compile` compile a model's layers, all into the same few graphs, when they are first called.

    One layer at a time, because they are alike: 30 of them compile as fast as one.

    Args:
        how: more for `torch.compile`.
    """
    torch.fx.experimental._config.use_duck_shape = False  # as many conversations as heads are so by chance, and once
    for layer in layers_of(model):
        layer.compile(dynamic=True, **how)


def layers_of(model):
    """The layers of a model, by transformers' list of their classes; FSDP puts its name before theirs."""
    for module in model.modules():
        if type(module).__name__.removeprefix("FSDP") in (model._no_split_modules or ()):
            yield module


def compiled_graphs():
    """How many graphs `torch.compile` has made in this process; it should stop growing after the first update."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@contextlib.contextmanager
def deterministic_algorithms(wanted):
    """Let a GPU add in one order: in FlashAttention's backward pass, for one, which otherwise adds as threads come.

    For updates only: what samples an answer has no such algorithm.
    """
    torch.use_deterministic_algorithms(wanted)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def in_eval_mode(model):
    """Switch a model's dropout and the like off, and afterwards back to what it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
