"""Processes that do not find each other: their environment is wrong, or somebody does not come."""

import re
import signal
import socket
from functools import partial

import pytest

import running.rendezvous
from config import UserError
from running.rendezvous import meet, place, store_at, wait_for_answer
from tests.faults.harness import Life
from tests.faults.inject import on_call, send

GOOD = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
GOOD |= {"MASTER_PORT": "29500"}
FIRST = {"RANK": "0", "LOCAL_RANK": "0"}
REPAIR = "; start several processes with torchrun, and one without these variables"
UNFIT = "RANK {}, WORLD_SIZE {}, LOCAL_RANK {}, LOCAL_WORLD_SIZE {}, MASTER_PORT {}: these do not fit each other"


@pytest.fixture
def environment(monkeypatch):
    """Set torchrun's variables: the good ones, changed."""

    def prepare(**changed):
        for name, value in {**GOOD, **changed}.items():
            monkeypatch.setenv(name, value) if value is not None else monkeypatch.delenv(name, raising=False)

    return prepare


@pytest.fixture
def port():
    """A port where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is two, but WORLD_SIZE is 'two', which is no number"),
        ({"WORLD_SIZE": "0"}, UNFIT.format(1, 0, 1, 2, 29500)),
        ({"RANK": None}, "WORLD_SIZE is 2, but RANK is not set"),
        ({"RANK": "-1"}, "WORLD_SIZE is 2, but RANK is '-1', which is no number"),
        ({"RANK": "2"}, UNFIT.format(2, 2, 1, 2, 29500)),
        ({"LOCAL_RANK": None}, "WORLD_SIZE is 2, but LOCAL_RANK is not set"),
        ({"LOCAL_WORLD_SIZE": "3"}, UNFIT.format(1, 2, 1, 3, 29500)),
        ({"MASTER_ADDR": ""}, "WORLD_SIZE is 2, but MASTER_ADDR is not set"),
        ({"MASTER_PORT": "70000"}, UNFIT.format(1, 2, 1, 2, 70000)),
    ],
    ids=str,
)
def test_variables_that_torchrun_would_not_set_are_one_line(environment, changed, said):
    environment(**changed)
    with pytest.raises(UserError, match=f"^{re.escape(said + REPAIR)}$"):
        place()


def test_one_process_needs_no_variables(environment):
    environment(WORLD_SIZE="1")
    assert place() is None
    environment(**dict.fromkeys(GOOD))
    assert place() is None


def test_a_host_that_does_not_exist_is_told_at_once():
    with pytest.raises(UserError, match="MASTER_ADDR no host: "):
        wait_for_answer("no host", 1)


def test_whoever_does_not_come_is_not_waited_for_without_end(monkeypatch, environment, port):
    monkeypatch.setattr(running.rendezvous, "PATIENCE", 0.2)
    with pytest.raises(UserError, match=rf"waited 0.2 s for the first process, at 127.0.0.1:{port}: .*refused"):
        wait_for_answer("127.0.0.1", port)
    environment(**FIRST, MASTER_PORT=str(port))
    store = store_at(place())
    with pytest.raises(UserError, match=r"waited 0.2 s for process 1 of 2$"):
        meet(store, 0, 2, "")
    with pytest.raises(UserError, match=r"waited 0.2 s for the other processes$"):
        meet(store, 1, 2, "")


def test_a_port_that_somebody_has_is_one_line(environment):
    with socket.create_server(("127.0.0.1", 0)) as server:
        environment(**FIRST, MASTER_PORT=str(server.getsockname()[1]))
        with pytest.raises(UserError, match=r"^MASTER_ADDR 127.0.0.1, MASTER_PORT \d+: .*"):
            store_at(place())


@pytest.mark.parametrize("own", [FIRST, {}], ids=["first", "other"])
def test_a_signal_ends_the_wait_for_the_others(flags, tmp_path, port, own):
    environment = {**GOOD, **own, "MASTER_PORT": str(port)}
    sends = partial(on_call, "running.rendezvous.Patience.wait", 3, partial(send, signal.SIGTERM))
    life = Life([*flags, "--output-dir", tmp_path / "run"], tmp_path, [sends], environment)
    assert life.wait(30) == 143
    assert life.complained.endswith("stopped before training began\n")
