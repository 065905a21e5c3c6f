"""A pool of processes with a process group, which serves many tests: a call costs no new start."""

import gc
import importlib
import multiprocessing
import os
import sys
import traceback
from datetime import timedelta

import torch
from torch import distributed

# A forked process cannot use CUDA where its parent has asked for it.
CONTEXT = multiprocessing.get_context("spawn" if torch.cuda.device_count() else "forkserver")
CONTEXT.set_forkserver_preload(["tests.worker_pool", "tests.faults.harness"])
MOCKS = "benchmarks.bare"  # of packages that a GPU machine may lack; a new process needs them, too
SECONDS = 120  # the longest time of a call


def serve(rank, size, port, pipe, mocked):
    """Join the process group, and call the functions that come through the pipe."""
    if mocked:
        importlib.import_module(MOCKS)
    torch.set_num_threads(1)
    gc.freeze()
    os.environ["LOCAL_RANK"] = str(rank)
    store = distributed.TCPStore("127.0.0.1", port, is_master=False)
    timeout = timedelta(seconds=SECONDS)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    while call := pipe.recv():
        function, arguments = call
        try:
            pipe.send((function(*arguments), None))
        except Exception:
            pipe.send((None, traceback.format_exc()))
    distributed.barrier()
    distributed.destroy_process_group()


class WorkerPool:
    """A process group of `size` processes."""

    def __init__(self, size):
        self.store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.pipes, self.processes = [], []
        for rank in range(size):
            ours, theirs = CONTEXT.Pipe()
            arguments = (rank, size, self.store.port, theirs, MOCKS in sys.modules)
            self.processes.append(CONTEXT.Process(target=serve, args=arguments, daemon=True))
            self.processes[-1].start()
            self.pipes.append(ours)

    def call(self, function, *arguments):
        """Call a function on every rank; returns a list of its results, by rank."""
        for pipe in self.pipes:
            pipe.send((function, arguments))
        replies = []
        for pipe in self.pipes:
            assert pipe.poll(SECONDS), "a rank does not answer"
            replies.append(pipe.recv())
        failed = [trace for _, trace in replies if trace]
        assert not failed, failed[0]
        return [result for result, _ in replies]

    def close(self):
        """End the processes."""
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(10)
            process.kill()
