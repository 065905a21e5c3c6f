"""The facts about a run, computed once from its files, for all that shows them: summary, page, model card, TensorBoard.

Here is also how numbers and foreign texts are formatted for reading.
"""

import math
import re
from pathlib import Path

from config import format_value
from evaluation.comparison import difference, verdict
from storage.records import read_answers, read_losses, read_metrics, read_record

RECIPE = (
    "epochs max_steps batch_size lr schedule warmup_steps min_lr weight_decay adam_beta2 max_grad_norm max_length "
    "supervise seed lora_rank lora_alpha"
).split()


def run_facts(run):
    """The facts about a run, finished or not, as a dict of plain values.

    Its lines of metrics may be lost: what depends on a lost line is None.
    """
    record, metrics, losses = read_record(run), read_metrics(run), read_losses(run)
    config, updates = record["config"], max((line["step"] for line in metrics), default=0)
    evaluated = [line for line in metrics if line["kind"] == "eval" and line["step"]]
    best_step = min(evaluated, key=lambda line: line["loss"])["step"] if evaluated else None
    if not record["data"]["eval"]:  # the last model is the best
        best_step = updates
    # A Hub id is shown as it is, of a path only its last part.
    model, *datasets = (name if is_hub_id(name) else Path(name).name for name in (config["model"], *config["dataset"]))
    losses = {kind: compare_losses(kind, metrics, best_step, losses) for kind in ("eval", "test")}
    before, after = (losses["eval"][when] or {} for when in ("before", "after"))
    sources = [key for key in before if key.startswith("loss/") and key in after]  # of several --eval-dataset
    return {
        **{name: record.get(name) for name in ("precision", "data", "versions")},
        "base": record.get("base") if config["lora_rank"] else None,  # of adapters, which need it
        "directory": str(run),
        "title": f"{model} on {', '.join(datasets)}",
        "model": model,
        "datasets": datasets,
        "settings": config,
        "recipe": {name: format_value(config[name]) for name in RECIPE if config["lora_rank"] or "lora" not in name},
        "commits": {kind: record.get("commits", {}).get(kind, {}) for kind in ("model", "dataset")},
        "metrics": metrics,
        "updates": updates,
        "best_step": best_step,
        "losses": losses,
        "source_losses": {key.removeprefix("loss/"): {"before": before[key], "after": after[key]} for key in sources},
        "cost": training_cost([line for line in metrics if line["kind"] == "train"], updates),
        "answers": pair_answers(read_answers(run)),
    }


def compare_losses(kind, metrics, best_step, losses):
    """The lines of metrics of a split "before" training and "after" it, of the best model, and their difference.

    "difference" is text; it has an interval where the losses of the split's conversations are known.
    """
    lines = {line["step"]: line for line in metrics if line["kind"] == kind}
    before, after = lines.get(0), lines.get(best_step)
    if not (before and after):
        return {"before": before, "after": after, "difference": None}
    text = f"{after['loss'] - before['loss']:+.4f}"
    found = losses.get(kind, {})
    pairs = zip(found.get("before", []), found.get("after", []), strict=False)
    if rows := [(old, new, tokens) for (old, _), (new, tokens) in pairs]:
        paired = difference(*zip(*rows, strict=True))
        if math.isclose(paired["after"], after["loss"], rel_tol=1e-6):  # else they are of another evaluation
            text = verdict(paired)
    return {"before": before, "after": after, "difference": text}


def training_cost(lines, updates):
    """Seconds, tokens and memory (bytes) of a number of updates, from the "train" lines; None where there are none."""
    if not lines:
        return None
    share = updates / len(lines)  # --log-every leaves lines out
    tokens, supervised = (sum(line[name] for line in lines) for name in ("tokens", "supervised_tokens"))
    seconds = sum(line["tokens"] / line["tokens_per_second"] for line in lines)
    return {
        "seconds": share * seconds,
        "tokens": round(share * tokens),
        "supervised_share": supervised / tokens,
        "tokens_per_second": tokens / seconds,
        "peak_memory": lines[-1].get("peak_memory", 0),
    }


def pair_answers(answers):
    """Answers before and after training side by side, as dicts; those to the same prompt follow each other."""
    pairs = [
        {
            "prompt": after["prompt"],
            "decoding": "greedy" if after["greedy"] else "sampled",
            "before": answer_text(before),
            "after": answer_text(after),
        }
        for before, after in zip(answers.get("before", []), answers.get("after", []), strict=False)
    ]
    prompts = [pair["prompt"] for pair in pairs]
    return sorted(pairs, key=lambda pair: prompts.index(pair["prompt"]))


def answer_text(answer):
    """The text of an answer, a dict, with a mark where it was cut off at the length limit."""
    return answer["text"] + ("" if answer["finished"] else " …")


def is_hub_id(name):
    """True for a name of the form owner/name, perhaps with a revision and more, that is not a path that exists."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+([:@~#].+)?", name)) and not Path(name).exists()


def format_duration(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def format_bytes(count):
    return f"{count / 1e9:.1f} GB"


def escape_markdown(text):
    """Any text as Markdown that shows it as it is, in a table's cell too."""
    text = str(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "<br>".join(re.sub(r"([\\`*_{}\[\]#|~])", r"\\\1", text).splitlines())
