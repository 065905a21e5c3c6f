"""Supervised fine-tuning of a causal language model on conversations: the whole loop, to be read top to bottom.

One idea: an update is defined by its window, the `--batch-size` conversations it sees. Its gradient is that of

    sum of the token losses over the window's supervised tokens / number of those tokens

and how the window is cut into micro-batches, or shared out among processes, changes memory and speed, never the result.

    python train.py --epochs 2 --lr 2e-4
    torchrun --standalone --nproc-per-node 8 train.py --epochs 2 --lr 2e-4
"""

import contextlib
import dataclasses
import math
import os
import shlex
import sys
import time

import torch
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from compute.gradients import SummedGradients
from compute.layers import checkpoint_activations, compiled_graphs, deterministic_algorithms
from compute.layout import PrefetchedWindows
from compute.memory import keep_freed_memory, refuse_too_large
from compute.processes import balance, from_first, in_first, is_first, rank, smallest, summed, total
from compute.self_check import choose_layout, use_layout
from compute.sharding import is_sharded, whole
from config import OF_THE_TEMPLATE, Parser, UserError, resolve, run_command, with_absolute_paths
from conversations.tokenizer import load_tokenizer
from data import prepare, windows_per_epoch
from eval import VIBE_PROMPTS, evaluate, greedy_and_sampled
from evaluation.facts import run_facts
from evaluation.generation import Sampling, answers
from model import choose_precision, count_parameters, load_model, load_sharded, ties_hold, token_loss
from running import report
from running.diagnostics import explain_failed_update, explain_failed_write, explain_out_of_memory, refuse_non_finite
from running.directory import locked, new_directory, refuse_foreign
from running.distributed import run_distributed
from running.estimate import estimate
from running.metrics import Log, NullLog, peak_memory
from running.progress import Progress
from running.resume import (
    check_agreement,
    check_same_run,
    differences,
    find_start,
    recorded_budget,
    resumed_config,
    run_to_resume,
)
from running.signals import Signals, Stopped
from running.state import Run, ensure_best, restore, save, save_best
from storage import hub
from storage.records import describe, is_finished, write_record

RESUME_HELP = "continue a run directory from its newest valid checkpoint; auto: that of --output-dir, if it holds a run"


def train_step(model, optimizer, window, lr, *, precision, scaler, max_grad_norm, meanwhile=lambda: None):
    """One update: the gradient of the mean token loss over a window, clipped and applied.

    Args:
        window: its micro-batches, as `Layout.batches` makes them; of several processes each has its `Layout.share`.
        meanwhile: what to do while a GPU computes them.

    Returns:
        The numbers worth logging; None where fp16 gradients overflowed: nothing was applied, the scaler has lowered
        its scale, and the window must be computed again.

    Raises:
        FloatingPointError: the loss or the gradient is not finite; nothing was applied.
        ValueError: no token of the window is supervised.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    own_tokens = sum(micro_batch.tokens for micro_batch in window)
    tokens, supervised = total(own_tokens, sum(len(micro_batch.targets) for micro_batch in window))
    if supervised == 0:
        raise ValueError("no token of this window is supervised: it has no mean loss")
    loss_sum = 0.0
    with SummedGradients(model, passes=len(window)) as gradients:  # over all processes
        for micro_batch in window:
            with precision.autocast():
                micro_loss_sum = token_loss(model, micro_batch.to(precision.device))
            scaler.scale(micro_loss_sum / supervised).backward()
            loss_sum += micro_loss_sum.detach()
    scaler.unscale_(optimizer)
    grad_norm = whole(clip_grad_norm_(model.parameters(), max_grad_norm or math.inf))
    apply_if_finite(optimizer, scaler, grad_norm)
    optimizer.zero_grad()
    meanwhile()
    loss, grad_norm = summed(loss_sum).item() / supervised, grad_norm.item()  # the only wait for a GPU
    if not math.isfinite(grad_norm):
        if math.isfinite(loss) and scaler.get_scale() > 1:  # only fp16 has a scale to lower
            return None
        raise FloatingPointError(f"loss {loss}, gradient norm {grad_norm}: not finite, so the update was not applied")
    return {
        "loss": loss,
        "grad_norm": grad_norm,  # before clipping
        "lr": lr,
        "tokens": tokens,
        "supervised_tokens": supervised,
        **balance([micro_batch.tokens for micro_batch in window], gradients.waited),
    }


def apply_if_finite(optimizer, scaler, grad_norm):
    """Step, unless the norm of the gradient is not finite; a fused optimizer finds that out without a wait for the GPU.

    A scaler, of fp16, lowers its scale where the gradient overflowed.
    """
    if scaler.is_enabled():
        scaler.step(optimizer)
        scaler.update()
    elif getattr(optimizer, "_step_supports_amp_scaling", False):  # as torch's fused optimizers do
        optimizer.found_inf = (~grad_norm.isfinite()).float()
        optimizer.step()
    elif grad_norm.isfinite():
        optimizer.step()


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
        Stopped: by a signal; the run is then as it was after its last complete update.
    """
    config, last = run.config, run.total_steps
    windows = PrefetchedWindows(run.data.train.examples, config.batch_size, config.seed, run.layout)
    run.model.train()
    with Progress(last, run.step) as progress:
        while True:
            if run.evaluated < run.step and (run.step % config.eval_every == 0 or run.step >= last):
                began = time.perf_counter()
                evaluation = evaluate_split(run, "eval", signals)  # if a signal interrupts it, resuming makes it again
                seconds = time.perf_counter() - began
                said = ask(run)
                with signals.deferred():
                    record_evaluation(run, evaluation, seconds)
                    run.log.show_answers("answers", run.step, said)
            run.background.check()
            if run.begun < run.step and run.step % config.save_every == 0:
                with signals.deferred():
                    save(run)
            if run.step >= last:
                return
            with signals.deferred():
                numbers = update(run, windows)
            if numbers:
                progress.update(numbers)


