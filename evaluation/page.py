"""One self-contained HTML page about a run, to be sent to somebody. Its form is the template `page.html.jinja`."""

import math
from pathlib import Path

from config import Config, flag_name, format_value
from conversations.preview import render_page, token_spans
from evaluation.facts import format_bytes, format_duration

REPORT = "report.html"  # in a run's directory
CHARTS = {  # title: the metric, and the kinds of lines that have it
    "loss": ("loss", ["train", "eval"]),
    "accuracy on the eval split": ("accuracy", ["eval"]),
    "gradient norm, before clipping": ("grad_norm", ["train"]),
    "learning rate": ("lr", ["train"]),
    "tokens a second": ("tokens_per_second", ["train"]),
}


def page(facts, examples, tokenizer):
    """The page about a run, as HTML, from its `run_facts` and some training conversations, whose masks it shows."""
    charts = CHARTS | {f"loss on {name}": (f"loss/{name}", ["eval"]) for name in facts["source_losses"]}
    return render_page(
        Path(__file__).with_name("page.html.jinja"),
        facts["title"],
        facts=facts,
        charts=[chart for title, curves in charts.items() if (chart := plot(title, *curves, facts["metrics"]))],
        defaults=vars(Config()),
        masks=["".join(token_spans(example, tokenizer)) for example in examples],  # escaped by `token_spans`
        format_duration=format_duration,
        format_bytes=format_bytes,
        flag_name=flag_name,
        format_value=format_value,
    )


def plot(title, name, kinds, metrics):
    """A line chart for the template, its points in percent from the top left; None where there is nothing to draw."""
    logged = [line for line in metrics if math.isfinite(line.get(name, math.nan))]
    points = {kind: [(line["step"], line[name]) for line in logged if line["kind"] == kind] for kind in kinds}
    steps, values = ([point[axis] for line in points.values() for point in line] for axis in (0, 1))
    if len(set(steps)) < 2:
        return None
    low, high, last = min(values), max(values), max(steps)
    height = (high - low) or 1.0
    return {
        "title": title,
        "labels": [f"{value:,.0f}" if value >= 1000 else f"{value:.4g}" for value in (high, low)],
        "last": last,
        "lines": {
            kind: " ".join(f"{100 * step / last:.2f},{100 * (high - value) / height:.2f}" for step, value in line)
            for kind, line in points.items()
        },
    }
