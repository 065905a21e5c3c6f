"""The cache of what is slow to make: directories that are verified at every use, and made again where corrupt."""

import os
import sys
from pathlib import Path

import filelock

from config import UserError, first_line
from storage.durable import atomic_directory, find_corruption, make_directory, remove_partial


def cache_directory():
    """`$XDG_CACHE_HOME/plain-sft`, or `~/.cache/plain-sft`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "plain-sft"


def cached(name, write, label):
    """A directory in the cache, in which every byte is as it was written.

    Args:
        name: its path in the cache.
        write: `write(empty_directory)` makes its content, where it is missing or corrupt.
        label: its name in messages.
    """
    directory = cache_directory() / name
    if problem := find_corruption(directory):
        if directory.exists():
            print(f"{label} is corrupt and is made again: {problem}", file=sys.stderr)
        try:
            make_directory(directory.parent)
            with filelock.FileLock(directory.with_name(f".{directory.name}.lock")):
                if find_corruption(directory):  # another process may have made it in the meantime
                    remove_partial(directory.parent, directory.name)
                    with atomic_directory(directory, {}) as partial:
                        write(partial)
        except OSError as error:
            raise UserError(
                f"the cache {cache_directory()} cannot be written ({error.strerror or first_line(error)}); "
                "set XDG_CACHE_HOME to a directory that can"
            ) from error
    return directory
