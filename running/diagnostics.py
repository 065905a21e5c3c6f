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


@contextlib.contextmanager
def explain_failed_update(run):
    """Turn a non-finite update, or one that does not fit into memory, into a `UserError` about its window."""
    config, examples = run.config, run.data.train.examples
    window = (run.step, len(examples), config.batch_size, config.seed)
    try:
        with explain_out_of_memory(run, lambda: [examples[index] for index in window_indices(*window)]):
            yield
    except FloatingPointError as error:
        losses = highest_losses(run, examples, window_indices(*window))
        raise UserError(f"update {run.step + 1}: {error}; {resume_hint(run)}; its window:\n{losses}") from error


@contextlib.contextmanager
def explain_failed_write(run):
    """Turn a failed write to the run's directory, or another rank's end, into a `UserError` that says how to resume."""
    try:
        yield
    except (OSError, CorruptError, MemoryError, RuntimeError) as error:
        why = lost_process(error)
        if not why and isinstance(error, MemoryError | RuntimeError) and not is_out_of_memory(error):
            raise
        why = why or getattr(error, "strerror", None) or first_line(error)
        if is_out_of_memory(error):
            why = f"out of memory ({why}); free some, or go on where there is more"
        raise UserError(f"{run.directory}, after update {run.step}: {why}; {resume_hint(run)}") from error


def check_finite(run, split, loss):
    """Raise `UserError` where the loss over a split is not finite; it names the split's worst conversations."""
    if not math.isfinite(loss):
        examples = getattr(run.data, split).examples
        losses = highest_losses(run, examples, range(len(examples)))
        raise UserError(f"after update {run.step}: {split} loss {loss}; {resume_hint(run)}; of these:\n{losses}")


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


@contextlib.contextmanager
def explain_out_of_memory(run, examples):
    """Turn running out of memory, over the examples that `examples()` returns, into a `UserError` that names a flag."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        largest = run.layout.partition(examples())[rank()][0]
        tokens = run.layout.collate(largest).inputs["input_ids"].numel()
        remedy = "a lower --max-length" if run.config.gradient_checkpointing else "--gradient-checkpointing"
        if len(largest) > 1:
            remedy = f"a --micro-batch-tokens below {tokens} (now {run.layout.tokens})"
        longest = max((len(example.input_ids) for example in largest), default=0)
        what = f"out of memory in a micro-batch of {tokens} tokens, its longest conversation {longest}"
        raise UserError(f"after update {run.step}: {what}: use {remedy}; {resume_hint(run)}") from error


def resume_hint(run):
    """The end of an error message: how the run resumes."""
    with contextlib.suppress(OSError, CorruptError):  # which would be another error
        run.saver.wait()
    if not run.saver.saved:
        return "there is no checkpoint yet"
    return f"--resume {shlex.quote(str(run.directory))} continues after update {run.saver.saved}"
