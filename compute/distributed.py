"""Ranks: collectives, sharded weights, each rank's part of a window.

Without a process group the world size is 1, and every collective returns what it is given. Numbers are reduced on the
CPU (gloo), tensors where they are (gloo or NCCL).
"""

import contextlib
import os

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from compute.layers import get_layers
from config import UserError


def world_size():
    """The number of processes that train together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank():
    """The number of this process, from 0 to the world size - 1."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def is_rank0():
    """True on rank 0, which alone writes files and prints."""
    return rank() == 0


def local_world_size():
    """The number of processes on this machine, by torchrun's environment."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


# --- collectives


def all_reduce_sum(*numbers):
    """All-reduce one number or several by sum; returns one number or a list. Integers stay exact."""
    return reduce_numbers(numbers, distributed.ReduceOp.SUM)


def all_reduce_max(number):
    """All-reduce a number by maximum."""
    return reduce_numbers([number], distributed.ReduceOp.MAX)


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
    result = [function(*arguments) if is_rank0() else None]
    if world_size() > 1:
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


def check_own_device(device):
    """Raise `UserError` unless all ranks compute on the same kind of device, and each on a GPU of its own."""
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None) if device.type == "cuda" else None
    devices = all_gather((device.type, uuid and str(uuid)))
    for number, (kind, gpu) in enumerate(devices):
        if kind != devices[0][0]:
            raise UserError(f"--device: process 0 has {devices[0][0]} and process {number} has {kind}; name one")
        if gpu and (other := devices.index((kind, gpu))) != number:
            raise UserError(f"--device cuda: processes {other} and {number} take the same GPU; start fewer")


def barrier():
    """A barrier, on the CPU: torch's own would take the backend of the GPU."""
    all_reduce_sum(0)


# --- sharded weights, by torch's FSDP2


def check_shard(count):
    """Raise `UserError` unless the world size is a multiple of `count`."""
    size = world_size()
    if size == 1 and count > 1:
        raise UserError(f"--shard {count}: it takes several processes; start them with torchrun, or use --shard 1")
    if size % count:
        fitting = ", ".join(str(number) for number in range(1, size + 1) if size % number == 0)
        raise UserError(f"--shard {count}: {size} processes cannot be divided by it; use one of {fitting}")


def shard(model, count, device, dtype):
    """Shard the weights of a model on "meta", its gradients and AdamW's moments over each `count` ranks.

    Layers' weights are sent and multiplied in `dtype`; None: fp32, as the embeddings, the output head, the last norm
    and the sums of gradients always are.
    """
    copies = world_size() // count
    shape, names = ((copies, count), ("copy", "part")) if copies > 1 else ((count,), ("part",))
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    layers = list(get_layers(model))
    if not layers:
        raise UserError("--shard: cannot identify this model's layers; use --shard 1")
    for name, module in model.named_modules():  # FSDP's ranks would send the gradients of different experts
        if isinstance(module, torch.nn.ModuleList | torch.nn.ModuleDict) and "expert" in name.rpartition(".")[2]:
            raise UserError(f"--shard: the experts of this model are modules of their own ({name}); use --shard 1")
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=dtype and torch.float32, cast_forward_inputs=False)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    # One group that is not resharded until the backward pass, as the loss reads the head's weights itself.
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    fully_shard(ends, mesh=mesh, reshard_after_forward=False)
    fully_shard(model.base_model, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # a sum, not a mean
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other reduction that sums
    model.to_empty(device=device)


def is_sharded(model):
    """True if the ranks share a model's weights."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def full_tensor(tensor):
    """A tensor, gathered where it is sharded: all ranks call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# --- a window's parts


def partition_by_tokens(examples, count):
    """Partition examples among `count` ranks by tokens: the longest first, each to the rank with the fewest so far.

    The result is the same on every rank, without communication. A part may be empty.
    """
    parts, tokens = [[] for _ in range(count)], [0] * count
    for example in sorted(examples, key=lambda example: -len(example.input_ids)):
        smallest = tokens.index(min(tokens))
        parts[smallest].append(example)
        tokens[smallest] += len(example.input_ids)
    return parts
