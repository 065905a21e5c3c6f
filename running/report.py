"""What a run tells people: the plan before it, its metrics while it goes, the summary after it."""

import importlib.metadata
import json
import math
import platform
import sys
import textwrap
import threading
from dataclasses import asdict
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from checkpoint import replace_file, sync
from config import UserError, shown
from data import window_at, windows_per_epoch

LIBRARIES = ("torch", "transformers", "datasets", "tokenizers", "safetensors", "tqdm", "tensorboard")


class Log:
    """The metrics of a run: a line of `metrics.jsonl` and the same numbers for TensorBoard."""

    def __init__(self, run, step=None, lines=0):
        """Open the log of a new run, or go on with one after `step` updates, when it had so many `lines`.

        What an interrupted run logged beyond them is taken back.

        Raises:
            UserError: one of these lines is damaged.
        """
        self.path = Path(run) / "metrics.jsonl"
        found = self.path.read_text().splitlines()[:lines] if self.path.exists() else []
        kept = [self.parse(line, number) for number, line in enumerate(found, 1)]
        if len(kept) < lines:
            print(f"warning: {self.path} has lost {lines - len(kept)} of its lines", file=sys.stderr)
        replace_file(self.path, "".join(line + "\n" for line in found))
        write_answers(run, {"before": read_answers(run).get("before", [])})
        self.lines = len(kept)
        threading.excepthook = untraced
        # After an interruption TensorBoard is made to forget from `step` on; what is kept of that it is told again.
        self.tensorboard = SummaryWriter(run, purge_step=step)
        for line in kept:
            if line["step"] == step:
                self.draw_numbers(**line)

    def parse(self, line, number):
        """A line of the metrics as a dict."""
        try:
            return json.loads(line)
        except ValueError as error:
            raise UserError(f"{self.path}:{number}: damaged; delete that line to go on without it") from error

    def write(self, kind, step, numbers):
        """Log numbers of a "train", "eval" or "test" `kind` after `step` updates, in full precision."""
        line = {"step": step, "kind": kind, **numbers}
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")
        self.lines += 1
        self.draw_numbers(**line)

    def write_answers(self, when, step, answers):
        """Keep answers given "before" or "after" training: in `answers.json`, and as text for TensorBoard."""
        for answer in answers:
            self.draw("add_text", f"answers/{answer.prompt}", f"**{when}:** {answer.text}", step)
        run = self.path.parent
        write_answers(run, {**read_answers(run), when: [asdict(answer) for answer in answers]})

    def draw_numbers(self, kind, step, **numbers):
        """Give numbers to TensorBoard, under `kind/name`."""
        for name, value in numbers.items():
            self.draw("add_scalar", f"{kind}/{name}", value, step)

    def draw(self, method, *arguments, **options):
        """Call a method of TensorBoard's writer; should it fail, that is said once and ends no run."""
        if self.tensorboard:
            try:
                getattr(self.tensorboard, method)(*arguments, **options)
            except Exception as error:
                self.tensorboard = None
                print(
                    f"warning: nothing more can be written for TensorBoard ({error}); training goes on", file=sys.stderr
                )

    def sync(self):
        """Force to disk what has been logged, before a checkpoint that counts its lines."""
        self.draw("flush")
        for path in (self.path, *self.path.parent.glob("events.out.tfevents.*")):
            if path.exists():
                sync(path)

    def close(self, config=None, results=None):
        """End the log; with a `Config` and results, TensorBoard's table of hyper-parameters gets its row."""
        if config:
            settings = {name: shown(value) for name, value in asdict(config).items()}
            numbers = {f"hparam/{name}": value for name, value in results.items()}
            self.draw("add_hparams", settings, numbers, run_name=".")
        self.draw("close")


def untraced(failure):
    """`threading.excepthook` without the traceback of TensorBoard's thread, whose failure `Log.draw` hears of too."""
    if not type(failure.thread).__module__.startswith("tensorboard"):
        threading.__excepthook__(failure)


def describe(config, precision, data):
    """What makes a run what it is, as JSON has it: every setting, the precision, what the data was, the versions."""
    described = {
        "config": asdict(config),
        "precision": precision.name,
        "data": {"fingerprint": data.fingerprint} | {name: len(split.examples) for name, split in data.splits.items()},
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in LIBRARIES},
    }
    return json.loads(json.dumps(described))


