"""Models and datasets by name: on this disk, on the Hub, or in its cache, found within seconds.

The libraries retry an unreachable Hub for about a minute before they fail; here one request decides whether it answers.
"""

import contextlib
import functools
import json
import os
import textwrap
import threading
from pathlib import Path

import datasets
import torch
import transformers
from datasets.packaged_modules.cache.cache import Cache
from huggingface_hub import HfApi, constants, get_token, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    StrictDataclassError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import get_session, httpx
from safetensors import SafetensorError

from config import PRESETS, QUICKSTART_MODEL, UserError, first_line, is_out_of_memory
from storage.durable import MANIFEST
from storage.quickstart import quickstart_model

HUB_TIMEOUT = 3  # seconds
# Raised by the libraries for a model or dataset that is missing, corrupt, or cut off on its way.
LOADING_ERRORS = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError, httpx.HTTPError)
LOADING_ERRORS += (SafetensorError, StrictDataclassError, datasets.exceptions.DatasetsError)


def find_model(name, may_be_adapter=False):
    """The place to load a model from: `(path or Hub id, perhaps with @revision, local_files_only)`."""
    directory = Path(name).expanduser()
    if (directory / "metrics.jsonl").exists():
        raise UserError(f"--model {name}: this is a run; its best model is {directory / 'best'}")
    if is_adapter(directory) and not may_be_adapter:
        merge = f"merge them first: python eval.py {name} --export DIR --dtype fp32"
        raise UserError(f"--model {name}: these are adapters; {merge}")
    if directory.is_dir():
        return str(directory), True
    if name == QUICKSTART_MODEL:
        return str(quickstart_model()), True
    repository, revision = split_revision(name)
    if directory.is_file() or looks_like_a_path(repository):
        raise UserError(f"--model {name}: there is no such directory")
    return name, find_commit("model", repository, revision=revision)[1]


def is_adapter(path):
    """Whether a directory is that of adapters; raises `UserError` where it is a model's, too."""
    has_adapters, has_model = ((Path(path) / file).exists() for file in ("adapter_config.json", "config.json"))
    if has_adapters and has_model:
        raise UserError(f"--model {path}: it holds a model and adapters, which libraries add to it; remove one of them")
    return has_adapters


def split_revision(name):
    """A model's Hub id and its revision, from `id@revision`; None without one, and where that is a directory."""
    repository, at, revision = name.partition("@")
    return (repository, revision) if at and not Path(name).is_dir() else (name, None)


def find_model_commit(name):
    """The commit of a model on the Hub, {name: commit}; empty for one on this disk."""
    path, _ = find_model(name)
    repository, revision = split_revision(path)
    return {} if Path(path).is_dir() else {name: find_commit("model", repository, revision=revision)[0]}


def pretrained(path, local_files_only):
    """The arguments of transformers' `from_pretrained` for what `find_model` returned."""
    repository, revision = split_revision(str(path))
    options = {"revision": revision or "main", "local_files_only": local_files_only, "trust_remote_code": False}
    return {"pretrained_model_name_or_path": repository, **options}


def model_directory(path, local_files_only, patterns):
    """The directory of a model at `path`; for one on the Hub, that in the cache, with its files of these patterns."""
    if Path(path).is_dir():
        return Path(path)
    repository, revision = split_revision(path)
    options = {"allow_patterns": patterns, "local_files_only": local_files_only}
    return Path(snapshot_download(repository, revision=revision, **options))


def explain_load_error(path, error):
    """The reason why a model could not be loaded, in one line."""
    for file in sorted(Path(path).glob("*")):
        if is_lfs_pointer(file):
            return f"{file} is a git-lfs pointer, not the file itself; run: git lfs pull"
    reason = textwrap.shorten(f"{type(error).__name__}: {error}", 300)
    if is_out_of_memory(error):
        return f"out of memory ({reason}); free some, or use a smaller model"
    is_corrupt = isinstance(error, SafetensorError)
    return f"its weights are corrupt ({reason}); download or save them again" if is_corrupt else reason


