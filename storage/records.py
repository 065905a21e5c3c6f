"""The records of a run, which `running.run` and `running.metrics` write: what they hold, and how they are read.

`evaluation.facts` combines them.
"""

import importlib.metadata
import json
import platform
from dataclasses import asdict
from pathlib import Path

from config import FIELDS, RUN_FORMAT, UserError, resolve

DAMAGE = (ValueError, LookupError, TypeError, AttributeError, RecursionError)  # what reading a damaged file raises
LIBRARIES = ("torch", "transformers", "datasets", "tokenizers", "safetensors", "tqdm", "tensorboard")


# --- config.json: what the run is, and the changes made on purpose when it was resumed


def describe(config, precision, data):
    """The identity of a run, as JSON: its settings, its precision, the sizes and fingerprint of its data, versions."""
    versions = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in LIBRARIES}
    record = {
        "format": RUN_FORMAT,
        "config": asdict(config),
        "precision": precision.name,
        "data": {"fingerprint": data.fingerprint} | {name: len(split.examples) for name, split in data.splits.items()},
        "versions": versions,
    }
    return json.loads(json.dumps(record))


def read_record(run):
    """The record in a run's config.json; `UserError` where it is damaged, or another version's of this program."""
    path = Path(run) / "config.json"
    try:
        record = json.loads(path.read_bytes())
        if "model_type" in record:
            raise UserError(f"{path}: this is a model's, not a run's; there is no run in {run}")
        settings = record["config"]
        if record.get("format") != RUN_FORMAT or settings.keys() != FIELDS.keys():
            raise UserError(
                f"{path}: this run was made by another version of this program; use that one, or start a new run"
            )
        resolve(settings, settings["preset"])
        if not {"precision", "data", "versions"} <= record.keys():
            raise ValueError("entries are missing")
    except DAMAGE as error:
        raise UserError(f"{path}: damaged; checkpoints/step-N/MANIFEST.json holds the same settings") from error
    return record


# --- metrics.jsonl: one line for each logged update, evaluation and test


def read_metrics(run, count=None):
    """The first `count` lines of a run's metrics, or all of them, as dicts; a truncated last line is ignored."""
    path, metrics = Path(run) / "metrics.jsonl", []
    content = path.read_bytes() if path.exists() else b""
    for number, line in enumerate(content[: content.rfind(b"\n") + 1].split(b"\n")[:-1][:count], 1):
        try:
            metrics.append(json.loads(line))
            if not (isinstance(metrics[-1]["step"], int) and isinstance(metrics[-1]["kind"], str)):
                raise ValueError("no step and kind")
        except DAMAGE as error:
            raise UserError(f"{path}:{number}: damaged; delete that line to continue without it") from error
    return metrics


# --- answers.json: the answers "before" and "after" training, lists of `generation.Answer` as dicts


def read_answers(run):
    """The answers that a run has generated so far; {} where there are none."""
    path = Path(run) / "answers.json"
    if not path.exists():
        return {}
    try:
        answers = json.loads(path.read_bytes())
        for answer in [*answers.get("before", []), *answers.get("after", [])]:
            if answer.keys() != {"prompt", "text", "greedy", "tokens", "finished"}:
                raise ValueError("not an answer")
    except DAMAGE as error:
        raise UserError(f"{path}: damaged; delete it, and resuming writes the answers again") from error
    return answers


def is_finished(run):
    """True for a run whose best model has answered the prompts, which is the last thing a run does."""
    return "after" in read_answers(run)


# --- losses.json: of each split the losses of its conversations "before" and "after", as pairs [loss sum, tokens]


def read_losses(run):
    """The losses of a run's held-out conversations; {} without a valid file, as only intervals depend on it."""
    try:
        losses = json.loads((Path(run) / "losses.json").read_bytes())
        for pair in (pair for split in losses.values() for pairs in split.values() for pair in pairs):
            float(pair[0]), int(pair[1])
    except (OSError, *DAMAGE):
        return {}
    return losses
