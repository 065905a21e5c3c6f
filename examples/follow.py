"""Send the metrics of a run to trackio, Weights & Biases or MLflow, while it trains or afterwards.

    python examples/follow.py RUN --to trackio|wandb|mlflow [--project NAME] [--once]

A process of its own that reads the run's `config.json` and `metrics.jsonl`, and needs nothing but the service's package
(`pip install trackio`). It ends when the run is finished, or by Ctrl-C; with --once when it has sent what is there. The
run is named by its directory, its settings are its configuration, and its numbers are `train/loss`, `eval/loss`, …

Nothing is written into the run. What was sent is noted beside it, in `RUN.SERVICE-PROJECT.sent`, so that each line is
sent once: when this is started again, and when a resumed run logs the same updates again. Delete that file to send
everything again, as when this was killed before the service's package had sent all it was given. The place to send to
is set as the service wants it, for example by MLFLOW_TRACKING_URI.
"""

import argparse
import contextlib
import importlib
import json
import re
import sys
import time
from pathlib import Path

INTERVAL = 2  # seconds between two looks at the run


# Each is a context that opens or continues a run of a service and gives a function that logs numbers after a step.


@contextlib.contextmanager
def open_trackio(trackio, project, name, settings):
    run = trackio.init(project, name, config=settings, resume="allow", auto_log_gpu=False, auto_log_cpu=False)
    try:
        yield run.log
    finally:
        run.finish()


@contextlib.contextmanager
def open_wandb(wandb, project, name, settings):
    with wandb.init(project=project, id=name, name=name, resume="allow") as run:
        run.config.update(settings, allow_val_change=True)
        # Its own steps never go back, as that of the test loss does: it is the best model's. So ours is a number.
        run.define_metric("*", step_metric="step")
        yield lambda numbers, step: run.log({**numbers, "step": step})


@contextlib.contextmanager
def open_mlflow(mlflow, project, name, settings):
    mlflow.set_experiment(project)
    named = f"attributes.run_name = '{name}'"
    found = mlflow.search_runs(experiment_names=[project], filter_string=named, output_format="list")
    with mlflow.start_run(run_id=found[0].info.run_id if found else None, run_name=name) as run:
        mlflow.log_params({key: settings[key] for key in settings.keys() - run.data.params.keys()})  # never changed
        yield mlflow.log_metrics


SERVICES = {"trackio": open_trackio, "wandb": open_wandb, "mlflow": open_mlflow}


def is_finished(run):
    """Whether the best model has answered the prompts, which is the last thing a run does."""
    with contextlib.suppress(OSError, ValueError):  # not written yet
        return "after" in json.loads((run / "answers.json").read_bytes())
    return False


def read_lines(run):
    """The complete lines of a run's metrics so far, as dicts."""
    path = run / "metrics.jsonl"
    content = path.read_bytes() if path.exists() else b""
    for number, line in enumerate(content.split(b"\n")[:-1], 1):  # what is behind the last newline is being written
        try:
            yield json.loads(line)
        except ValueError:
            sys.exit(f"error: {path}:{number}: damaged")


def wait_for_settings(run, once):
    """A run's settings; they are written when its data and model are loaded."""
    path = run / "config.json"
    if not run.is_dir() or (once and not path.exists()):
        sys.exit(f"error: {run}: there is no run")
    if not path.exists():
        print(f"waiting for {path}", flush=True)
    while not path.exists():
        time.sleep(INTERVAL)
    return json.loads(path.read_bytes())["config"]


def follow(run, record, log, once):
    """Send a run's lines until it is finished; each by its kind and step once, as noted in the file `record`."""
    record.touch()
    sent = {(kind, step): loss for kind, step, loss in map(str.split, record.read_text().splitlines())}
    changed = False
    while True:
        done = once or is_finished(run)  # before the last lines are read
        for line in read_lines(run):
            kind, step = line.pop("kind"), line.pop("step")
            loss = sent.get((kind, str(step)))
            if loss not in (None, repr(line.get("loss"))) and not changed:
                changed = True
                print(f"warning: {kind} {step} is not what was sent; that stays, unless you delete it and {record}")
            if loss is None:
                log(
                    {f"{kind}/{name}": value for name, value in line.items() if isinstance(value, int | float)},
                    step=step,
                )
                sent[kind, str(step)] = repr(line.get("loss"))
                with open(record, "a") as file:
                    print(kind, step, sent[kind, str(step)], file=file)
        if done:
            return print(f"{len(sent)} lines of {run} are sent")
        time.sleep(INTERVAL)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory")
    parser.add_argument("--to", required=True, choices=SERVICES)
    parser.add_argument("--project", default="plain-sft", help="the service's project or experiment (plain-sft)")
    parser.add_argument("--once", action="store_true", help="send what is there, and end")
    options = parser.parse_args(argv)
    try:
        service = importlib.import_module(options.to)
    except ModuleNotFoundError:
        sys.exit(f"error: {options.to} is not installed; run: pip install {options.to}")
    run = options.run.expanduser().absolute()
    name, project = (re.sub(r"[^\w.-]", "-", each) for each in (run.name, options.project))
    record = run.with_name(f"{run.name}.{options.to}-{project}.sent")
    with contextlib.suppress(KeyboardInterrupt):
        settings = wait_for_settings(run, options.once)
        with SERVICES[options.to](service, options.project, name, settings) as log:
            follow(run, record, log, options.once)


if __name__ == "__main__":
    main()
