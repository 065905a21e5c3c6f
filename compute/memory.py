"""Memory: whether a model fits on a GPU, how many tokens a micro-batch may have, and how a CPU reuses freed memory."""

import ctypes
import math
import sys

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from compute.distributed import is_sharded
from compute.layout import random_examples
from config import UserError
from storage.hub import LOADING_ERRORS, explain_load_error, pretrained

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # from glibc's malloc.h
CPU_TOKENS = 1536  # in a micro-batch; a CPU is no faster with more, and in SmolLM2 they cost 1 MB each
GPU_TOKENS = 2**16  # at most
GPU_SHARE = 0.8  # of the free memory; an allocator cannot use the rest
SAMPLE = 4096  # tokens of a measured micro-batch at least, more than the output head takes at once
BYTES_PER_PARAMETER = 16  # fp32 weight, gradient and AdamW's two moments
BYTES_PER_HEAD_PARAMETER = 6  # more in the output head: the fp32 gradient of a micro-batch, and the 16-bit weight


def check_model_fits(path, local_files_only, precision, config):
    """Raise `UserError` if the model at `path`, which is not loaded, is too large to be trained on a GPU."""
    try:
        model_config = AutoConfig.from_pretrained(**pretrained(path, local_files_only))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model_config)
    except LOADING_ERRORS as error:
        raise UserError(f"--model {path}: {explain_load_error(path, error)}") from error
    parameters = sum(weights.numel() for weights in model.parameters())
    needed = BYTES_PER_PARAMETER * parameters + BYTES_PER_HEAD_PARAMETER * model.get_output_embeddings().weight.numel()
    free, _ = torch.cuda.mem_get_info(precision.device)
    if needed / config.shard > free:
        raise UserError(
            f"--model {config.model}: training {parameters:,} parameters takes {needed / 1e9:.1f} GB before the first "
            f"token (weights, gradients, AdamW), and {precision.device} has {free / 1e9:.1f} GB free; use a smaller "
            f"model, or several processes with --shard {math.ceil(needed / (GPU_SHARE * free))}"
        )


def measure_micro_batch_budget(model, token_loss, layout, precision, longest, training):
    """The number of tokens that a micro-batch may have on a GPU, padding counted.

    Measured is the peak memory of passes over two micro-batches of conversations of unequal lengths, with the
    gradients in memory and room for AdamW's two moments. The longest row counts quadratic attention. For an evaluation
    the forward pass is measured alone.
    """
    device, was_training = precision.device, model.training
    lengths = [longest, max(1, longest // 2), max(1, longest // 4), max(1, longest // 4)]
    lengths *= math.ceil(SAMPLE / sum(lengths))
    model.train(training)
    try:
        before = torch.cuda.memory_allocated(device)
        probe_pass(model, token_loss, layout, precision, [longest], training)
        moments = 2 * (torch.cuda.memory_allocated(device) - before)  # AdamW's, by what remains: the gradients
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
    room = GPU_SHARE * (free - moments) - (small - per_token * few)
    return max(1024, min(GPU_TOKENS, int(room / per_token) // 1024 * 1024))


def probe_pass(model, token_loss, layout, precision, lengths, training):
    """The tokens of a random micro-batch, padding counted, and the bytes that its passes took at their peak."""
    before = torch.cuda.memory_allocated(precision.device)
    torch.cuda.reset_peak_memory_stats(precision.device)
    batch = layout.collate(random_examples(lengths, model.get_input_embeddings().num_embeddings))
    with precision.autocast(), torch.set_grad_enabled(training):
        loss = token_loss(model, batch.to(precision.device))
    if training:
        loss.backward()
    return batch.inputs["input_ids"].numel(), torch.cuda.max_memory_allocated(precision.device) - before


def keep_freed_memory():
    """Make glibc keep the memory of freed tensors for the next ones, on a CPU; see mallopt(3).

    By default glibc returns much of it to the kernel, which clears and maps it again for the next tensor: a fifth of
    the time of an update. Blocks above 32 MB are returned: if kept, small ones are cut out of them, and a run grows
    with every update (docs/performance.md). Does nothing without glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(M_MMAP_THRESHOLD, 2**25)
        mallopt(M_TRIM_THRESHOLD, -1)
        mallopt(M_TOP_PAD, 2**26)


def is_out_of_memory(error):
    """True if an exception reports that memory ran out."""
    signs = ("can't allocate memory", "can't start new thread")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(sign in str(error) for sign in signs)
