"""Resuming a run: from its newest valid checkpoint, and only as the same run."""

import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from compute.distributed import all_gather, broadcast_from_rank0
from config import (
    MAY_CHANGE_ON_RESUME,
    UserError,
    flag_name,
    format_value,
    lists_to_tuples,
    resolve,
    with_absolute_paths,
)
from running.checkpoint import MODEL, find_newest_valid
from running.directory import locked
from storage.records import is_finished, read_metrics, read_record


@dataclass(frozen=True)
class ResumePoint:
    """Where a run resumes: at a checkpoint, or at its beginning if it died before the first one (path is None)."""

    path: Path | None
    described: dict  # what it was made with, as `records.describe` says it
    best_is_lost: bool = False  # the best model so far is corrupt

    @property
    def model(self):
        """The directory of the checkpoint's model; None at the beginning."""
        return self.path and self.path / MODEL


def find_resume_point(run, recorded):
    """The `ResumePoint` of a run: its newest valid checkpoint; corrupt ones are named and skipped.

    Args:
        recorded: what its `config.json` holds.

    Raises:
        UserError: no checkpoint is valid, or they are missing; or the run is finished and never had one.
    """
    checkpoint, manifest, reasons = find_newest_valid(run)
    best_is_lost = bool(reasons) and not checkpoint
    if best_is_lost:
        checkpoint, manifest, _ = find_newest_valid(run, with_best=False)
    for reason in reasons:
        print(f"skipped: {reason}", file=sys.stderr)
    if checkpoint:
        if best_is_lost:
            print("warning: the best model so far is lost; the best from here on is kept", file=sys.stderr)
        print(f"resuming {run} from {checkpoint.name}")
        return ResumePoint(checkpoint, manifest, best_is_lost)
    if reasons:
        raise UserError(f"--resume {run}: none of its checkpoints is valid; start a new run in another directory")
    if is_finished(run):
        best = shlex.quote(f"{run}/best")
        raise UserError(
            f"--resume {run}: it is finished, with no checkpoint to continue from; try a run of --model {best}"
        )
    logged = find_last_logged_update(run)
    # On a GPU a run goes on while its first checkpoint is written, until the second is due.
    if logged > 2 * recorded["config"]["save_every"]:
        raise UserError(
            f"--resume {run}: it logged update {logged} but has no checkpoint; restore them, or start a new run"
        )
    print(f"resuming {run} from its beginning: it has no checkpoint")
    return ResumePoint(None, recorded)


def find_run_to_resume(asked, named):
    """The directory of the run that `--resume` asks for; None where a new one begins.

    Raises:
        UserError: "auto" without `--output-dir`, by which a run is found again.
    """
    if asked != "auto":
        return Path(asked) if asked else None
    if "output_dir" not in named:
        raise UserError("--resume auto needs --output-dir, by which it finds the run again")
    return broadcast_from_rank0(find_run_in, Path(named["output_dir"]))


def find_run_in(directory):
    """A directory that holds a run; None where there is none, once what a killed process left of one is removed."""
    if (directory / "config.json").exists():
        return directory
    if (directory / ".lock").exists():
        with locked(directory):
            pass


def load_resumed_config(directory, named):
    """The `Config` of a run with the settings that a user named on top, and what its `config.json` holds.

    Raises:
        UserError: there is no run in the directory, or another directory is named as well.
    """
    for parent in [*directory.parents][:3]:  # of run/best, run/checkpoints/step-N, run/checkpoints/step-N/model
        if (parent / "metrics.jsonl").exists():
            advice = f"resume the run: --resume {shlex.quote(str(parent))}"
            raise UserError(f"--resume {directory}: this is a part of a run; {advice}")
    if not (directory / "config.json").exists():
        raise UserError(f"--resume {directory}: there is no run in it")
    if Path(named.get("output_dir", directory)) != directory:
        raise UserError(f"--output-dir {named['output_dir']}: a resumed run stays in its own directory; leave that out")
    recorded = read_record(directory)
    named = with_absolute_paths(named) | {"output_dir": str(directory)}
    settings = lists_to_tuples({**recorded["config"], **named})
    return resolve(settings, settings["preset"]), recorded


