"""Signals that stop a run: after the update, evaluation or checkpoint that is under way, on all ranks alike."""

import contextlib
import os
import signal
import time

from compute.distributed import all_reduce_max, is_rank0

# Ctrl-C, a shutdown, the warning that batch systems send before they kill, and a closed terminal.
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)

FORWARDING_SECONDS = 10  # within which torchrun may forward a signal that its processes have received themselves


class Stopped(KeyboardInterrupt):
    """A stopping signal. It is not an `Exception`, which a library might handle."""

    def __init__(self, number):
        super().__init__("stopped before training began")  # the message, unless the run saves and says more
        self.number = number


class Signals:
    """A context in which the first stopping signal raises `Stopped`, and a second one ends the process at once.

    Once `check()` has been called, `Stopped` is raised only there, on all ranks at the same call.
    """

    def __init__(self):
        self.received = None  # the number of the signal, which may have reached another rank
        self.received_at = None  # the time of this rank's first signal
        self.deferring = False  # `check()` has been called

    def __enter__(self):
        self.process = os.getpid()
        # nohup starts a program with SIGHUP ignored, which must stay so
        stopping = [each for each in STOPPING if (each, signal.getsignal(each)) != (signal.SIGHUP, signal.SIG_IGN)]
        self.previous = {number: signal.signal(number, self.handle) for number in stopping}
        return self

    def __exit__(self, *_):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def handle(self, number, _frame):
        """The handler of all stopping signals."""
        launched = "RANK" in os.environ  # by torchrun
        if os.getpid() != self.process:  # a forked worker has inherited this handler
            end_process(number)
        elif self.received_at is None:
            self.received, self.received_at = number, time.monotonic()
            for each in () if launched else self.previous:
                signal.signal(each, signal.SIG_DFL)  # which needs no interpreter, where a library is busy
            if is_rank0():
                with contextlib.suppress(OSError):  # the terminal may be gone
                    # not print(), as the signal may have interrupted one
                    os.write(2, b"\nstopping after this update; press Ctrl-C again to quit now\n")
            if not self.deferring:
                raise Stopped(number)
        elif launched and time.monotonic() > self.received_at + FORWARDING_SECONDS:
            end_process(number)

    def check(self):
        """Raise `Stopped` if this rank, or any other, has received a signal; a collective.

        A signal that arrives during the all-reduce is handled by the next check.
        """
        self.deferring = True
        if received := all_reduce_max(self.received or 0):
            self.received = received
            raise Stopped(received)


def end_process(number):
    """End this process as the signal does by default."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
