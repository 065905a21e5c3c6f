"""Saving while a run goes on: what is saved is copied to the host, and a thread of its own writes it.

So it is on a GPU, whose updates hardly need the host's processor. On a CPU the thread would take the updates' own time,
and the copy as much memory again: there a run waits until it is saved.
"""

from concurrent.futures import ThreadPoolExecutor, wait

import torch

ALWAYS = False  # on a CPU too, for tests


class Background:
    """A thread that writes, one thing at a time."""

    def __init__(self):
        self.thread, self.writing = ThreadPoolExecutor(max_workers=1), None

    def write(self, work, then):
        """Call `work()` in the thread, once it is done with what came before; `then()` follows in `check` or `wait`."""
        self.wait()
        self.writing = self.thread.submit(work), then

    def check(self):
        """Raise what has failed since; nothing is waited for."""
        if self.writing and self.writing[0].done():
            self.wait()

    def wait(self):
        """Return when all is written, or raise what has failed."""
        if self.writing:
            future, then = self.writing
            wait([future])  # a signal may end this
            self.writing = None
            future.result()
            then()

    def close(self):
        """Return when nothing is written any more, whatever came of it."""
        self.thread.shutdown()


def saves_in_background(device):
    """Whether a run on a device goes on while it is saved."""
    return ALWAYS or device.type == "cuda"


def on_host(tensor):
    """A copy of a tensor on the host: of a GPU's as it is after all work it was given so far; see `copies_made`."""
    if not tensor.is_cuda:
        return tensor.detach().clone()
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return copy.copy_(tensor.detach(), non_blocking=True)


def copies_made(device):
    """A function that returns when the copies begun so far are made."""
    if device.type != "cuda":
        return lambda: None
    event = torch.cuda.Event()
    event.record()
    return event.synchronize
