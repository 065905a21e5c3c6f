"""Weights that several processes share: torch's FSDP2, set up so that an update is still the same.

Each process keeps a part of every weight, of its gradient and of AdamW's moments. A layer's weights are put together
when it computes and its gradient is summed as soon as it is known, in every micro-batch.
"""

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from compute.layers import get_layers
from compute.processes import world_size
from config import UserError


def check_shard(count):
    """Raise `UserError` where so many processes cannot share one copy of the weights."""
    size = world_size()
    if size == 1 and count > 1:
        raise UserError(f"--shard {count}: it takes several processes; start them with torchrun, or use --shard 1")
    if size % count:
        fitting = ", ".join(str(n) for n in range(1, size + 1) if size % n == 0)
        raise UserError(f"--shard {count}: {size} processes cannot be divided by it; use one of {fitting}")


def shard(model, count, device, dtype):
    """Divide the weights of a model, which has none yet (they are on "meta"), among `count` processes.

    Where there are more processes, each `count` of them share a copy.

    Args:
        dtype: in which the layers' weights are sent and multiplied; None: fp32. What a gradient is summed in is fp32,
            as are the embeddings, the output head and the last norm, which autocast casts where it should.

    Raises:
        UserError: it is not known what the model's layers are.
    """
    copies = world_size() // count
    shape, names = ((copies, count), ("copy", "part")) if copies > 1 else ((count,), ("part",))
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    layers = list(get_layers(model))
    if not layers:
        raise UserError("--shard: it is not known what this model's layers are; use --shard 1")
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=dtype and torch.float32, cast_forward_inputs=False)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    # In one group that stays together until the backward pass, as the loss reads the head's weights by itself.
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    fully_shard(ends, mesh=mesh, reshard_after_forward=False)
    fully_shard(model.base_model, mesh=mesh)
    for part in fsdp_modules(model):
        part.set_gradient_divide_factor(1.0)  # a sum, no mean
        part.set_force_sum_reduction_for_comms(True)  # gloo knows no other that is one
    model.to_empty(device=device)


def is_sharded(model):
    """Whether processes share a model's weights."""
    return any(True for _ in fsdp_modules(model))


def fsdp_modules(model):
    """The modules whose weights are put together at once."""
    return (module for module in model.modules() if isinstance(module, FSDPModule))


def reshard(model):
    """Leave each process with its part of the weights alone, as it is after a backward pass."""
    for part in fsdp_modules(model):
        part.reshard()


def full_tensor(tensor):
    """A tensor, put together where processes share it: all of them call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