def update(run, windows):
    """The run's next update, logged; returns its numbers, or None where fp16 gradients overflowed.

    Raises:
        UserError: the loss or the gradient is not finite, or there is too little memory; nothing was applied.
    """
    began = time.perf_counter()
    config, examples = run.config, run.data.train.examples
    with explain_failed_update(run), deterministic_algorithms(config.deterministic):
        window = windows.at(run.step)
        waited = time.perf_counter() - began
        numbers = train_step(
            run.model,
            run.optimizer,
            window,
            learning_rate(run.step, config.lr, config.warmup_steps, run.total_steps),
            precision=run.precision,
            scaler=run.scaler,
            max_grad_norm=config.max_grad_norm,
            meanwhile=lambda: windows.prefetch(run.step + 1),
        )
    if numbers is None:
        run.overflows += 1
        return None
    run.step += 1
    if run.scaler.is_enabled():
        numbers["overflows"] = run.overflows
    if config.compile:
        numbers["compiled_graphs"] = compiled_graphs()
    seconds = time.perf_counter() - began
    numbers["tokens_per_second"] = numbers["tokens"] / seconds
    numbers |= {"seconds": seconds, "seconds_data": waited}
    numbers["peak_memory"] = peak_memory(run.precision.device)
    numbers["epoch"] = run.step / windows_per_epoch(len(examples), config.batch_size)
    if run.step % config.log_every == 0:
        run.log.write("train", run.step, numbers)
    return numbers


def tokens_of_run(config, data):
    """How many tokens a run trains on, padding not counted."""
    updates = windows_per_epoch(len(data.train.examples), config.batch_size)
    return data.train.tokens * (config.max_steps / updates if config.max_steps else config.epochs)


def evaluate_split(run, split, signals):
    """The `Evaluation` of the run's model over its "eval" or "test" split.

    Raises:
        UserError: the loss is not finite, or there is too little memory.
    """
    examples = getattr(run.data, split).examples
    with explain_out_of_memory(run, lambda: examples):
        evaluation = evaluate(run.model, examples, run.layout, run.precision, signals.check)
    refuse_non_finite(run, split, evaluation.loss)
    return evaluation


def record_evaluation(run, evaluation, seconds):
    """Log an evaluation of the eval split; the model with the lowest loss so far becomes the run's `best/`."""
    run.log.write("eval", run.step, {**evaluation.report(), "seconds": seconds})
    run.evaluated = run.step
    is_best = evaluation.loss < run.best_loss
    note = "   best so far" if is_best else ""
    if is_best and run.log.untrained_loss is not None and evaluation.loss > run.log.untrained_loss:
        note += f", but above the untrained model's {run.log.untrained_loss:.4f}"
    tqdm.write(f"  update {run.step:>5}   eval loss {evaluation.loss:.4f}{note}")
    if is_best:
        run.best_step, run.best_loss = run.step, evaluation.loss
        run.log.write_losses("eval", "after", evaluation)
        save_best(run)


