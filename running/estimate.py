"""What a run would take: memory by part, seconds, bytes on disk. Measured on a few updates at learning rate 0.

Of several processes each measures itself; the memory is that of the one that takes the most.
"""

import os
import shutil
import time
from dataclasses import dataclass

import torch

from compute.memory import own_numbers
from compute.processes import from_first, largest, local_world_size, total, world_size
from compute.sharding import put_apart
from data import window_at, windows_per_epoch
from eval import evaluate
from evaluation.page import duration
from running.diagnostics import explain_failed_update
from running.meter import StepMeter, peak_memory

# In 16 bits on a CPU, what torch compiles for each new shape is kept: SmolLM2's peak grew by 8 % in 8 updates over long
# conversations and by 28 % in the quickstart's 48; in fp32 not at all.
KEPT_ON_CPU = 1.15
SAMPLED = 50  # windows, in which the largest micro-batch is looked for


@dataclass(frozen=True)
class Estimate:
    """What a run would take; memory and disk in bytes."""

    weights: int
    gradients: int
    moments: int  # AdamW's
    peak: float  # measured, and what is kept later
    device: int  # how much memory it has
    training: float  # seconds of all updates
    evaluating: float  # seconds of all evaluations
    disk: int  # at most
    free: int  # on that disk

    def __str__(self):
        rest = max(0, self.peak - self.weights - self.gradients - self.moments)
        parts = f"weights {gb(self.weights)}, gradients {gb(self.gradients)}, AdamW {gb(self.moments)}, "
        parts += f"activations and the rest {gb(rest)}"
        fits = "" if self.peak < 0.9 * self.device else ": hardly fits, use a lower --micro-batch-tokens"
        enough = "" if self.disk < self.free else ": not enough, use a lower --keep or another --output-dir"
        of_each = " of a process" if world_size() > 1 else ""
        lines = {
            "memory": f"{gb(self.peak)} at the peak{of_each} of {gb(self.device)}{fits} ({parts})",
            "time": f"about {duration(self.training + self.evaluating)}, {duration(self.evaluating)} of it for "
            "evaluations; starting, checkpoints and answers come on top",
            "disk": f"up to {gb(self.disk)} of {gb(self.free)} that are free{enough}",
        }
        return "\n".join(f"  {name:<10}{text}" for name, text in lines.items())


def estimate(run, train_step):
    """The `Estimate` of a run that has not begun. Updates at rate 0 leave its weights as they are; nothing is written.

    Args:
        train_step: `train.train_step`.

    Raises:
        UserError: it does not fit in memory.
    """
    config, data = run.config, run.data
    per_token, per_evaluated_token, optimizer = measure(run, train_step)
    update = per_token * data.train.tokens / windows_per_epoch(len(data.train.examples), config.batch_size) + optimizer
    evaluations = 1 + -(-run.total_steps // config.eval_every)
    put_apart(run.model)
    own, parameters = (sum(map(count, run.model.parameters())) for count in (own_numbers, torch.Tensor.numel))
    checkpoint, best = 12 * parameters, 4 * parameters
    grows = run.precision.device.type == "cpu" and run.precision.dtype
    return Estimate(
        weights=4 * own,
        gradients=4 * own,
        moments=8 * own,
        peak=largest(peak_memory(run.precision.device)) * (KEPT_ON_CPU if grows else 1),
        device=device_memory(run.precision.device),
        training=update * run.total_steps,
        evaluating=per_evaluated_token * (evaluations * data.eval.tokens + 2 * data.test.tokens),
        disk=(config.keep + 1) * checkpoint + best,  # a new checkpoint is complete before an old one is removed
        free=from_first(lambda: shutil.disk_usage(run.directory).free),  # whose directory it removes afterwards
    )


def measure(run, train_step):
    """Seconds of a token in an update and in an evaluation, where all processes share them, and of an optimizer's step.

    Raises:
        UserError: there is too little memory.
    """
    batch_size, seed, examples = run.config.batch_size, run.config.seed, run.data.train.examples
    steps = range(min(SAMPLED, windows_per_epoch(len(examples), batch_size)))
    windows = [window_at(step, examples, batch_size, seed) for step in steps]
    heaviest = max(windows, key=lambda window: max(tokens_of(batches[0]) for batches in run.layout.shares(window)))
    settings = {"precision": run.precision, "scaler": run.precision.grad_scaler()}
    settings["max_grad_norm"] = run.config.max_grad_norm
    meter = StepMeter(run.model, run.optimizer)
    meter.measuring = True
    run.model.train()

    def timed(window):
        """Seconds of an update over two micro-batches of each process without the optimizer's, and all their tokens."""
        batches = list(run.layout.share(window))[:2]
        began = time.perf_counter()
        train_step(run.model, run.optimizer, batches, 0.0, **settings)
        return time.perf_counter() - began - meter.seconds, total(sum(batch.tokens for batch in batches))

    with explain_failed_update(run):
        timed(heaviest)  # compiles, and allocates what stays
        seconds, tokens = map(sum, zip(*(timed(window) for window in (heaviest, *windows[:2])), strict=True))
        evaluated = [each for batch in run.layout.cut(run.data.eval.examples)[-world_size() :] for each in batch]
        began = time.perf_counter()
        evaluate(run.model, evaluated, run.layout, run.precision)
        return seconds / tokens, (time.perf_counter() - began) / tokens_of(evaluated), meter.seconds


def tokens_of(examples):
    """The tokens of some examples."""
    return sum(len(example.input_ids) for example in examples)


def device_memory(device):
    """The memory that a device has for a process, in bytes; on a CPU its machine's processes share it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // local_world_size()


def gb(count):
    """Bytes for reading."""
    return f"{count / 1e9:.1f} GB"