def write_record(run, described, changes):
    """Write a run's `config.json`: what it is, and what was changed on purpose when it went on."""
    record = {**described, "changes": changes} if changes else described
    replace_file(Path(run) / "config.json", json.dumps(record, indent=2) + "\n")


def plan(config, data, model, precision, layout, total_steps):
    """What is about to happen, derived from the settings and the data, in a few lines."""
    train, per_epoch = data.train.examples, windows_per_epoch(len(data.train.examples), config.batch_size)
    looked_at = min(per_epoch, 50)  # windows; to read all of them can take long
    windows = [window_at(step, train, config.batch_size, config.seed) for step in range(looked_at)]
    cuts = sum(len(layout.cut(window)) for window in windows)
    cut, dropped, lost, supervised = (
        sum(getattr(split, name) for split in data.splits.values())
        for name in ("cut", "dropped", "supervised_lost", "supervised")
    )
    lost = f", {lost / (lost + supervised):.1%} of the supervised tokens lost" if lost else ""
    never = " that is never reached" if config.warmup_steps >= total_steps else ""
    lines = {
        "model": f"{config.model}: {sum(p.numel() for p in model.parameters()):,} parameters",
        "device": f"{precision.describe()}, over fp32 weights",
        "layout": f"{layout.describe()}{', compiled' if config.compile else ''}",
        "data": f"{len(train):,} conversations to train on, {len(data.eval.examples):,} to evaluate, "
        f"{len(data.test.examples):,} to test ({cut:,} cut for length{lost}, {dropped:,} dropped: nothing supervised)",
        "rows": "; ".join(data.notes),
        "tokens": f"{data.train.tokens:,} an epoch, {data.train.supervised / data.train.tokens:.1%} of them supervised",
        "updates": f"{per_epoch:,} an epoch, {total_steps:,} in all, each over a window of {config.batch_size} "
        f"conversations in {cuts / looked_at:.1f} micro-batches (gradient accumulation)",
        "schedule": f"{config.warmup_steps} updates of warm-up to a learning rate of {config.lr:g}"
        f"{never}, then a cosine to 0",
    }
    shown = [f"  {name:<10}{text}" for name, text in lines.items()]
    return "\n".join(shown + [f"  warning   {warning}" for warning in data.warnings])


def is_finished(run):
    """Whether a run has come to its end: it has answered with its best model."""
    return "after" in read_answers(run)


def read_answers(run):
    """The answers a run has given so far, in lists of dicts: "before" training and "after" it."""
    path = Path(run) / "answers.json"
    return json.loads(path.read_text()) if path.exists() else {}


def write_answers(run, answers):
    """Write what `read_answers` reads."""
    replace_file(Path(run) / "answers.json", json.dumps(answers, indent=2, ensure_ascii=False) + "\n")


def summary(run):
    """What came of a run, read from its directory: losses, answers before and after side by side, what to do next."""
    metrics = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    by_step = {kind: {line["step"]: line for line in metrics if line["kind"] == kind} for kind in ("eval", "test")}
    best_step = min((step for step in by_step["eval"] if step), key=lambda step: by_step["eval"][step]["loss"])
    lines = [f"  {'':<18}{'before':>10}{f'best, update {best_step}':>22}"]
    for kind, steps in by_step.items():
        if steps:
            for name, style in (("loss", ".4f"), ("perplexity", ".2f"), ("accuracy", ".1%")):
                # what was lost of a log is no number
                before, after = (steps.get(step, {}).get(name, math.nan) for step in (0, best_step))
                lines.append(f"  {kind + ' ' + name:<18}{before:>10{style}}{after:>22{style}}")
    answers = read_answers(run)
    for before, after in zip(answers["before"], answers["after"], strict=False):
        lines += ["", f"  > {before['prompt']}", *side_by_side(before["text"], after["text"])]
    lines += [
        "",
        f"  the best model   {run}/best",
        f"  ask it           python eval.py {run} --prompts 'Your question'",
        f"  see the curves   tensorboard --logdir {Path(run).parent}",
    ]
    return "\n".join(lines)


def side_by_side(left, right, width=54):
    """Two texts wrapped into columns, line by line."""
    columns = [[line for part in text.splitlines() for line in textwrap.wrap(part, width)] for text in (left, right)]
    height = max(map(len, columns))
    rows = zip(*(column + [""] * (height - len(column)) for column in columns), strict=True)
    return [f"  {row[0]:<{width}} | {row[1]}".rstrip() for row in rows]
