"""Signals that stop a run, deferred while it must not be interrupted."""

import contextlib
import os
import signal
import time
from functools import partial

from compute.processes import is_first, largest, world_size

# Ctrl-C, a shutdown, what batch systems send some time before they kill, and a closed terminal.
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)

PASSED_ON = 10  # seconds within which a launcher passes on a signal that its processes may have had themselves


class Stopped(BaseException):
    """A signal asked the program to end; like KeyboardInterrupt, it is no error that somebody might handle."""

    def __init__(self, number):
        super().__init__(number)
        self.number = number


class Signals:
    """A context in which the first stopping signal raises `Stopped` and a second one kills.

    Within `deferred()` it is raised at the end, so that an update or a checkpoint is never left half done. Several
    processes that train stop at the same `check()`, whichever of them is signalled.
    """

    def __init__(self):
        self.received = None
        self.deferring = False
        self.checked = False  # by all processes

    def __enter__(self):
        self.process = os.getpid()
        # nohup starts a program with SIGHUP ignored, and it stays so
        stopping = [each for each in STOPPING if (each, signal.getsignal(each)) != (signal.SIGHUP, signal.SIG_IGN)]
        self.before = {number: signal.signal(number, self.handle) for number in stopping}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number, _frame):
        """The handler of the first signal."""
        launched, now = "RANK" in os.environ, time.monotonic()
        for each in self.before:
            signal.signal(each, partial(handle_again, now + PASSED_ON) if launched else signal.SIG_DFL)
        if os.getpid() != self.process:  # a worker process, which inherited this handler
            os.kill(os.getpid(), number)
            return
        self.received = number
        if is_first():
            with contextlib.suppress(OSError):  # the terminal may be gone
                os.write(2, b"\nstopping; once more to leave at once\n")  # the signal may have interrupted a print
        if not (self.deferring or self.checked):
            raise Stopped(number)

    def check(self):
        """Raise `Stopped` where this process, or any other of the run, was signalled: all call it at the same points.

        Of several processes, none stops elsewhere after the first call.
        """
        received = self.received
        if world_size() > 1:
            self.checked = True
            received = largest(received or 0) or None  # one that comes meanwhile is for the next check
        if received is not None:
            self.received = received
            raise Stopped(received)

    @contextlib.contextmanager
    def deferred(self):
        """A block that a signal does not interrupt; `Stopped` is raised after it."""
        self.deferring = True
        try:
            yield
        finally:
            self.deferring = False
        self.check()


def handle_again(since, number, _frame):
    """The handler of a second signal where a launcher may send the first one twice: it counts only some time later."""
    if time.monotonic() > since:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
