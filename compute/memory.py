"""How many tokens a micro-batch may have on a device, whether compiling pays, and how freed memory is used again."""

import ctypes
import math
import sys
import time
from dataclasses import replace

import torch
from torch.distributed.tensor import DTensor

from compute.layout import random_examples
from compute.sharding import is_sharded
from config import UserError

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # of glibc's malloc.h
CPU_TOKENS = 1536  # of a micro-batch; a CPU is no faster with more, and in SmolLM2 they cost 1 MB each
GPU_TOKENS = 2**16  # at most
GPU_SHARE = 0.8  # of what is free; an allocator cannot use the rest
SAMPLE = 4096  # tokens at least to measure with: more than the output head takes at once
# Bytes of training: of a parameter its fp32 weight, gradient and AdamW's two moments; of one in the output head also
# the fp32 gradient of a micro-batch, and the 16-bit weight.
PARAMETER, IN_HEAD = 16, 6
COMPILING_PAYS = 300  # seconds of a run that is not compiled; compiling takes about a minute


def refuse_too_large(parameters, head, precision, config):
    """Raise `UserError` where a model is too large to be trained on a GPU, before any of it is there.

    Args:
        parameters, head: how many the model has, and how many of them its output head.
    """
    if precision.device.type == "cpu":
        return
    free, _ = torch.cuda.mem_get_info(precision.device)
    needed = PARAMETER * parameters + IN_HEAD * head
    if needed / config.shard > free:
        raise UserError(
            f"--model {config.model}: to train {parameters:,} parameters takes {needed / 1e9:.1f} GB before the first "
            f"token (weights, gradients, AdamW), and {precision.device} has {free / 1e9:.1f} GB free; use a smaller "
            f"model, or several processes with --shard {math.ceil(needed / (GPU_SHARE * free))}"
        )


def fitting_tokens(model, token_loss, layout, precision, longest, training):
    """How many tokens a micro-batch may have on this device; the arguments are those of `measured_tokens`."""
    if precision.device.type == "cpu":
        return CPU_TOKENS
    return measured_tokens(model, token_loss, layout, precision, longest, training)


def measured_tokens(model, token_loss, layout, precision, longest, training):
    """How many tokens a micro-batch may have on a GPU.

    By the peak memory of forward and backward passes over two micro-batches of conversations of unequal
    lengths, in train mode, with the gradients there, and with room for AdamW's two moments. A quadratic attention is
    counted too: its rows are as long as the run's longest conversation.

    Args:
        longest: tokens of that conversation.
        training: without it, only the forward pass is measured, for an evaluation.

    Raises:
        UserError: the longest conversation does not fit by itself.
    """
    device, was_training, lengths = precision.device, model.training, unequal(longest)
    model.train(training)
    try:
        one_pass(model, token_loss, layout, precision, [longest], training)  # which leaves the gradients
        try:
            (few, small), (many, large) = (
                peak_of_pass(model, token_loss, layout, precision, rows, training) for rows in (lengths, 2 * lengths)
            )
        except torch.OutOfMemoryError:
            if is_sharded(model):  # the other processes wait for this one
                raise
            return longest
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of memory: a conversation of {longest:,} tokens does not fit on {device} by itself; use "
            "--gradient-checkpointing, a lower --max-length or a smaller model"
        ) from error
    finally:
        model.zero_grad()
        model.train(was_training)
    per_token = (large - small) / (many - few)
    room = GPU_SHARE * (free - training * 8 * sum(map(own_numbers, model.parameters()))) - (small - per_token * few)
    return max(1024, min(GPU_TOKENS, int(room / per_token) // 1024 * 1024))


def unequal(longest):
    """Lengths of conversations, some as long as the longest: SAMPLE tokens at least."""
    lengths = [longest, max(1, longest // 2), max(1, longest // 4), max(1, longest // 4)]
    return lengths * math.ceil(SAMPLE / sum(lengths))


def one_pass(model, token_loss, layout, precision, lengths, training):
    """A forward, and in training a backward pass over one micro-batch of random conversations; returns its tokens."""
    examples = random_examples(lengths, model.get_input_embeddings().num_embeddings)
    (batch,) = replace(layout, tokens=2**40).batches(examples)
    with precision.autocast(), torch.set_grad_enabled(training):
        loss = token_loss(model, batch.to(precision.device))
    if training:
        loss.backward()
    return batch.inputs["input_ids"].numel()


def peak_of_pass(model, token_loss, layout, precision, lengths, training):
    """The tokens of such a pass, padding included, and the memory it takes beyond what is held before it, in bytes."""
    held = torch.cuda.memory_allocated(precision.device)
    torch.cuda.reset_peak_memory_stats(precision.device)
    tokens = one_pass(model, token_loss, layout, precision, lengths, training)
    return tokens, torch.cuda.max_memory_allocated(precision.device) - held


def compiling_pays(model, token_loss, layout, precision, longest, total_tokens):
    """Whether a run over so many tokens would take COMPILING_PAYS seconds on a GPU without it, by a pass that is timed.

    What runs out of memory without being compiled is compiled.
    """
    if precision.device.type == "cpu" or not total_tokens:
        return False
    try:
        one_pass(model, token_loss, layout, precision, [longest], True)
        torch.cuda.synchronize(precision.device)
        began = time.perf_counter()
        tokens = one_pass(model, token_loss, layout, precision, unequal(longest), True)
        torch.cuda.synchronize(precision.device)
        return (time.perf_counter() - began) / tokens * total_tokens > COMPILING_PAYS
    except torch.OutOfMemoryError:
        return True
    finally:
        model.zero_grad()


def own_numbers(weights):
    """How many of some weights are in this process."""
    return weights.to_local().numel() if isinstance(weights, DTensor) else weights.numel()


def keep_freed_memory():
    """Have glibc keep the memory of freed tensors for the next ones, on a CPU.

    It otherwise gives much of it back to the kernel, which clears and maps it anew for the next tensor: a fifth of the
    time of an update. The largest blocks are given back all the same: kept, they are cut up for small ones that stay,
    and a run grew by the 57 MB of SmolLM2's output head in 16 bits with every update. See mallopt(3); without glibc
    nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        for setting, value in ((M_MMAP_THRESHOLD, 2**25), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, 2**26)):
            mallopt(setting, value)


def is_out_of_memory(error):
    """Whether an exception says that memory ran out."""
    signs = ("can't allocate memory", "can't start new thread")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(sign in str(error) for sign in signs)