def get_recorded_budget(start, config, precision):
    """The tokens of a micro-batch that an interrupted run had, so that it rounds as before.

    0 where that is not known to fit: on another device, or with other settings that decide what memory is taken.
    """
    before = start.described if start else {}
    same = before.get("device") == precision.describe() and all(
        before["config"][name] == getattr(config, name)
        for name in ("layout", "compile", "gradient_checkpointing", "micro_batch_tokens")
    )
    return before["micro_batch_tokens"] if same else 0


def find_last_logged_update(run):
    """The last update in the metrics of a run; 0 where there is none."""
    return max((line["step"] for line in read_metrics(run)), default=0)


def list_changes(before, now):
    """What differs between two records of a run, as `records.describe` gives them, and makes it a different run."""
    recorded = before["config"]
    flags = [
        f"{flag_name(name)} {format_value(recorded[name])} -> {format_value(value)}"
        for name, value in now["config"].items()
        if name not in MAY_CHANGE_ON_RESUME and format_value(recorded[name]) != format_value(value)
    ]
    if before.get("precision") != now.get("precision"):
        flags.append(f"forward pass in {before['precision']} -> {now['precision']} (--dtype)")
    if before["data"] != now["data"]:
        flags.append(f"data {summarize_data(before['data'])} -> {summarize_data(now['data'])}")
    return flags


def check_agreement(run):
    """Check that the processes of a run are about to do the same, in the same directory, before one of them writes.

    Raises:
        UserError: they are not; it says what differs.
    """
    described = run.describe()
    mine = {flag_name(name): value for name, value in described.pop("config").items()}
    mine |= {
        "versions": described["versions"],
        "data": summarize_data(described["data"]),
        "precision": described["precision"],
    }
    mine |= {"layout": run.layout.describe(), "step": run.step}
    first, *others = all_gather(mine)
    for number, other in enumerate(others, 1):
        for name, value in other.items():
            if value != first[name]:
                theirs = f"{format_value(first[name])} in the first, {format_value(value)} in process {number}"
                raise UserError(f"the processes do not agree on {name}: {theirs}")
    owner = broadcast_from_rank0(read_owner, run.directory)
    strangers = [number for number, same in enumerate(all_gather(can_see(run.directory, owner))) if not same]
    if strangers:
        advice = "name a directory on a file system that all processes share"
        raise UserError(f"--output-dir {run.directory}: process {strangers[0]} does not see it; {advice}")


def can_see(directory, owner, seconds=10):
    """Whether this process sees the owner of a locked run; a network's file system may take a while to show it."""
    end = time.monotonic() + seconds
    while not (same := read_owner(directory) == owner) and time.monotonic() < end:
        time.sleep(0.2)
    return same


def read_owner(directory):
    """Which process has locked a run; "" where none is seen to."""
    owner = directory / ".owner"
    return owner.read_text(encoding="utf-8") if owner.exists() else ""


def summarize_data(data):
    """A dataset in a few words: how many conversations its splits have, and its fingerprint."""
    counts = "/".join(f"{count:,}" for name, count in data.items() if name != "fingerprint")
    return f"{data['fingerprint'][:8]} ({counts} conversations)"


def check_same_run(run, before, now, allow_changes):
    """The differences between two descriptions of a run, printed where they are allowed.

    Raises:
        UserError: there are some, and they are not allowed.
    """
    changed = list_changes(before, now)
    if changed and not allow_changes:
        what = "\n".join(changed)
        raise UserError(
            f"--resume {run}: it would be a different run; leave that out, or allow it with --allow-changes\n{what}"
        )
    for line in changed:
        print(f"changed: {line}")
    versions = [
        f"{name} {before['versions'][name]} -> {version}"
        for name, version in now["versions"].items()
        if before["versions"].get(name, version) != version
    ]
    if versions:
        print(f"library versions differ ({', '.join(versions)}): results are equal within rounding, not bit for bit")
    return changed
