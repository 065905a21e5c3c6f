"""What the processes of a run are to each other: ranks, sums over all of them, each one's share of a window.

One that was started alone is the first of one: nothing is sent, and the functions return what they were given. Numbers
travel between processors and gradients between devices, each by torch.distributed's backend for it.
"""

import contextlib
import os
from datetime import timedelta

import torch
from torch import distributed

# Nobody waits for it: a process that fails is noticed in seconds (`running.together`). It is the longest time that one
# may be busy while the others wait, with a corpus, say.
TIMEOUT = timedelta(hours=12)


def world_size():
    """How many processes train together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank():
    """Which of them this one is, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def is_first():
    """Whether this process writes the files and talks to people."""
    return rank() == 0


def local_rank():
    """Which of its machine's processes this one is, from 0: the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0)) if distributed.is_initialized() else 0


def local_world_size():
    """How many processes this machine has."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if distributed.is_initialized() else 1


# --- numbers and objects


def total(*numbers):
    """The sum of a number over all processes, or of each of several; integers stay exact."""
    return reduced(numbers, distributed.ReduceOp.SUM)


def largest(*numbers):
    """The largest of a number over all processes, or of each of several."""
    return reduced(numbers, distributed.ReduceOp.MAX)


def smallest(number):
    """The smallest of a number over all processes."""
    return -largest(-number)


def reduced(numbers, operation):
    """Numbers after a reduction over all processes: one as itself, several as a list."""
    if world_size() > 1:
        dtype = torch.int64 if all(isinstance(number, int) for number in numbers) else torch.float64
        tensor = torch.tensor(numbers, dtype=dtype)
        distributed.all_reduce(tensor, operation)
        numbers = tensor.tolist()
    return numbers[0] if len(numbers) == 1 else list(numbers)


def summed(tensor):
    """A tensor's sum over all processes."""
    if world_size() > 1:
        distributed.all_reduce(tensor)
    return tensor


def from_first(function, *arguments):
    """What the first process gets from a function; it calls it alone, and tells the others."""
    if world_size() == 1:
        return function(*arguments)
    result = [function(*arguments) if is_first() else None]
    distributed.broadcast_object_list(result, device=torch.device("cpu"))
    return result[0]


@contextlib.contextmanager
def in_first(manager, *arguments):
    """A context that the first process enters alone; the others get what it yields."""
    with manager(*arguments) if is_first() else contextlib.nullcontext() as value:
        yield from_first(lambda: value)


def gathered(value):
    """What every process has under this name: a list, by rank."""
    values = [value] * world_size()
    if world_size() > 1:
        distributed.all_gather_object(values, value)
    return values


def wait_for_all():
    """Return when every process has come here."""
    total(0)


def balance(micro_batches, waited):
    """How evenly an update was shared out; of one process nothing.

    Args:
        micro_batches: the tokens of each that this process had; an empty one only keeps it in step with the others.
        waited: the seconds that this process waited for the others' gradients.
    """
    if world_size() == 1:
        return {}
    tokens, empty, count = total(sum(micro_batches), micro_batches.count(0), len(micro_batches))
    return {
        "largest_share": largest(sum(micro_batches)) * world_size() / tokens,
        "empty_share": empty / count,
        "waiting_seconds": largest(waited),
    }


# --- shares


def shares_by_tokens(examples, count):
    """Examples shared out among `count` processes: the longest first, each to the one that has the fewest tokens.

    Every process computes the same, so nothing has to be sent. A share may be empty.
    """
    shares, tokens = [[] for _ in range(count)], [0] * count
    for example in sorted(examples, key=lambda example: -len(example.input_ids)) if count > 1 else examples:
        least = tokens.index(min(tokens))
        shares[least].append(example)
        tokens[least] += len(example.input_ids)
    return shares
