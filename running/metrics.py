"""The log of a run: `metrics.jsonl`, the same numbers for TensorBoard, and the answers it generates."""

import json
import resource
import sys
import threading
import time
from dataclasses import asdict

import torch
from torch.utils.tensorboard import SummaryWriter

from evaluation.facts import answer_text, escape_markdown
from storage.durable import replace_file, sha256, sync
from storage.records import read_losses, read_metrics

# Each number of a train or eval line in metrics.jsonl is a curve of its name; this chart has two of them.
LAYOUT = {"loss": {"train and eval": ["Multiline", ["(train|eval)/loss$"]]}}


class Log:
    """The log of a run, which rank 0 writes: `metrics.jsonl`, answers, losses, and TensorBoard's events."""

    def __init__(self, directory, step, lines=0, digest=None, answers=None):
        """Open the log of a run after `step` updates, given its `state` at that step, if it had one.

        Lines that an interrupted run logged beyond that are discarded.
        """
        self.directory, self.path = directory, directory / "metrics.jsonl"
        kept = read_metrics(directory, lines)
        replace_file(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        if digest and sha256(self.path) != digest:
            print(f"warning: {self.path} was changed: its first {lines} lines are not what was logged", file=sys.stderr)
        self.answers = {"before": (answers or {}).get("before", [])}
        self.save_answers()
        self.losses, self.lines = read_losses(directory), len(kept)
        threading.excepthook = hide_tensorboard_traceback
        rename_files_of_the_future(directory)
        # TensorBoard discards its events from `step` on; the lines kept of that step are drawn again.
        self.tensorboard = SummaryWriter(directory, purge_step=step)
        if not step:
            self.call_tensorboard("add_custom_scalars", LAYOUT)
        for line in kept:
            if line["step"] == step:
                self.draw_line(**line)

    def write(self, kind, step, metrics):
        """Log the metrics of a "train", "eval" or "test" `kind` after `step` updates, in full precision."""
        line = {"step": step, "kind": kind, **metrics}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.lines += 1
        self.draw_line(**line)

    def write_answers(self, when, step, answers):
        """Log answers generated "before" or "after" training; `report.write_report` saves the latter."""
        self.show_answers(f"answers of the {'untrained' if when == 'before' else 'best'} model", step, answers)
        self.answers[when] = [asdict(answer) for answer in answers]
        if when == "before":
            self.save_answers()

    def save_answers(self):
        replace_file(self.directory / "answers.json", json.dumps(self.answers, indent=2, ensure_ascii=False) + "\n")

    def write_losses(self, split, when, evaluation):
        """Log the losses of a split's conversations, "before" or "after" training, in `losses.json`."""
        pairs = [[losses.sum().item(), len(losses)] for losses in evaluation.token_losses]
        self.losses.setdefault(split, {})[when] = pairs
        replace_file(self.directory / "losses.json", json.dumps(self.losses) + "\n")

    def state(self):
        """The state of the log for a checkpoint, to continue it: its number of lines, their SHA-256, the answers."""
        return {"lines": self.lines, "digest": sha256(self.path), "answers": dict(self.answers)}

    def sync(self):
        """Force to disk what has been logged, before a checkpoint that counts its lines."""
        self.call_tensorboard("flush")
        for path in (self.path, *self.directory.glob("events.out.tfevents.*")):
            sync(path)

    def close(self, facts=None):
        """Close the log; of a finished run, its `run_facts` become a row in TensorBoard's table of hyperparameters."""
        if facts:
            settings = {"model": facts["model"], "dataset": " ".join(facts["datasets"]), **facts["recipe"]}
            final = {"final/tokens_per_second": facts["cost"]["tokens_per_second"]} if facts["cost"] else {}
            for kind, loss in facts["losses"].items():
                if loss["after"]:
                    final |= {f"final/{kind}_{name}": loss["after"][name] for name in ("loss", "accuracy")}
            # At the last step: a run that is extended discards the row with all events of that step.
            self.call_tensorboard("flush")
            self.call_tensorboard("add_hparams", settings, final, run_name=".", global_step=facts["updates"])
        self.call_tensorboard("close")

    # --- TensorBoard

    def call_tensorboard(self, method, *arguments, **options):
        """Call a method of TensorBoard's writer; where it fails, training goes on without it, after one warning."""
        if self.tensorboard:
            try:
                getattr(self.tensorboard, method)(*arguments, **options)
            except Exception as error:
                self.tensorboard = None
                print(f"warning: cannot write for TensorBoard any more ({error}); training continues", file=sys.stderr)

    def draw_line(self, kind, step, **metrics):
        """Draw a line of `metrics.jsonl`; of the test split, which has no curve, nothing."""
        for name, value in metrics.items() if kind != "test" else ():
            self.call_tensorboard("add_scalar", f"{kind}/{name}", value, step)

    def show_answers(self, tag, step, answers):
        """Show answers, those to each prompt as one text."""
        for prompt in dict.fromkeys(answer.prompt for answer in answers):
            texts = [
                f"*{'greedy' if answer.greedy else 'sampled'}, {answer.tokens} tokens:*\n\n"
                f"> {escape_markdown(answer_text(asdict(answer)))}"
                for answer in answers
                if answer.prompt == prompt
            ]
            self.call_tensorboard("add_text", f"{tag}/{prompt}", "\n\n".join(texts), step)


class NullLog:
    """The `Log` of all ranks but rank 0: nothing is written."""

    def ignore(self, *_, **__):
        pass

    write = write_answers = write_losses = show_answers = draw_line = state = sync = close = ignore


def rename_files_of_the_future(directory):
    """Where the clock was set back since, number TensorBoard's files: it reads them by the seconds in their names."""
    now = directory / f"events.out.tfevents.{int(time.time()):010}"
    files = sorted(directory.glob("events.out.tfevents.*"))
    if files and files[-1] > now:
        for number, file in enumerate(files):
            file.rename(directory / f"events.out.tfevents.{number:010}.earlier")


def hide_tensorboard_traceback(failure):
    """`threading.excepthook` without the tracebacks of TensorBoard's thread: the next call of its writer raises."""
    if not type(failure.thread).__module__.startswith("tensorboard"):
        threading.__excepthook__(failure)


def peak_memory(device):
    """The most memory in use so far, in bytes: on a GPU by tensors, else by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
