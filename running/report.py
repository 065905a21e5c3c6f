"""What a run prints: its headline and plan before it, the summary after it; and the writing of its page."""

import math
import shlex
import sys
from pathlib import Path

from compute.distributed import is_rank0, world_size
from config import PRESETS, format_value
from conversations.preview import is_missing_or_page
from data import window_at, windows_per_epoch
from evaluation.facts import format_bytes, run_facts
from evaluation.format import side_by_side
from evaluation.page import REPORT, page
from storage.durable import replace_file

SAMPLED = 50  # windows whose micro-batches are counted for the plan: reading all of them can take long


def headline(config, why):
    """The first line of a new run's output.

    Args:
        why: the reason for its preset.
    """
    preset = "no preset" if config.preset == "none" else f"preset {config.preset}"
    if config.dataset != PRESETS[config.preset].get("dataset", config.dataset):
        why += ", but of it only the model: the dataset is your own"
    return f"{preset} ({why}): {config.model} on {format_value(config.dataset)}, into {config.output_dir}"


def plan(run):
    """The plan of a `Run`, derived from its settings and data, in a few lines."""
    config, data, layout, ranks = run.config, run.data, run.layout, world_size()
    train, per_epoch = data.train.examples, windows_per_epoch(len(data.train.examples), config.batch_size)
    windows = [window_at(step, train, config.batch_size, config.seed) for step in range(min(per_epoch, SAMPLED))]
    micro_batches = sum(len(layout.partition(window)[0]) for window in windows) / len(windows)
    truncated, dropped, lost, supervised = (
        sum(getattr(split, name) for split in data.splits.values())
        for name in ("truncated", "dropped", "supervised_lost", "supervised")
    )
    lost = f", {lost / (lost + supervised):.1%} of the supervised tokens lost" if lost else ""
    unit = "examples" if has_more_examples(data.train) else "conversations"
    never = " that is never reached" if config.warmup_steps >= run.total_steps else ""
    sharded = f", {config.shard} to a copy of the weights" if config.shard > 1 else ""
    parameters = sum(p.numel() for p in run.model.parameters())
    lines = {
        "model": f"{config.model}: {parameters:,} parameters",
        "device": f"{f'{ranks} processes{sharded}, each on ' if ranks > 1 else ''}{run.precision.describe()}, "
        "over fp32 weights",
        "layout": layout.describe(),
        "data": f"{count_conversations(data.train)} to train on, {count_conversations(data.eval, '')} to evaluate, "
        f"{count_conversations(data.test, '')} to test ({truncated:,} truncated{lost}, {dropped:,} dropped: nothing "
        "supervised)",
        "rows": "; ".join(data.notes),
        "tokens": f"{data.train.tokens:,} an epoch, {data.train.supervised / data.train.tokens:.1%} of them supervised",
        "updates": f"{per_epoch:,} an epoch, {run.total_steps:,} in all, each over a window of "
        f"{min(config.batch_size, len(train))} {unit} in {micro_batches:.1f} micro-batches "
        f"(gradient accumulation){'' if ranks == 1 else ' of each process'}",
        "schedule": f"{config.warmup_steps} updates of warm-up to a learning rate of {config.lr:g}"
        f"{never}, then a cosine to 0",
    }
    if config.shard > 1:
        lines["saving"] = f"by rank 0, which gathers {format_bytes(12 * parameters)} in its host memory"
    shown = [f"  {name:<10}{text}" for name, text in lines.items()]
    return "\n".join(shown + [f"  warning   {warning}" for warning in data.warnings])


def has_more_examples(split):
    """Whether some conversations of a split became several examples."""
    return split.conversations not in (0, len(split.examples) + split.dropped)


def count_conversations(split, noun=" conversations"):
    """The number of a split's conversations, and of its examples where that differs."""
    if has_more_examples(split):
        return f"{split.conversations:,}{noun} ({len(split.examples):,} examples)"
    return f"{len(split.examples):,}{noun}"


def summary(directory):
    """The summary of a run: losses and answers before and after side by side, and what to do next."""
    facts = run_facts(directory)
    best = f"best, update {facts['best_step'] or 0}"
    lines = [f"  {'':<18}{'before':>10}{best:>22}"]
    for kind, loss in facts["losses"].items():
        if loss["before"] or loss["after"]:
            for name, style in (("loss", ".4f"), ("perplexity", ".2f"), ("accuracy", ".1%")):
                before, after = ((loss[when] or {}).get(name, math.nan) for when in ("before", "after"))
                change = f"   {loss['difference']}" if name == "loss" and loss["difference"] else ""
                lines.append(f"  {kind + ' ' + name:<18}{before:>10{style}}{after:>22{style}}{change}")
    for answer in facts["answers"]:
        sampled = " (sampled)" if answer["decoding"] == "sampled" else ""
        lines += ["", f"  > {answer['prompt']}{sampled}", *side_by_side(answer["before"], answer["after"])]
    run = facts["directory"]
    lines += [
        "",
        f"  the best model   {run}/best",
        f"  the report       {run}/{REPORT}",
        f"  ask it           python eval.py {shlex.quote(run)} --prompts 'Your question'",
        f"  see the curves   tensorboard --logdir {shlex.quote(str(Path(run).parent))}",
    ]
    return "\n".join(lines)


def write_report(run):
    """Close a finished run's log with its facts, and write its page, unless another file is in the way; on rank 0."""
    if not is_rank0():
        return
    facts, path = run_facts(run.directory), run.directory / REPORT
    run.log.close(facts)
    if is_missing_or_page(path):
        replace_file(path, page(facts, run.data.train.examples[:3], run.tokenizer))
    else:
        print(f"warning: {path} is not an earlier report, and is left as it is", file=sys.stderr)
