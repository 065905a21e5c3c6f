"""Files and directories that are complete or absent at whatever instant the process or the machine dies.

The caller writes the contents. Everything is written under a temporary name and forced to disk; one rename gives it its
name; then the rename is forced to disk. The last file of a directory is a manifest with the size and the SHA-256 of all
others, so that later damage to them is noticed.
"""

import contextlib
import ctypes
import hashlib
import json
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

MANIFEST = "MANIFEST.json"
UNFINISHED = ".unfinished-"  # part of every temporary name


class Damaged(Exception):
    """A directory is not what was written; the message says which file, and what of it."""


def sync(path):
    """Force a file or a directory's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(path):
    """Make a directory and its parents where they are missing, for good."""
    path = Path(path)
    if not path.exists():
        make_directory(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)


def replace_file(path, text):
    """Make `text` the content of the file at `path`: the old content or all of the new, never a part."""
    path = Path(path)
    descriptor, unfinished = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}{UNFINISHED}")
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(unfinished, 0o644)  # mkstemp's files are the owner's alone
        sync(unfinished)
        os.replace(unfinished, path)
    except BaseException:
        Path(unfinished).unlink(missing_ok=True)
        raise
    sync(path.parent)


def replace_directory(path, write):
    """Make `path` the directory that `write(empty_directory)` fills: the old content, or all of the new, never a part.

    Raises:
        OSError: what `write` could not do (a full disk, say); `path` is then as it was and nothing is left beside it.
    """
    with replacing(path) as unfinished:
        write(unfinished)


@contextlib.contextmanager
def replacing(path):
    """A context in which the empty directory that it yields is filled, to become `path`; as `replace_directory`."""
    path = Path(path)
    make_directory(path.parent)
    unfinished = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}{UNFINISHED}"))
    try:
        yield unfinished
        for part in (*unfinished.rglob("*"), unfinished):
            part.chmod(0o755 if part.is_dir() else 0o644)  # temporary ones are the owner's alone
            sync(part)
        if not path.exists():
            os.replace(unfinished, path)
        elif not exchange(unfinished, path):
            remove_directory(path)  # an instant without it, where the system knows no better
            os.replace(unfinished, path)
        sync(path.parent)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    shutil.rmtree(unfinished, ignore_errors=True)  # what was replaced, now


def exchange(one, other):
    """Swap two directories in one instant; whether that was possible: Linux can, on most file systems."""
    at_working_directory, swap = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of renameat2(2)
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    paths = os.fsencode(one), os.fsencode(other)
    return bool(renameat2) and not renameat2(at_working_directory, paths[0], at_working_directory, paths[1], swap)


def remove_directory(path):
    """Remove a directory: it is renamed first, so that a partial one is never found."""
    nameless = path.with_name(f".{path.name}{UNFINISHED}removed")
    shutil.rmtree(nameless, ignore_errors=True)
    os.replace(path, nameless)
    shutil.rmtree(nameless)


def remove_unfinished(directory, name="*"):
    """Remove what a process that died in the middle of writing left in a directory."""
    for unfinished in Path(directory).glob(f".{name}{UNFINISHED}*"):
        shutil.rmtree(unfinished) if unfinished.is_dir() else unfinished.unlink()


def write_manifest(directory, about, known=()):
    """Write the manifest of a directory, its last file: what it is `about`, and the size and SHA-256 of the others.

    Args:
        known: what `hashes` gave of some of them.

    Returns:
        The `hashes` of all.
    """
    known = dict(known)
    paths = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    files = known | hashes(directory, [path for path in paths if str(path.relative_to(directory)) not in known])
    seal(directory, {**about, "files": dict(sorted(files.items()))})
    return files


def hashes(directory, paths):
    """The size and the SHA-256 of some files in a directory, by their names relative to it."""
    with ThreadPoolExecutor() as threads:  # hashlib lets go of the interpreter's lock
        return {
            str(path.relative_to(directory)): {"size": path.stat().st_size, "sha256": digest}
            for path, digest in zip(paths, threads.map(sha256, paths), strict=True)
        }


def seal(directory, content):
    """Write a manifest that vouches for itself."""
    text = json.dumps({**content, "sha256": digest_of(content)}, indent=2) + "\n"
    (directory / MANIFEST).write_text(text, encoding="utf-8")


def read_manifest(directory):
    """A directory's manifest, which vouches for itself; of the files it names nothing is known yet.

    Raises:
        Damaged: it is missing, or is not what was written.
    """
    try:
        content = json.loads((directory / MANIFEST).read_bytes())
        expected = content.pop("sha256")
    except FileNotFoundError:
        raise Damaged(f"{directory / MANIFEST} is missing") from None
    except OSError as error:
        raise Damaged(f"{directory / MANIFEST} cannot be read ({error.strerror})") from error
    except (ValueError, AttributeError, KeyError, TypeError):
        content, expected = None, None
    if digest_of(content) != expected:
        raise Damaged(f"{directory / MANIFEST} is not what was written")
    return content


def verify(directory):
    """A directory's manifest, once every file that it names has been read.

    Raises:
        Damaged: the manifest or a file that it names is missing, or is not what was written.
    """
    content = read_manifest(directory)
    verify_files(directory, content["files"])
    return content


def verify_files(directory, files):
    """Read files of a directory, and raise `Damaged` where one is missing, or is not what its `hashes` say."""

    def check(name):
        path, file = directory / name, files[name]
        if not path.is_file():
            raise Damaged(f"{path} is missing")
        if path.stat().st_size != file["size"]:
            raise Damaged(f"{path} has {path.stat().st_size:,} bytes of {file['size']:,}")
        try:
            digest = sha256(path)
        except OSError as error:
            raise Damaged(f"{path} cannot be read ({error.strerror})") from error
        if digest != file["sha256"]:
            raise Damaged(f"{path} is not what was written (another SHA-256)")

    with ThreadPoolExecutor() as threads:
        list(threads.map(check, files))


def sha256(path):
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(content):
    """SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def save_directory(path, about, write):
    """Make `path` the directory that `write(empty_directory)` fills, with a manifest, and verify it as it is on disk.

    Raises:
        OSError, Damaged: it could not be written, or not read again.
    """

    def write_all(directory):
        write(directory)
        write_manifest(directory, about)

    replace_directory(path, write_all)
    verify(path)


def copy_directory(source, target, without=()):
    """Copy a directory, but for its manifest; its weights get a second name instead, where that can be."""
    ignored = shutil.ignore_patterns(MANIFEST, *without)
    shutil.copytree(source, target, ignore=ignored, copy_function=link_weights, dirs_exist_ok=True)


def link_weights(source, target):
    """Copy a file; make a hard link to a file of weights instead, which is large and never edited."""
    if source.endswith(".safetensors"):
        with contextlib.suppress(OSError):  # not every file system can
            os.link(source, target)
            return
    shutil.copy2(source, target)
