"""What a run tells people: what it is, the plan before it, the summary after it."""

import importlib.metadata
import json
import math
import platform
import shlex
import sys
from dataclasses import asdict
from pathlib import Path

from compute.processes import world_size
from config import FORMAT, PRESETS, as_text
from conversations.preview import is_replaceable
from data import window_at, windows_per_epoch
from evaluation.format import side_by_side
from evaluation.page import REPORT, page
from storage.durable import replace_file
from storage.records import read_answers, read_metrics

LIBRARIES = ("torch", "transformers", "datasets", "tokenizers", "safetensors", "tqdm", "tensorboard")


def describe(config, precision, data):
    """What makes a run what it is, as JSON: every setting, the precision, what the data was, the versions."""
    described = {
        "format": FORMAT,
        "config": asdict(config),
        "precision": precision.name,
        "data": {"fingerprint": data.fingerprint} | {name: len(split.examples) for name, split in data.splits.items()},
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in LIBRARIES},
    }
    return json.loads(json.dumps(described))


def write_record(run, described, changes):
    """Write a run's `config.json`: what it is, and what was changed on purpose when it was resumed."""
    record = {**described, "changes": changes} if changes else described
    replace_file(Path(run) / "config.json", json.dumps(record, indent=2) + "\n")


def headline(config, why):
    """The first line of a new run's output.

    Args:
        why: the reason for its preset.
    """
    preset = "no preset" if config.preset == "none" else f"preset {config.preset}"
    if config.dataset != PRESETS[config.preset].get("dataset", config.dataset):
        why += ", but of it only the model: the dataset is your own"
    return f"{preset} ({why}): {config.model} on {as_text(config.dataset)}, into {config.output_dir}"


def plan(run):
    """What a `Run` is about to do, derived from its settings and data, in a few lines."""
    config, data, layout = run.config, run.data, run.layout
    train, per_epoch = data.train.examples, windows_per_epoch(len(data.train.examples), config.batch_size)
    sampled = min(per_epoch, 50)  # windows; reading all of them can take long
    windows = [window_at(step, train, config.batch_size, config.seed) for step in range(sampled)]
    cuts = sum(len(layout.shares(window)[0]) for window in windows)
    truncated, dropped, lost, supervised = (
        sum(getattr(split, name) for split in data.splits.values())
        for name in ("truncated", "dropped", "supervised_lost", "supervised")
    )
    lost = f", {lost / (lost + supervised):.1%} of the supervised tokens lost" if lost else ""
    split_up = data.train.conversations not in (0, len(train) + data.train.dropped)
    unit = "examples" if split_up else "conversations"
    never = " that is never reached" if config.warmup_steps >= run.total_steps else ""
    sharing = f", {config.shard} to a copy of the weights" if config.shard > 1 else ""
    together = f"{world_size()} processes{sharing}, each on " if world_size() > 1 else ""
    parameters = sum(p.numel() for p in run.model.parameters())
    lines = {
        "model": f"{config.model}: {parameters:,} parameters",
        "device": f"{together}{run.precision.describe()}, over fp32 weights",
        "layout": layout.describe(),
        "data": f"{counted(data.train)} to train on, {counted(data.eval, '')} to evaluate, "
        f"{counted(data.test, '')} to test ({truncated:,} truncated{lost}, {dropped:,} dropped: nothing supervised)",
        "rows": "; ".join(data.notes),
        "tokens": f"{data.train.tokens:,} an epoch, {data.train.supervised / data.train.tokens:.1%} of them supervised",
        "updates": f"{per_epoch:,} an epoch, {run.total_steps:,} in all, each over a window of "
        f"{min(config.batch_size, len(train))} {unit} in {cuts / sampled:.1f} micro-batches "
        f"(gradient accumulation){'' if world_size() == 1 else ' of each process'}",
        "schedule": f"{config.warmup_steps} updates of warm-up to a learning rate of {config.lr:g}"
        f"{never}, then a cosine to 0",
    }
    if config.shard > 1:
        lines["saving"] = f"by rank 0, which gathers {12 * parameters / 1e9:.1f} GB in its host memory"
    shown = [f"  {name:<10}{text}" for name, text in lines.items()]
    return "\n".join(shown + [f"  warning   {warning}" for warning in data.warnings])


def write_page(run):
    """Write a `Run`'s page into its directory, unless something else stands there."""
    path = run.directory / REPORT
    if is_replaceable(path):
        replace_file(path, page(run.directory, run.data.train.examples[:3], run.tokenizer))
    else:
        print(f"warning: {path} is not an earlier report, and is left as it is", file=sys.stderr)


def counted(split, noun=" conversations"):
    """How many conversations a split has, and how many examples where that is another number."""
    kept = len(split.examples)
    if split.conversations in (0, kept + split.dropped):
        return f"{kept:,}{noun}"
    return f"{split.conversations:,}{noun} ({kept:,} examples)"


def summary(run):
    """What came of a run, read from its directory: losses, answers before and after side by side, what to do next."""
    metrics = read_metrics(run)
    by_step = {kind: {line["step"]: line for line in metrics if line["kind"] == kind} for kind in ("eval", "test")}
    evaluated = {step: line.get("loss", math.inf) for step, line in by_step["eval"].items() if step}
    best_step = min(evaluated, key=evaluated.get, default=0)  # a line of the log may be lost
    lines = [f"  {'':<18}{'before':>10}{f'best, update {best_step}':>22}"]
    for kind, steps in by_step.items():
        if steps:
            for name, style in (("loss", ".4f"), ("perplexity", ".2f"), ("accuracy", ".1%")):
                # a line of the log may be lost
                before, after = (steps.get(step, {}).get(name, math.nan) for step in (0, best_step))
                lines.append(f"  {kind + ' ' + name:<18}{before:>10{style}}{after:>22{style}}")
    answers = read_answers(run)
    for before, after in zip(answers.get("before", []), answers.get("after", []), strict=False):
        how = "" if after["greedy"] else " (sampled)"
        lines += ["", f"  > {before['prompt']}{how}", *side_by_side(before["text"], after["text"])]
    lines += [
        "",
        f"  the best model   {run}/best",
        f"  the report       {run}/{REPORT}",
        f"  ask it           python eval.py {shlex.quote(str(run))} --prompts 'Your question'",
        f"  see the curves   tensorboard --logdir {shlex.quote(str(Path(run).parent))}",
    ]
    return "\n".join(lines)
