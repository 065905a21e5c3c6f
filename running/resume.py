"""Resuming a run: from its newest valid checkpoint, and only as the same run."""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from compute.adapters import get_lora
from compute.distributed import all_gather, broadcast_from_rank0
from config import MAY_CHANGE_ON_RESUME, UserError, flag_name, format_value, resolve, with_absolute_paths
from running.checkpoint import MODEL, checkpoint_path, list_checkpoints
from running.directory import read_owner
from storage.durable import find_corruption, read_manifest
from storage.records import describe, is_finished, read_metrics, read_record

MACHINE = ("device", "processor", "processes", "layout", "micro_batch_tokens")  # entries of `Run.describe`


@dataclass(frozen=True)
class ResumePoint:
    """The checkpoint from which a run resumes; path is None where it died before the first one and begins again."""

    path: Path | None
    described: dict  # the run when that was written, as `records.describe` describes it, and all changes so far
    best_is_lost: bool = False  # its best model so far is corrupt

    @property
    def model(self):
        """The directory of the checkpoint's model; None at the beginning."""
        return self.path and self.path / MODEL


def find_resume_point(directory, recorded):
    """The `ResumePoint` of a run, given its record: its newest valid checkpoint; corrupt ones are named and skipped."""
    checkpoints = list_checkpoints(directory)
    for checkpoint in reversed(checkpoints.values()):
        if problem := find_corruption(checkpoint):
            print(f"skipped: {checkpoint.name}: {problem}", file=sys.stderr)
            continue
        print(f"resuming {directory} from {checkpoint.name}")
        manifest = read_manifest(checkpoint)
        best = manifest["best_step"]
        problem = find_corruption(checkpoint_path(directory, best)) if best not in (0, manifest["step"]) else None
        if problem:
            print(f"warning: {problem}; the best model so far is lost; the best from here on is kept", file=sys.stderr)
        return ResumePoint(checkpoint, manifest | {"changes": recorded.get("changes", [])}, problem is not None)
    if checkpoints:
        raise UserError(f"--resume {directory}: none of its checkpoints is valid; start a new run in another directory")
    logged = max((line["step"] for line in read_metrics(directory)), default=0)
    # On a GPU a run goes on while its first checkpoint is written, until the second is due.
    if is_finished(directory) or logged > 2 * recorded["save_every"]:
        lost = f"it logged update {logged} but has no checkpoint"
        raise UserError(f"--resume {directory}: {lost}; restore them, or start a new run")
    print(f"resuming {directory} from its beginning: it has no checkpoint")
    return ResumePoint(None, recorded)


def find_run_to_resume(resume, named):
    """The directory of the run that `--resume` names; None where a new one begins."""
    if resume != "auto":
        return Path(resume) if resume else None
    if "output_dir" not in named:
        raise UserError("--resume auto needs --output-dir, by which it finds the run again")
    directory = Path(named["output_dir"])
    return directory if broadcast_from_rank0((directory / "config.json").exists) else None


def load_resumed_config(directory, named):
    """The `Config` of a run with the settings that a user named on top, and the record in its config.json."""
    if not (directory / "config.json").exists():
        raise UserError(f"--resume {directory}: there is no run in it")
    if Path(named.get("output_dir", directory)) != directory:
        raise UserError(f"--output-dir {named['output_dir']}: a resumed run stays in its own directory; leave that out")
    recorded = read_record(directory)
    named = with_absolute_paths(named) | {"output_dir": str(directory)}
    settings = {**recorded["config"], **named}
    return resolve(settings, settings["preset"]), recorded


def get_recorded_measurements(start, config, precision):
    """What a resumed run found out when it began, as arguments of `choose_layout`, so that it goes on as before.

    Its layout holds unless a setting that decides it has changed; its budget of tokens also needs the same device.
    """
    before, now = start.described if start else {}, vars(config)
    decisive = ("layout", "device", "compile", "gradient_checkpointing")
    if before.get("precision") != precision.name or any(before["config"][name] != now[name] for name in decisive):
        return {}
    same = before.get("device") == precision.describe()
    same &= before["config"]["micro_batch_tokens"] == now["micro_batch_tokens"]
    return {"recorded": before.get("layout"), "budget": before["micro_batch_tokens"] if same else 0}


