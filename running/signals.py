"""Signals that stop a run, deferred while it must not be interrupted."""

import contextlib
import os
import signal

# Ctrl-C, a shutdown, what batch systems send some time before they kill, and a closed terminal.
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class Stopped(BaseException):
    """A signal asked the program to end; like KeyboardInterrupt, it is no error that somebody might handle."""

    def __init__(self, number):
        super().__init__(number)
        self.number = number


class Signals:
    """A context in which the first stopping signal raises `Stopped` and a second one kills.

    Within `deferred()` it is raised at the end, so that an update or a checkpoint is never left half done.
    """

    def __init__(self):
        self.received = None
        self.deferring = False

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
        for each in self.before:
            signal.signal(each, signal.SIG_DFL)
        if os.getpid() != self.process:  # a worker process, which inherited this handler
            os.kill(os.getpid(), number)
            return
        self.received = number
        with contextlib.suppress(OSError):  # the terminal may be gone
            os.write(2, b"\nstopping; once more to leave at once\n")  # the signal may have interrupted a print
        if not self.deferring:
            raise Stopped(number)

    @contextlib.contextmanager
    def deferred(self):
        """A block that a signal does not interrupt; `Stopped` is raised after it."""
        self.deferring = True
        try:
            yield
        finally:
            self.deferring = False
        if self.received is not None:
            raise Stopped(self.received)
