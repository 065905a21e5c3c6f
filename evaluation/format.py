"""A report of `eval.py` as text."""

import textwrap
from itertools import zip_longest

from config import format_value
from conversations.preview import escape_controls
from evaluation.comparison import verdict
from evaluation.facts import answer_text

MAX_WRONG = 5  # answers that are shown


def format_report(report):
    """A report as text: losses, comparisons, answers; of several runs their losses, mean and spread."""
    if "runs" in report:
        return "\n".join(format_runs(report["runs"], report["over_runs"]))
    other, answers = report.get("against"), report["answers"]
    lines = list(format_losses(report))
    if other:
        lines += ["", *format_losses(other)]
        compared = report["comparison"] | {"text": report.get("forgetting")}
        for name in (name for name in compared if compared[name]):
            lines.append(f"\n  {name}: {report['model']} against {other['model']}")
            lines += format_comparison(compared[name])
        lines += ["", *side_by_side(f"answers of {other['model']}", report["model"])]
    for number, answer in enumerate(answers):
        lines.append(f"\n  > {answer['prompt']}{'' if answer['greedy'] else ' (sampled)'}")
        text = answer_text(answer)
        lines += side_by_side(answer_text(other["answers"][number]), text) if other else [f"  {text}"]
    ended = f", of {other['model']} {other['finished']}" if other else ""
    lines.append(f"\n  {report['finished']} of {len(answers)} answers ended by themselves{ended}")
    return escape_controls("\n".join(lines))


def format_losses(report):
    """The lines of a model and its losses."""
    yield f"{report['model']} ({report['precision']})"
    if report["dataset"]:
        yield f"  on {format_value(report['dataset'])}"
    rows = [(name, split, "supervised tokens") for name, split in report["splits"].items()]
    if text := report.get("text"):
        rows.append(("text", text, f"tokens of {text['file']}"))
    for name, split, unit in rows:
        losses = "loss {loss:.4f}   perplexity {perplexity:.2f}   accuracy {accuracy:.1%}".format(**split)
        yield f"  {name:<5} {losses}   {split['supervised_tokens']:,} {unit}"
    for name, found in report.get("exact", {}).items():
        yield from format_exact(name, found)


def format_exact(name, found):
    """The lines about the right answers to a split: how many, by which rules, and the first wrong ones."""
    rules = ", ".join(f"{rule} {each['right']} of {each['conversations']}" for rule, each in found["by_rule"].items())
    share, interval = "none can be judged", found["interval"]
    if interval:
        share = f"{found['right'] / found['conversations']:.1%}, 95 % interval [{interval[0]:.1%}, {interval[1]:.1%}]"
    yield f"\n  {name}: {found['right']} of {found['conversations']} answers are right: {share} ({rules})"
    if found["unfinished"]:
        yield f"    {found['unfinished']} answers did not end, and count as wrong"
    for reason, count in found["not_judged"].items():
        yield f"    {count} references {reason}, and are not judged"
    if paired := found.get("against"):
        better = "better" if paired["won"] > paired["lost"] else "worse"
        better = "no difference beyond chance" if paired["p"] > 0.05 else better
        yield "    only this one right {won}, only the other {lost}, p = {p:.2g}: ".format(**paired) + better
    for row in [row for row in found["rows"] if not row["right"]][:MAX_WRONG]:
        yield f"    wrong, by {row['rule']}: {row['location'].rsplit('/', 1)[-1]}"
        lines = side_by_side(row["reference"], answer_text({**row, "text": row["answer"]}))
        yield from (f"    {line}" for line in lines)


def format_comparison(found):
    """The lines that compare two models over a split, or on plain text, which has no conversations."""
    yield f"    loss {found['before']:.4f} -> {found['after']:.4f}: {verdict(found)}"
    if "blocks" in found:
        return
    yield "    won {won}, lost {lost}, tied {tied} of {conversations} conversations".format(**found)
    for title in ("by_turn", "by_source"):
        if len(found[title]) > 1:
            yield f"    {title.replace('_', ' ')}"
            for group in found[title]:
                counts = "{conversations} conversations, {tokens:,} tokens".format(**group)
                yield f"      {group['name']:<22} {verdict(group)} ({counts})"
    for title, rows in (("got better most", found["better"]), ("got worse most", found["worse"])):
        if rows:
            yield f"    {title}"
        for row in rows:
            losses = f"{row['before']:.3f} -> {row['after']:.3f}"
            yield f"      {losses}  {row['location'].rsplit('/', 1)[-1]}  {row['opening']}"


def format_runs(reports, means):
    """The lines of several runs, and of the mean and spread of each loss."""
    for report in reports:
        yield from format_losses(report)
    other = f"   difference from {reports[0]['against']['model']}" if "against" in reports[0] else ""
    yield f"\n  {f'over {len(reports)} runs':<22} {'mean':>9} {'std':>8}{other}"
    for name, found in means.items():
        change = "   {mean:+.4f}, std {std:.4f}".format(**found["difference"]) if found["difference"] else ""
        yield f"  {name:<22} {found['mean']:9.4f} {found['std']:8.4f}{change}"


def side_by_side(left, right, width=54):
    """The lines of two texts wrapped into columns."""
    columns = [[line for part in text.splitlines() for line in textwrap.wrap(part, width)] for text in (left, right)]
    return [f"  {one:<{width}} | {other}".rstrip() for one, other in zip_longest(*columns, fillvalue="")]