def is_lfs_pointer(path):
    """Whether a file is git-lfs's note of where its content is, not the content."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(19) == b"version https://git"


@functools.cache  # each is loaded once
def load_hub_dataset(name, configuration, split, revision=None):
    """One split of a Hub dataset, in its configuration of that name (None: its default), as a `datasets.Dataset`."""
    try:
        commit, from_cache = find_commit("dataset", name, configuration, revision)
        if from_cache:
            return find_prepared(name, configuration, commit).as_dataset(split)
        return datasets.load_dataset(name, configuration, split=split, revision=commit)
    except LOADING_ERRORS as error:
        named = name if configuration is None else f"{name}:{configuration}"
        raise UserError(f"--dataset {named} --split {split}: {first_line(error)}") from error


def looks_like_a_path(name):
    """Whether a name that is not on this disk was meant as one."""
    return name.startswith(("/", ".", "~")) or name.count("/") > 1


@functools.cache  # one request for each name
def find_commit(kind, name, configuration=None, revision=None):
    """The commit of a "model" or "dataset" at a revision (None: its main branch), and whether only the cache has it."""
    if error := connection_error():
        advice = "name a local file" if kind == "dataset" else f"use the quickstart's: --model {QUICKSTART_MODEL}"
        problem = f"not on this disk, and the Hub does not answer ({first_line(error)}); check the network, or {advice}"
    else:
        try:
            commit = HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=HUB_TIMEOUT).sha
            with contextlib.suppress(*LOADING_ERRORS):  # for the cache to know the commit of this revision, offline
                file = "config.json" if kind == "model" else "README.md"
                hf_hub_download(name, file, repo_type=kind, revision=revision)
            return commit, False
        except RevisionNotFoundError as error:
            raise UserError(f"--{kind} {name}: it has no revision {revision} on the Hub") from error
        except (RepositoryNotFoundError, HFValidationError) as error:
            where = "neither on this disk nor on the Hub (if it is private or gated: hf auth login)"
            raise UserError(f"--{kind} {name}: {where}") from error
        except LOADING_ERRORS as error:
            problem = f"the Hub fails ({first_line(error)}); try again later"
    commit = find_cached_commit(kind, name, configuration, revision)
    if commit is None:
        raise UserError(f"--{kind} {name}{f' at {revision}' if revision else ''}: {problem}")
    return commit, True


@functools.cache
def connection_error():
    """The error of a request to the Hub, None where it answers; one request, of at most HUB_TIMEOUT."""
    found = TimeoutError(f"no answer within {HUB_TIMEOUT} s")

    def request():
        nonlocal found
        try:
            get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT)
            found = None
        except Exception as error:  # whatever it is, it is reported by the thread that waits
            found = error

    thread = threading.Thread(target=request, daemon=True)
    thread.start()
    thread.join(HUB_TIMEOUT)  # looking up a host name has no time limit of its own
    return found


def find_cached_commit(kind, name, configuration, revision):
    """The commit of a complete "model", or a prepared "dataset", in the Hub's cache on this disk; None without one."""
    try:
        if kind == "dataset":
            builder = find_prepared(name, configuration, revision)
            # Offline, `datasets` takes any configuration it finds; only "default" is surely what the Hub would give.
            return builder.hash if builder.config.name == (configuration or "default") else None
        config = try_to_load_from_cache(name, "config.json", revision=revision)
    except LOADING_ERRORS:  # half prepared, never prepared, not a name
        return None
    if not isinstance(config, str):
        return None
    index, weights = Path(config).with_name("model.safetensors.index.json"), ["model.safetensors"]
    if index.exists():  # the weights are in several files
        weights = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    return index.parent.name if all(index.with_name(file).exists() for file in weights) else None


def find_prepared(name, configuration, revision):
    """The builder of a dataset in the cache of `datasets`, at a revision; None: main, or what was prepared last."""
    named = {"repo_id": name, "dataset_name": name.rpartition("/")[2]}
    builder = Cache(**named, config_name=configuration, version="auto", hash="auto")
    ref = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="dataset"), "refs", revision or "main")
    commit = ref.read_text().strip() if ref.is_file() else revision or builder.hash
    directory = Path(builder.cache_dir).with_name(commit)
    if not directory.is_dir():
        if revision is None:
            return builder
        raise FileNotFoundError(f"{directory} is not prepared")
    return Cache(**named, config_name=builder.config.name, version=directory.parent.name, hash=commit)


def push(directory, name):
    """Upload a model's directory, without its manifest, to a repository on the Hub; a new one is private.

    Returns the repository's address, and whether it is private.
    """
    if get_token() is None:
        raise UserError(f"--push-to-hub {name}: not logged in; run: hf auth login (or set HF_TOKEN)")
    if error := connection_error():
        raise UserError(f"--push-to-hub {name}: the Hub does not answer ({first_line(error)}); check the network")
    api = HfApi()
    try:
        address = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=address.repo_id, folder_path=directory, ignore_patterns=MANIFEST)
        return str(address), api.repo_info(address.repo_id).private
    except LOADING_ERRORS as error:
        raise UserError(f"--push-to-hub {name}: the Hub refuses ({' '.join(str(error).split())})") from error


def choose_preset(named):
    """The preset for the settings that a user named, and why: `(name, reason)`. Decides what `auto` means."""
    if named.get("preset", "auto") != "auto":
        return named["preset"], "as given"
    if "dataset" in named:
        return "none", "your own --dataset"
    if not torch.cuda.is_available():
        return "quickstart", "auto: there is no GPU"
    try:
        (dataset,) = PRESETS["ultrachat"]["dataset"]
        needed = [("dataset", dataset), *([] if "model" in named else [("model", PRESETS["ultrachat"]["model"])])]
        only_cached = all([find_commit(*each)[1] for each in needed])
    except UserError:
        return "quickstart", "auto: the Hub does not answer, and the experiment is not cached"
    return "ultrachat", f"auto: there is a GPU, and {'the experiment is cached' if only_cached else 'the Hub answers'}"


def quiet_libraries():
    """Turn off the progress bars, warnings and telemetry of the libraries; errors stay."""
    constants.HF_HUB_DISABLE_TELEMETRY = True
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    # A Hub model with only pickled weights would be named, with the user's token, to a service that converts it.
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    for library in (datasets.logging, transformers.utils.logging):
        library.set_verbosity_error()
