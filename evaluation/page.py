"""One self-contained HTML page about a run, to be sent to somebody: what was trained on what, and what came of it."""

import html
import math
from pathlib import Path

from config import Config, as_text, flag_name, read_record
from conversations.preview import PAGE, STYLE, token_spans
from evaluation.comparison import difference, verdict
from storage.records import read_answers, read_losses, read_metrics

REPORT = "report.html"  # in a run's directory
CHARTS = """
h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd } th { text-align: right; font-weight: 600 }
.answers td { text-align: left; vertical-align: top; width: 50%; white-space: pre-wrap; border-top: 1px solid #ddd }
table.settings td { text-align: left } .changed { font-weight: 600 }
.charts { display: flex; flex-wrap: wrap; gap: 1rem }
figure { margin: 0 } figcaption { font-size: 13px } .axis { stroke: #ccc } polyline { fill: none; stroke-width: 1.5 }
.train { stroke: #4a7fb5; background: #4a7fb5 } .eval { stroke: #d9822b; background: #d9822b } .many { font-size: 13px }
.key { display: inline-block; width: 1em; height: 3px; vertical-align: middle; margin: 0 .3em }
"""


def page(run, examples, tokenizer, sections=()):
    """The page about a run's directory.

    Args:
        examples: some of its training conversations, whose masks are shown.
        sections: more to show, such as a comparison with another model: pairs of a heading and text.

    Raises:
        UserError: a file of the run is damaged.
    """
    record, metrics, answers, losses = read_record(run), read_metrics(run), read_answers(run), read_losses(run)
    config = record["config"]
    title = html.escape(f"{Path(config['model']).name} on {', '.join(Path(name).name for name in config['dataset'])}")
    parts = [f"{PAGE}<meta charset=utf-8><title>{title}</title><style>{STYLE}{CHARTS}</style><h1>{title}</h1>"]
    parts += [what(record, metrics), "<h2>Losses</h2>", losses_table(metrics, losses)]
    parts += ["<h2>Curves</h2><div class=charts>", *charts(metrics), "</div>"]
    parts += ["<h2>Answers</h2>", answers_table(answers)]
    for heading, text in sections:
        parts.append(f"<h2>{heading}</h2><pre class=many>{html.escape(text)}</pre>")
    parts.append("<h2>What was trained on</h2><p><span class=t>supervised</span> <span class=c>context only</span></p>")
    for example in examples:
        parts.append(f"<pre>{''.join(token_spans(example, tokenizer))}</pre>")
    parts += ["<h2>Settings</h2>", settings_table(config), "<h2>Versions</h2>"]
    versions = "".join(f"<tr><td>{name}<td>{html.escape(version)}" for name, version in record["versions"].items())
    return "\n".join([*parts, f"<table class=settings>{versions}</table>"]) + "\n"


def what(record, metrics):
    """What was trained on what, and what it cost, as paragraphs."""
    config, data = record["config"], record["data"]
    train = [line for line in metrics if line["kind"] == "train"]
    names = " ".join(Path(name).name for name in config["dataset"])
    text = (
        f"<b>{html.escape(config['model'])}</b>, fine-tuned on {data['train']:,} conversations of "
        f"<b>{html.escape(names)}</b> ({data['eval']:,} chose the best model, {data['test']:,} judge it), in "
        f"{record['precision']}; data fingerprint {data['fingerprint'][:12]}."
    )
    if not train:
        return f"<p>{text}</p>"
    share = train[-1]["step"] / len(train)  # --log-every leaves lines out
    seconds = share * sum(line["tokens"] / line["tokens_per_second"] for line in train)
    tokens = share * sum(line["tokens"] for line in train)
    supervised = sum(line["supervised_tokens"] for line in train) / sum(line["tokens"] for line in train)
    memory = train[-1].get("peak_memory", math.nan) / 1e9
    cost = (
        f"{train[-1]['step']:,} updates took {duration(seconds)} for {tokens:,.0f} tokens, {supervised:.0%} of them "
        f"supervised: {tokens / seconds:,.0f} tokens a second, {memory:.1f} GB of memory at the peak."
    )
    return f"<p>{text}</p><p>{cost}</p>"


