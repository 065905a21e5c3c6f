"""What went wrong in a run, in words that somebody can act on: which conversations, which flag, what is left."""

import contextlib
import math

import torch

from config import UserError
from data import micro_batches
from eval import evaluate


def highest_losses(run, examples, indices, most=10):
    """Some examples with the loss of each, a line each: those whose loss is not finite, then the highest."""
    losses = []
    for index in indices:
        tokens = run.config.micro_batch_tokens
        result = evaluate(run.model, [examples[index]], run.tokenizer.pad_token_id, run.precision, tokens)
        losses.append((result.loss, examples.place(index)))
    losses.sort(key=lambda loss: (math.isfinite(loss[0]), -loss[0]))
    yield from (f"loss {loss:.4f}   {place}" for loss, place in losses[:most])
    if losses[most:]:
        yield f"and {len(losses) - most} more, with losses up to {losses[most][0]:.4f}"


@contextlib.contextmanager
def memory_explained(run, examples):
    """Say what did not fit, and what to turn, where memory runs out over some examples."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        told = isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
        if not told:
            raise
        largest = micro_batches(examples, run.config.micro_batch_tokens)[0]
        rows, longest = len(largest), len(largest[0].input_ids)
        turn = "a lower --max-length" if run.config.gradient_checkpointing else "--gradient-checkpointing"
        if rows > 1:
            turn = f"a --micro-batch-tokens below {rows * longest} (now {run.config.micro_batch_tokens})"
        what = f"out of memory in a micro-batch of {rows} x {longest} tokens (conversations x longest)"
        raise UserError(f"after update {run.step}: {what}: use {turn}; {way_on(run)}") from error


def way_on(run):
    """What somebody can do whose run an error has ended."""
    return f"--resume {run.directory} goes on after update {run.saved}" if run.saved else "there is no checkpoint yet"
