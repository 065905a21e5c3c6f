"""What went wrong in a run, in words that somebody can act on: which conversations, which flag, what is left."""

import contextlib
import math

import torch

from config import UserError
from eval import evaluate


def highest_losses(run, examples, indices, most=10):
    """Some examples with the loss of each, a line each: those whose loss is not finite, then the highest."""
    losses = []
    for index in indices:
        result = evaluate(run.model, [examples[index]], run.layout, run.precision)
        losses.append((result.loss, examples.place(index)))
    losses.sort(key=lambda loss: (math.isfinite(loss[0]), -loss[0]))
    yield from (f"loss {loss:.4f}   {place}" for loss, place in losses[:most])
    if losses[most:]:
        yield f"and {len(losses) - most} more, with losses up to {losses[most][0]:.4f}"


@contextlib.contextmanager
def memory_explained(run, examples):
    """Say what did not fit, and what to turn, where memory runs out over some examples, which a call of that gives."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        told = isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
        if not told:
            raise
        largest = run.layout.cut(examples())[0]
        tokens = next(run.layout.batches(largest)).inputs["input_ids"].numel()
        turn = "a lower --max-length" if run.config.gradient_checkpointing else "--gradient-checkpointing"
        if len(largest) > 1:
            turn = f"a --micro-batch-tokens below {tokens} (now {run.layout.tokens})"
        longest = len(largest[0].input_ids)
        what = f"out of memory in a micro-batch of {tokens} tokens, its longest conversation {longest}"
        raise UserError(f"after update {run.step}: {what}: use {turn}; {way_on(run)}") from error


def way_on(run):
    """What somebody can do whose run an error has ended."""
    return f"--resume {run.directory} goes on after update {run.saved}" if run.saved else "there is no checkpoint yet"
