"""Supervised fine-tuning of a causal language model on conversations: the whole loop, to be read top to bottom.

One idea: an update is defined by its window, the `--batch-size` conversations it sees. Its gradient is that of

    sum of the token losses over the window's supervised tokens / number of those tokens

and how the window is cut into micro-batches changes memory and speed, never the result.

    python train.py --epochs 2 --lr 2e-4
"""

import dataclasses
import math
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

import hub
import report
from chat import load_tokenizer
from checkpoint import Damaged, locked, make_directory
from config import PRESETS, Parser, UserError, first_line, read_record, resolve, run_command, shown, with_tuples
from data import prepare, window_at, window_indices, windows_per_epoch
from eval import VIBE_PROMPTS, answer, evaluate
from explain import highest_losses, memory_explained, way_on
from layout import Windows
from model import (
    checkpoint_activations,
    choose_precision,
    compiled_graphs,
    keep_freed_memory,
    load_model,
    ties_hold,
    token_loss,
)
from probe import choose_layout, use_layout
from resume import check_same_run, differences, find_start
from run import Run, ensure_best, restore, save, save_best
from signals import Signals, Stopped


def train_step(model, optimizer, window, lr, *, precision, scaler, max_grad_norm):
    """One update: the gradient of the mean token loss over a window, clipped and applied.

    Args:
        window: its micro-batches, as `layout.Layout.batches` makes them.

    Returns:
        The numbers worth logging; None where fp16 gradients overflowed: nothing was applied, the scaler has lowered
        its scale, and the window wants to be seen again.

    Raises:
        FloatingPointError: the loss or the gradient is not finite; nothing was applied.
        ValueError: no token of the window is supervised.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    tokens = sum(len(micro_batch.targets) for micro_batch in window)
    if tokens == 0:
        raise ValueError("nothing is supervised in this window: it has no mean loss")
    loss_sum = 0.0
    for micro_batch in window:
        with precision.autocast():
            micro_loss_sum = token_loss(model, micro_batch.to(precision.device))
        scaler.scale(micro_loss_sum / tokens).backward()
        loss_sum += micro_loss_sum.detach()
    scaler.unscale_(optimizer)
    grad_norm = clip_grad_norm_(model.parameters(), max_grad_norm or math.inf).item()  # all that a GPU is waited for
    loss = loss_sum.item() / tokens
    overflow = not math.isfinite(grad_norm)
    if overflow and not (math.isfinite(loss) and scaler.get_scale() > 1):  # only fp16 has a scale to lower
        optimizer.zero_grad()
        raise FloatingPointError(f"loss {loss}, gradient norm {grad_norm}: not finite, so the update was not applied")
    scaler.step(optimizer)  # leaves an overflowed gradient out
    scaler.update()  # and lowers the scale for the next try
    optimizer.zero_grad()
    if overflow:
        return None
    return {
        "loss": loss,
        "grad_norm": grad_norm,  # before clipping
        "lr": lr,
        "tokens": sum(micro_batch.tokens for micro_batch in window),
        "supervised_tokens": tokens,
    }


def learning_rate(step, peak, warmup_steps, total_steps):
    """The learning rate of update `step` (from 0): linear from 0 to the peak, then half a cosine to 0.

    The schedule of transformers' `get_cosine_schedule_with_warmup`: after a warm-up, so the first update has rate 0.
    """
    if step < warmup_steps:
        return peak * (step / warmup_steps)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak * (0.5 * (1 + math.cos(math.pi * progress)))


def make_optimizer(model, weight_decay):
    """Fused AdamW that decays matrices and embeddings, but no biases and norms (parameters of one dimension)."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), eps=1e-8, fused=True)


def fit(run, signals):
    """The loop: updates from `run.step` on, and what happens between them.

    Raises:
        Stopped: by a signal; the run is then as it was after its last whole update.
    """
    config, last = run.config, run.total_steps
    windows = Windows(run.data.train.examples, config.batch_size, config.seed, run.layout)
    run.model.train()
    # disable=None: a bar only on a terminal
    with tqdm(total=last, initial=run.step, unit="update", disable=None) as progress:
        while True:
            if run.evaluated < run.step and (run.step % config.eval_every == 0 or run.step >= last):
                result = evaluate_split(run, "eval")  # a signal drops it, and it is made when the run goes on
                with signals.held():
                    note_evaluation(run, result)
            if run.saved < run.step and run.step % config.save_every == 0:
                with signals.held():
                    save(run)
            if run.step >= last:
                return
            with signals.held():
                numbers = update(run, windows)
            if numbers:
                progress.update()
                progress.set_postfix_str(f"loss {numbers['loss']:.3f}, {numbers['tokens_per_second']:,.0f} tokens/s")


