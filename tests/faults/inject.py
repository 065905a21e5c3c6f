"""Faults that are prepared in a process of `train.py` before it starts. They are plain calls, so that they can be sent
there: `partial(on_call, "train.train_step", 3, kill)` kills the process as it begins its third update."""

import copy
import ctypes
import errno
import importlib
import itertools
import os
import signal
import threading
import time
from pathlib import Path

import torch

from compute.self_check import Mismatch


def on_call(name, number, do, *_, **__):
    """At the `number`th call of a function, named "module.function" or "module.Class.function", `do()` first, with the
    function's arguments. It may itself be prepared by another call, whose arguments do not matter."""
    owner, function = name.rsplit(".", 1)
    try:
        owner = importlib.import_module(owner)
    except ModuleNotFoundError:
        module, kind = owner.rsplit(".", 1)
        owner = getattr(importlib.import_module(module), kind)
    real, calls = getattr(owner, function), itertools.count(1)

    def faulty(*arguments, **options):
        if next(calls) == number:
            do(*arguments, **options)
        return real(*arguments, **options)

    setattr(owner, function, faulty)


def pretend(name, result):
    """Let a function, named "module.function", always give the same result."""
    module, function = name.rsplit(".", 1)
    setattr(importlib.import_module(module), function, lambda *_, **__: result)


def kill(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def send(number, *_, **__):
    os.kill(os.getpid(), number)


def send_and_hang(number, *_, **__):
    """What is under way when a signal comes does not end."""
    os.kill(os.getpid(), number)
    time.sleep(600)


def hang(*_, **__):
    time.sleep(600)


def fail(*_, **__):
    raise RuntimeError("a bug")


def inexact(*_, **__):
    raise Mismatch("as a test wants it")


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fill_disk(directory, left, *_, **__):
    """Write a file that leaves so many bytes of a disk."""
    disk = os.statvfs(directory)
    with open(Path(directory) / "filling", "wb") as file:
        file.write(bytes(disk.f_bavail * disk.f_frsize - left))


def corrupt_weights(value, model, *_, **__):
    """Put NaN or infinity into a weight of a model, or of a run's."""
    with torch.no_grad():
        getattr(model.model, "model", model.model).layers[0].mlp.up_proj.weight[0, 0] = value


def corrupt_gradient(model, *_, **__):
    """Let the loss be finite and its gradient not."""
    model.model.norm.weight.register_hook(lambda gradient: gradient * torch.inf)


def shift_the_order():
    """A loop that takes the wrong window: the one of the update before."""
    layout = importlib.import_module("compute.layout")
    real = layout.window_at
    layout.window_at = lambda step, *rest: real(step - 1, *rest)


def forget(name):
    """A `restore` that does not take up the optimizer, or the random state, or …"""
    real = torch.load

    def load(path, **options):
        state = real(path, **options)
        zeros = torch.utils._pytree.tree_map(torch.zeros_like, state["optimizer"])
        state[name] = {"optimizer": zeros, "random": [(torch.get_rng_state(), None)]}[name]
        return state

    torch.load = load


def fewer_bits_of_scale(bits):
    """An fp16 scale that overflows at first, and grows so often that it will again."""
    model = importlib.import_module("model")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**bits, growth_interval=2)
    model.Precision.grad_scaler = lambda _: scaler


def kill_at_change(number, count_file, counts):
    """Die at the `number`th call that changes the disk while `counts()`; or only count these calls."""
    calls = itertools.count(1)

    def counted(real):
        def call(*arguments, **options):
            if counts():
                current = next(calls)
                if count_file:
                    Path(count_file).write_text(str(current))
                elif current == number:
                    kill()
            return real(*arguments, **options)

        return call

    for name in ("fsync", "replace", "mkdir", "unlink", "rmdir", "symlink"):
        setattr(os, name, counted(getattr(os, name)))


def kill_at_system_call(number, count_file=None):
    """Die at the `number`th call that changes the disk while the second best model is saved, and the checkpoint after
    it; or only count these calls."""
    checkpoint, counting = importlib.import_module("running.checkpoint"), []
    save = checkpoint.save

    def counted_save(run):
        counting[:] = [run.step] if run.step in (8, 9) else []
        save(run)
        counting.clear()

    checkpoint.save = counted_save
    kill_at_change(number, count_file, lambda: bool(counting))


def saving_in_background():
    """A run on a CPU is saved as one on a GPU is: a thread writes copies."""
    checkpoint, run = (importlib.import_module(f"running.{name}") for name in ("checkpoint", "run"))
    gather = checkpoint.gather_state
    checkpoint.gather_state = lambda *arguments: copy.deepcopy(gather(*arguments))
    saver = checkpoint.Saver(in_background=True)
    run.Saver = lambda **_: saver
    # However fast updates are, the checkpoint that is due after 6 of them does not wait for one before it.
    on_call("train.train_step", 6, lambda *_, **__: saver.writing and saver.writing.exception())


def hold_checkpoint(which, number, do=None, name="train.train_step"):
    """The `which`th checkpoint is not written before a `number`th call, that of an update; then `do()`."""
    begun = threading.Event()

    def hold(*_, **__):
        assert begun.wait(60), f"{name} is not called"
        if do:
            do()

    on_call(name, number, lambda *_, **__: begun.set())
    on_call("running.checkpoint.write_checkpoint", which, hold)


def kill_in_background(number, count_file=None):
    """Die at the `number`th call by which a thread of its own changes the disk; or only count these calls."""
    kill_at_change(number, count_file, lambda: threading.current_thread() is not threading.main_thread())


def ask_for_too_much(*_, **__):
    """Ask for more memory than there is in any machine."""
    torch.empty(2**50)


def give_memory_back():
    """Let what is freed go back to the system, so that it has to be asked for again."""
    mmap_threshold = -3  # M_MMAP_THRESHOLD of mallopt(3)
    ctypes.CDLL(None).mallopt(mmap_threshold, 2**16)


def little_memory(megabytes, *_, **__):
    """Let the process have only so much more address space than it has."""
    import resource

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + megabytes * 2**20,) * 2)