def test_and_answer(run, when, step, signals):
    """Log the model's loss over the test split and its answers to the prompts, "before" or "after" training."""
    evaluation = evaluate_split(run, "test", signals) if run.data.test.examples else None
    said = ask(run, greedy_and_sampled, Sampling(seed=run.config.seed))
    with signals.deferred():
        if evaluation:
            run.log.write("test", step, evaluation.report())
            run.log.write_losses("test", when, evaluation)
        run.log.write_answers(when, step, said)


def ask(run, how=answers, *settings):
    """The answers of a run's model to the prompts; several processes ask together only where they share its weights."""
    sharded = is_sharded(run.model)
    prompts = VIBE_PROMPTS if sharded or is_first() else ()
    with run.precision.autocast() if sharded else contextlib.nullcontext():  # shared layers stay in 16 bits
        return how(run.model, run.tokenizer, prompts, *settings)


def set_up(config, start=None, allow_changes=False):
    """A `Run` ready to train, from the `Start` of an interrupted one if there is one; nothing is written yet.

    Raises:
        UserError: something cannot be loaded, or it would be a different run and changes are not allowed.
    """
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it is first used
    precision = choose_precision(config.device, config.dtype)
    if precision.device.type == "cpu":
        keep_freed_memory()
    checkpoint = start.path if start else None
    path, local_files_only, tokenizer = tokenizer_of(config, start)
    data = prepare(config, tokenizer)
    now = describe(config, precision, data)
    changed = check_same_run(config.output_dir, start.described, now, allow_changes) if start else []
    if precision.device.type == "cuda":
        refuse_too_large(*count_parameters(path, local_files_only), precision, config)
    model = load(checkpoint or path, tokenizer, precision, config.shard, local_files_only)
    if config.gradient_checkpointing:
        checkpoint_activations(model)
    layout = choose_layout(
        model,
        token_loss,
        config,
        tokenizer.pad_token_id,
        precision,
        longest=max(split.longest for split in data.splits.values()),
        total_tokens=tokens_of_run(config, data),
        budget=from_first(recorded_budget, start, config, precision),
    )
    layout = dataclasses.replace(layout, tokens=smallest(layout.tokens))  # of all processes
    config = dataclasses.replace(config, compile=layout.compiled)
    optimizer = make_optimizer(model, config.weight_decay)
    run = Run(config, precision, layout, tokenizer, data, model, optimizer, precision.grad_scaler())
    torch.manual_seed(config.seed + rank())  # for dropout, where a model has it
    if checkpoint:
        restore(run, checkpoint)
    if changed:
        run.changes.append({"step": run.step, "changed": changed})
    return run


def tokenizer_of(config, start):
    """Where a run's tokenizer is, and its untrained model; whether on this machine alone; and the tokenizer."""
    template, options = config.chat_template, config.template_option
    recorded = start and start.path and [start.described["config"][name] for name in OF_THE_TEMPLATE]
    if recorded == [template, list(options)]:
        path, local_files_only = str(start.path), True  # the original model may be gone, and a template's file too
        template, options = ("chatml" if template == "chatml" else "model"), ()
    else:
        path, local_files_only = hub.find_model(config.model)
    return path, local_files_only, load_tokenizer(path, local_files_only, template, options)


def load(path, tokenizer, precision, shard, local_files_only=False):
    """A model for training, whole in this process or divided among `shard` of them."""
    if shard > 1:
        return load_sharded(path, tokenizer, precision, shard, local_files_only)
    return load_model(path, tokenizer, precision.device, local_files_only)


