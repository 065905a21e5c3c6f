"""Reading a model that processes share: the first one reads it and hands it on, tensor by tensor.

Nobody holds more than its own part and a tensor or two, or what one is made of. `from_pretrained` knows many ways of
naming, joining and converting what is in files, so it does the reading, and each weight is taken from it as it is set.
What cannot be taken so early goes out at the end: what transformers may still compare (tied weights) or change
(embeddings that get new rows), and what has to be refused.
"""

import contextlib
import os
from collections import Counter

import torch
from torch import distributed
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from compute.processes import from_first, is_first
from compute.sharding import part_like


def fill(model, read):
    """Give a divided model the weights and buffers of a whole one. All processes call this.

    Args:
        read: returns the whole one; only the first process calls it.
    """
    whole = None
    if is_first():
        with handing_on(model) as sent:
            whole = read()
        for name, weights in whole.named_parameters():
            if not (weights.is_meta and name in sent):
                hand_on(model, name, weights)
        hand_on(model)
    else:
        while hand_on(model):
            pass
    found = dict(whole.named_buffers()) if is_first() else {}
    for name, buffer in model.named_buffers():  # those that are in no file, too
        if is_first():
            buffer.copy_(found[name])
        distributed.broadcast(buffer, 0)


@torch.no_grad()
def hand_on(model, name="", whole=None):
    """Give a divided model one tensor. All processes call this until there is none; returns its name.

    Args:
        name, whole: the tensor, in the first process alone; nothing: that was all.
    """
    name = from_first(lambda: name)
    if name:
        weights = model.get_parameter(name)
        like = {"dtype": weights.dtype, "device": weights.device}
        whole = whole.detach().to(**like).contiguous() if is_first() else torch.empty(weights.shape, **like)
        distributed.broadcast(whole, 0)
        weights.copy_(part_like(whole, weights))
    return name


@contextlib.contextmanager
def handing_on(model):
    """A context in which what `from_pretrained` reads is handed on to a divided model; yields the names of that.

    In its place the model that is read gets a tensor without numbers, on "meta".
    """
    parents, sent, fitting = {}, set(), dict(once(model))

    def remember(module, name, child):
        parents[child] = module, name

    def take(module, name, weights):
        name = path_to(module, parents) + name
        if may_be_taken(weights, fitting.get(name)):
            hand_on(model, name, weights)
            sent.add(name)
            empty = torch.nn.Parameter(torch.empty_like(weights, device="meta"), weights.requires_grad)
            empty._is_hf_initialized = True  # or transformers would draw random numbers for it
            return empty
        return None

    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # else threads of transformers read ahead
    with contextlib.ExitStack() as stack:
        stack.callback(register_module_module_registration_hook(remember).remove)
        stack.callback(register_module_parameter_registration_hook(take).remove)
        yield sent


def once(model):
    """The weights of a model that have one name; pairs of a name and the weights."""
    every = list(model.named_parameters(remove_duplicate=False))
    names = Counter(id(weights) for _, weights in every)
    return ((name, weights) for name, weights in every if names[id(weights)] == 1)


def path_to(module, parents):
    """What the names of a module's weights begin with."""
    path = ""
    while module in parents:
        module, name = parents[module]
        path = f"{name}.{path}"
    return path


def may_be_taken(weights, theirs):
    """Whether weights that were just set have come out of a file, and are what the divided model has under this name.

    Those that are not finite are left for the whole model's checks.
    """
    read = getattr(weights, "_is_hf_initialized", False) and not weights.is_meta
    return read and theirs is not None and weights.shape == theirs.shape and bool(weights.isfinite().all())
