"""An estimate of what a run takes, for `--dry-run`: memory, time, disk.

It is arithmetic on one update at learning rate 0 and the evaluation of one micro-batch, both measured by all ranks. The
memory is that of the rank that takes the most.
"""

import os
import shutil
import time

import torch

from compute.distributed import all_reduce_max, broadcast_from_rank0, local_world_size, world_size
from data import window_at, windows_per_epoch
from eval import evaluate
from evaluation.facts import format_bytes, format_duration
from running.diagnostics import explain_failed_update
from running.metrics import peak_memory


def estimate(run, train_step):
    """What a run that has not begun takes, for reading. Its weights stay as they are, and nothing is written.

    Args:
        train_step: `train.train_step`.

    Raises:
        UserError: it does not fit in memory.
    """
    seconds_per_token, seconds_per_evaluated_token = measure(run, train_step)
    config, data, device = run.config, run.data, run.precision.device
    per_epoch = windows_per_epoch(len(data.train.examples), config.batch_size)
    training = seconds_per_token * data.train.tokens * run.total_steps / per_epoch
    evaluations = 1 + -(-run.total_steps // config.eval_every)  # the untrained model's, and rounded up
    evaluating = seconds_per_evaluated_token * (evaluations * data.eval.tokens + 2 * data.test.tokens)

    parameters = sum(weights.numel() for weights in run.model.parameters())
    weights = 4 * parameters // config.shard  # fp32, as its gradient and AdamW's two moments
    peak, memory = all_reduce_max(peak_memory(device)), device_memory(device)
    parts = {"weights": weights, "gradients": weights, "AdamW": 2 * weights}
    parts["activations and the rest"] = max(0, peak - 4 * weights)
    fits = "" if peak < 0.9 * memory else ": hardly fits, use a lower --micro-batch-tokens"

    # Weights and moments; besides those kept, the best one, and a new one before an old one is removed.
    disk = (config.keep + 2) * 12 * parameters
    free = broadcast_from_rank0(
        lambda: shutil.disk_usage(run.directory).free
    )  # rank 0 removes the directory afterwards
    enough = "" if disk < free else ": not enough, use a lower --keep or another --output-dir"
    lines = {
        "memory": f"{format_bytes(peak)} at the peak{' of a process' if world_size() > 1 else ''} of "
        f"{format_bytes(memory)}{fits} ({', '.join(f'{name} {format_bytes(size)}' for name, size in parts.items())})",
        "time": f"about {format_duration(training + evaluating)}, {format_duration(evaluating)} of it for "
        "evaluations; starting, checkpoints and answers come on top",
        "disk": f"up to {format_bytes(disk)}, {format_bytes(free)} free{enough}",
    }
    return "\n".join(f"  {name:<10}{text}" for name, text in lines.items())


def measure(run, train_step):
    """Seconds for each token of an update, and of an evaluation, where all ranks share the tokens.

    Raises:
        UserError: there is too little memory.
    """
    config = run.config
    settings = {"precision": run.precision, "scaler": run.precision.grad_scaler()}
    settings["max_grad_norm"] = config.max_grad_norm
    run.model.train()
    with explain_failed_update(run):
        micro_batches = list(
            run.layout.local_micro_batches(window_at(0, run.data.train.examples, config.batch_size, config.seed))
        )
        train_step(run.model, run.optimizer, micro_batches[:1], 0.0, **settings)  # compiles, and allocates what stays
        start = time.perf_counter()
        tokens = train_step(run.model, run.optimizer, micro_batches, 0.0, **settings)["tokens"]
        update = time.perf_counter() - start
        evaluated = [
            each for batch in run.layout.plan_micro_batches(run.data.eval.examples)[-world_size() :] for each in batch
        ]
        start = time.perf_counter()
        evaluate(run.model, evaluated, run.layout, run.precision)
        return update / tokens, (time.perf_counter() - start) / sum(len(each.input_ids) for each in evaluated)


def device_memory(device):
    """The memory of a device for one process, in bytes; on a CPU the processes of its machine share it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // local_world_size()
