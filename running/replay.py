"""Replay: the first updates of a recorded run once more, compared with its log bit for bit; nothing is written."""

import contextlib
import math
from pathlib import Path

from compute.distributed import broadcast_from_rank0
from config import UserError, flag_name, rewrite_errors
from running.checkpoint import list_checkpoints
from running.progress import Progress
from running.resume import ResumePoint, list_changes, load_resumed_config
from storage.durable import CorruptError, read_manifest
from storage.records import read_metrics

COMPARED = ("loss", "grad_norm", "lr", "tokens", "supervised_tokens")
UPDATES = 20  # by default
PLACES = ("model", "dataset", "eval_dataset", "chat_template")  # which may have moved: their content is compared


def replay(directory, named, count, build_run, updates, signals):
    """Repeat the first updates of a run and compare them with its log. Returns the exit status: 0 only if all is equal.

    Args:
        named: settings that the user has named, which replace those of the run.
        count: the number of updates; None: `UPDATES`. No more than are logged.
        build_run, updates: the functions of `train.py`.
    """
    with rewrite_errors("--resume", "--replay"):
        config, recorded = load_resumed_config(Path(directory), named)
        logged = broadcast_from_rank0(read_updates, Path(directory), recorded, count)
        recorded["config"] |= {name: getattr(config, name) for name in PLACES if name in named}
        run = build_run(config, ResumePoint(None, recorded), allow_changes=True)
    repeated = {}
    with Progress(max(logged)) as progress:
        for metrics in updates(run):
            progress.update(metrics)
            if run.step in logged:
                repeated[run.step] = metrics
            signals.check()
            if run.step == max(logged):
                break
    changed = [line for change in run.changes for line in change["changed"]]
    if len(repeated) < len(logged):
        changed.append(f"{max(logged)} updates -> {run.total_steps} in all")
    differing = {step: line for step, line in repeated.items() if compare(logged[step], line)}
    print("\n" + format_verdict(logged, differing, changed))
    unknown = [] if recorded.get("base") else ["the base model's files, which are not recorded"]
    for line in [*changed, *run.resumed[0]["differs"], *unknown]:
        print(f"  then -> now: {line}")
    for resumed in recorded.get("resumed", []):
        for line in resumed["differs"]:
            print(f"  when it was resumed after update {resumed['step']}: {line}")
    return 1 if differing or changed else 0


def check_options(options):
    """Raise `UserError` for options of the command line that `--replay` excludes or needs."""
    for name in ("resume", "allow_changes", "dry_run", "write_config"):
        if options["replay"] and options[name]:
            raise UserError(f"--replay trains nothing and writes nothing; leave {flag_name(name)} out")
    if options["updates"] is not None and (not options["replay"] or options["updates"] < 1):
        raise UserError("--updates needs --replay, and is at least 1")


def read_updates(directory, recorded, count):
    """The lines of a run's log that its first updates are compared with, by the number of the update.

    Raises:
        UserError: there are none, one is damaged, or the recorded settings are not those of the first updates.
    """
    if changes := [line for change in recorded.get("changes", []) for line in change["changed"]]:
        why = f"it was resumed with other settings ({', '.join(changes)}), and the old ones are not recorded"
        raise UserError(f"--replay {directory}: {why}; replay a run that has one set of settings")
    for checkpoint in list_checkpoints(directory).values():
        with contextlib.suppress(CorruptError):  # it is not needed
            if changes := list_changes(read_manifest(checkpoint), recorded):
                why = f"config.json was changed since {checkpoint.name} was saved ({', '.join(changes)})"
                raise UserError(f"--replay {directory}: {why}; put that back")
    lines = {line["step"]: line for line in read_metrics(directory) if line["kind"] == "train"}
    for step, line in lines.items():
        if not all(isinstance(line.get(name), int | float) for name in COMPARED):
            raise UserError(f"--replay {directory}: the line of update {step} in metrics.jsonl is damaged")
    if not lines:
        raise UserError(f"--replay {directory}: no update is in its log")
    most = count or max(UPDATES, min(lines))  # with --log-every 50 the first line is that of update 50
    if most < min(lines):
        raise UserError(f"--updates {count}: the first update in the log of {directory} is {min(lines)}")
    return {step: line for step, line in lines.items() if step <= most}


def compare(then, now):
    """The relative differences of an update's numbers, by their names; of those that are equal, none."""
    unequal = {name: (then[name], now[name]) for name in COMPARED if now[name] != then[name]}
    return {name: abs(new - old) / abs(old) if old else math.inf for name, (old, new) in unequal.items()}


def format_verdict(logged, differing, changed):
    """The result of a replay in a line: equal, or the first update that differs, and by how much."""
    numbers, last = f"{', '.join(COMPARED)} of {len(logged)} updates", max(logged)
    if not differing:
        if changed:
            return f"up to update {last} nothing that is logged differs, but it is not the same run:"
        return f"equal to update {last}: {numbers}, bit for bit"
    first = min(differing)
    then, now = logged[first], differing[first]
    values = [f"{name} {then[name]!r} -> {now[name]!r} (by {share:.1e})" for name, share in compare(then, now).items()]
    losses = [compare(logged[step], line).get("loss", 0) for step, line in differing.items()]
    return (
        f"differs at update {first}: {', '.join(values)}\n"
        f"  {len(differing)} of {len(logged)} updates differ, the loss by up to {max(losses):.1e}"
    )
