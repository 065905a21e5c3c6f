"""Ranks, collectives over all ranks, and each rank's part of a window.

Without a process group the world size is 1, and every collective returns what it is given. Numbers are reduced on the
CPU (gloo), tensors where they are (gloo or NCCL).
"""

import contextlib
import os

import torch
from torch import distributed


def world_size():
    """The number of processes that train together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank():
    """The number of this process, from 0 to the world size - 1."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def is_rank0():
    """True on rank 0, which alone writes files and prints."""
    return rank() == 0


def local_rank():
    """The number of this process among those of its machine, and of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0)) if distributed.is_initialized() else 0


def local_world_size():
    """The number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if distributed.is_initialized() else 1


# --- collectives


def all_reduce_sum(*numbers):
    """All-reduce one number or several by sum; returns one number or a list. Integers stay exact."""
    return reduce_numbers(numbers, distributed.ReduceOp.SUM)


def all_reduce_max(*numbers):
    """All-reduce one number or several by maximum; returns one number or a list."""
    return reduce_numbers(numbers, distributed.ReduceOp.MAX)


def all_reduce_min(number):
    """All-reduce a number by minimum."""
    return -all_reduce_max(-number)


def reduce_numbers(numbers, operation):
    """All-reduce numbers, as integers or in double precision; returns one number or a list."""
    if world_size() > 1:
        dtype = torch.int64 if all(isinstance(number, int) for number in numbers) else torch.float64
        tensor = torch.tensor(numbers, dtype=dtype)
        distributed.all_reduce(tensor, operation)
        numbers = tensor.tolist()
    return numbers[0] if len(numbers) == 1 else list(numbers)


def all_reduce_tensor(tensor):
    """All-reduce a tensor by sum, in place; returns it."""
    if world_size() > 1:
        distributed.all_reduce(tensor)
    return tensor


def broadcast_from_rank0(function, *arguments):
    """Call a function on rank 0 alone, and broadcast its result."""
    if world_size() == 1:
        return function(*arguments)
    result = [function(*arguments) if is_rank0() else None]
    distributed.broadcast_object_list(result, device=torch.device("cpu"))
    return result[0]


@contextlib.contextmanager
def on_rank0(manager, *arguments):
    """Enter a context manager on rank 0 alone, and broadcast the value it yields."""
    with manager(*arguments) if is_rank0() else contextlib.nullcontext() as value:
        yield broadcast_from_rank0(lambda: value)


def all_gather(value):
    """All-gather a picklable value; returns a list by rank."""
    values = [value] * world_size()
    if world_size() > 1:
        distributed.all_gather_object(values, value)
    return values


def barrier():
    """A barrier, on the CPU: torch's own would take the backend of the GPU."""
    all_reduce_sum(0)


# --- a window's parts


def partition_by_tokens(examples, count):
    """Partition examples among `count` ranks by tokens: the longest first, each to the rank with the fewest so far.

    The result is the same on every rank, without communication. A part may be empty.
    """
    parts, tokens = [[] for _ in range(count)], [0] * count
    for example in sorted(examples, key=lambda example: -len(example.input_ids)) if count > 1 else examples:
        smallest_part = tokens.index(min(tokens))
        parts[smallest_part].append(example)
        tokens[smallest_part] += len(example.input_ids)
    return parts


def load_balance(micro_batches, sync_seconds):
    """Metrics of how evenly a window was partitioned; none for one process.

    Args:
        micro_batches: the tokens of each of this rank's micro-batches. An empty one keeps it in step with other ranks.
        sync_seconds: the time that this rank waited for the gradients of the others.
    """
    if world_size() == 1:
        return {}
    tokens, empty, count = all_reduce_sum(sum(micro_batches), micro_batches.count(0), len(micro_batches))
    return {
        "largest_share": all_reduce_max(sum(micro_batches)) * world_size() / tokens,
        "empty_share": empty / count,
        "waiting_seconds": all_reduce_max(sync_seconds),
    }
