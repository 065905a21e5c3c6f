"""How the processes of a run find each other: what torchrun tells them in the environment, a store, a meeting in it.

Nothing here waits where a signal would not reach it, or for ever.
"""

import os
import socket
import sys
import time
import uuid
from dataclasses import dataclass

from torch import distributed

from config import UserError, first_line

PATIENCE = 600  # seconds that one process waits for another to start
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")


@dataclass(frozen=True)
class Place:
    """A process' place among those that were started together."""

    rank: int
    size: int
    host: str  # where the store is
    port: int
    keeps: bool  # the store; else it is torchrun's, or the first process'


def place():
    """This process' `Place`; None where it was started alone.

    Raises:
        UserError: the environment is not as torchrun makes it.
    """
    found = {name: os.environ.get(name) for name in (*NAMES, "MASTER_ADDR")}
    if found["WORLD_SIZE"] in (None, "1"):
        return None
    for name, value in found.items():
        if not value or (name in NAMES and not value.isdecimal()):
            are = f"is {value!r}, which is no number" if value else "is not set"
            refuse(f"WORLD_SIZE is {found['WORLD_SIZE']}, but {name} {are}")
    rank, size, local_rank, local_size, port = (int(found[name]) for name in NAMES)
    if not (local_rank <= rank < size and local_rank < local_size <= size and port < 2**16):
        refuse(", ".join(f"{name} {found[name]}" for name in NAMES) + ": these do not fit each other")
    keeps = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    return Place(rank, size, found["MASTER_ADDR"], port, keeps)


def refuse(why):
    """Raise `UserError` about the environment."""
    raise UserError(f"{why}; start several processes with torchrun, and one without these variables")


def store_at(place):
    """The store through which processes that were started together find each other.

    Raises:
        UserError: there is no such host, or nobody answers there; the port is taken.
    """
    if not place.keeps:
        wait_for_answer(place.host, place.port)
    try:
        # Its own wait for all would be one that no signal ends.
        return distributed.TCPStore(place.host, place.port, is_master=place.keeps, wait_for_workers=False)
    except distributed.DistError as error:
        raise UserError(f"MASTER_ADDR {place.host}, MASTER_PORT {place.port}: {first_line(error)}") from error


def wait_for_answer(host, port):
    """Return when somebody listens at a port: the first process may still be starting.

    Raises:
        UserError: there is no such host, or nobody answers within PATIENCE.
    """
    patience = Patience(f"the first process, at {host}:{port}")
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
        except socket.gaierror as error:
            raise UserError(f"MASTER_ADDR {host}: {error.strerror}") from error
        except OSError as error:
            patience.wait(error)
        else:
            return


class Patience:
    """Waiting for somebody: said after a while, and not for ever."""

    def __init__(self, whom):
        self.whom, self.since, self.said = whom, time.monotonic(), False

    def wait(self, why=""):
        """Wait for a moment.

        Raises:
            UserError: it has been PATIENCE.
        """
        waited = time.monotonic() - self.since
        if waited > PATIENCE:
            raise UserError(f"waited {PATIENCE} s for {self.whom}" + (f": {why}" if why else ""))
        if waited > 10 and not self.said:
            print(f"waiting for {self.whom}", file=sys.stderr)
            self.said = True
        time.sleep(0.05)


def meet(store, rank, size, about):
    """Wait for the other processes; returns a name for this meeting, and what each says about itself, by rank.

    torchrun's store outlives its processes. When it starts them again, what the last ones left there would be taken for
    the new ones' addresses; and no count of these starts is the same on every machine. So each process gives itself a
    name that no other has had, and the first answers to these names.

    Raises:
        UserError: somebody does not come within PATIENCE.
    """
    own, patience = uuid.uuid4().hex, Patience("the other processes")
    meeting = own
    if rank:
        store.set(f"hello {rank}", own)
        while not store.check([f"welcome {own}"]):
            patience.wait()
        meeting = store.get(f"welcome {own}").decode()
    store.set(f"{meeting} {rank}", about)
    waiting = set(range(size))
    while waiting:
        for other in waiting if rank == 0 else ():
            if store.check([f"hello {other}"]):
                store.set(f"welcome {store.get(f'hello {other}').decode()}", own)
        waiting = {other for other in waiting if not store.check([f"{meeting} {other}"])}
        if waiting:
            patience.whom = f"process {min(waiting)} of {size}"
            patience.wait()
    return meeting, {other: store.get(f"{meeting} {other}").decode() for other in range(size)}
