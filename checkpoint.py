"""Directories that are complete or absent, and a run's checkpoints: saving, finding, keeping the newest.

Knows nothing of what a checkpoint's files mean: the caller writes them.
"""

import os
import shutil
import tempfile
from pathlib import Path


def replace_directory(path, write):
    """Make `path` the directory that `write(empty_directory)` fills: the old content, or all of the new, never a part.

    Raises:
        OSError: what `write` could not do (a full disk, say); `path` is then as it was and nothing is left beside it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-"))
    try:
        write(unfinished)
        unfinished.chmod(0o755)  # mkdtemp's directories are the owner's alone
        replaced = unfinished.with_name(unfinished.name + "-replaced")
        if path.exists():
            os.replace(path, replaced)
        os.replace(unfinished, path)
        shutil.rmtree(replaced, ignore_errors=True)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def save_checkpoint(run, step, write, keep):
    """Write `run/checkpoints/step-N` and remove all but the newest `keep`."""
    replace_directory(Path(run) / "checkpoints" / f"step-{step}", write)
    for old in checkpoints(run)[:-keep]:
        shutil.rmtree(old)


def checkpoints(run):
    """A run's checkpoint directories, oldest first."""
    return sorted((Path(run) / "checkpoints").glob("step-*"), key=step_of)


def step_of(checkpoint):
    """How many updates a checkpoint has seen: the N of `step-N`."""
    return int(Path(checkpoint).name.removeprefix("step-"))
