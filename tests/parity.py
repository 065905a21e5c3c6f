"""Ours and `Trainer` side by side: running our loop under the same eyes, and naming whatever differs."""

import math

import torch
import transformers

from compute.layers import checkpoint_activations
from compute.self_check import choose_layout
from data import Data, Split, window_at
from model import Precision, token_loss
from running.run import Run
from tests.reference import Witness
from train import make_optimizer, updates


def train(model, examples, eval_examples, tokenizer, config):
    """Train a model with this project's loop, `train.updates`.

    Returns:
        The list of its `Update`s, their conversations in the window's order.
    """
    witness = Witness(model)
    precision = Precision(config.dtype, next(model.parameters()).device)
    layout = choose_layout(model, token_loss, config, tokenizer.pad_token_id, precision)
    if config.gradient_checkpointing:
        checkpoint_activations(model)
    data = Data(Split(examples, 0, 0), Split(eval_examples, 0, 0), Split([], 0, 0))
    optimizer = make_optimizer(model, config.weight_decay)
    run = Run(config, precision, layout, tokenizer, data, model, optimizer, precision.grad_scaler())
    for step, metrics in enumerate(updates(run)):
        window = window_at(step, examples, config.batch_size, config.seed)
        conversations = [tuple(example.input_ids.tolist()) for example in window]
        assert sorted(witness.seen) == sorted(conversations)  # a micro-batch may have them in another order
        witness.seen = conversations
        witness.update_ended(metrics["loss"], metrics["grad_norm"], metrics["lr"])
    return witness.updates


def compare(ours, trainers, our_model, trainers_model, loss=1e-6, grad_norm=1e-6, weights=1e-6):
    """The largest differences between two runs, by quantity; the tolerances are relative, that of the weights absolute.

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
    largest["weights"] = weight_difference(our_model, trainers_model)
    assert largest["weights"] <= weights, (
        f"weights: {whose} ends up to {largest['weights']:.1e} from ours, tolerance {weights:.0e}"
    )
    return largest


def weight_difference(model, other):
    """The largest absolute difference between two models' weights; NaN, within no tolerance, where one of them is."""
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return torch.stack([(ours.double() - theirs.double()).abs().max() for ours, theirs in pairs]).max().item()