def train(run, signals, resumed):
    """Train in the run's directory, which is locked: begin, fit, finish. Returns the exit status."""
    began = time.perf_counter()
    check_agreement(run)
    if is_first():
        write_record(run.directory, run.described, run.changes)
    run.log = Log(run.directory, run.step if resumed else None, **run.logged) if is_first() else NullLog()
    try:
        with explain_failed_write(run):
            signals.check()
            begin(run, signals)
            fit(run, signals)
            finish(run, signals)
            if is_first():
                facts = run_facts(run.directory)
                report.write_page(run, facts)
                run.log.close(facts)
    except Stopped as stop:
        with explain_failed_write(run):
            if run.begun < run.step and run.optimizer:  # `finish` has freed it
                save(run)
            run.background.wait()
            run.log.close()
        quoted = shlex.quote(str(run.directory))
        print(f"stopped after update {run.step}; to resume: python train.py --resume {quoted}", file=sys.stderr)
        return 128 + stop.number
    finally:
        run.background.close()
    if not is_first():
        return 0
    seconds = f"{time.perf_counter() - began:.0f} s, {run.seconds_saving:.0f} s of it for checkpoints"
    print(f"\n{run.step} updates, {seconds}\n\n{report.summary(facts)}")
    return 0


def begin(run, signals):
    """What precedes the first update: the untrained model's losses and answers."""
    if run.best_step and is_first():
        ensure_best(run)
    if run.step == 0:
        evaluation = evaluate_split(run, "eval", signals)
        with signals.deferred():
            run.log.write("eval", 0, evaluation.report())
            run.log.write_losses("eval", "before", evaluation)
        test_and_answer(run, "before", 0, signals)


def finish(run, signals):
    """What follows the last update: the test loss and the answers of the best model, loaded from disk."""
    from_first(ensure_best, run)
    run.optimizer = run.model = None  # free their memory
    run.model = load(run.directory / "best", run.tokenizer, run.precision, run.config.shard)
    use_layout(run.model, run.layout)
    if not ties_hold(run.model):
        raise UserError(f"{run.directory}/best: its output head is no longer tied to its embeddings")
    test_and_answer(run, "after", run.best_step, signals)


def start_run(named, dry_run, signals):
    """A new run. Returns the exit status."""
    preset, why = from_first(hub.choose_preset, named)
    config = resolve(with_absolute_paths(named), preset)
    with in_first(new_directory, config) as directory:
        config = dataclasses.replace(config, output_dir=str(directory))
        print(report.headline(config, why))
        run = set_up(config)
        print(report.plan(run))
        if dry_run:
            print(estimate(run, train_step))
            return 0
        with in_first(locked, directory):
            from_first(refuse_foreign, directory)  # another run may have begun in it by now
            return train(run, signals, resumed=False)


def resume_run(directory, named, allow_changes, dry_run, signals):
    """The rest of a run. Returns the exit status."""
    config, recorded = resumed_config(directory, named)
    changed = differences(recorded, {**recorded, "config": dataclasses.asdict(config)})
    finished = from_first(is_finished, directory)
    if finished and not changed:
        print(f"{directory} is finished already" + ("" if dry_run else f"\n\n{report.summary(run_facts(directory))}"))
        return 0
    with in_first(locked, directory):
        start = from_first(find_start, directory, recorded)
        run = set_up(config, start, allow_changes)
        if finished and run.step >= run.total_steps:  # its record would name settings it was not trained with
            what = f"nothing is left to train with {', '.join(changed)}"
            raise UserError(f"{directory} is finished; {what}; raise --epochs or --max-steps")
        run.changes = recorded.get("changes", []) + run.changes
        print(report.plan(run))
        return 0 if dry_run else train(run, signals, resumed=True)


def main(argv):
    """`python train.py [flags]`; exit status 0 done, 1 error, 128 + N stopped by signal N after saving."""
    with Signals() as signals:
        return run_distributed(lambda: command(argv, signals))


def command(argv, signals):
    """The command as each of its processes runs it. Returns the exit status."""
    parser = Parser(prog="train.py", description="Fine-tune a causal language model on conversations.")
    parser.add_argument("--resume", metavar="RUN", help=RESUME_HELP)
    parser.add_argument("--allow-changes", action="store_true", help="with --resume: allow settings or data to change")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, and what a new run takes, and stop")
    parser.add_config_flags()
    named, options = parser.parse(argv)
    if options["allow_changes"] and not options["resume"]:
        raise UserError("--allow-changes needs --resume")
    hub.quiet_libraries()
    try:
        directory = run_to_resume(options["resume"], named)
        if directory:
            return resume_run(directory, named, options["allow_changes"], options["dry_run"], signals)
        return start_run(named, options["dry_run"], signals)
    except BaseException as error:  # a stopped library may raise an error of its own
        if signals.received is None or isinstance(error, UserError | OSError):
            raise
        raise Stopped(signals.received) from error


if __name__ == "__main__":
    run_command(main)
