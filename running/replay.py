"""Replay: the first updates of a recorded run once more, compared with its log bit for bit; nothing is written."""

import math
from pathlib import Path

from compute.distributed import broadcast_from_rank0
from config import UserError, flag_name, rewrite_errors
from running.progress import Progress
from running.resume import ResumePoint, load_resumed_config
from storage.records import read_metrics

COMPARED = ("loss", "grad_norm", "lr", "tokens", "supervised_tokens")
UPDATES = 20  # by default
PLACES = ("model", "dataset", "eval_dataset", "chat_template")  # which may have moved: their content is compared


def replay(options, named, build_run, updates, signals):
    """Repeat a run's first updates, up to one that differs from its log. Returns the exit status: 0 if all are equal.

    Args:
        options: of the command line.
        named: settings that the user has named, which replace those of the run.
        build_run, updates: the functions of `train.py`.
    """
    for name in ("resume", "allow_changes", "dry_run", "write_config"):
        if options[name]:
            raise UserError(f"--replay trains nothing and writes nothing; leave {flag_name(name)} out")
    if options["updates"] is not None and options["updates"] < 1:
        raise UserError("--updates must be at least 1")
    directory = Path(options["replay"])
    with rewrite_errors("--resume", "--replay"):
        config, recorded = load_resumed_config(directory, named)
        logged = broadcast_from_rank0(read_updates, directory, recorded, options["updates"])
        recorded["config"] |= {name: getattr(config, name) for name in PLACES if name in named}
        run = build_run(config, ResumePoint(None, recorded), allow_changes=True)
    if (last := max(logged)) > run.total_steps:
        raise UserError(f"--replay {directory}: update {last} is logged, but there are {run.total_steps} in all")
    with Progress(last) as progress:
        for metrics in updates(run):
            progress.update(metrics)
            signals.check()
            found = compare(logged[run.step], metrics) if run.step in logged else {}
            if found or run.step == last:
                break
    changed = [line for change in run.changes for line in change["changed"]]
    print("\n" + format_verdict(run.step, found, len(logged), changed))
    unknown = [] if recorded.get("base") else ["the base model's files, which are not recorded"]
    differs = [line for resumed in run.resumed for line in resumed["differs"]]
    for line in [*changed, *differs, *unknown]:
        print(f"  then -> now: {line}")
    for resumed in recorded.get("resumed", []):
        for line in resumed["differs"]:
            print(f"  when it was resumed after update {resumed['step']}: {line}")
    return 1 if found or changed else 0


def read_updates(directory, recorded, count):
    """The lines of a run's log to compare its first updates with, at most `count` (None: `UPDATES`), by their number.

    Raises:
        UserError: there are none, one is damaged, or they were made with other settings than those that are recorded.
    """
    if changes := [line for change in recorded.get("changes", []) for line in change["changed"]]:
        why = f"it was resumed with other settings ({', '.join(changes)}), and the old ones are not recorded"
        raise UserError(f"--replay {directory}: {why}; replay a run that has one set of settings")
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
    """The numbers of an update that differ, by their names: both, and their relative difference."""
    pairs = {name: (then[name], now[name]) for name in COMPARED if then[name] != now[name]}
    return {name: (old, new, abs(new - old) / abs(old) if old else math.inf) for name, (old, new) in pairs.items()}


def format_verdict(step, found, count, changed):
    """What a replay of `count` logged updates has found, in a line: equal, or what first differs, and by how much."""
    if found:
        values = [f"{name} {old!r} -> {new!r} (by {share:.1e})" for name, (old, new, share) in found.items()]
        return f"differs at update {step}: {', '.join(values)}"
    if changed:
        return f"up to update {step} nothing that is logged differs, but it is not the same run:"
    return f"equal to update {step}: {', '.join(COMPARED)} of {count} logged updates, bit for bit"
