"""The texts of a run: its headline and plan before it, the summary after it, and its page."""

import math
import shlex
import sys
import textwrap
from pathlib import Path

from compute.adapters import has_fused_experts, list_untrained
from compute.distributed import is_rank0, world_size
from compute.layers import list_extra_losses
from compute.memory import count_parameters
from config import LORA_RATE, PRESETS, Config, format_value
from conversations.preview import escape_controls
from data import describe_leaks, window_at
from evaluation.comparison import MIN_CONVERSATIONS, smallest_difference
from evaluation.facts import format_bytes, pair_answers, run_facts
from evaluation.format import side_by_side
from evaluation.page import REPORT, page
from storage.durable import replace_file

# The lowest and highest peak rates of published full fine-tuning, by size of the model, and whose they are; a row holds
# up to that many billion parameters.
PUBLISHED_RATES = (
    (0.05, "", 0.0, math.inf),  # none is known to us
    (0.7, "135 to 360 million", 5e-5, 1e-3),  # smol-course 1_instruction_tuning; alignment-handbook smollm2/config_smol
    (2.2, "1.5 to 1.7 billion", 1e-5, 3e-4),  # open-r1 Qwen2.5-1.5B-Instruct; alignment-handbook smollm2
    (5, "3 billion", 2e-5, 5e-5),  # alignment-handbook smollm3; smol-course unit 1 (SmolLM3-3B-Base)
    (10, "7 to 8 billion", 5e-6, 8e-5),  # open-instruct tulu3 8B; olmo3 7B instruct
    (20, "13 to 15 billion", 5e-6, 2e-5),  # open-instruct olmo2 13B; alignment-handbook starchat2-15b
    (45, "32 billion", 4e-6, 1e-4),  # open-instruct olmo2 32B; olmo3 32B think
    (150, "70 billion", 2e-6, 1e-5),  # open-instruct tulu3 70B; tulu2 70B
)


def headline(config, why):
    """The first line of a new run's output, with the reason for its preset."""
    preset = "no preset" if config.preset == "none" else f"preset {config.preset}"
    if config.dataset != PRESETS[config.preset].get("dataset", config.dataset):
        why += ", but of it only the model: the dataset is your own"
    return f"{preset} ({why}): {config.model} on {format_value(config.dataset)}, into {config.output_dir}"


def plan_of_data(run):
    """The lines of a run's plan that are known before its model is loaded: what it will learn from, and when."""
    config, data, train = run.config, run.data, run.data.train
    truncated, dropped, lost, supervised = (
        sum(getattr(split, name) for split in data.splits.values())
        for name in ("truncated", "dropped", "supervised_lost", "supervised")
    )
    lost = f", {lost / (lost + supervised):.1%} of the supervised tokens lost" if lost else ""
    unit = "conversations" if train.conversations == len(train.examples) + train.dropped else "examples"
    lines = {
        "data": f"{len(train.examples):,} {unit} to train on, {len(data.eval.examples):,} to evaluate, "
        f"{len(data.test.examples):,} to test ({truncated:,} truncated{lost}, {dropped:,} dropped: nothing supervised)",
        "rows": "; ".join(data.notes),
        "leaks": describe_leaks(data) if is_rank0() else "",  # which alone prints: finding them takes seconds
        "tokens": f"{train.tokens:,} an epoch, {train.supervised / train.tokens:.1%} of them supervised",
        "updates": f"{run.steps_per_epoch:,} an epoch, {run.total_steps:,} in all, each over a window of "
        f"{min(config.batch_size, len(train.examples))} {unit}",
        "schedule": describe_schedule(run),
        "cadence": describe_cadence(run),
    }
    return format_plan(lines, data.warnings)


def plan_of_model(run):
    """The lines of a run's plan that its model decides: how an update is computed."""
    config, layout, ranks = run.config, run.layout, world_size()
    window = window_at(0, run.data.train.examples, config.batch_size, config.seed)
    count = len(layout.partition(window)[0])
    micro_batches = f"{count} micro-batch{'' if count == 1 else 'es'}{'' if ranks == 1 else ' of each process'}"
    sharded = f", {config.shard} to a copy of the weights" if config.shard > 1 else ""
    trained, frozen, held = count_parameters(run.model)
    model, weights = f"{trained + frozen:,} parameters", "weights"
    if config.lora_rank:
        model, weights = f"{frozen:,} parameters, frozen", f"adapters, beside matrices in {run.precision.name}"
    lines = {
        "model": f"{config.model}: {model}",
        "device": f"{f'{ranks} processes{sharded}, each on ' if ranks > 1 else ''}{run.precision.describe()}, "
        f"over fp32 {weights}",
        "layout": f"{layout.describe()}; the first window in {micro_batches} (gradient accumulation)",
    }
    if config.lora_rank:
        lines["adapters"] = describe_adapters(run.model, trained, held)
    if others := list_extra_losses(run.model):
        why = "which the model's configuration asks for, depends on how a window is cut"
        lines["loss"] = f"cross-entropy alone: {', '.join(others)}, {why}"
    if config.shard > 1:
        lines["saving"] = f"by rank 0, which gathers {format_bytes(12 * trained)} in its host memory"
    return format_plan(lines, warn_of_rate(config.lr, trained + frozen, LORA_RATE if config.lora_rank else 1))


