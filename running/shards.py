"""Large models on disk: all processes that share one write it, in files of bounded size, which transformers can read.

No process holds more of the model than its part and one file. One that cannot write fails all of them.
"""

import contextlib
import json

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from compute.processes import from_first, gathered, is_first, rank, world_size
from compute.sharding import is_sharded, whole
from config import first_line
from storage.durable import Damaged, hashes, replacing, sync, verify_files, write_manifest

LARGE = 2 * 10**9  # parameters: in one process, a checkpoint of so many takes 24 GB of memory
FILE_BYTES = 2**30  # of a file at most, where a single tensor is not larger


def is_large(model):
    """Whether a model is saved by all processes that share it, instead of by the first."""
    return is_sharded(model) and sum(weights.numel() for weights in model.parameters()) >= LARGE


def agreed(work):
    """What `work()` returns in this process; all processes call this.

    Raises:
        OSError, Damaged: it failed in one of them; then it fails in all.
    """
    result = failure = None
    try:
        result = work()
    except (OSError, Damaged) as error:
        failure = error
    for each in gathered(failure):
        if each:
            raise each from failure
    return result


def save_directory_together(path, about, write):
    """`durable.save_directory` by all processes; each hashes and reads back what it wrote.

    Args:
        write: fills an empty directory; called in each process, it returns the paths that this one has written. What
            none has named is the first's.

    Raises:
        OSError, Damaged: it could not be written in one of them, or not read again. Nothing unfinished is left.
    """
    with contextlib.ExitStack() as stack:
        made = agreed(lambda: stack.enter_context(replacing(path)) if is_first() else None)
        unfinished = from_first(lambda: made)
        paths = agreed(lambda: write(unfinished))
        own = agreed(lambda: hashes(unfinished, paths))
        known = {name: file for each in gathered(own) for name, file in each.items()}
        if is_first():
            others = known.keys() - own.keys()
            files = agreed(lambda: write_manifest(unfinished, about, known))
            own = {name: file for name, file in files.items() if name not in others}
        else:
            agreed(lambda: None)
        agreed(stack.close)  # which renames it
    agreed(lambda: verify_files(path, own))


def write_tensors(tensors, directory, stem):
    """Write tensors, put together, and an index of them, as transformers lays out the weights of a large model.

    All processes call this. In turn, as many files as there are processes are put together, then written, one by each.

    Args:
        tensors: by name; processes may share them.
        stem: the files are `stem-00001-of-00003.safetensors`, …, and `stem.safetensors.index.json`.

    Returns:
        The paths that this process has written.

    Raises:
        OSError: a process could not write.
    """
    files = cut(tensors)
    names = [f"{stem}-{number:05}-of-{len(files):05}.safetensors" for number in range(1, len(files) + 1)]
    paths = []
    for first in range(0, len(files), world_size()):
        own = {}
        for owner, file in enumerate(files[first : first + world_size()]):
            for name in file:
                put_together = whole(tensors[name].detach())
                if owner == rank():
                    own[name] = put_together.cpu().contiguous()
        if own:
            paths.append(directory / names[first + rank()])
        agreed(lambda path=paths[-1] if own else None, own=own: path and write_file(own, path))
    if is_first():
        size = sum(map(bytes_of, tensors.values()))
        places = {name: file_name for file, file_name in zip(files, names, strict=True) for name in file}
        index = {"metadata": {"total_size": size}, "weight_map": places}
        paths.append(index_of(directory, stem))
        paths[-1].write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return paths


def cut(tensors):
    """The names of some tensors, file by file."""
    files, room = [], 0
    for name, tensor in tensors.items():
        room -= bytes_of(tensor)
        if room < 0:
            files.append([])
            room = FILE_BYTES - bytes_of(tensor)
        files[-1].append(name)
    return files


def bytes_of(tensor):
    """The bytes of a tensor, of all processes that share it together."""
    return tensor.numel() * tensor.element_size()


def write_file(tensors, path):
    """Write tensors into one file, and force it to disk."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(first_line(error)) from error
    sync(path)


def index_of(directory, stem):
    """Where `write_tensors` keeps in which file each tensor is."""
    return directory / f"{stem}.safetensors.index.json"


def read_tensors(directory, stem):
    """The tensors that `write_tensors` has written, one after another: pairs of a name and a tensor that is mapped."""
    places = json.loads(index_of(directory, stem).read_text(encoding="utf-8"))["weight_map"]
    for file in sorted(set(places.values())):
        with safe_open(directory / file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  it is no dict
                yield name, tensors.get_tensor(name)
