"""A report of `eval.py` as text."""

import textwrap

from config import format_value
from evaluation.comparison import verdict


def format_report(report):
    """A report as text: losses, comparisons, answers; of several runs their losses, mean and spread."""
    if "runs" in report:
        return "\n".join(format_runs(report["runs"], report["over_runs"]))
    other, answers = report.get("against"), report["answers"]
    lines = [*format_losses(report), *(["", *format_losses(other)] if other else [])]
    for name in report.get("comparison", {}):
        lines += ["", *format_comparison(name, report)]
    lines += format_forgetting(report)
    if other:
        lines += ["", *side_by_side(f"answers of {other['model']}", report["model"])]
    for number, answer in enumerate(answers):
        lines.append(f"\n  > {answer['prompt']}{'' if answer['greedy'] else ' (sampled)'}")
        text = answer["text"] + ("" if answer["finished"] else " …")
        lines += side_by_side(other["answers"][number]["text"], text) if other else [f"  {text}"]
    ended = f", of {other['model']} {other['finished']}" if other else ""
    lines.append(f"\n  {report['finished']} of {len(answers)} answers ended by themselves{ended}")
    return "\n".join(lines)


def page_sections(report):
    """The parts of a report that a run's page does not have by itself: pairs of a heading and text."""
    parts = {"Plain text": [*format_text(report), *format_forgetting(report)]}
    parts |= {f"Compared on the {name} split": format_comparison(name, report) for name in report.get("comparison", {})}
    texts = {heading: textwrap.dedent("\n".join(lines)).strip() for heading, lines in parts.items()}
    return [(heading, text) for heading, text in texts.items() if text]


def format_losses(report):
    """The lines of a model and its losses."""
    yield f"{report['model']} ({report['precision']})"
    if report["dataset"]:
        yield f"  on {format_value(report['dataset'])}"
    for name, split in report["splits"].items():
        yield format_loss(name, split, "supervised tokens")
    yield from format_text(report)


def format_text(report):
    """The line of the loss on plain text, if it was measured."""
    if text := report.get("text"):
        yield format_loss("text", text, f"tokens of {text['file']}")


def format_loss(name, split, unit):
    losses = "loss {loss:.4f}   perplexity {perplexity:.2f}   accuracy {accuracy:.1%}".format(**split)
    return f"  {name:<5} {losses}   {split['supervised_tokens']:,} {unit}"


def format_forgetting(report):
    """The lines that compare two models on plain text, if they were."""
    if found := report.get("forgetting"):
        yield f"\n  text: {report['model']} against {report['against']['model']}"
        yield f"    loss {found['before']:.4f} -> {found['after']:.4f}: {verdict(found)}"


def format_comparison(split, report):
    """The lines that compare two models over a split."""
    found = report["comparison"][split]
    yield f"  {split}: {report['model']} against {report['against']['model']}"
    yield f"    loss {found['before']:.4f} -> {found['after']:.4f}: {verdict(found)}"
    yield "    won {won}, lost {lost}, tied {tied} of {conversations} conversations".format(**found)
    for title in ("by_turn", "by_source"):
        if len(found[title]) > 1:
            yield f"    {title.replace('_', ' ')}"
            yield from (f"      {group['name']:<22} {format_difference(group)}" for group in found[title])
    for title, rows in (("got better most", found["better"]), ("got worse most", found["worse"])):
        if rows:
            yield f"    {title}"
        for row in rows:
            losses = f"{row['before']:.3f} -> {row['after']:.3f}"
            yield f"      {losses}  {row['location'].rsplit('/', 1)[-1]}  {row['opening']}"


def format_difference(found):
    interval = "[{:+.4f}, {:+.4f}]".format(*found["interval"]) if found["interval"] else "too few for an interval"
    return f"{found['difference']:+.4f} {interval} ({found['conversations']} conversations, {found['tokens']:,} tokens)"


def format_runs(reports, means):
    """The lines of several runs, and of the mean and spread of each loss."""
    for report in reports:
        yield from format_losses(report)
    other = f"   difference from {reports[0]['against']['model']}" if "against" in reports[0] else ""
    yield f"\n  {f'over {len(reports)} runs':<22} {'mean':>9} {'std':>8}{other}"
    for name, found in means.items():
        line = f"  {name:<22} {found['mean']:9.4f} {found['std']:8.4f}"
        if found["difference"]:
            line += "   {mean:+.4f}, std {std:.4f}, of each ".format(**found["difference"])
            line += " ".join(f"{value:+.4f}" for value in found["difference"]["values"])
        yield line


def side_by_side(left, right, width=54):
    """The lines of two texts wrapped into columns."""
    columns = [[line for part in text.splitlines() for line in textwrap.wrap(part, width)] for text in (left, right)]
    height = max(map(len, columns))
    rows = zip(*(column + [""] * (height - len(column)) for column in columns), strict=True)
    return [f"  {row[0]:<{width}} | {row[1]}".rstrip() for row in rows]
