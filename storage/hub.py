"""Where a model or dataset is found, by its name: on this disk, on the Hub, or in its cache, within seconds.

The libraries retry an unreachable Hub for about a minute before they fail; here it is asked once whether it answers.
"""

import contextlib
import functools
import json
import re
import threading
from pathlib import Path

import datasets
import torch
import transformers
from huggingface_hub import HfApi, constants, get_token, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, StrictDataclassError
from huggingface_hub.utils import get_session, httpx
from safetensors import SafetensorError

from config import PRESETS, QUICKSTART_MODEL, UserError, first_line
from storage.durable import MANIFEST
from storage.quickstart import quickstart_model

ASK_SECONDS = 3
# What the libraries raise over a model or dataset that is missing, damaged, or cut off on its way.
LOADING_ERRORS = (
    OSError,
    ValueError,
    RuntimeError,
    KeyError,
    TypeError,
    AttributeError,
    httpx.HTTPError,
    SafetensorError,
    StrictDataclassError,
    datasets.exceptions.DatasetsError,
)


def find_model(name):
    """Where to load a model from: `(path or Hub id, local_files_only)`.

    Raises:
        UserError: no such directory, a file, a run's or an adapter's directory, no such model on the Hub, or a Hub that
            does not answer and nothing in its cache.
    """
    directory = Path(name).expanduser()
    if (directory / "metrics.jsonl").exists():
        raise UserError(f"--model {name}: this is a run; its best model is {directory / 'best'}")
    if (directory / "adapter_config.json").exists() and not (directory / "config.json").exists():
        raise UserError(f"--model {name}: a PEFT adapter; merge it into its base model first")
    if directory.is_file():
        raise UserError(f"--model {name}: a file; name its directory")
    if directory.is_dir():
        return str(directory), True
    if name == QUICKSTART_MODEL:
        return str(quickstart_model()), True
    if looks_like_a_path(name):
        raise UserError(f"--model {name}: there is no such directory")
    return name, only_cached("model", name)


def why_not_loaded(path, error):
    """The reason why a model could not be loaded, in a line."""
    files = sorted(Path(path).glob("*"))
    for file in files:
        if is_lfs_pointer(file):
            return f"{file} is a git-lfs pointer, not the file itself; run: git lfs pull"
    of_tokenizers = [file for file in files if re.search(r"token|vocab|tekken|\.model$", file.name)]
    if files and "backend tokenizer" in str(error) and not of_tokenizers:
        return "there is no tokenizer in it"
    if isinstance(error, SafetensorError):
        return f"its weights are damaged ({first_line(error)}); download or save them again"
    if isinstance(error, StrictDataclassError):
        return f"its config.json is not valid: {' '.join(str(error).split())}"
    if other := re.search(r"models\.(\w+)\.\S+ for this kind of AutoModel", str(error)):
        return f"{other[1]} is not a causal language model"
    kind = f"{type(error).__name__}: " if isinstance(error, KeyError | TypeError) else ""
    return kind + first_line(error)


def is_lfs_pointer(path):
    """Whether a file is only git-lfs's note of where its content is."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(19) == b"version https://git"


@functools.cache  # each is loaded once
def load_hub_dataset(name, configuration, split):
    """One split of a Hub dataset, in its configuration of that name (None: its default), as a `datasets.Dataset`.

    Raises:
        UserError: no such dataset or split, or a Hub that does not answer and nothing in its cache.
    """
    try:
        with offline() if only_cached("dataset", name, configuration) else contextlib.nullcontext():
            return datasets.load_dataset(name, configuration, split=split)
    except LOADING_ERRORS as error:
        named = name if configuration is None else f"{name}:{configuration}"
        raise UserError(f"--dataset {named} --split {split}: {first_line(error)}") from error


def looks_like_a_path(name):
    """Whether a name that is not on this disk was meant to be."""
    return name.startswith(("/", ".", "~")) or name.count("/") > 1


@functools.cache  # each name is asked for once
def only_cached(kind, name, configuration=None):
    """Whether a "model" or "dataset" must come from the cache: False where the Hub has it, True where it is silent.

    Raises:
        UserError: the Hub has it not, or wants a login, or is silent and the cache has it not.
    """
    if hub_silence() is None:
        try:
            HfApi().repo_info(name, repo_type=kind, timeout=ASK_SECONDS)
        except GatedRepoError as error:
            terms = f"accept its terms at {constants.ENDPOINT}/{name}, then run: hf auth login"
            raise UserError(f"--{kind} {name}: gated; {terms}") from error
        except (RepositoryNotFoundError, HFValidationError) as error:
            where = "neither on this disk nor on the Hub (if it is private: hf auth login)"
            raise UserError(f"--{kind} {name}: {where}") from error
        except LOADING_ERRORS as error:
            if is_cached(kind, name, configuration):
                return True
            raise UserError(f"--{kind} {name}: the Hub fails ({first_line(error)}); try again later") from error
        return False
    if not is_cached(kind, name, configuration):
        advice = "check the network, or name a local file"
        if kind == "model":
            advice = f"check the network, name a local directory, or use the quickstart's: --model {QUICKSTART_MODEL}"
        raise UserError(
            f"--{kind} {name}: not on this disk, and the Hub does not answer ({first_line(hub_silence())}); {advice}"
        )
    return True


@functools.cache
def hub_silence():
    """Why the Hub does not answer, as an exception; None where it does. Asked once, waited for ASK_SECONDS."""
    heard = []

    def ask():
        try:
            get_session().head(constants.ENDPOINT, timeout=ASK_SECONDS)
            heard.append(None)
        except Exception as error:  # whatever it is, it is reported by the thread that waits
            heard.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(ASK_SECONDS)  # looking up a host name has no time limit of its own
    return heard[0] if heard else TimeoutError(f"no answer within {ASK_SECONDS} s")


def is_cached(kind, name, configuration=None):
    """Whether the Hub's cache on this disk holds a "model", all of it, or a prepared "dataset" of that name."""
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
    index = Path(config).with_name("model.safetensors.index.json")  # of weights in several files
    weights = (
        json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        if index.exists()
        else ["model.safetensors"]
    )
    return all(index.with_name(file).exists() for file in weights)


def push(directory, name):
    """Upload a model's directory to a repository on the Hub, which is private where this call makes it.

    The manifest of its files stays here, as it is of use to this program only.

    Returns:
        The repository's address, and whether it is private: one that was there stays as it was.

    Raises:
        UserError: nobody is logged in, the Hub does not answer, or it refuses.
    """
    if get_token() is None:
        raise UserError(f"--push-to-hub {name}: not logged in; run: hf auth login (or set HF_TOKEN)")
    if hub_silence() is not None:
        silence = first_line(hub_silence())
        raise UserError(f"--push-to-hub {name}: the Hub does not answer ({silence}); check the network")
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
        cached = [only_cached("dataset", dataset, None)]
        if "model" not in named:
            cached.append(only_cached("model", PRESETS["ultrachat"]["model"]))
    except UserError:
        return "quickstart", "auto: the Hub does not answer, and the experiment is not cached"
    return "ultrachat", f"auto: there is a GPU, and {'the experiment is cached' if all(cached) else 'the Hub answers'}"


def quiet_libraries():
    """Leave the progress bars and warnings of the libraries out of the output; errors stay."""
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    for library in (datasets.logging, transformers.utils.logging):
        library.set_verbosity_error()