def update(run, windows):
    """The run's next update, logged; returns its numbers, or None where fp16 gradients overflowed.

    Raises:
        UserError: the loss or the gradient is not finite, or there is too little memory; nothing was applied.
    """
    began = time.perf_counter()
    config, examples = run.config, run.data.train.examples
    try:
        with memory_explained(run, lambda: window_at(run.step, examples, config.batch_size, config.seed)):
            numbers = train_step(
                run.model,
                run.optimizer,
                windows.at(run.step),
                learning_rate(run.step, config.lr, config.warmup_steps, run.total_steps),
                precision=run.precision,
                scaler=run.scaler,
                max_grad_norm=config.max_grad_norm,
            )
    except FloatingPointError as error:
        indices = window_indices(run.step, len(examples), config.batch_size, config.seed)
        worst = "\n".join(highest_losses(run, examples, indices))
        raise UserError(f"update {run.step + 1}: {error}; {way_on(run)}; its window:\n{worst}") from error
    if numbers is None:
        run.overflows += 1
        return None
    run.step += 1
    if run.scaler.is_enabled():
        numbers["overflows"] = run.overflows
    if config.compile:
        numbers["compiled_graphs"] = compiled_graphs()
    numbers["tokens_per_second"] = numbers["tokens"] / (time.perf_counter() - began)
    numbers["epoch"] = run.step / windows_per_epoch(len(examples), config.batch_size)
    if run.step % config.log_every == 0:
        run.log.write("train", run.step, numbers)
    return numbers


def evaluate_examples(run, examples):
    """The `Evaluation` of the run's model over examples."""
    with memory_explained(run, lambda: examples):
        return evaluate(run.model, examples, run.layout, run.precision)


def evaluate_split(run, split):
    """The `Evaluation` of the run's model over its "eval" or "test" split.

    Raises:
        UserError: the loss is not finite.
    """
    examples = getattr(run.data, split).examples
    result = evaluate_examples(run, examples)
    if not math.isfinite(result.loss):
        worst = "\n".join(highest_losses(run, examples, range(len(examples))))
        raise UserError(f"after update {run.step}: {split} loss {result.loss}; {way_on(run)}; of these:\n{worst}")
    return result


def note_evaluation(run, result):
    """Log an evaluation of the eval split; the model with the lowest loss so far becomes the run's `best/`."""
    run.log.write("eval", run.step, result.report())
    run.evaluated = run.step
    is_best = result.loss < run.best_loss
    tqdm.write(f"  update {run.step:>5}   eval loss {result.loss:.4f}{'   best so far' if is_best else ''}")
    if is_best:
        run.best_step, run.best_loss = run.step, result.loss
        save_best(run)


def examine(run, when, step, signals):
    """Log what a model can do "before" or "after" training: its loss over the test split, and its answers."""
    tested = evaluate_split(run, "test") if run.data.test.examples else None
    answers = [answer(run.model, run.tokenizer, prompt, run.config.seed) for prompt in VIBE_PROMPTS]
    with signals.held():
        if tested:
            run.log.write("test", step, tested.report())
        run.log.write_answers(when, step, answers)


def set_up(config, start=None, allow_changes=False):
    """A `Run` ready to go, from the `Start` of one that was interrupted; nothing is written yet.

    Raises:
        UserError: something cannot be loaded, or it would be another run and changes are not allowed.
    """
    precision = choose_precision(config.device, config.dtype)
    if precision.device.type == "cpu":
        keep_freed_memory()
    path, local_files_only = hub.find_model(config.model)
    tokenizer = load_tokenizer(path, local_files_only, config.chat_template)
    data = prepare(config, tokenizer)
    now = report.describe(config, precision, data)
    changed = check_same_run(config.output_dir, start.described, now, allow_changes) if start else []
    checkpoint = start.path if start else None
    model = load_model(checkpoint or path, tokenizer, precision.device, local_files_only)
    layout = choose_layout(model, config, tokenizer.pad_token_id, precision)
    if config.gradient_checkpointing:
        checkpoint_activations(model)
    optimizer = make_optimizer(model, config.weight_decay)
    run = Run(config, precision, layout, tokenizer, data, model, optimizer, precision.grad_scaler())
    torch.manual_seed(config.seed)
    if checkpoint:
        restore(run, checkpoint)
    if changed:
        run.changes.append({"step": run.step, "changed": changed})
    return run


def train(run, signals, resumed):
    """Train in the run's directory, which is locked. Returns the exit status."""
    began = time.perf_counter()
    report.write_record(run.directory, run.described, run.changes)
    run.log = report.Log(run.directory, run.step if resumed else None, run.log_lines)
    try:
        stopped_by = begin_fit_finish(run, signals)
    except (OSError, Damaged) as error:
        why = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"{run.directory}, after update {run.step}: {why}; {way_on(run)}") from error
    if stopped_by:
        print(f"stopped after update {run.step}; to go on: python train.py --resume {run.directory}", file=sys.stderr)
        return 128 + stopped_by
    seconds = f"{time.perf_counter() - began:.0f} s, {run.seconds_saving:.0f} s of it for checkpoints"
    print(f"\n{run.total_steps} updates, {seconds}\n\n{report.summary(run.directory)}")
    return 0


