"""Names of models and datasets: a place on this disk, in the cache, on the Hub, or nowhere, settled within seconds.

The libraries retry an unreachable Hub for about a minute before they fail; here it is asked once, and not at all for
what is on this machine.
"""

import contextlib
import threading
from pathlib import Path

import datasets
import torch
import transformers
from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

from config import PRESETS, QUICKSTART_MODEL, UserError, first_line
from quickstart import quickstart_model

ASK_SECONDS = 3


def find_model(name):
    """Where to load a model from: `(path or Hub id, local_files_only)`.

    Raises:
        UserError: no such directory, no such model on the Hub, or a Hub that does not answer.
    """
    if Path(name).expanduser().is_dir():
        return str(Path(name).expanduser()), True
    if name == QUICKSTART_MODEL:
        return str(quickstart_model()), True
    if looks_like_a_path(name):
        raise UserError(f"--model {name}: there is no such directory")
    if is_cached("model", name):
        return name, True
    ask_hub("model", name)
    return name, False


def load_hub_dataset(name, split):
    """One split of a Hub dataset, as a `datasets.Dataset`.

    Raises:
        UserError: no such dataset or split, or a Hub that does not answer and nothing in the cache.
    """
    cached = is_cached("dataset", name)
    if not cached:
        ask_hub("dataset", name)
    try:
        with offline() if cached else contextlib.nullcontext():
            return datasets.load_dataset(name, split=split)
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"--dataset {name} --split {split}: {first_line(error)}") from error


def looks_like_a_path(name):
    """Whether a name that is not on this disk was meant to be."""
    return name.startswith(("/", ".", "~")) or name.count("/") > 1


def is_cached(kind, name):
    """Whether the Hub's cache on this disk holds a "model" (its weights too) or a prepared "dataset" of that name."""
    try:
        if kind == "dataset":
            return bool(datasets.load.CachedDatasetModuleFactory(name).get_module())
        config = try_to_load_from_cache(name, "config.json")
    except (FileNotFoundError, HFValidationError, AssertionError):
        return False
    return isinstance(config, str) and any(Path(config).parent.glob("*.safetensors"))


@contextlib.contextmanager
def offline():
    """Make `datasets` look only into its cache."""
    before, datasets.config.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def ask_hub(kind, name):
    """Ask the Hub once whether it has this "model" or "dataset"; returns when it does.

    Raises:
        UserError: it has not, it wants a login, or it did not answer within a few seconds.
    """
    answer = []

    def ask():
        try:
            answer.append(HfApi().repo_info(name, repo_type=kind, timeout=ASK_SECONDS))
        except Exception as error:  # whatever went wrong is reported below, on the thread that waits
            answer.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(ASK_SECONDS)  # looking up a host name has no time limit of its own
    error = answer[0] if answer else TimeoutError(f"no answer within {ASK_SECONDS} s")
    if isinstance(error, GatedRepoError):
        raise UserError(f"--{kind} {name}: gated; accept its terms at {constants.ENDPOINT}, then run: hf auth login")
    if isinstance(error, (RepositoryNotFoundError, HFValidationError)):
        raise UserError(f"--{kind} {name}: neither on this disk nor on the Hub (if it is private: hf auth login)")
    if isinstance(error, Exception):
        raise UserError(
            f"--{kind} {name}: not on this disk, and the Hub does not answer ({first_line(error)}); "
            f"check the network, name a local {'directory' if kind == 'model' else 'file'}, or use --preset quickstart"
        )


def choose_preset(named):
    """The preset that a user's settings ask for, and why: `(name, reason)`. What `auto` means is decided here."""
    if named.get("preset", "auto") != "auto":
        return named["preset"], "as asked"
    if not torch.cuda.is_available():
        return "quickstart", "auto: there is no GPU"
    needed = {kind: PRESETS["ultrachat"][kind] for kind in ("model", "dataset")}
    if all(is_cached(kind, name) for kind, name in needed.items()):
        return "ultrachat", "auto: there is a GPU, and model and dataset are cached"
    try:
        ask_hub("dataset", needed["dataset"])
    except UserError:
        return "quickstart", "auto: the Hub does not answer"
    return "ultrachat", "auto: there is a GPU, and the Hub answers"


def quiet_libraries():
    """Leave the progress bars and warnings of the libraries out of the output; errors stay."""
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    for library in (datasets.logging, transformers.utils.logging):
        library.set_verbosity_error()
