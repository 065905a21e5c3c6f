"""Ours and `Trainer` side by side: running our loop under the same eyes, and naming whatever differs."""

import math

import torch
import transformers
from torch.optim.optimizer import register_optimizer_step_pre_hook

from compute.distributed import full_tensor
from compute.layers import checkpoint_activations
from compute.self_check import choose_layout
from data import Data, Split, window_at
from model import Precision, token_loss
from running.run import Run
from tests.reference import Witness
from train import make_optimizer, updates


def train(model, examples, tokenizer, config):
    """Train a model with this project's loop, `train.updates`.

    Returns:
        The list of its `Update`s, their conversations in the window's order.
    """
    witness = Witness(model)
    precision = Precision(config.dtype, next(model.parameters()).device)
    layout = choose_layout(model, token_loss, config, tokenizer.pad_token_id, precision)
    if config.gradient_checkpointing:
        checkpoint_activations(model)
    data = Data(Split(examples, 0, 0), Split([], 0, 0), Split([], 0, 0))
    optimizer = make_optimizer(model, config.weight_decay, config.adam_beta2)
    run = Run(config, precision, layout, tokenizer, data, model, optimizer, precision.grad_scaler())
    for step, metrics in enumerate(updates(run)):
        window = window_at(step, examples, config.batch_size, config.seed)
        conversations = [tuple(example.input_ids.tolist()) for example in window]
        assert sorted(witness.seen) == sorted(conversations)  # a micro-batch may have them in another order
        witness.seen = conversations
        witness.update_ended(metrics["loss"], metrics["grad_norm"], metrics["lr"])
    return witness.updates


class GradientFloor:
    """Within a `with`, each weight's smallest gradient in any update, relative to its tensor's root mean square.

    AdamW divides a gradient by its size: where a gradient is a rounding error, the step has a random sign and the size
    of the learning rate. Weights can be compared only where the floor is well above rounding.
    """

    def __init__(self, model):
        self.model, self.values = model, None

    def __enter__(self):
        self.hook = register_optimizer_step_pre_hook(self.look)
        return self

    def look(self, *_):
        every = self.model.parameters()
        gradients = [full_tensor(torch.zeros_like(p) if p.grad is None else p.grad).abs() for p in every]
        relative = flatten(each / each.square().mean().sqrt() for each in gradients)  # NaN where there is no gradient
        self.values = relative if self.values is None else relative.minimum(self.values)

    def __exit__(self, *_):
        self.hook.remove()


def compare(ours, trainers, our_model, trainers_model, floor=None, loss=1e-5, grad_norm=1e-5, weights=1e-4):
    """The largest differences between two runs, by quantity; relative, and for weights as in `flat_difference`.

    Raises:
        AssertionError: a quantity is beyond its tolerance; the message says which, in which update, and by how much.
    """
    whose = f"Trainer of transformers {transformers.__version__}"
    assert len(ours) == len(trainers), f"number of updates: {whose} made {len(trainers)}, we made {len(ours)}"
    tolerances = {"learning_rate": 0.0, "loss": loss, "grad_norm": grad_norm}
    largest = dict.fromkeys(tolerances, 0.0)
    for number, (our, their) in enumerate(zip(ours, trainers, strict=True), 1):
        assert our.conversations == their.conversations, f"conversations: {whose} sees others in update {number}"
        for quantity, tolerance in tolerances.items():
            mine, other = getattr(our, quantity), float(getattr(their, quantity))
            difference = abs(mine - other) / (abs(other) or math.nan) if mine != other else 0.0
            assert difference <= tolerance, (
                f"{quantity}: {whose} has {other!r} in update {number}, we have {mine!r}: "
                f"relative difference {difference:.1e}, tolerance {tolerance:.0e}"
            )
            largest[quantity] = max(largest[quantity], difference)
    rate = sum(our.learning_rate for our in ours)
    largest["weights"] = weight_difference(our_model, trainers_model, floor, rate)
    assert largest["weights"] <= weights, (
        f"weights: {whose} ends up to {largest['weights']:.1e} from ours, tolerance {weights:.0e}"
    )
    return largest


def weight_difference(model, other, floor=None, rate=1.0):
    """The largest difference between two models' weights, as `flat_difference` has it."""
    return flat_difference(flatten(model.parameters()), flatten(other.parameters()), floor, rate)


def flat_difference(weights, others, floor=None, rate=1.0):
    """The largest difference between weights, one long tensor each; NaN, within no tolerance, where one of them is.

    Without a `gradient_floor` it is absolute. With one it is relative to the sum of the learning rates, and leaves out
    the weights whose gradient was rounding in some update, and what the weights themselves are rounded by.
    """
    apart = (weights - others).abs()
    if floor is None:
        return apart.max().item()
    beyond_rounding = (apart - 8 * torch.finfo(weights.dtype).eps * others.abs()).clamp(min=0)
    compared = floor > 1e-2
    assert compared.sum() > 0.3 * len(compared), "most gradients are rounding: too few weights can be compared"
    return beyond_rounding.where(compared, 0.0).max().item() / rate


def flatten(tensors):
    """Tensors as one of one dimension, on the CPU; all ranks call this where they are sharded."""
    return torch.cat([full_tensor(tensor.detach()).flatten().cpu() for tensor in tensors])
