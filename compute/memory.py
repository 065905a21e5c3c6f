"""How many tokens a micro-batch may have on a device, and how freed memory is used again."""

import ctypes
import sys

import torch

from compute.layout import random_examples

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of glibc's malloc.h
CPU_TOKENS = 1536  # of a micro-batch; a CPU is no faster with more, and in SmolLM2 they cost 1 MB each
GPU_TOKENS = 2**16  # at most
GPU_SHARE = 0.7  # of what is free; the rest is for the loss, and for what an allocator cannot use


def fitting_tokens(model, token_loss, layout, precision):
    """How many tokens a micro-batch may have on this device.

    On a GPU, a share of the memory that is left when gradients, AdamW's two moments and 16-bit weights have theirs, by
    what the activations of a token take: two forward passes of different lengths measure that.
    """
    device = precision.device
    if device.type == "cpu":
        return CPU_TOKENS
    taken = []
    for tokens in (512, 2048):
        (batch,) = layout.batches(random_examples([512] * (tokens // 512), model.get_input_embeddings().num_embeddings))
        before = torch.cuda.memory_allocated(device)
        with precision.autocast():
            loss = token_loss(model, batch.to(device))
        taken.append(torch.cuda.memory_allocated(device) - before)
        del loss
    per_token = (taken[1] - taken[0]) / (2048 - 512)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    free -= (3 * 4 + 2) * sum(p.numel() for p in model.parameters())
    return max(1024, min(GPU_TOKENS, int(GPU_SHARE * free / per_token) // 1024 * 1024))


def keep_freed_memory():
    """Have glibc keep the memory of freed tensors for the next ones, on a CPU.

    It otherwise gives much of it back to the kernel, which clears and maps it anew for the next tensor: a fifth of the
    time of an update. See mallopt(3); without glibc nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        for setting, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, 2**26)):
            mallopt(setting, value)


def is_out_of_memory(error):
    """Whether an exception says that memory ran out."""
    signs = ("can't allocate memory", "can't start new thread")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(sign in str(error) for sign in signs)