def list_changes(before, now):
    """The differences between two `records.describe` records that make a run a different one, as lines."""
    changes = []
    for name, value in now["config"].items():
        old, new = format_value(before["config"][name]), format_value(value)
        if old != new and name not in (*MAY_CHANGE_ON_RESUME, "dtype"):  # for which the precision stands, below
            changes.append(f"{flag_name(name)} {old} -> {new}")
    old, new = before["precision"], now["precision"]
    if old != new:
        changes.append(f"forward pass in {old} -> {new} (--dtype {old} keeps it)")
    if before["data"] != now["data"]:
        changes.append(f"data {summarize_data(before['data'])} -> {summarize_data(now['data'])}")
    return changes


def list_machine_changes(before, now):
    """The differences between two `Run.describe` records that change results by rounding at most, as lines."""
    pairs = {name.replace("_", " "): (before.get(name, "not recorded"), now[name]) for name in MACHINE}
    for name in MAY_CHANGE_ON_RESUME:
        if name not in ("save_every", "keep", "output_dir"):
            pairs[flag_name(name)] = before["config"][name], now["config"][name]
    changes = [f"{name} {old} -> {new}" for name, (old, new) in pairs.items() if old != new]
    return list_version_changes(before, now) + changes


def list_version_changes(before, now):
    """The libraries whose versions differ between two records, as lines."""
    old = before["versions"]
    return [f"{name} {old[name]} -> {new}" for name, new in now["versions"].items() if old.get(name, new) != new]


def check_agreement(run):
    """Raise `UserError` unless all ranks are about to train the same run in the same directory."""
    described = describe(run.config, run.precision, run.data)
    settings = {flag_name(name): format_value(value) for name, value in described.pop("config").items()}
    mine = {**settings, **described, "layout": run.layout.describe(), "step": run.step, "commits": run.commits}
    if lora := get_lora(run.model):
        mine["the base model"] = lora.base["files"]
    first, *others = all_gather(mine)
    for number, other in enumerate(others, 1):
        for name, value in other.items():
            if value != first[name]:
                theirs = f"{first[name]} in the first, {value} in process {number}"
                raise UserError(f"the processes do not agree on {name}: {theirs}")
    owner = broadcast_from_rank0(read_owner, run.directory)
    deadline = time.monotonic() + 10  # a network's file system may show it late
    while not (sees_it := read_owner(run.directory) == owner) and time.monotonic() < deadline:
        time.sleep(0.2)
    strangers = [number for number, sees in enumerate(all_gather(sees_it)) if not sees]
    if strangers:
        advice = "name a directory on a file system that all processes share"
        raise UserError(f"--output-dir {run.directory}: process {strangers[0]} does not see it; {advice}")


def summarize_data(data):
    """The fingerprint of a dataset, and how many conversations its splits have."""
    counts = "/".join(f"{count:,}" for name, count in data.items() if name != "fingerprint")
    return f"{data['fingerprint'][:8]} ({counts} conversations)"


def check_same_run(run, before, allow_changes):
    """Print the changes of a run since its record; returns all so far. `UserError` if they were never allowed."""
    now = describe(run.config, run.precision, run.data)
    changed = list_changes(before, now)
    for name in ("lora_rank", "lora_alpha"):
        if before["config"][name] != now["config"][name]:
            what = f"{flag_name(name)} cannot change, as its checkpoints depend on it"
            raise UserError(f"--resume {run.directory}: {what}")
    change, recorded = {"step": before.get("step", 0), "changed": changed}, before.get("changes", [])
    if changed and not allow_changes and change not in recorded:
        advice = "it would be a different run; leave that out, or allow it with --allow-changes"
        raise UserError("\n".join([f"--resume {run.directory}: {advice}", *changed]))
    for line in changed:
        print(f"changed: {line}")
    if versions := list_version_changes(before, now):
        print(f"library versions differ ({', '.join(versions)}): results are equal within rounding, not bit for bit")
    return recorded if not changed or change in recorded else [*recorded, change]
