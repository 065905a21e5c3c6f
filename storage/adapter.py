"""The directory of adapters, in PEFT's format, and the base model that they belong to.

    adapter_config.json, adapter_model.safetensors    what PEFT, transformers, vLLM and llama.cpp read
    base_model.json                                   where the base model is, and the SHA-256 of its files
    tokenizer and its template, generation_config.json; no config.json, which would make it a model

The files of the base model are not copied. They must be the same whenever the adapters are used.
"""

import json
import re
from pathlib import Path

from config import UserError, first_line
from storage.durable import sha256
from storage.hub import find_model, is_adapter, model_directory, split_revision

CONFIG, WEIGHTS, BASE = "adapter_config.json", "adapter_model.safetensors", "base_model.json"
PREFIX = "base_model.model."  # PEFT's, before the name of a parameter


def describe_base(path, local_files_only):
    """The record of a base model that has been loaded, as JSON: its place, and the SHA-256 of each of its files."""
    directory = model_directory(path, local_files_only, ["config.json"])
    # Those that transformers reads the weights from.
    files = sorted(directory.glob("model*.safetensors")) or sorted(directory.glob("pytorch_model*.bin"))
    place = str(Path(path).absolute()) if Path(path).is_dir() else path
    return {"model": place, "files": {file.name: find_sha256(file) for file in [directory / "config.json", *files]}}


def find_sha256(file):
    """SHA-256 of a file; of a large one in the Hub's cache it is the name of its blob."""
    blob = file.resolve()
    return blob.name if blob.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", blob.name) else sha256(file)


def find_base(path, local_files_only=False):
    """The place of the base model of adapters, or of the model itself: `(path or Hub id, local_files_only)`.

    Raises:
        UserError: the adapters' base model is not there, or the adapters are not this program's.
    """
    if not is_adapter(path):
        return path, local_files_only
    base = read_json(path, BASE)["model"]
    try:
        return find_model(base)
    except UserError as error:
        raise UserError(f"{path}: its base model {base} is missing; put it there again") from error


def check_base(path):
    """The record of the base model of adapters; raises `UserError` where that is not, file by file, as it was."""
    recorded = read_json(path, BASE)
    found = describe_base(*find_base(path))["files"]
    for name in sorted(recorded["files"].keys() | found.keys()):
        if recorded["files"].get(name) != found.get(name):
            what = f"its base model {recorded['model']} has changed, {name} is not what the adapters were trained on"
            raise UserError(f"{path}: {what}; put that back")
    return recorded


def read_json(path, name):
    """The content of a JSON file in the directory of adapters."""
    try:
        content = json.loads((Path(path) / name).read_bytes())
        return {key: content[key] for key in {BASE: ("model", "files"), CONFIG: ("r", "lora_alpha")}[name]}
    except FileNotFoundError as error:
        why = "these adapters are not of this program; merge them into their base model with PEFT"
        raise UserError(f"{path}: there is no {name}: {why}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}/{name}: damaged ({first_line(error)})") from error


def write_config(directory, lora, target_modules, fan_in_fan_out):
    """Write PEFT's configuration of adapters, and the record of their base model.

    Args:
        lora: a `compute.adapters.Lora`.
        target_modules: the names of the layers with adapters, or the last parts of these names.
        fan_in_fan_out: whether the matrices of these layers are transposed, (inputs, outputs), as GPT-2's are.
    """
    model, revision = split_revision(lora.base["model"])
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model,
        "revision": revision,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": target_modules,
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
    }
    for name, value in ((CONFIG, content), (BASE, lora.base)):
        (directory / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
