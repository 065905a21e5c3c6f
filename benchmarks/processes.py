"""Time, memory and losses of one process, of several with a copy of the weights each, and of several that shard one.

    python -m benchmarks.processes --data CONVERSATIONS.jsonl --processes 2 [--rounds 2] [flags of train.py]

Each case is a run of `train.py`: a few updates with the same flags, in turns. Memory is the host's, with a GPU too.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TRAIN = str(Path(__file__).parents[1] / "train.py")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    options, flags = parser.parse_known_args()
    flags = ["--dataset", options.data, "--max-steps", "5", "--eval-every", "1000", "--save-every", "1000", *flags]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(options.processes)]
    cases = {
        "one process": ([], []),
        "one process, smaller micro-batches": ([], ["--micro-batch-tokens", "500"]),
        f"{options.processes} processes": (torchrun, []),
        f"{options.processes} processes, sharded": (torchrun, ["--shard", str(options.processes)]),
    }
    results = {name: [] for name in cases}
    for _ in range(options.rounds):
        for name, (launcher, more) in cases.items():
            results[name].append(measure(launcher, [*flags, *more]))
    (loss, norm), *_ = [(run[0]["loss"], run[0]["grad_norm"]) for run, _ in results["one process"]]
    for name, runs in results.items():
        later = [line for run, _ in runs for line in run[1:]]
        speed = statistics.median(line["tokens_per_second"] for line in later)
        waiting = max((line["waiting_seconds"] for line in later if "waiting_seconds" in line), default=None)
        share = statistics.median(line.get("largest_share", 1) for line in later)
        empty = statistics.mean(line.get("empty_share", 0) for line in later)
        memory = max(peak for _, peaks in runs for peak in peaks)
        first = runs[0][0][0]
        print(f"{name:<36}{speed:7.0f} tokens/s, {memory:5.1f} GB a process at most", end=", ")
        print(f"largest share {share:.2f} of the mean, {empty:.0%} of micro-batches empty", end=", ")
        print("" if waiting is None else f"{waiting:.1f} s waited at most, ", end="first update's ")
        print(f"loss off by {abs(first['loss'] / loss - 1):.1e}, norm by {abs(first['grad_norm'] / norm - 1):.1e}")


def measure(launcher, flags):
    """The updates' lines of a run's log, and the peak memory of each of its processes, in GB."""
    with tempfile.TemporaryDirectory() as directory:
        run, peaks = Path(directory) / "run", {}
        command = [sys.executable, *launcher, TRAIN, *flags, "--output-dir", str(run)]
        environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
        while process.poll() is None:
            for pid in list_training_processes(process.pid, launcher):
                peaks[pid] = max(peaks.get(pid, 0), peak_memory(pid))
            time.sleep(0.1)
        if process.returncode:
            raise SystemExit(process.returncode)
        lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        return [line for line in lines if line["kind"] == "train"], list(peaks.values())


def list_training_processes(pid, launcher):
    """The ids of the processes that train: the children of torchrun, or the process itself."""
    try:
        return Path(f"/proc/{pid}/task/{pid}/children").read_text().split() if launcher else [pid]
    except FileNotFoundError:
        return []


def peak_memory(pid):
    """The peak memory of a process so far, in GB; 0 if it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return 0
    return next((int(line.split()[1]) / 2**20 for line in status.splitlines() if line.startswith("VmHWM")), 0)


if __name__ == "__main__":
    main()
