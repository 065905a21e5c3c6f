"""Memory: whether a model fits on a GPU, how many tokens a micro-batch may have, and how a CPU reuses freed memory."""

import ctypes
import math
import sys
from dataclasses import replace

import torch
from torch.distributed.tensor import DTensor

from compute.layout import random_examples
from compute.sharding import is_sharded
from config import UserError

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # from glibc's malloc.h
CPU_TOKENS = 1536  # in a micro-batch; a CPU is no faster with more, and in SmolLM2 they cost 1 MB each
GPU_TOKENS = 2**16  # at most
GPU_SHARE = 0.8  # of the free memory; an allocator cannot use the rest
SAMPLE = 4096  # tokens at least in a measured micro-batch: more than the output head takes at once
BYTES_PER_PARAMETER = 16  # fp32 weight, gradient and AdamW's two moments
BYTES_PER_HEAD_PARAMETER = 6  # more in the output head: the fp32 gradient of a micro-batch, and the 16-bit weight


def check_model_fits(parameters, head, precision, config):
    """Raise `UserError` if a model is too large to be trained on a GPU; called before the model is loaded.

    Args:
        parameters, head: the number of the model's parameters, and of those in its output head.
    """
    if precision.device.type == "cpu":
        return
    free, _ = torch.cuda.mem_get_info(precision.device)
    needed = BYTES_PER_PARAMETER * parameters + BYTES_PER_HEAD_PARAMETER * head
    if needed / config.shard > free:
        raise UserError(
            f"--model {config.model}: training {parameters:,} parameters takes {needed / 1e9:.1f} GB before the first "
            f"token (weights, gradients, AdamW), and {precision.device} has {free / 1e9:.1f} GB free; use a smaller "
            f"model, or several processes with --shard {math.ceil(needed / (GPU_SHARE * free))}"
        )


def measure_micro_batch_budget(model, token_loss, layout, precision, longest, training):
    """The number of tokens that a micro-batch may have on a GPU, padding counted.

    It follows from the peak memory of passes over two micro-batches of conversations of unequal lengths, in train
    mode, with the gradients in memory and room for AdamW's two moments. As the longest row is as long as the run's
    longest conversation, quadratic attention is counted too.

    Args:
        longest: tokens of that conversation.
        training: False to measure the forward pass alone, for an evaluation.

    Raises:
        UserError: the longest conversation does not fit by itself.
    """
    device, was_training = precision.device, model.training
    lengths = [longest, max(1, longest // 2), max(1, longest // 4), max(1, longest // 4)]
    lengths *= math.ceil(SAMPLE / sum(lengths))
    model.train(training)
    try:
        probe_pass(model, token_loss, layout, precision, [longest], training)  # leaves the gradients in memory
        try:
            few, small = probe_pass(model, token_loss, layout, precision, lengths, training)
            many, large = probe_pass(model, token_loss, layout, precision, 2 * lengths, training)
        except torch.OutOfMemoryError:
            if is_sharded(model):  # the other ranks wait in a collective for this one
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
    moments = 8 * sum(map(local_numel, model.parameters())) if training else 0
    room = GPU_SHARE * (free - moments) - (small - per_token * few)
    return max(1024, min(GPU_TOKENS, int(room / per_token) // 1024 * 1024))


def probe_pass(model, token_loss, layout, precision, lengths, training):
    """Run a forward pass, and in training a backward pass, over one micro-batch of random conversations.

    Returns:
        Its tokens, padding included, and the peak memory beyond what was allocated before, in bytes.
    """
    before = torch.cuda.memory_allocated(precision.device)
    torch.cuda.reset_peak_memory_stats(precision.device)
    examples = random_examples(lengths, model.get_input_embeddings().num_embeddings)
    (batch,) = replace(layout, tokens=2**40).micro_batches(examples)
    with precision.autocast(), torch.set_grad_enabled(training):
        loss = token_loss(model, batch.to(precision.device))
    if training:
        loss.backward()
    return batch.inputs["input_ids"].numel(), torch.cuda.max_memory_allocated(precision.device) - before


def local_numel(weights):
    """The number of elements of a tensor that are on this rank."""
    return weights.to_local().numel() if isinstance(weights, DTensor) else weights.numel()


def keep_freed_memory():
    """Make glibc keep the memory of freed tensors for the next ones, on a CPU; see mallopt(3).

    By default glibc returns much of it to the kernel, which clears and maps it again for the next tensor: a fifth of
    the time of an update. Blocks above 32 MB are still returned: when they were kept, small blocks were cut out of
    them, and a run grew by the 57 MB of SmolLM2's output head in 16 bits with every update. Does nothing without glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        for setting, value in ((M_MMAP_THRESHOLD, 2**25), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, 2**26)):
            mallopt(setting, value)


def is_out_of_memory(error):
    """True if an exception reports that memory ran out."""
    signs = ("can't allocate memory", "can't start new thread")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(sign in str(error) for sign in signs)