def plan_of_evaluation(evaluation):
    """The line of a run's plan that its untrained model decides: what difference the eval split can show."""
    losses = evaluation.token_losses
    smallest = smallest_difference([float(each.sum()) for each in losses], [len(each) for each in losses])
    if smallest is None:
        text = f"none: fewer than {MIN_CONVERSATIONS} conversations to evaluate on cannot tell a difference from chance"
    else:
        text = f"a difference of {smallest:.2g} or more in eval loss"
        text += f" is not chance (95 %, {len(losses):,} conversations); --against tells smaller ones"
    return format_plan({"evidence": text})


def describe_adapters(model, trained, held):
    """What is trained of a model with adapters, and the bytes that are held of both, for reading."""
    lora, beside = model.lora, f"{format_bytes(held)} with gradients, moments and the frozen ones"
    text = f"{trained:,} parameters of rank {lora.rank}, alpha {lora.alpha:g}; {beside}"
    if has_fused_experts(model):
        text += "; the experts stay frozen, and other layers of their names"
    if lora.rank > 16:
        text += f"; vLLM needs --max-lora-rank {lora.rank}"
    return text


def warn_of_untrained(model):
    """Name the adapters that the updates have left as they were."""
    if names := list_untrained(model):
        what = f"{len(names)} of its layers are not called by the model, so that their adapters stay without effect"
        print(f"warning: {what}: {textwrap.shorten(', '.join(names), 300)}", file=sys.stderr)


def format_plan(lines, warnings=()):
    """Lines of a plan, by their name, and warnings below them, as text."""
    shown = [f"  {name:<10}{text}" for name, text in lines.items() if text]
    return "\n".join(shown + [f"  warning   {warning}" for warning in warnings])


def warn_of_rate(lr, parameters, factor=1):
    """A list of one warning where a learning rate is outside what was published for models of that size, else empty.

    Of adapters it is the published rates times a factor.
    """
    for most, sizes, lowest, highest in PUBLISHED_RATES:
        if parameters <= most * 1e9:
            published = f"published runs of models of {sizes} parameters used {lowest:g} to {highest:g}"
            more = f", and adapters take about {factor} times as much" if factor > 1 else ""
            return [] if lowest <= lr / factor <= highest else [f"--lr {lr:g}: {published}{more}"]
    return []


def describe_schedule(run):
    """The learning rates of a run, for reading."""
    config, end = run.config, f"{run.config.lr * run.config.min_lr:g}"
    decay = {
        "cosine": f"then a cosine to {end}",
        "linear": f"then linearly to {end}",
        "constant": "then constant",
        "wsd": f"then constant, and in the last {run.decay_steps:,} a cosine to {end}",
    }[config.schedule]
    is_default = config.lora_rank and config.lr == LORA_RATE * Config.lr
    peak = f"{config.lr:g}" + (f" ({LORA_RATE} times the default of all weights)" if is_default else "")
    never = " that is never reached" if run.warmup_steps >= run.total_steps else ""
    return f"{run.warmup_steps:,} updates of warm-up to a learning rate of {peak}{never}, {decay}"


def describe_cadence(run):
    """How often a run evaluates and saves, and the share of its time that an evaluation costs, for reading."""
    saving = f"a checkpoint every {run.save_every:,}"
    if not run.data.eval.examples:
        return f"{saving} updates; no evaluation: the last model is the best"
    cost = run.data.eval.tokens / (3 * run.tokens_per_update * run.eval_every)
    return f"an evaluation every {run.eval_every:,} updates ({cost:.0%} of the time of training), {saving}"


def summary(directory):
    """The summary of the run in a directory: losses and answers before and after, and what to do next."""
    facts = run_facts(directory)
    best = f"best, update {facts['best_step'] or 0}"
    lines = [f"  {'':<18}{'before':>10}{best:>22}"]
    for kind, loss in facts["losses"].items():
        if loss["before"] or loss["after"]:
            for name, style in (("loss", ".4f"), ("perplexity", ".2f"), ("accuracy", ".1%")):
                before, after = ((loss[when] or {}).get(name, math.nan) for when in ("before", "after"))
                change = f"   {loss['difference']}" if name == "loss" and loss["difference"] else ""
                lines.append(f"  {kind + ' ' + name:<18}{before:>10{style}}{after:>22{style}}{change}")
    for name, loss in facts["source_losses"].items():
        change = f"   {loss['after'] - loss['before']:+.4f}"
        lines.append(f"  {'loss on ' + name:<18}{loss['before']:>10.4f}{loss['after']:>22.4f}{change}")
    for answer in facts["answers"]:
        sampled = " (sampled)" if answer["decoding"] == "sampled" else ""
        lines += ["", f"  > {answer['prompt']}{sampled}", *side_by_side(answer["before"], answer["after"])]
    run = shlex.quote(facts["directory"])
    merge, served = (f"python eval.py {run} --export merged; ", "merged") if facts["base"] else ("", f"{run}/best")
    lines += [
        "",
        f"  chat with it     python eval.py {run} --chat",
        f"  serve it         {merge}transformers serve {served}   (needs: pip install 'transformers[serving]')",
        f"  read its report  {facts['directory']}/{REPORT}",
        f"  see the curves   tensorboard --logdir {shlex.quote(str(Path(facts['directory']).parent))}",
    ]
    return escape_controls("\n".join(lines))


def write_report(run):
    """Close a finished run's log and write its page; returns its summary. Only rank 0 does it."""
    if not is_rank0():
        return ""
    facts = run_facts(run.directory) | {"answers": pair_answers(run.log.answers)}
    run.log.close(facts)
    replace_file(run.directory / REPORT, page(facts, run.data.train.examples[:3], run.tokenizer))
    run.log.sync()
    run.log.save_answers()
    return summary(run.directory)
