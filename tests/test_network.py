"""A run on local files opens no connection beyond its machine: neither to train, nor to evaluate, nor to look at data.

The commands run under two guards. A `sitecustomize` module reports what Python connects to and looks up, in every
process. Where this user may make one, they also run in a network of their own that leads nowhere, in which the kernel
counts what any library has tried.
"""

import fcntl
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
NEW_NETWORK = ["unshare", "--map-root-user", "--net", "--mount"]
ELSEWHERE = "192.0.2.1"  # reserved for documentation: nobody has it
GUARD = """
import os, sys

PLACE = {"connect": 1, "sendto": 1, "getaddrinfo": 0, "gethostbyname": 0, "gethostbyaddr": 0}  # its argument

def guard(event, arguments):
    name = event.removeprefix("socket.")
    if name == event or name not in PLACE:
        return
    place = arguments[PLACE[name]]
    if PLACE[name] == 1:
        place = place[0] if isinstance(place, tuple) else "localhost"  # of a Unix socket: a path
    if place not in (None, "localhost", "::1", os.uname().nodename) and not str(place).startswith("127."):
        with open(os.environ["CONTACTED"], "a") as file:
            file.write(f"{name} {place}\\n")
        raise OSError(f"{place} is outside of this machine")

sys.addaudithook(guard)
"""
# Several programs in one process, which imports the libraries once.
ONE_AFTER_ANOTHER = f"""
import json, runpy, sys
sys.path.insert(0, {str(ROOT)!r})
for sys.argv in json.loads(sys.argv[1]):
    try:
        runpy.run_path(f"{ROOT}/{{sys.argv[0]}}", run_name="__main__")
    except SystemExit as end:
        assert end.code == 0, sys.argv
"""


@pytest.fixture(scope="session")
def has_new_network():
    """Whether this user may make a network of its own, with mounts of its own."""
    allowed = shutil.which("unshare") and subprocess.run([*NEW_NETWORK, "true"], capture_output=True).returncode == 0
    return bool(allowed)


@pytest.fixture
def watch(tmp_path, has_new_network):
    """A function that runs commands under the guards and returns what they contacted.

    A list of what Python reported, and the kernel's counts, None where it cannot be asked.
    """
    (tmp_path / "guard").mkdir()
    (tmp_path / "guard/sitecustomize.py").write_text(GUARD)
    (tmp_path / "resolv.conf").write_text("nameserver 127.0.0.1\n")
    settings = {"PYTHONPATH": str(tmp_path / "guard"), "CONTACTED": str(tmp_path / "contacted"), "HF_HOME": "empty"}
    offline = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
    environment = {name: value for name, value in os.environ.items() if name not in offline} | settings

    def watch(*commands):
        program = [*NEW_NETWORK, sys.executable, __file__] if has_new_network else [sys.executable, __file__]
        arguments = [json.dumps([list(map(str, command)) for command in commands]), str(has_new_network)]
        done = subprocess.run(
            [*program, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, input="Hello"
        )
        assert done.returncode == 0, done.stderr
        reported = tmp_path / "contacted"
        return reported.read_text().splitlines() if reported.exists() else [], json.loads(done.stdout.splitlines()[-1])

    return watch


# --- in a process that may have a network of its own


def start_loopback():
    """Start the network's loopback, and resolve names there: to log 127.0.0.1, torch looks up its name."""
    subprocess.run(["mount", "--bind", "resolv.conf", "/etc/resolv.conf"], check=True)
    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, 0x8914, struct.pack("16sh22x", b"lo", 1))  # SIOCSIFFLAGS, IFF_UP


def count_attempts():
    """The connections that this network had no route for, and the datagrams in it, as those of a lookup are."""
    words = [line.split() for line in Path("/proc/self/net/snmp").read_text().splitlines()]
    counts = {
        names[0] + name: int(n)
        for names, row in zip(words[::2], words[1::2], strict=True)
        for name, n in zip(names[1:], row[1:], strict=True)
    }
    counts |= {name: int(n) for name, n in map(str.split, Path("/proc/self/net/snmp6").read_text().splitlines())}
    return [
        counts["Ip:OutNoRoutes"] + counts["Ip6OutNoRoutes"],
        counts["Udp:OutDatagrams"] + counts["Udp6OutDatagrams"],
    ]


def main(commands, in_new_network):
    if in_new_network:
        start_loopback()
    for command in commands:
        subprocess.run(command, check=True, stdout=sys.stderr)
    print(json.dumps(count_attempts() if in_new_network else None))


# --- what must hold


def test_the_guards_notice_what_leaves_the_machine(watch, has_new_network):
    address = f"struct.pack('=HH4s8x', 2, 20480, socket.inet_aton({ELSEWHERE!r}))"  # family, port 80, address
    reported, counts = watch(
        *(
            [sys.executable, "-c", f"import ctypes, socket, struct\ntry: {tried}\nexcept OSError: pass"]
            for tried in (
                f"socket.socket().connect(({ELSEWHERE!r}, 80))",
                "socket.getaddrinfo('example.org', 80)",
                "socket.create_connection(('localhost', 9))",  # this one is allowed, and refused
                f"ctypes.CDLL(None).connect((opened := socket.socket()).fileno(), {address}, 16)",  # past Python
            )
        )
    )
    assert reported == [f"connect {ELSEWHERE}", "getaddrinfo example.org"]
    assert counts == ([1, 0] if has_new_network else None)


def test_a_run_on_local_files_contacts_nothing(watch, tiny_model_dir, chats):
    other = chats.with_name("other.jsonl")
    other.write_text(chats.read_text().replace("Count", "Reckon"))
    text = ["--text", chats, "--max-new-tokens", "4"]
    train = ["train.py", "--model", tiny_model_dir, "--dataset", chats, "--eval-dataset", other, "--max-steps", "2"]
    commands = (
        [*train, "--output-dir", "run"],
        ["train.py", "--resume", "run", "--max-steps", "3", "--allow-changes"],
        ["eval.py", "run", "--against", tiny_model_dir, "--html", "page.html", *text],
        ["eval.py", "run", "--chat", "--max-new-tokens", "4"],
        ["data.py", "--model", tiny_model_dir, "--dataset", chats],
    )
    reported, counts = watch([sys.executable, "-c", ONE_AFTER_ANOTHER, json.dumps(commands, default=str)])
    assert reported == []
    assert counts in ([0, 0], None)


@pytest.mark.slow
def test_processes_on_local_files_contact_each_other_alone(watch, tiny_model_dir, chats):
    train = [ROOT / "train.py", "--model", tiny_model_dir, "--dataset", chats, "--max-steps", "2"]
    reported, counts = watch([*TORCHRUN, *train, "--output-dir", "run", "--shard", "2"])
    assert reported == []
    assert counts is None or counts[0] == 0  # torch looks up the loopback's name


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), sys.argv[2] == "True")
