"""The processes of a run from their start to their end: they meet, and whatever ends one of them ends all, in seconds.

torchrun, or whatever else sets RANK and WORLD_SIZE, starts them and gives them a store, through which they find each
other. The first of them to fail says so there and explains itself; the others leave without a word.
"""

import contextlib
import os
import sys
import threading
import time
import traceback

import torch
from torch import distributed

from compute.processes import TIMEOUT, wait_for_all
from config import UserError, die_with_parent, explain
from running.rendezvous import meet, place, store_at
from running.signals import Stopped

POLL = 0.5  # seconds between two looks at the others
GRACE = 3  # seconds that a process has to leave by itself after another one has ended
FAILED = "failed"  # in the store: the exit status of the process that failed first, and which it is


class Group:
    """The processes that were started together, as one of them sees them."""

    def __init__(self, store, rank, size):
        self.rank, self.size, self.streams = rank, size, (sys.stdout, sys.stderr)
        agent = os.environ.get("GROUP_RANK", "")  # the number of the torchrun that started this process
        try:
            meeting, others = meet(store, rank, size, f"{agent} {os.getpid()}")
        except distributed.DistError as error:
            raise UserError("the first process ended before all had met") from error
        others = {other: text.split(" ") for other, text in others.items() if other != rank}
        self.pids = {other: int(pid) for other, (theirs, pid) in others.items() if agent and theirs == agent}
        self.store = distributed.PrefixStore(meeting, store)
        self.mailbox = distributed.PrefixStore(meeting, store.clone())  # its own connection, that nothing blocks
        self.leaving = threading.Event()
        threading.Thread(target=self.look_after_others, daemon=True).start()

    def look_after_others(self):
        """The thread that does so: this process may be blocked where no signal and no exception reaches it."""
        while not self.leaving.wait(POLL):
            if (self.failed() or self.ended() is not None) and not self.leaving.wait(GRACE):
                if self.claim(1):
                    explain(UserError(self.obituary()))
                os._exit(self.status())

    def failed(self):
        """Whether a process has said that it failed, or the store is gone and with it whoever kept it."""
        try:
            return self.mailbox.check([FAILED])
        except distributed.DistError:
            return True

    def ended(self):
        """A process of this machine that is no more; None where all are there."""
        return next((other for other, pid in self.pids.items() if not exists(pid)), None)

    def claim(self, status):
        """Whether this process is the first to fail; it then has its output back, to explain why."""
        try:
            mine = f"{status} {self.rank}"
            first = self.mailbox.compare_set(FAILED, "", mine).decode() == mine
        except distributed.DistError:
            first = os.environ.get("LOCAL_RANK") == "0"  # one of each machine
        if first:
            sys.stdout, sys.stderr = self.streams
        return first

    def status(self):
        """The exit status of the process that failed first, which is everybody's."""
        try:
            return int(self.mailbox.get(FAILED).decode().split()[0])
        except distributed.DistError:
            return 1

    def obituary(self):
        """A line about a process that ended without one."""
        for _ in range(10):  # its parent may not have noticed yet
            if (other := self.ended()) is not None:
                return f"process {other} of {self.size} (pid {self.pids[other]}) was killed or has crashed"
            time.sleep(0.1)
        return "a process on another machine was killed or has crashed, or the network failed"


group = None  # of this process, where there are others


def together(work):
    """Call `work()`, which returns an exit status, as one of the processes that were started together.

    One that was started alone only calls it. Of several, the first alone keeps its output. Where one fails, it explains
    itself, and all leave with its status; a process that is blocked does so GRACE seconds later.
    """
    global group
    if "RANK" in os.environ:
        die_with_parent()
    own = place()
    if own is None:
        try:
            return work()
        except Stopped as stop:
            return stopped(stop)
    rank, size = own.rank, own.size
    try:
        group = Group(store_at(own), rank, size)
        if rank:
            sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  for good
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        distributed.init_process_group(backend, store=group.store, rank=rank, world_size=size, timeout=TIMEOUT)
        status = work()
        with contextlib.suppress(RuntimeError):  # a process that has left already is no failure any more
            wait_for_all()
    except BaseException as error:
        status = fail(error)
    leave(status)


def stopped(stop):
    """Say that a signal came before there was a run to save; returns the exit status."""
    print("stopped before training began", file=sys.stderr)
    return 128 + stop.number


def fail(error):
    """Explain an exception, if no other process failed before this one; returns the exit status of all."""
    status = error.code or 0 if isinstance(error, SystemExit) else 1
    if isinstance(error, Stopped):
        status = 128 + error.number
    if group and not group.claim(status):
        return group.status()
    if isinstance(error, Stopped):
        stopped(error)
    elif not isinstance(error, SystemExit):
        try:
            explain(error)
        except BaseException:
            traceback.print_exception(error)
    return status


def leave(status):
    """End this process at once: while the interpreter is taken down, the backends' threads may abort it."""
    if group:
        group.leaving.set()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(status)


def lost_process(error):
    """A line about the process whose end an error tells of; None where it tells of something else."""
    signs = ("gloo", "NCCL", "Connection closed", "Connection reset")
    lost = isinstance(error, distributed.DistError) or any(sign in str(error) for sign in signs)
    return group.obituary() if group and lost else None


def exists(pid):
    """Whether there is a process of that number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
