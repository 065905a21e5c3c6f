"""Going on with a run: from the newest checkpoint that can be trusted, and only if it is still the same run."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from checkpoint import newest_whole
from config import FREE_TO_CHANGE, UserError, flag_name, shown, with_defaults


@dataclass(frozen=True)
class Start:
    """Where a run goes on: at a checkpoint, or at its beginning where it died before the first (path is None)."""

    path: Path | None
    described: dict  # what it was made with, as `report.describe` says it


def find_start(run, recorded):
    """The `Start` of a run: its newest checkpoint that verifies; those that do not are named and passed over.

    Args:
        recorded: what its `config.json` holds.

    Raises:
        UserError: no checkpoint verifies, or they are gone.
    """
    checkpoint, described, damages = newest_whole(run)
    for damage in damages:
        print(f"passed over: {damage}", file=sys.stderr)
    if checkpoint:
        return Start(checkpoint, described)
    if damages:
        raise UserError(f"--resume {run}: none of its checkpoints is whole; start anew in another directory")
    logged = last_logged_update(run)
    if logged > recorded["config"]["save_every"]:  # a checkpoint comes before any later update
        raise UserError(
            f"--resume {run}: it logged update {logged} and has no checkpoint; put them back, or start anew elsewhere"
        )
    return Start(None, recorded)


def last_logged_update(run):
    """The last update in the metrics of a run; 0 where there is none."""
    path = Path(run) / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    whole = text[: text.rfind("\n") + 1]  # the last line may have been cut short
    return max((json.loads(line)["step"] for line in whole.splitlines()), default=0)


def differences(before, now):
    """What makes one description of a run, as `report.describe` gives it, another run than a second: a line each."""
    recorded = with_defaults(before["config"])
    flags = [
        f"{flag_name(name)} {shown(recorded[name])} -> {shown(value)}"
        for name, value in now["config"].items()
        if name not in FREE_TO_CHANGE and shown(recorded[name]) != shown(value)
    ]
    if before.get("precision") != now.get("precision"):
        flags.append(f"forward pass in {before['precision']} -> {now['precision']} (--dtype)")
    if before["data"] != now["data"]:
        flags.append(f"data {sizes(before['data'])} -> {sizes(now['data'])}")
    return flags


def sizes(data):
    """A dataset in a few words: how many conversations its splits have, and its fingerprint."""
    counts = "/".join(f"{count:,}" for name, count in data.items() if name != "fingerprint")
    return f"{data['fingerprint'][:8]} ({counts} conversations)"


def check_same_run(run, before, now, allow_changes):
    """The differences between two descriptions of a run, printed where they are allowed.

    Raises:
        UserError: there are some, and they are not allowed.
    """
    changed = differences(before, now)
    if changed and not allow_changes:
        what = "\n".join(changed)
        raise UserError(
            f"--resume {run}: it would be another run; leave that out, or change it on purpose: --allow-changes\n{what}"
        )
    for line in changed:
        print(f"changed: {line}")
    versions = [
        f"{name} {before['versions'][name]} -> {version}"
        for name, version in now["versions"].items()
        if before["versions"].get(name, version) != version
    ]
    if versions:
        print(f"other versions than before ({', '.join(versions)}): equal within rounding, not to the last bit")
    return changed
