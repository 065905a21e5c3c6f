"""Files and directories that are complete or absent at whatever instant the process or the machine dies.

Everything is written under a temporary name and forced to disk; one atomic rename gives it its name; then the rename is
forced to disk. The last file of a directory is a manifest with the size and SHA-256 of every other file, so that later
corruption is noticed.
"""

import contextlib
import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from config import UserError

MANIFEST = "MANIFEST.json"
PARTIAL = ".partial-"  # part of every temporary name


class CorruptError(UserError):
    """A directory is not what was written; the message says which file, and what is wrong with it."""


def sync(path):
    """Force a file, or the entries of a directory, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(path):
    """Make a directory, and its missing parents, and force that to disk."""
    path = Path(path)
    if not path.exists():
        make_directory(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)


def replace_file(path, text):
    """Make `text` the content of the file at `path`, atomically."""
    path = Path(path)
    partial = partial_path(path)
    try:
        partial.write_text(text, encoding="utf-8")
        sync(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    sync(path.parent)


def replace_link(path, target):
    """Make `path` a symbolic link to `target`, atomically."""
    partial = partial_path(path)
    partial.unlink(missing_ok=True)
    os.symlink(target, partial)
    if path.is_dir() and not path.is_symlink():  # a copy that followed the link
        remove_directory(path)
    os.replace(partial, path)
    sync(path.parent)


@contextlib.contextmanager
def atomic_directory(path, about):
    """A context that yields an empty directory to fill; at its end that becomes `path`, and is verified on disk.

    An existing directory, which should be a corrupt one, is removed just before.

    Args:
        about: the manifest's entries besides the files, a dict of JSON values; None: no manifest, and no verifying.

    Raises:
        OSError, CorruptError: it could not be written, or not read back; nothing is left beside `path`.
    """
    path = Path(path)
    make_directory(path.parent)
    partial = partial_path(path)
    partial.mkdir()
    try:
        yield partial
        if about is not None:
            write_manifest(partial, about)
        for part in (*partial.rglob("*"), partial):
            sync(part)
        if path.exists():
            remove_directory(path)
        os.replace(partial, path)
        sync(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if about is not None:
        verify(path)


def partial_path(path):
    """The temporary name under which this process writes `path`; `remove_partial` finds it by its form."""
    return path.with_name(f".{path.name}{PARTIAL}{os.getpid()}")


def remove_directory(path):
    """Remove a directory; it is renamed first, so that nobody finds a part of it."""
    partial = path.with_name(f".{path.name}{PARTIAL}removed")
    os.replace(path, partial)
    shutil.rmtree(partial)


def remove_partial(directory, name="*"):
    """Remove what a process that was killed while it wrote files of that name left in a directory."""
    for partial in Path(directory).glob(f".{name}{PARTIAL}*"):
        shutil.rmtree(partial) if partial.is_dir() and not partial.is_symlink() else partial.unlink()


def write_manifest(directory, about):
    """Write the manifest of a directory, its last file: `about`, and the size and SHA-256 of every other file."""
    paths = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    with ThreadPoolExecutor() as threads:
        digests = threads.map(sha256, paths)
    files = {
        str(path.relative_to(directory)): {"size": path.stat().st_size, "sha256": digest}
        for path, digest in zip(paths, digests, strict=True)
    }
    write_checksummed(directory / MANIFEST, {**about, "files": files})


def write_checksummed(path, content):
    """Write a dict as JSON that holds its own SHA-256."""
    path.write_text(json.dumps({**content, "sha256": json_sha256(content)}, indent=2) + "\n", encoding="utf-8")


def read_manifest(directory):
    """The manifest of a directory; raises `CorruptError` where it is missing, or has another SHA-256 than it names."""
    path = Path(directory) / MANIFEST
    try:
        content = json.loads(path.read_bytes())
        expected = content.pop("sha256")
    except FileNotFoundError:
        raise CorruptError(f"{path} is missing") from None
    except OSError as error:
        raise CorruptError(f"{path} cannot be read ({error.strerror})") from error
    except (ValueError, AttributeError, KeyError, TypeError):
        content, expected = None, None
    if json_sha256(content) != expected:
        raise CorruptError(f"{path} is corrupt (not what was written)")
    return content


def verify(directory):
    """The manifest of a directory; raises `CorruptError` where it, or a file it names, is not what was written."""
    content = read_manifest(directory)
    paths = [Path(directory) / name for name in content["files"]]
    with ThreadPoolExecutor() as threads:  # hashlib releases the GIL
        list(threads.map(verify_file, paths, content["files"].values()))
    return content


def find_corruption(directory):
    """The first file of a directory that is missing or corrupt, as a `CorruptError`; None where there is none."""
    try:
        verify(directory)
    except CorruptError as error:
        return error


def verify_file(path, expected):
    """Raise `CorruptError` where a file does not have the size and SHA-256 of its entry in the manifest."""
    try:
        size = path.stat().st_size
        if size != expected["size"]:
            raise CorruptError(f"{path} is corrupt ({size:,} bytes of {expected['size']:,})")
        if sha256(path) != expected["sha256"]:
            raise CorruptError(f"{path} is corrupt (another SHA-256)")
    except FileNotFoundError:
        raise CorruptError(f"{path} is missing") from None
    except OSError as error:
        raise CorruptError(f"{path} cannot be read ({error.strerror})") from error


def sha256(path):
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_sha256(content):
    """SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