def begin_fit_finish(run, signals):
    """What is left of a run; a signal ends it with a checkpoint. Returns the number of the signal, or None."""
    try:
        if run.best_step:
            ensure_best(run)
        if run.step == 0:
            before = evaluate_split(run, "eval")
            with signals.held():
                run.log.write("eval", 0, before.report())
            examine(run, "before", 0, signals)
        fit(run, signals)
        finish(run, signals)
        run.log.close(run.config, {"best_eval_loss": run.best_loss})
    except Stopped as stop:
        if run.saved < run.step and run.optimizer:  # which has made room once training is over
            save(run)
        run.log.close()
        return stop.number


def finish(run, signals):
    """Judge the best model as it is on disk, not the last one in memory: its test loss and its answers."""
    ensure_best(run)
    run.optimizer = run.model = None  # room for it
    run.model = load_model(run.directory / "best", run.tokenizer, run.precision.device)
    use_layout(run.model, run.layout)
    if not ties_hold(run.model):
        raise UserError(f"{run.directory}/best: its output head came back untied from its embeddings")
    examine(run, "after", run.best_step, signals)


def new_directory(config):
    """The directory of a new run: the one asked for, or `runs/<preset or dataset>-<time>`.

    Raises:
        UserError: it already holds a run, or cannot be written.
    """
    name = config.preset if config.dataset == PRESETS[config.preset]["dataset"] else Path(config.dataset[0]).stem
    directory = Path(config.output_dir or f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}")
    check_no_run(directory)
    existing = next(parent for parent in (directory, *directory.absolute().parents) if parent.exists())
    try:
        tempfile.TemporaryDirectory(dir=existing).cleanup()
    except OSError as error:
        raise UserError(f"--output-dir {directory}: cannot write to {existing} ({error.strerror})") from error
    return directory


def check_no_run(directory):
    """Raise `UserError` where a directory holds a run."""
    if (directory / "config.json").exists():
        raise UserError(f"--output-dir {directory}: it holds a run already; --resume {directory}, or name another")


def begin(named, dry_run, signals):
    """A new run. Returns the exit status."""
    preset, why = hub.choose_preset(named)
    config = resolve(named, preset)
    directory = new_directory(config)
    config = dataclasses.replace(config, output_dir=str(directory))
    print(f"preset {preset} ({why}): {config.model} on {shown(config.dataset)}, into {directory}")
    run = set_up(config)
    print(report.plan(config, run.data, run.model, run.precision, run.layout, run.total_steps))
    if dry_run:
        return 0
    make_directory(directory)
    with locked(directory):
        check_no_run(directory)  # which another process may have begun by now
        return train(run, signals, resumed=False)


def go_on(directory, named, allow_changes, dry_run, signals):
    """The rest of a run. Returns the exit status."""
    if not (directory / "config.json").exists():
        raise UserError(f"--resume {directory}: there is no run there")
    if Path(named.get("output_dir", directory)) != directory:
        raise UserError(f"--output-dir {named['output_dir']}: a resumed run stays in its own directory; leave that out")
    record = read_record(directory)
    settings = with_tuples({**record["config"], **named, "output_dir": str(directory)})
    config = resolve(settings, settings["preset"])
    if report.is_finished(directory) and not differences(record, {**record, "config": dataclasses.asdict(config)}):
        print(f"{directory} is finished already\n\n{report.summary(directory)}")
        return 0
    with locked(directory):
        start = find_start(directory, record)
        print(
            f"resuming {directory} from {start.path.name if start.path else 'its beginning: it has no checkpoint yet'}"
        )
        run = set_up(config, start, allow_changes)
        run.changes = record.get("changes", []) + run.changes
        print(report.plan(config, run.data, run.model, run.precision, run.layout, run.total_steps))
        return 0 if dry_run else train(run, signals, resumed=True)


def main(argv):
    """`python train.py [flags]`; exit status 0 done, 1 error, 128 + N stopped by signal N after saving."""
    parser = Parser(prog="train.py", description="Fine-tune a causal language model on conversations.")
    parser.add_argument("--resume", metavar="RUN", help="go on with a run directory from its newest whole checkpoint")
    parser.add_argument(
        "--allow-changes", action="store_true", help="with --resume: go on though it will be another run than before"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop; nothing is written")
    parser.add_config_flags()
    named, options = parser.parse(argv)
    if options["allow_changes"] and not options["resume"]:
        raise UserError("--allow-changes says something of --resume only")
    hub.quiet_libraries()
    with Signals() as signals:
        try:
            if options["resume"]:
                directory = Path(options["resume"])
                return go_on(directory, named, options["allow_changes"], options["dry_run"], signals)
            return begin(named, options["dry_run"], signals)
        except BaseException as error:  # libraries raise errors of their own on the way out of what was stopped
            if signals.noted is None or isinstance(error, UserError | OSError):
                raise
            print("stopped before training began", file=sys.stderr)
            return 128 + signals.noted


if __name__ == "__main__":
    run_command(main)
