"""The metrics of a run: `metrics.jsonl`, the same numbers for TensorBoard, and the answers it gave."""

import json
import sys
import threading
from dataclasses import asdict
from operator import attrgetter
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from running.dashboard import LAYOUT, answer_text, curves_of, masked_table, scalar, settings_table
from storage.durable import replace_file, sha256, sync
from storage.records import read_losses, read_metrics


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
        self.losses = read_losses(run)
        self.lines = len(kept)
        self.untrained_loss = next((line["loss"] for line in kept if (line["kind"], line["step"]) == ("eval", 0)), None)
        threading.excepthook = hide_tensorboard_traceback
        self.pending = []  # points of curves whose values nothing has waited for yet
        # TensorBoard discards its events from `step` on; the lines kept of that step are written again.
        self.tensorboard = SummaryWriter(run, purge_step=step)
        for line in kept:
            if line["step"] == step:
                self.add_line(**line)

    def write(self, kind, step, numbers):
        """Log numbers of a "train", "eval" or "test" `kind` after `step` updates, in full precision."""
        line = {"step": step, "kind": kind, **numbers}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.lines += 1
        if (kind, step) == ("eval", 0):
            self.untrained_loss = numbers["loss"]
        self.add_pending()
        self.add_line(**line)

    def write_answers(self, when, step, answers):
        """Keep answers given "before" or "after" training: in `answers.json`, and as text for TensorBoard."""
        self.show_answers(f"answers of the {'untrained' if when == 'before' else 'best'} model", step, answers)
        self.answers[when] = [asdict(answer) for answer in answers]
        replace_answers(self.path.parent, self.answers)

    def write_losses(self, split, when, evaluation):
        """Keep the losses of a split's conversations, "before" or "after" training, in `losses.json`."""
        pairs = [[losses.sum().item(), len(losses)] for losses in evaluation.token_losses]
        self.losses.setdefault(split, {})[when] = pairs
        replace_file(self.path.parent / "losses.json", json.dumps(self.losses) + "\n")

    def show_answers(self, tag, step, answers):
        """Show answers in TensorBoard, those to each prompt as a text of its own."""
        for prompt in dict.fromkeys(answer.prompt for answer in answers):
            texts = [answer_text(answer) for answer in answers if answer.prompt == prompt]
            self.tell_tensorboard("add_text", f"{tag}/{prompt}", "\n\n".join(texts), step)

    def show_run(self, config, examples, tokenizer):
        """Show in TensorBoard what does not change: its charts, the settings, the masks of some examples."""
        self.tell_tensorboard("add_custom_scalars", LAYOUT)
        self.tell_tensorboard("add_text", "run/settings", settings_table(config), 0)
        for number, example in enumerate(examples, 1):
            counts = f"{len(example.input_ids)} tokens, {example.supervised_tokens} of them supervised"
            table = masked_table(example, tokenizer)
            self.tell_tensorboard("add_text", f"data/training conversation {number}", f"{counts}\n\n{table}", 0)

    def state(self):
        """What a checkpoint holds of the log, to continue it: the count of its lines, their SHA-256, the answers."""
        return {"lines": self.lines, "digest": sha256(self.path), "answers": self.answers}

    def add_line(self, kind, step, **numbers):
        """Draw a line of `metrics.jsonl` in TensorBoard."""
        self.add_points(step, curves_of(kind, numbers))

    def add_points(self, step, values):
        """Draw a point of each of some curves in TensorBoard."""
        for tag, value in values.items():
            self.add_summary(scalar(tag, value), step)

    def add_later(self, step, tensors):
        """Draw points whose values are still being computed, when something else has waited for them."""
        self.pending.append((step, tensors))

    def add_pending(self):
        """Draw what `add_later` was given."""
        for step, tensors in self.pending:
            self.add_points(step, {tag: tensor.item() for tag, tensor in tensors.items()})
        self.pending.clear()

    def add_summary(self, summary, step=None):
        """Write one of TensorBoard's summaries."""
        self.tell_tensorboard("file_writer.add_summary", summary, step)

    def tell_tensorboard(self, method, *arguments):
        """Call a method of TensorBoard's writer; a failure is reported once and does not end the run."""
        if self.tensorboard:
            try:
                attrgetter(method)(self.tensorboard)(*arguments)
            except Exception as error:
                self.tensorboard = None
                print(
                    f"warning: nothing more can be written for TensorBoard ({error}); training continues",
                    file=sys.stderr,
                )

    def sync(self):
        """Force to disk what has been logged, before a checkpoint that counts its lines."""
        self.add_pending()
        self.tell_tensorboard("flush")
        for path in (self.path, *self.path.parent.glob("events.out.tfevents.*")):
            if path.exists():
                sync(path)

    def close(self, hyper_parameters=(), step=None):
        """End the log; TensorBoard's table of hyper-parameters gets its row, where there is one, after `step` updates.

        A run that is extended discards it with the other events of that step.
        """
        self.add_pending()
        for summary in hyper_parameters:
            self.add_summary(summary, step)
        self.tell_tensorboard("close")


class Unheard:
    """The `Log` of a process that is not the first: nothing is written, and nothing was."""

    untrained_loss = None

    def ignore(self, *_, **__):
        pass

    write = write_answers = write_losses = show_answers = show_run = add_points = add_later = sync = close = ignore


def hide_tensorboard_traceback(failure):
    """`threading.excepthook` without the tracebacks of TensorBoard's thread, as `Log` reports its failure."""
    if not type(failure.thread).__module__.startswith("tensorboard"):
        threading.__excepthook__(failure)


def replace_answers(run, answers):
    """Write what `records.read_answers` reads."""
    replace_file(Path(run) / "answers.json", json.dumps(answers, indent=2, ensure_ascii=False) + "\n")
