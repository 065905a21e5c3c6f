"""The directory of a run: choosing a new one, opening one to resume, and locking it."""

import contextlib
import itertools
import os
import platform
import re
import shlex
import tempfile
import time
from pathlib import Path

import filelock

from config import PRESETS, UserError
from storage.durable import PARTIAL, make_directory, remove_partial


@contextlib.contextmanager
def new_directory(config):
    """Make the directory of a new run: the one of `--output-dir`, or `runs/<preset or dataset>-<time>`.

    What was made is removed again in the end, if nothing has been written to it.
    """
    directory = Path(config.output_dir or f"runs/{name_run(config)}-{time.strftime('%Y%m%d-%H%M%S')}")
    try:
        if config.output_dir:
            check_output_dir(directory)
        missing = [path for path in (directory, *directory.parents) if not path.exists()]
        if not config.output_dir:
            directory = make_unique(directory)
            missing.insert(0, directory)
        make_directory(directory)
        tempfile.TemporaryDirectory(prefix=f".{PARTIAL}", dir=directory).cleanup()
    except OSError as error:
        raise UserError(f"--output-dir {directory}: cannot write to it ({error.strerror})") from error
    try:
        yield directory
    finally:
        for path in missing:
            with contextlib.suppress(OSError):  # it is not empty
                path.rmdir()


def name_run(config):
    """The name of a run: its preset or first dataset, in characters that a shell takes as they are."""
    if config.dataset == PRESETS[config.preset].get("dataset"):
        return config.preset
    return re.sub(r"[^\w.-]+", "-", Path(config.dataset[0]).stem).strip("-.") or "run"


def make_unique(directory):
    """Make a directory of that name, or with a number behind it, that did not exist, and return it."""
    make_directory(directory.parent)
    for number in itertools.count(1):
        candidate = directory if number == 1 else directory.with_name(f"{directory.name}-{number}")
        with contextlib.suppress(FileExistsError):
            candidate.mkdir()
            return candidate


def check_output_dir(directory):
    """Raise `UserError` where a new run would write into a directory that holds something."""
    if (directory / "config.json").exists():
        run = shlex.quote(str(directory))
        raise UserError(f"--output-dir {directory}: it holds a run already; --resume {run}, or name another")
    for name in sorted(os.listdir(directory)) if directory.exists() else ():
        if name not in (".lock", ".owner") and PARTIAL not in name:  # those are left by a run that was killed at once
            raise UserError(f"--output-dir {directory}: it is not empty (it holds {name}); name a new directory")


@contextlib.contextmanager
def locked(directory):
    """Lock a run directory for this process, and remove what a killed one left incomplete there.

    The system releases the lock when the process ends, however it ends.
    """
    lock = filelock.FileLock(directory / ".lock")
    try:
        lock.acquire(timeout=0)
        (directory / ".owner").write_text(f"process {os.getpid()} on {platform.node()}", encoding="utf-8")
    except filelock.Timeout:
        owner = read_owner(directory)
        raise UserError(f"{directory}: another process is training in it ({owner}); wait for it, or stop it") from None
    except OSError as error:
        raise UserError(f"{directory}: cannot write to it ({error.strerror})") from error
    try:
        remove_partial(directory)
        remove_partial(directory / "checkpoints")
        yield
    finally:
        lock.release()


def read_owner(directory):
    """The process that has locked a run directory last; "" where this process cannot see that."""
    owner = directory / ".owner"
    return owner.read_text(encoding="utf-8") if owner.exists() else ""
