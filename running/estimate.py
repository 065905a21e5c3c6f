"""An estimate of the memory, time and disk that a run takes, for `--dry-run`, from one update at learning rate 0."""

import os
import shutil
import time

import torch

from compute.adapters import trained_parameters
from compute.distributed import all_reduce_max, broadcast_from_rank0, local_world_size, world_size
from compute.layout import length
from data import window_at
from evaluation.facts import format_bytes, format_duration
from running.diagnostics import explain_failed_update
from running.metrics import peak_memory
from running.report import format_plan

ENOUGH = 4  # seconds


def estimate(run, train_step):
    """What a run that has not begun takes, for reading; of memory the rank that takes the most. Nothing is written."""
    update_seconds, peak = measure_update(run, train_step)
    seconds, memory = run.total_steps * update_seconds, device_memory(run.precision.device)
    fits = "" if peak < 0.9 * memory else ": may not fit, use a lower --micro-batch-tokens"
    # Weights and moments; besides those kept, the best one, and a new one before an old one is removed.
    disk = (run.config.keep + 2) * 12 * sum(weights.numel() for weights in trained_parameters(run.model).values())
    free = broadcast_from_rank0(lambda: shutil.disk_usage(run.directory).free)
    enough = "" if disk < free else ": not enough, use a lower --keep or another --output-dir"
    process = " of a process" if world_size() > 1 else ""
    lines = {
        "memory": f"{format_bytes(peak)} at the peak{process} of {format_bytes(memory)}{fits}",
        "time": f"about {format_duration(seconds)}; starting, evaluations, checkpoints and answers come on top",
        "disk": f"up to {format_bytes(disk)}, {format_bytes(free)} free{enough}",
    }
    return format_plan(lines)


def measure_update(run, train_step):
    """The seconds of an average update, and the peak memory of a full micro-batch in bytes, about.

    Measured are updates over the shortest conversations of the first window, twice as many each time, until one takes
    `ENOUGH` seconds; the last two tell what more tokens take.
    """
    config, examples = run.config, run.data.train.examples
    settings = {"precision": run.precision, "scaler": run.precision.grad_scaler()}
    settings["max_grad_norm"] = config.max_grad_norm
    window = sorted(window_at(0, examples, config.batch_size, config.seed), key=length)

    def measure(count):
        """The tokens, seconds and peak bytes of an update over the first `count` conversations."""
        micro_batches = list(run.layout.local_micro_batches(window[:count]))
        began = time.perf_counter()
        tokens = train_step(run.model, run.optimizer, micro_batches, 0.0, **settings)["tokens"]
        return tokens, all_reduce_max(time.perf_counter() - began), all_reduce_max(peak_memory(run.precision.device))

    run.model.train()
    with explain_failed_update(run):
        measure(1)  # compiles, and allocates what stays
        count, before, last = 2, measure(1), measure(2)
        while last[1] < ENOUGH and count < len(window):
            count *= 2
            before, last = last, measure(count)
    tokens, seconds, peak = last
    per_update = run.tokens_per_update
    full = min(run.layout.tokens * world_size(), per_update)
    if tokens == before[0]:  # the window is one conversation
        return seconds * per_update / tokens, peak
    seconds_per_token, bytes_per_token = (max(0, last[of] - before[of]) / (tokens - before[0]) for of in (1, 2))
    return seconds + seconds_per_token * (per_update - tokens), round(peak + bytes_per_token * max(0, full - tokens))


def device_memory(device):
    """The bytes of memory for one process: of a GPU what no other has, of a CPU a share for each on its machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // local_world_size()
