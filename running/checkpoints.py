"""The checkpoints of a run: saving, finding, and keeping the newest ones."""

import re
from pathlib import Path

from storage.durable import Damaged, remove_directory, save_directory, verify


def save_checkpoint(run, about, write, newest, also):
    """Write `run/checkpoints/step-N`, verify it as it is on disk, and only then remove older ones.

    Args:
        about: what the manifest says besides its files; its `step` is N.
        write: fills the directory it is given.
        newest: how many of the newest are kept.
        also: the step of another one to keep.

    Raises:
        OSError, Damaged: it could not be written or read back; the older ones are unchanged.
    """
    save_directory(checkpoint_at(run, about["step"]), about, write)
    remove_older(run, about["step"], newest, also)


def remove_older(run, step, newest, also):
    """Remove a run's checkpoints up to that of `step`, but for the `newest` of them, and that of the step `also`."""
    done = [checkpoint for checkpoint in checkpoints(run) if step_of(checkpoint) <= step]
    for old in done[:-newest]:
        if step_of(old) != also:
            remove_directory(old)


def newest_valid(run):
    """The newest checkpoint that verifies, what it is about, and why each newer one was skipped.

    Returns:
        (path, about, damages); path and about are None where there is none.
    """
    damages = []
    for checkpoint in reversed(checkpoints(run)):
        try:
            return checkpoint, verify(checkpoint), damages
        except Damaged as why:
            damages.append(str(why))
    return None, None, damages


def checkpoints(run):
    """A run's checkpoint directories, oldest first."""
    found = (Path(run) / "checkpoints").glob("step-*")
    return sorted((path for path in found if re.fullmatch(r"step-\d+", path.name)), key=step_of)


def checkpoint_at(run, step):
    """Where the checkpoint after `step` updates is, or would be."""
    return Path(run) / "checkpoints" / f"step-{step}"


def step_of(checkpoint):
    """How many updates a checkpoint has seen: the N of `step-N`."""
    return int(Path(checkpoint).name.removeprefix("step-"))
