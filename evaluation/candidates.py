"""The model that a name on `eval.py`'s command line stands for, with its settings, and its upload to the Hub."""

import sys
from pathlib import Path
from typing import NamedTuple

from config import DATASET_SETTINGS, Config, UserError, flag_name, format_value, resolve
from conversations.sources import pin_commits
from data import DATA_FLAGS
from storage import hub
from storage.adapter import BASE, read_json
from storage.durable import MANIFEST, verify
from storage.records import read_record


class Candidate(NamedTuple):
    """A model to evaluate, the run it belongs to (None: none), and the settings to evaluate it under."""

    model: str
    run: Path | None
    config: Config
    fingerprint: str = ""  # of the run's own data, where no flag asks for other data


def find_candidate(name, overrides):
    """The `Candidate` of that name on the command line, with the settings of its run, or else of a preset."""
    model, run = find_model_and_run(name)
    if run is None:
        return Candidate(model, None, resolve({**overrides, "model": model}, hub.choose_preset(overrides)[0]))
    record = read_record(run)
    settings = pin_commits(record["config"], record.get("commits", {}))  # its data as it was, for the same splits
    if settings["chat_template"] not in ("chatml", "model"):  # a file, of which the run has its own copy
        settings |= {"chat_template": str(run / "best" / "chat_template.jinja"), "template_option": ()}
    if "dataset" in overrides:
        settings = {key: value for key, value in settings.items() if key not in DATASET_SETTINGS}
    else:
        for key in ("seed", "eval_fraction", "test_fraction", *DATASET_SETTINGS):
            if overrides.get(key, settings[key]) != settings[key]:
                why = "gives other splits than the run's, which may have learned what it is evaluated on"
                print(f"warning: {flag_name(key)} {format_value(overrides[key])} {why}", file=sys.stderr)
    fingerprint = "" if overrides.keys() & {*DATA_FLAGS} else record["data"]["fingerprint"]
    return Candidate(model, run, resolve({**settings, **overrides}, settings["preset"]), fingerprint)


def find_model_and_run(name):
    """The model of that name, and the run it belongs to: of a run its best model, else a directory or a Hub id."""
    path = Path(name).expanduser().absolute()
    run = next((each for each in (path, *path.parents[:3]) if is_run(each)), None)  # the run, or a model in it
    if run == path:
        return str(find_best(run)), run
    checkpoint = path if (path / MANIFEST).exists() else path.resolve().parent
    if run and (checkpoint / MANIFEST).exists():
        verify(checkpoint)
    return (str(path / "model") if checkpoint == path else name), run


def is_run(path):
    return (path / "metrics.jsonl").exists() and (path / "config.json").exists()


def find_best(run):
    """The directory of a run's best model; raises `UserError` where there is none or where it is corrupt."""
    best = run / "best"
    if not best.is_dir():
        raise UserError(f"{run}: this run has no best model yet; its first evaluation writes one")
    if best.is_symlink():  # a copy of the checkpoint that it links to has no manifest
        verify(best.resolve().parent)
    return best


def push(name, repository):
    """Upload a run's best model to a repository on the Hub; returns the exit status."""
    run = Path(name).expanduser()
    if not is_run(run):
        raise UserError(f"{name}: there is no such run; --push-to-hub uploads a run's best model")
    best = find_best(run).resolve()
    if hub.is_adapter(best) and Path(base := read_json(best, BASE)["model"]).is_absolute():
        why = f"the base model of its adapters is on this disk alone ({base}); merge them: --export DIR"
        raise UserError(f"--push-to-hub {repository}: {why}")
    address, private = hub.push(best, repository)
    who = "only you see it; to publish it, change its visibility in its settings" if private else "everybody sees it"
    print(f"uploaded to {address}: {who}")
    return 0
