"""What a run tells people: the plan before it, its metrics while it goes, the summary after it."""

import importlib.metadata
import itertools
import json
import platform
import textwrap
from dataclasses import asdict
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from config import shown
from data import micro_batches, window_at, windows_per_epoch

LIBRARIES = ("torch", "transformers", "datasets", "tokenizers", "safetensors", "tqdm", "tensorboard")


class Log:
    """The metrics of a run: a line of `metrics.jsonl` and the same numbers for TensorBoard."""

    def __init__(self, run, step=0):
        """Open the log of a run at `step`; what an interrupted run logged beyond it, or of its end, is taken back."""
        self.path = Path(run) / "metrics.jsonl"
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        logged = [json.loads(line) for line in lines]
        kept = [line["step"] <= step and not (line["kind"] == "test" and line["step"]) for line in logged]
        self.path.write_text("".join(line + "\n" for line in itertools.compress(lines, kept)))
        self.tensorboard = SummaryWriter(run, purge_step=step + 1 if step else None)

    def write(self, kind, step, numbers):
        """Log numbers of a "train", "eval" or "test" `kind` after `step` updates, in full precision."""
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": step, "kind": kind, **numbers}) + "\n")
        for name, value in numbers.items():
            self.tensorboard.add_scalar(f"{kind}/{name}", value, step)

    def write_answers(self, when, step, answers):
        """Keep answers given "before" or "after" training: in `answers.json`, and as text for TensorBoard."""
        path = self.path.with_name("answers.json")
        kept = json.loads(path.read_text()) if path.exists() else {}
        kept[when] = [asdict(answer) for answer in answers]
        path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n")
        for answer in answers:
            self.tensorboard.add_text(f"answers/{answer.prompt}", f"**{when}:** {answer.text}", step)

    def close(self, config=None, results=None):
        """End the log; with a `Config` and results, TensorBoard's table of hyper-parameters gets its row."""
        if config:
            settings = {name: shown(value) for name, value in asdict(config).items()}
            self.tensorboard.add_hparams(settings, {f"hparam/{k}": v for k, v in results.items()}, run_name=".")
        self.tensorboard.close()


def write_config(run, config, data):
    """Write `config.json`: every setting, the versions of the libraries, and what the data was."""
    described = {
        "config": asdict(config),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in LIBRARIES},
        "data": {"fingerprint": data.fingerprint} | {name: len(split.examples) for name, split in data.splits.items()},
    }
    (Path(run) / "config.json").write_text(json.dumps(described, indent=2) + "\n")


def plan(config, data, model, precision, total_steps):
    """What is about to happen, derived from the settings and the data, in a few lines."""
    train, per_epoch = data.train.examples, windows_per_epoch(len(data.train.examples), config.batch_size)
    looked_at = min(per_epoch, 50)  # windows; to read all of them can take long
    windows = [window_at(step, train, config.batch_size, config.seed) for step in range(looked_at)]
    cuts = sum(len(micro_batches(window, config.micro_batch_tokens)) for window in windows)
    cut, dropped, lost, supervised = (
        sum(getattr(split, name) for split in data.splits.values())
        for name in ("cut", "dropped", "supervised_lost", "supervised")
    )
    lost = f", {lost / (lost + supervised):.1%} of the supervised tokens lost" if lost else ""
    never = " that is never reached" if config.warmup_steps >= total_steps else ""
    lines = {
        "model": f"{config.model}: {sum(p.numel() for p in model.parameters()):,} parameters",
        "device": f"{precision.device}, {precision.name} forward and backward over fp32 weights",
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
    path = Path(run) / "answers.json"
    return path.exists() and "after" in json.loads(path.read_text())


def summary(run):
    """What came of a run, read from its directory: losses, answers before and after side by side, what to do next."""
    metrics = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    by_step = {kind: {line["step"]: line for line in metrics if line["kind"] == kind} for kind in ("eval", "test")}
    best_step = min((step for step in by_step["eval"] if step), key=lambda step: by_step["eval"][step]["loss"])
    lines = [f"  {'':<18}{'before':>10}{f'best, update {best_step}':>22}"]
    for kind, steps in by_step.items():
        if steps:
            for name, style in (("loss", ".4f"), ("perplexity", ".2f"), ("accuracy", ".1%")):
                before, after = steps[0][name], steps[best_step][name]
                lines.append(f"  {kind + ' ' + name:<18}{before:>10{style}}{after:>22{style}}")
    answers = json.loads((Path(run) / "answers.json").read_text())
    for before, after in zip(answers["before"], answers["after"], strict=True):
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
