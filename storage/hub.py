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
from huggingface_hub import HfApi, constants, get_token, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, StrictDataclassError
from huggingface_hub.utils import get_session, httpx
from safetensors import SafetensorError

from config import PRESETS, QUICKSTART_MODEL, UserError, first_line, is_out_of_memory
from storage.durable import MANIFEST
from storage.quickstart import quickstart_model

HUB_TIMEOUT = 3  # seconds
# Raised by the libraries for a model or dataset that is missing, corrupt, or cut off on its way.
LOADING_ERRORS = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError, httpx.HTTPError)
LOADING_ERRORS += (SafetensorError, StrictDataclassError, datasets.exceptions.DatasetsError)


def find_model(name):
    """The place to load a model from: `(path or Hub id, local_files_only)`."""
    directory = Path(name).expanduser()
    if (directory / "metrics.jsonl").exists():
        raise UserError(f"--model {name}: this is a run; its best model is {directory / 'best'}")
    if (directory / "adapter_config.json").exists() and not (directory / "config.json").exists():
        raise UserError(f"--model {name}: a PEFT adapter; merge it into its base model first")
    if directory.is_dir():
        return str(directory), True
    if name == QUICKSTART_MODEL:
        return str(quickstart_model()), True
    if directory.is_file() or looks_like_a_path(name):
        raise UserError(f"--model {name}: there is no such directory")
    return name, must_use_cache("model", name)


def model_directory(path, local_files_only, patterns):
    """The directory of a model at `path`; for one on the Hub, that in the cache, with its files of these patterns."""
    if Path(path).is_dir():
        return Path(path)
    return Path(snapshot_download(path, allow_patterns=patterns, local_files_only=local_files_only))


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
def load_hub_dataset(name, configuration, split):
    """One split of a Hub dataset, in its configuration of that name (None: its default), as a `datasets.Dataset`."""
    try:
        with offline() if must_use_cache("dataset", name, configuration) else contextlib.nullcontext():
            return datasets.load_dataset(name, configuration, split=split)
    except LOADING_ERRORS as error:
        named = name if configuration is None else f"{name}:{configuration}"
        raise UserError(f"--dataset {named} --split {split}: {first_line(error)}") from error


def looks_like_a_path(name):
    """Whether a name that is not on this disk was meant as one."""
    return name.startswith(("/", ".", "~")) or name.count("/") > 1


@functools.cache  # one request for each name
def must_use_cache(kind, name, configuration=None):
    """Whether a "model" or "dataset" must come from the cache: False where the Hub has it, True without an answer."""
    if error := connection_error():
        advice = "name a local file" if kind == "dataset" else f"use the quickstart's: --model {QUICKSTART_MODEL}"
        problem = f"not on this disk, and the Hub does not answer ({first_line(error)}); check the network, or {advice}"
    else:
        try:
            HfApi().repo_info(name, repo_type=kind, timeout=HUB_TIMEOUT)
            return False
        except (RepositoryNotFoundError, HFValidationError) as error:
            where = "neither on this disk nor on the Hub (if it is private or gated: hf auth login)"
            raise UserError(f"--{kind} {name}: {where}") from error
        except LOADING_ERRORS as error:
            problem = f"the Hub fails ({first_line(error)}); try again later"
    if not is_cached(kind, name, configuration):
        raise UserError(f"--{kind} {name}: {problem}")
    return True


@functools.cache
def connection_error():
    """The error of a request to the Hub, None where it answers; one request, of at most HUB_TIMEOUT."""
    results = []

    def request():
        try:
            get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT)
            results.append(None)
        except Exception as error:  # whatever it is, it is reported by the thread that waits
            results.append(error)

    thread = threading.Thread(target=request, daemon=True)
    thread.start()
    thread.join(HUB_TIMEOUT)  # looking up a host name has no time limit of its own
    return results[0] if results else TimeoutError(f"no answer within {HUB_TIMEOUT} s")


def is_cached(kind, name, configuration):
    """Whether the Hub's cache on this disk has a complete "model", or a prepared "dataset", of that name."""
    try:
        if kind == "dataset":
            # Offline, `datasets` takes any configuration it finds; only "default" is surely what the Hub would give.
            with offline():
                builder = datasets.load_dataset_builder(name, configuration)
                return builder.config.name == (configuration or "default")
        config = try_to_load_from_cache(name, "config.json")
    except LOADING_ERRORS:  # half prepared, never prepared, not a name
        return False
    if not isinstance(config, str):
        return False
    index, weights = Path(config).with_name("model.safetensors.index.json"), ["model.safetensors"]
    if index.exists():  # the weights are in several files
        weights = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    return all(index.with_name(file).exists() for file in weights)


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


@contextlib.contextmanager
def offline():
    """Make `datasets` look only into its cache."""
    before, datasets.config.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def choose_preset(named):
    """The preset for the settings that a user named, and why: `(name, reason)`. Decides what `auto` means."""
    if named.get("preset", "auto") != "auto":
        return named["preset"], "as asked"
    if "dataset" in named:
        return "none", "your own --dataset"
    if not torch.cuda.is_available():
        return "quickstart", "auto: there is no GPU"
    try:
        (dataset,) = PRESETS["ultrachat"]["dataset"]
        cached = [must_use_cache("dataset", dataset)]
        if "model" not in named:
            cached.append(must_use_cache("model", PRESETS["ultrachat"]["model"]))
    except UserError:
        return "quickstart", "auto: the Hub does not answer, and the experiment is not cached"
    return "ultrachat", f"auto: there is a GPU, and {'the experiment is cached' if all(cached) else 'the Hub answers'}"


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
