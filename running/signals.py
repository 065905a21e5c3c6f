"""Signals that ask a run to end, and the moments in which it must not end yet."""

import contextlib
import os
import signal

# Ctrl-C, a shutdown, and what batch systems send some time before they kill.
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Stopped(BaseException):
    """A signal asked the program to end; like KeyboardInterrupt, it is no error that somebody might handle."""

    def __init__(self, number):
        super().__init__(number)
        self.number = number


class Signals:
    """A context in which the first stopping signal raises `Stopped` and a second one kills.

    Within `held()`, it is raised at the end: what changes weights, or counts what was changed, is done whole.
    """

    def __init__(self):
        self.noted = None
        self.holding = False

    def __enter__(self):
        self.process = os.getpid()
        self.before = {number: signal.signal(number, self.note) for number in STOPPING}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number, _frame):
        """The handler of the first signal."""
        for each in STOPPING:
            signal.signal(each, signal.SIG_DFL)
        if os.getpid() != self.process:  # a worker, which has this handler from us and is not to have it
            os.kill(os.getpid(), number)
            return
        self.noted = number
        os.write(2, b"\nstopping; once more to leave at once\n")  # print might have been interrupted by the signal
        if not self.holding:
            raise Stopped(number)

    @contextlib.contextmanager
    def held(self):
        """Something that is to end well before a signal may stop the program."""
        self.holding = True
        try:
            yield
        finally:
            self.holding = False
        if self.noted is not None:
            raise Stopped(self.noted)
