"""What `eval.py` reports: two models compared, several runs together, and all of it for reading."""

import sys
import textwrap

import numpy as np

from config import as_text
from evaluation.comparison import compare, format_comparison, side_by_side, verdict
from evaluation.forgetting import forgetting


def compare_models(before, after):
    """What two `Evaluated` models differ in, as the parts of a report.

    Returns:
        A dict of "comparison", the `compare` of each split that both were evaluated on, and "forgetting" where both
        were evaluated on a text.
    """
    found = {"comparison": {}}
    for name, evaluation in before.evaluations.items():
        split = before.splits[name]
        if split.digest != after.splits[name].digest:
            warn_of_other_tokens(name, "the conversations")
            continue
        examples = list(split.examples)
        locations = [split.examples.location(row) for row in range(len(examples))]
        openings = [opening(example, before.tokenizer) for example in examples]
        losses = evaluation.token_losses, after.evaluations[name].token_losses
        found["comparison"][name] = compare(*losses, examples, locations, openings)
    if before.text:
        if before.text_ids.equal(after.text_ids) and len(before.text.token_losses) == len(after.text.token_losses):
            found["forgetting"] = forgetting(before.text.token_losses, after.text.token_losses)
        else:
            warn_of_other_tokens("text", "it")
    return found


def warn_of_other_tokens(name, what):
    """Warn that a comparison is left out."""
    print(f"warning: {name}: not compared, as the two models read {what} as different tokens", file=sys.stderr)


def opening(example, tokenizer, width=60):
    """The first words of a conversation that are no header, to recognise it by."""
    text = tokenizer.decode(example.input_ids[:60], skip_special_tokens=True)
    return " ".join(text.split())[:width]


# --- several runs


def measures(report):
    """The numbers of a report that are worth a mean over runs, by name: (value, difference from the other model)."""
    found, nothing = {}, {}
    for name, split in report["splits"].items():
        compared = report.get("comparison", nothing).get(name, nothing)
        found[f"{name} loss"] = (split["loss"], compared.get("difference"))
    if "text" in report:
        found["text loss"] = (report["text"]["loss"], report.get("forgetting", nothing).get("difference"))
    return found


def over_runs(reports):
    """The mean of each measure over several runs, and the standard deviation between them, as a dict by its name.

    Each run is judged on its own held-out conversations: those of another seed's run are among what it learned.
    """
    each, found = [measures(report) for report in reports], {}
    for name in each[0]:
        if all(name in one for one in each):
            values, differences = zip(*(one[name] for one in each), strict=True)
            found[name] = {**spread(values), "difference": None if None in differences else spread(differences)}
    return found


def spread(values):
    """Values with their mean and (sample) standard deviation, as a dict."""
    return {"values": list(values), "mean": float(np.mean(values)), "std": float(np.std(values, ddof=1))}


# --- for reading


def format_report(report):
    """A report for reading."""
    if "runs" in report:
        return "\n".join(format_runs(report["runs"], report["over_runs"]))
    other = report.get("against")
    lines = [*format_losses(report), *(["", *format_losses(other)] if other else [])]
    for name, found in report.get("comparison", {}).items():
        lines += ["", *format_comparison(name, found, names_of(report))]
    lines += format_forgetting(report)
    if other and report["answers"]:
        lines += ["", *side_by_side(f"answers of {other['model']}", report["model"])]
    for number, given in enumerate(report["answers"]):
        lines.append(f"\n  > {given['prompt']}{'' if given['greedy'] else ' (sampled)'}")
        text = given["text"] + ("" if given["finished"] else " …")
        lines += side_by_side(other["answers"][number]["text"], text) if other else [f"  {text}"]
    if report["answers"]:
        lines.append(f"\n  {report['finished']} of {len(report['answers'])} answers ended by themselves")
        lines[-1] += f", of {other['model']} {other['finished']}" if other else ""
    return "\n".join(lines)


def page_sections(report):
    """The parts of a report that are not about the run's own files, for its page: pairs of a heading and text."""
    sections = {"Plain text": [*format_text(report), *format_forgetting(report)]} if "text" in report else {}
    for name, comparison in report.get("comparison", {}).items():
        sections[f"Compared on the {name} split"] = format_comparison(name, comparison, names_of(report))
    return [(heading, textwrap.dedent("\n".join(lines)).strip()) for heading, lines in sections.items()]


def names_of(report):
    """The names of the two models that a report compares, the other one first."""
    return report["against"]["model"], report["model"]


def format_losses(report):
    """A model and its numbers, as lines."""
    yield f"{report['model']} ({report['precision']})"
    if report["dataset"]:
        yield f"  on {as_text(report['dataset'])}"
    for name, split in report["splits"].items():
        yield f"  {name:<5} {format_loss(split)}   {split['supervised_tokens']:,} supervised tokens"
    yield from format_text(report)


def format_text(report):
    """The loss on plain text, if it was measured, as lines."""
    if "text" in report:
        text = report["text"]
        yield f"  text  {format_loss(text)}   {text['supervised_tokens']:,} tokens of {text['file']}"


def format_loss(split):
    """The numbers of an `Evaluation` in a few words."""
    return "loss {loss:.4f}   perplexity {perplexity:.2f}   accuracy {accuracy:.1%}".format(**split)


def format_forgetting(report):
    """The difference of two models on plain text, if it was measured, as lines."""
    if found := report.get("forgetting"):
        yield "\n  text: {1} against {0}".format(*names_of(report))
        yield f"    loss {found['before']:.4f} -> {found['after']:.4f}: {verdict(found)}"


def format_runs(reports, together):
    """Several runs, and their mean and spread, as lines."""
    for report in reports:
        yield from format_losses(report)
    compared = "against" in reports[0]
    other = f"   difference from {reports[0]['against']['model']}" if compared else ""
    yield f"\n  {f'over {len(reports)} runs':<22} {'mean':>9} {'std':>8}{other}"
    for name, found in together.items():
        line = f"  {name:<22} {found['mean']:9.4f} {found['std']:8.4f}"
        if found["difference"]:
            line += "   {mean:+.4f}, std {std:.4f}, of each ".format(**found["difference"])
            line += " ".join(f"{value:+.4f}" for value in found["difference"]["values"])
        yield line
