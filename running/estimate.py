"""An estimate of the memory, time and disk that a run takes, for `--dry-run`, from one update at learning rate 0."""

import os
import shutil
import time

import torch

from compute.distributed import all_reduce_max, broadcast_from_rank0, local_world_size, world_size
from data import window_at
from evaluation.facts import format_bytes, format_duration
from running.diagnostics import explain_failed_update
from running.metrics import peak_memory


def estimate(run, train_step):
    """What a run that has not begun takes, for reading; of memory the rank that takes the most. Nothing is written."""
    seconds = run.total_steps * measure_seconds(run, train_step)
    peak, memory = all_reduce_max(peak_memory(run.precision.device)), device_memory(run.precision.device)
    fits = "" if peak < 0.9 * memory else ": may not fit, use a lower --micro-batch-tokens"
    # Weights and moments; besides those kept, the best one, and a new one before an old one is removed.
    disk = (run.config.keep + 2) * 12 * sum(weights.numel() for weights in run.model.parameters())
    free = broadcast_from_rank0(lambda: shutil.disk_usage(run.directory).free)
    enough = "" if disk < free else ": not enough, use a lower --keep or another --output-dir"
    process = " of a process" if world_size() > 1 else ""
    lines = [
        f"  memory    {format_bytes(peak)} at the peak{process} of {format_bytes(memory)}{fits}",
        f"  time      about {format_duration(seconds)}; starting, evaluations, checkpoints and answers come on top",
        f"  disk      up to {format_bytes(disk)}, {format_bytes(free)} free{enough}",
    ]
    return "\n".join(lines)


def measure_seconds(run, train_step):
    """The seconds of an average update: those of the first one, scaled by its tokens."""
    config, train = run.config, run.data.train
    settings = {"precision": run.precision, "scaler": run.precision.grad_scaler()}
    settings["max_grad_norm"] = config.max_grad_norm
    run.model.train()
    with explain_failed_update(run):
        window = list(run.layout.local_micro_batches(window_at(0, train.examples, config.batch_size, config.seed)))
        train_step(run.model, run.optimizer, window[:1], 0.0, **settings)  # compiles, and allocates what stays
        start = time.perf_counter()
        tokens = train_step(run.model, run.optimizer, window, 0.0, **settings)["tokens"]
        return (time.perf_counter() - start) / tokens * train.tokens / run.steps_per_epoch


def device_memory(device):
    """The bytes of memory for one process: of a GPU what no other has, of a CPU a share for each on its machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // local_world_size()
