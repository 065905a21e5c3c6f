"""The metrics of a run: `metrics.jsonl`, the same numbers for TensorBoard, and the answers it gave."""

import json
import sys
import threading
from dataclasses import asdict
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from config import UserError, as_text
from storage.durable import replace_file, sha256, sync


class Log:
    """The metrics of a run: a line of `metrics.jsonl` and the same numbers for TensorBoard."""

    def __init__(self, run, step=None, lines=0, digest=None, answers=None):
        """Open the log of a new run, or continue one after `step` updates, when `state` was as given.

        What an interrupted run logged beyond that is discarded.

        Raises:
            UserError: one of these lines is damaged.
        """
        self.path = Path(run) / "metrics.jsonl"
        kept = read_metrics(run, lines)
        replace_file(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        if len(kept) < lines:
            print(f"warning: {self.path} has lost {lines - len(kept)} of its lines", file=sys.stderr)
        elif digest and sha256(self.path) != digest:
            print(f"warning: {self.path} was changed: its first {lines} lines are not what was logged", file=sys.stderr)
        self.answers = {"before": (answers or {}).get("before", [])}
        replace_answers(run, self.answers)
        self.lines = len(kept)
        self.untrained_loss = next((line["loss"] for line in kept if (line["kind"], line["step"]) == ("eval", 0)), None)
        threading.excepthook = hide_tensorboard_traceback
        # TensorBoard discards its events from `step` on; the lines kept of that step are written again.
        self.tensorboard = SummaryWriter(run, purge_step=step)
        for line in kept:
            if line["step"] == step:
                self.add_scalars(**line)

    def write(self, kind, step, numbers):
        """Log numbers of a "train", "eval" or "test" `kind` after `step` updates, in full precision."""
        line = {"step": step, "kind": kind, **numbers}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.lines += 1
        if (kind, step) == ("eval", 0):
            self.untrained_loss = numbers["loss"]
        self.add_scalars(**line)

    def write_answers(self, when, step, answers):
        """Keep answers given "before" or "after" training: in `answers.json`, and as text for TensorBoard."""
        for answer in answers:
            self.tell_tensorboard("add_text", f"answers/{answer.prompt}", f"**{when}:** {answer.text}", step)
        self.answers[when] = [asdict(answer) for answer in answers]
        replace_answers(self.path.parent, self.answers)

    def state(self):
        """What a checkpoint holds of the log, to continue it: the count of its lines, their SHA-256, the answers."""
        return {"lines": self.lines, "digest": sha256(self.path), "answers": self.answers}

    def add_scalars(self, kind, step, **numbers):
        """Show numbers in TensorBoard, under `kind/name`."""
        for name, value in numbers.items():
            self.tell_tensorboard("add_scalar", f"{kind}/{name}", value, step)

    def tell_tensorboard(self, method, *arguments, **options):
        """Call a method of TensorBoard's writer; a failure is reported once and does not end the run."""
        if self.tensorboard:
            try:
                getattr(self.tensorboard, method)(*arguments, **options)
            except Exception as error:
                self.tensorboard = None
                print(
                    f"warning: nothing more can be written for TensorBoard ({error}); training continues",
                    file=sys.stderr,
                )

    def sync(self):
        """Force to disk what has been logged, before a checkpoint that counts its lines."""
        self.tell_tensorboard("flush")
        for path in (self.path, *self.path.parent.glob("events.out.tfevents.*")):
            if path.exists():
                sync(path)

    def close(self, config=None, results=None):
        """End the log; with a `Config` and results, TensorBoard's table of hyper-parameters gets its row."""
        if config:
            settings = {name: as_text(value) for name, value in asdict(config).items()}
            numbers = {f"hparam/{name}": value for name, value in results.items()}
            self.tell_tensorboard("add_hparams", settings, numbers, run_name=".")
        self.tell_tensorboard("close")


class Unheard:
    """The `Log` of a process that is not the first: nothing is written, and nothing was."""

    untrained_loss = None

    def ignore(self, *_, **__):
        pass

    write = write_answers = add_scalars = sync = close = ignore


def hide_tensorboard_traceback(failure):
    """`threading.excepthook` without the tracebacks of TensorBoard's thread, as `Log` reports its failure."""
    if not type(failure.thread).__module__.startswith("tensorboard"):
        threading.__excepthook__(failure)


def read_metrics(run, lines=None):
    """The first `lines` lines of a run's metrics, or all of them, as dicts; a truncated last line is left out.

    Raises:
        UserError: a line is damaged.
    """
    path, metrics = Path(run) / "metrics.jsonl", []
    content = path.read_bytes() if path.exists() else b""
    for number, line in enumerate(content[: content.rfind(b"\n") + 1].split(b"\n")[:-1][:lines], 1):
        try:
            metrics.append(json.loads(line))
            if not (isinstance(metrics[-1]["step"], int) and isinstance(metrics[-1]["kind"], str)):
                raise ValueError("no step and kind")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}:{number}: damaged; delete that line to continue without it") from error
    return metrics


def is_finished(run):
    """Whether a run has finished: its best model has answered the prompts."""
    return "after" in read_answers(run)


def read_answers(run):
    """The answers a run has given so far, in lists of dicts: "before" training and "after" it.

    Raises:
        UserError: the file is damaged.
    """
    path = Path(run) / "answers.json"
    if not path.exists():
        return {}
    try:
        answers = json.loads(path.read_bytes())
        for one in (one for when in answers.values() for one in when):
            one["prompt"] + one["text"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged; delete it, and resuming writes the answers again") from error
    return answers


def replace_answers(run, answers):
    """Write what `read_answers` reads."""
    replace_file(Path(run) / "answers.json", json.dumps(answers, indent=2, ensure_ascii=False) + "\n")
