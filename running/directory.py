"""The directory of a run: choosing a new one, opening one to resume, and locking it."""

import contextlib
import os
import platform
import tempfile
import time
from pathlib import Path

import filelock

from config import PRESETS, UserError
from storage.durable import remove_unfinished


def new_directory(config):
    """The directory of a new run: the one asked for, or `runs/<preset or dataset>-<time>`.

    Raises:
        UserError: it already holds a run, or cannot be written.
    """
    is_presets = config.dataset == PRESETS[config.preset].get("dataset")
    name = config.preset if is_presets else Path(config.dataset[0]).stem
    directory = Path(config.output_dir or f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}")
    refuse_existing_run(directory)
    existing = next(parent for parent in (directory, *directory.absolute().parents) if parent.exists())
    try:
        tempfile.TemporaryDirectory(dir=existing).cleanup()
    except OSError as error:
        raise UserError(f"--output-dir {directory}: cannot write to {existing} ({error.strerror})") from error
    return directory


def refuse_existing_run(directory):
    """Raise `UserError` where a directory holds a run."""
    if (directory / "config.json").exists():
        raise UserError(f"--output-dir {directory}: it holds a run already; --resume {directory}, or name another")


@contextlib.contextmanager
def locked(run):
    """Lock a run directory for this process, and remove what a killed one left unfinished there.

    The system releases the lock when the process ends, however it ends.

    Raises:
        UserError: another process has locked it, or it cannot be written.
    """
    run = Path(run)
    lock, owner = filelock.FileLock(run / ".lock"), run / ".owner"
    try:
        lock.acquire(timeout=0)
        owner.write_text(f"process {os.getpid()} on {platform.node()}")
    except filelock.Timeout:
        who = f" ({owner.read_text()})" if owner.exists() else ""
        raise UserError(f"{run}: another process is training in it{who}; wait for it, or stop it") from None
    except OSError as error:
        raise UserError(f"{run}: cannot write to it ({error.strerror})") from error
    try:
        remove_unfinished(run)
        remove_unfinished(run / "checkpoints")
        yield
    finally:
        lock.release()
