"""What a run would take: memory by part, seconds, bytes on disk. Measured on a few updates at learning rate 0."""

import os
import shutil
import time
from dataclasses import dataclass

import torch

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
        lines = {
            "memory": f"{gb(self.peak)} at the peak of {gb(self.device)}{fits} ({parts})",
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
    config, examples = run.config, run.data.train.examples
    per_epoch = windows_per_epoch(len(examples), config.batch_size)
    windows = [window_at(step, examples, config.batch_size, config.seed) for step in range(min(SAMPLED, per_epoch))]
    largest = max(windows, key=lambda window: tokens_of(run.layout.cut(window)[0]))
    meter, run.scaler = StepMeter(run.model, run.optimizer), run.precision.grad_scaler()
    meter.measuring = True
    run.model.train()

    def timed(window):
        """Seconds of an update over two micro-batches of a window without the optimizer's, and their tokens."""
        batches = list(run.layout.batches(window))[:2]
        began = time.perf_counter()
        train_step(
            run.model,
            run.optimizer,
            batches,
            0.0,
            precision=run.precision,
            scaler=run.scaler,
            max_grad_norm=config.max_grad_norm,
        )
        return time.perf_counter() - began - meter.seconds, sum(batch.tokens for batch in batches)

    with explain_failed_update(run):
        timed(largest)  # compiles, and allocates what stays
        measured = [timed(window) for window in (largest, *windows[:2])]
        per_token = sum(seconds for seconds, _ in measured) / sum(tokens for _, tokens in measured)
        evaluated = run.layout.cut(run.data.eval.examples)[-1]
        began = time.perf_counter()
        evaluate(run.model, evaluated, run.layout, run.precision)
        per_evaluated_token = (time.perf_counter() - began) / tokens_of(evaluated)
    seconds = per_token * run.data.train.tokens / per_epoch + meter.seconds
    evaluations = 1 + -(-run.total_steps // config.eval_every)
    evaluated_tokens = evaluations * run.data.eval.tokens + 2 * run.data.test.tokens
    parameters = sum(p.numel() for p in run.model.parameters())
    checkpoint, best = 12 * parameters, 4 * parameters
    grows = run.precision.device.type == "cpu" and run.precision.dtype
    return Estimate(
        weights=4 * parameters,
        gradients=4 * parameters,
        moments=8 * parameters,
        peak=peak_memory(run.precision.device) * (KEPT_ON_CPU if grows else 1),
        device=device_memory(run.precision.device),
        training=seconds * run.total_steps,
        evaluating=per_evaluated_token * evaluated_tokens,
        disk=(config.keep + 1) * checkpoint + best,  # a new checkpoint is complete before an old one is removed
        free=shutil.disk_usage(run.directory).free,
    )


def tokens_of(examples):
    """The tokens of some examples."""
    return sum(len(example.input_ids) for example in examples)


def device_memory(device):
    """The memory that a device has, in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def gb(count):
    """Bytes for reading."""
    return f"{count / 1e9:.1f} GB"
