"""Diagnostics of a failed run: its conversations, the flag to change, and the update from which it resumes."""

import contextlib
import math
import shlex

from compute.distributed import rank
from config import UserError, first_line, is_out_of_memory
from data import window_indices
from eval import evaluate
from running.distributed import lost_process
from storage.durable import CorruptError


def explain_failed_update(run):
    """The context `explain_failure` for the next update and its window."""
    examples = run.data.train.examples
    window = window_indices(run.step, len(examples), run.config.batch_size, run.config.seed)
    return explain_failure(run, f"update {run.step + 1}", examples, window)


@contextlib.contextmanager
def explain_failure(run, what, examples, indices):
    """Turn a loss that is not finite, or too little memory for some of the examples, into a `UserError` about them."""
    try:
        yield
    except FloatingPointError as error:
        losses = highest_losses(run, examples, indices)
        raise UserError(f"{what}: {error}; {resume_hint(run)}; its conversations:\n{losses}") from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        largest = run.layout.partition([examples[index] for index in indices])[rank()][0]
        tokens = run.layout.collate(largest).inputs["input_ids"].numel()
        remedy = "a lower --max-length" if run.config.gradient_checkpointing else "--gradient-checkpointing"
        if len(largest) > 1:
            remedy = f"a --micro-batch-tokens below {tokens} (now {run.layout.tokens})"
        longest = max((len(example.input_ids) for example in largest), default=0)
        why = f"out of memory in a micro-batch of {tokens} tokens, its longest conversation {longest}"
        raise UserError(f"{what}: {why}: use {remedy}; {resume_hint(run)}") from error


@contextlib.contextmanager
def explain_failed_write(run):
    """Turn a failed write to the run's directory, or another rank's end, into a `UserError` that says how to resume."""
    try:
        yield
    except (OSError, CorruptError, MemoryError, RuntimeError) as error:
        why = lost_process(error)
        if not why and isinstance(error, RuntimeError) and not is_out_of_memory(error):
            raise
        why = why or getattr(error, "strerror", None) or first_line(error)
        if is_out_of_memory(error):
            why = f"out of memory ({why}); free some, or go on where there is more"
        raise UserError(f"{run.directory}, after update {run.step}: {why}; {resume_hint(run)}") from error


def highest_losses(run, examples, indices, most=10):
    """The losses of some examples, one a line: those that are not finite, then the highest."""
    losses = []
    for index in indices:
        result = evaluate(run.model, [examples[index]], run.layout, run.precision)
        losses.append((result.loss, examples.location(index)))
    losses.sort(key=lambda loss: (math.isfinite(loss[0]), -loss[0]))
    lines = [f"loss {loss:.4f}   {location}" for loss, location in losses[:most]]
    if losses[most:]:
        lines.append(f"and {len(losses) - most} more, with losses up to {losses[most][0]:.4f}")
    return "\n".join(lines)


def resume_hint(run):
    """The end of an error message: how the run resumes."""
    with contextlib.suppress(OSError, CorruptError):  # which would be another error
        run.saver.wait()
    if not run.saver.saved:
        return "there is no checkpoint yet"
    return f"--resume {shlex.quote(str(run.directory))} continues after update {run.saver.saved}"
