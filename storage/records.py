"""What a run's directory says of it: metrics, answers, losses of single conversations. `running/` writes them."""

import json
import statistics
from pathlib import Path

from config import UserError


def read_metrics(run, lines=None):
    """The first `lines` lines of a run's metrics, or all of them, as dicts; a truncated last line is left out.

    Raises:
        UserError: a line is damaged.
    """
    path, metrics = Path(run) / "metrics.jsonl", []
    content = path.read_bytes() if path.exists() else b""
    for number, line in enumerate(content[: content.rfind(b"\n") + 1].split(b"\n")[:-1][:lines], 1):
        try:
            metrics.append(json.loads(line))
            if not (isinstance(metrics[-1]["step"], int) and isinstance(metrics[-1]["kind"], str)):
                raise ValueError("no step and kind")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}:{number}: damaged; delete that line to continue without it") from error
    return metrics


def final_numbers(run):
    """What became of a run, by name: loss and accuracy of its best model on the eval and test splits, and its speed."""
    metrics = read_metrics(run)
    evaluated = [line for line in metrics if line["kind"] == "eval" and line["step"]]
    last = {line["kind"]: line for line in metrics}
    last["eval"] = min(evaluated, key=lambda line: line["loss"], default=last.get("eval"))
    train = [line for line in metrics if line["kind"] == "train"]
    kinds = [kind for kind in ("eval", "test") if last.get(kind)]  # a line of the log may be lost
    numbers = {f"{kind}_{name}": last[kind][name] for kind in kinds for name in ("loss", "accuracy")}
    speed = [line["tokens_per_second"] for line in train]
    return numbers | ({"tokens_per_second": statistics.median(speed)} if speed else {})


def is_finished(run):
    """Whether a run has finished: its best model has answered the prompts."""
    return "after" in read_answers(run)


def read_answers(run):
    """The answers a run has given so far, in lists of dicts: "before" training and "after" it.

    Raises:
        UserError: the file is damaged.
    """
    path = Path(run) / "answers.json"
    if not path.exists():
        return {}
    try:
        answers = json.loads(path.read_bytes())
        for one in (one for when in answers.values() for one in when):
            one["prompt"] + one["text"] * one.setdefault("greedy", False)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged; delete it, and resuming writes the answers again") from error
    return answers


def read_losses(run):
    """Of each split the losses of its conversations "before" and "after" training, as pairs [loss sum, tokens].

    It is empty where there is no such file, or a damaged one: nothing but intervals depends on it.
    """
    try:
        losses = json.loads((Path(run) / "losses.json").read_bytes())
        for pair in (pair for split in losses.values() for pairs in split.values() for pair in pairs):
            float(pair[0]), int(pair[1])
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        return {}
    return losses