def duration(seconds):
    """Seconds for reading."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def losses_table(metrics, losses):
    """A table of the losses before and after; with an interval where the losses of each conversation are known."""
    rows = ["<tr><th><th>before<th>after, best model<th>accuracy<th>difference of the loss"]
    for kind in ("eval", "test"):
        lines = [line for line in metrics if line["kind"] == kind]
        after = min((line for line in lines if line["step"]), key=lambda line: line["loss"], default=None)
        before = next((line for line in lines if not line["step"]), None)
        if not (before and after):  # a line of the log may be lost
            continue
        change = f"{after['loss'] - before['loss']:+.4f}"
        found = losses.get(kind, {})
        pairs = list(zip(found.get("before", []), found.get("after", []), strict=False))
        if pairs:
            single = difference(*zip(*((old[0], new[0], new[1]) for old, new in pairs), strict=True))
            if math.isclose(single["after"], after["loss"], rel_tol=1e-6):  # else they are of another evaluation
                change = verdict(single)
        accuracy = f"{before['accuracy']:.1%} → {after['accuracy']:.1%}"
        rows.append(f"<tr><td>{kind}<td>{before['loss']:.4f}<td>{after['loss']:.4f}<td>{accuracy}<td>{change}")
    return f"<table>{''.join(rows)}</table>"


def charts(metrics):
    """The charts of a run's metrics, as figures."""
    train, held_out = ([line for line in metrics if line["kind"] == kind] for kind in ("train", "eval"))

    def points(lines, name):
        return [(line["step"], line[name]) for line in lines if math.isfinite(line.get(name, math.nan))]

    yield chart("loss", train=points(train, "loss"), eval=points(held_out, "loss"))
    yield chart("accuracy on the eval split", eval=points(held_out, "accuracy"))
    yield chart("gradient norm, before clipping", train=points(train, "grad_norm"))
    yield chart("learning rate", train=points(train, "lr"))
    yield chart("tokens a second", train=points(train, "tokens_per_second"))


def chart(title, width=420, height=180, margin=52, **lines):
    """An SVG line chart; the lines are lists of `(step, value)`, by their names."""
    points = [point for line in lines.values() for point in line]
    steps, values = ([point[part] for point in points] for part in (0, 1))
    if len(set(steps)) < 2:
        return ""
    low, high = min(values), max(values)
    span, last = (high - low) or abs(high) or 1.0, max(steps)

    def at(step, value):
        return f"{margin + (width - margin - 8) * step / last:.1f},{8 + (height - 28) * (1 - (value - low) / span):.1f}"

    bottom = height - 20
    drawn = [
        f"<line class=axis x1={margin} y1=8 x2={margin} y2={bottom} />",
        f"<line class=axis x1={margin} y1={bottom} x2={width} y2={bottom} />",
    ]
    for name, line in lines.items():
        drawn.append(f'<polyline class={name} points="{" ".join(at(*point) for point in line)}" />')
    drawn += [
        f"<text x={margin - 4} y=16 text-anchor=end>{high:.4g}</text>",
        f"<text x={margin - 4} y={bottom} text-anchor=end>{low:.4g}</text>",
        f"<text x={margin} y={height - 6}>0</text><text x={width - 8} y={height - 6} text-anchor=end>{last}</text>",
    ]
    key = "".join(f"<span class='key {name}'></span>{name}" for name in lines) if len(lines) > 1 else ""
    picture = f"<svg width={width} height={height}>{''.join(drawn)}</svg>"
    return f"<figure><figcaption>{title} {key}</figcaption>{picture}</figure>"


def answers_table(answers):
    """A table of the answers before and after, for each prompt the greedy one first."""
    rows = []
    pairs = list(zip(answers.get("before", []), answers.get("after", []), strict=False))
    for before, after in sorted(pairs, key=lambda pair: [one["prompt"] for one, _ in pairs].index(pair[0]["prompt"])):
        how = "greedy" if after["greedy"] else "sampled"
        rows.append(f"<tr><th colspan=2 style='text-align:left'>{html.escape(before['prompt'])} ({how})")
        cells = [html.escape(one["text"]) + ("" if one["finished"] else " …") for one in (before, after)]
        rows.append(f"<tr><td>{cells[0]}<td>{cells[1]}")
    return f"<table class=answers><tr><td><i>before<td><i>after{''.join(rows)}</table>" if rows else "<p>None yet."


def settings_table(config):
    """A table of the settings; those that are not the default are bold."""
    rows = []
    for name, value in config.items():
        default = as_text(Config.__dataclass_fields__[name].default)
        value = as_text(value)
        kind = " class=changed" if value != default else ""
        rows.append(f"<tr><td><code>{flag_name(name)}</code><td{kind}>{html.escape(str(value))}")
    return f"<table class=settings>{''.join(rows)}</table>"
