"""Supervised fine-tuning of a causal language model on conversations: the whole loop, to be read top to bottom.

One idea: an update is defined by its window, the `--batch-size` conversations it sees. Its gradient is that of

    sum of the token losses over the window's supervised tokens / number of those tokens

How the window is cut into micro-batches (gradient accumulation), or sharded over ranks, changes memory and speed, never
the result.

    python train.py --epochs 2 --lr 2e-4
    torchrun --standalone --nproc-per-node 8 train.py --epochs 2 --lr 2e-4
"""

import dataclasses
import math
import shlex
import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm
from transformers import PreTrainedModel

from compute.distributed import all_reduce_sum, all_reduce_tensor, broadcast_from_rank0, full_tensor, on_rank0
from compute.gradients import GradientAllReduce, load_balance
from compute.layers import compiled_graphs, deterministic_algorithms
from compute.layout import Batch, PrefetchedWindows
from config import Parser, UserError, run_command
from model import Precision, token_loss
from running import checkpoint, diagnostics, directory, replay, report, resume, setup
from running.distributed import run_distributed
from running.estimate import estimate
from running.metrics import peak_memory
from running.progress import Progress
from running.signals import Signals, Stopped
from running.validation import answer_prompts, evaluate_best, evaluate_split, evaluate_untrained
from storage import hub
from storage.records import is_finished

REPLAY_HELP = "repeat the first updates of a run, compare them with its log, bit for bit, and stop; writes nothing"
RESUME_HELP = "continue a run directory from its newest valid checkpoint; auto: that of --output-dir, if it holds a run"


# --- one update


def train_step(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    window: Sequence[Batch],
    lr: float,
    *,
    precision: Precision,
    scaler: torch.amp.GradScaler,
    max_grad_norm: float,
    while_busy: Callable[[], None] = lambda: None,
) -> dict[str, float] | None:
    """One update: the gradient of the mean token loss over a window, clipped and applied.

    Args:
        window: its micro-batches, those of this rank: `Layout.local_micro_batches`.
        while_busy: called while a GPU computes.

    Returns:
        The metrics worth logging; None where fp16 gradients overflowed: nothing was applied, the scaler has lowered its
        scale, and the window must be computed again.

    Raises:
        FloatingPointError: the loss or the gradient is not finite; nothing was applied.
        ValueError: no token of the window is supervised.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    local_tokens = sum(micro_batch.tokens for micro_batch in window)
    tokens, supervised = all_reduce_sum(local_tokens, sum(len(micro_batch.targets) for micro_batch in window))
    if supervised == 0:
        raise ValueError("no token of this window is supervised: it has no mean loss")
    loss_sum = 0.0
    with GradientAllReduce(model, passes=len(window)) as gradients:  # an all-reduce over the ranks
        for micro_batch in window:
            gradients.empty_pass = not micro_batch.tokens
            with precision.autocast():
                micro_loss_sum = token_loss(model, micro_batch.to(precision.device))
            scaler.scale(micro_loss_sum / supervised).backward()
            loss_sum += micro_loss_sum.detach()
    scaler.unscale_(optimizer)
    grad_norm = full_tensor(clip_grad_norm_(model.parameters(), max_grad_norm or math.inf))
    apply_if_finite(optimizer, scaler, grad_norm)
    optimizer.zero_grad()
    while_busy()
    loss, grad_norm = all_reduce_tensor(loss_sum).item() / supervised, grad_norm.item()  # the only wait for a GPU
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
        **load_balance([micro_batch.tokens for micro_batch in window], gradients.sync_seconds),
    }


def apply_if_finite(optimizer, scaler, grad_norm):
    """Step the optimizer, unless the gradient norm is not finite; a fused one finds that out on the GPU.

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


def learning_rate(step, peak, warmup_steps, total_steps, schedule="cosine", min_lr=0.0, decay_steps=0):
    """The learning rate of update `step` (from 0): a linear warm-up to the peak, then a decay to `min_lr` · peak.

    The schedules are transformers' of the same names; "wsd" keeps the peak until the last `decay_steps`
    updates, "constant" to the end. With a warm-up, the first update has rate 0 (in "wsd" `min_lr` · peak).
    """
    decay_steps = decay_steps if schedule == "wsd" else max(1, total_steps - warmup_steps)
    decayed = step - (total_steps - decay_steps)  # updates of the decay so far
    if step < warmup_steps:
        share, lowest = step / warmup_steps, min_lr if schedule == "wsd" else 0.0
    elif schedule == "constant" or decayed < 0:
        share, lowest = 1.0, 0.0
    else:
        share, lowest = (decay_steps - decayed) / decay_steps, min_lr
        if schedule != "linear":
            share = 0.5 * (1 + math.cos(math.pi * (decayed / decay_steps)))
    return peak * (share * (1 - lowest) + lowest)


def make_optimizer(model, weight_decay, adam_beta2=0.999):
    """Fused AdamW of what is trained; matrices and embeddings decay, but not biases and norms (of one dimension)."""
    decayed, others = [], []
    for name, weights in model.named_parameters():
        if weights.requires_grad:
            decays = weights.ndim > 1 and not name.endswith("bias")  # the biases of experts have two dimensions
            (decayed if decays else others).append(weights)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, adam_beta2), eps=1e-8, fused=True)


# --- the loop


def updates(run):
    """Train from `run.step` to the end, update by update; yields the metrics of each.

    It writes nothing: the caller logs, evaluates and saves between two updates.

    Raises:
        UserError: the loss or the gradient is not finite, or there is too little memory; nothing was applied.
    """
    config = run.config
    windows = PrefetchedWindows(run.data.train.examples, config.batch_size, config.seed, run.layout)
    while run.step < run.total_steps:
        began = time.perf_counter()
        run.model.train()
        schedule = (run.warmup_steps, run.total_steps, config.schedule, config.min_lr, run.decay_steps)
        with diagnostics.explain_failed_update(run), deterministic_algorithms(config.deterministic):
            window = windows.get(run.step)
            seconds_data = time.perf_counter() - began
            metrics = train_step(
                run.model,
                run.optimizer,
                window,
                learning_rate(run.step, config.lr, *schedule),
                precision=run.precision,
                scaler=run.scaler,
                max_grad_norm=config.max_grad_norm,
                while_busy=lambda: windows.prefetch(run.step + 1),
            )
        if metrics is None:
            run.overflows += 1
            continue
        run.step += 1
        seconds = time.perf_counter() - began
        metrics |= {"tokens_per_second": metrics["tokens"] / seconds, "seconds": seconds, "seconds_data": seconds_data}
        metrics["peak_memory"] = peak_memory(run.precision.device)
        metrics["epoch"] = run.step / run.steps_per_epoch
        if run.scaler.is_enabled():
            metrics["overflows"] = run.overflows
        if run.layout.compiled:
            metrics["compiled_graphs"] = compiled_graphs()
        yield metrics


def fit(run, signals):
    """Make the remaining updates of a run; log, evaluate and save between them.

    Raises:
        Stopped: by a signal; the run is then as it was after its last complete update.
    """
    evaluate_and_save(run, signals)  # which an interrupted run may have left to do
    with Progress(run.total_steps, run.step) as progress:
        for metrics in updates(run):
            if run.step == 2 and metrics["lr"]:  # the first one has a rate of 0 where the rate warms up
                report.warn_of_untrained(run.model)
            if run.step % run.config.log_every == 0:
                run.log.write("train", run.step, metrics)
            progress.update(metrics)
            evaluate_and_save(run, signals)


def evaluate_and_save(run, signals):
    """Evaluate and save where that is due after `run.step` updates; the best model and the last are saved at once."""
    is_best, is_last = False, run.step >= run.total_steps
    if not run.data.eval.examples:
        is_best = is_last  # without an evaluation, each saved model counts as the best so far
    elif run.evaluated < run.step and (run.step % run.eval_every == 0 or is_last):
        is_best = evaluate_and_log(run, signals)
    run.saver.check()
    if is_best or (is_last and run.saver.started < run.step) or checkpoint.is_due(run):
        checkpoint.save(run)
    signals.check()


def evaluate_and_log(run, signals):
    """Evaluate the model on the eval split; returns whether its loss is the lowest so far."""
    began = time.perf_counter()
    evaluation = evaluate_split(run, "eval", signals)
    seconds = time.perf_counter() - began
    run.log.write("eval", run.step, {**evaluation.report(), "seconds": seconds})
    run.log.show_answers("answers", run.step, answer_prompts(run))
    run.evaluated = run.step
    is_best = evaluation.loss < run.best_loss
    note = "   best so far" if is_best else ""
    tqdm.write(f"  update {run.step:>5}   eval loss {evaluation.loss:.4f}{note}")
    if is_best:
        run.best_step, run.best_loss = run.step, evaluation.loss
        run.log.write_losses("eval", "after", evaluation)
    return is_best


# --- a run, from its start or from a checkpoint to its end


def build_run(config, start=None, allow_changes=False):
    """A `Run` ready to train, from the `ResumePoint` of an interrupted one if there is one; nothing is written yet."""
    run = setup.load_run(config, start, allow_changes)
    run.optimizer = make_optimizer(run.model, config.weight_decay, config.adam_beta2)
    if start and start.path:
        checkpoint.restore(run, start)
    return run


def train(run, signals):
    """Train in the run's directory, which is locked. Returns the exit status."""
    began = time.perf_counter()
    resume.check_agreement(run)
    run.open()
    try:
        with diagnostics.explain_failed_write(run):
            signals.check()  # from here on, a signal stops the run at such a check only
            if run.step == 0:
                evaluate_untrained(run, signals)
            fit(run, signals)
            evaluate_best(run, signals)
            summary = report.write_report(run)
            signals.check()
    except Stopped as stop:
        with diagnostics.explain_failed_write(run):
            if run.saver.started < run.step:
                checkpoint.save(run)
            run.saver.wait()
            run.log.close()
        command = f"python train.py --resume {shlex.quote(str(run.directory))}"
        print(f"stopped after update {run.step}; to resume: {command}", file=sys.stderr)
        return 128 + stop.number
    finally:
        run.saver.close()
    seconds = f"{time.perf_counter() - began:.0f} s, {run.saver.seconds:.0f} s of it for checkpoints"
    print(f"\n{run.step} updates, {seconds}\n\n{summary}")
    return 0


def start_run(named, dry_run, signals):
    """Start a new run. Returns the exit status."""
    config, why = setup.choose_config(named)
    with on_rank0(directory.new_directory, config) as path:
        config = dataclasses.replace(config, output_dir=str(path))
        print(report.headline(config, why))
        run = build_run(config)
        if dry_run:
            print(estimate(run, train_step))
            return 0
        with on_rank0(directory.locked, path):
            broadcast_from_rank0(directory.check_output_dir, path)  # another run may have begun in it by now
            return train(run, signals)


def resume_run(path, named, allow_changes, dry_run, signals):
    """Resume a run. Returns the exit status."""
    config, recorded = resume.load_resumed_config(path, named)
    changed = resume.list_changes(recorded, {**recorded, "config": dataclasses.asdict(config)})
    finished = broadcast_from_rank0(is_finished, path)
    if finished and not changed:
        print(f"{path} is finished already" + ("" if dry_run else f"\n\n{report.summary(path)}"))
        return 0
    with on_rank0(directory.locked, path):
        start = broadcast_from_rank0(resume.find_resume_point, path, recorded)
        run = build_run(config, start, allow_changes)
        if finished and run.step >= run.total_steps:  # its record would name settings it was not trained with
            what = f"nothing is left to train with {', '.join(changed)}"
            raise UserError(f"{path} is finished; {what}; raise --epochs or --max-steps")
        run.resumed = recorded.get("resumed", []) + run.resumed
        return 0 if dry_run else train(run, signals)


def main(argv):
    """`python train.py [flags]`; exit status 0 done, 1 error, 128 + N stopped by signal N after saving."""
    with Signals() as signals:
        return run_distributed(lambda: command(argv, signals))


def command(argv, signals):
    """The command, as each rank runs it. Returns the exit status."""
    parser = Parser(prog="train.py", description="Fine-tune a causal language model on conversations.")
    group = parser.add_config_flags()
    group.add_argument("--resume", metavar="RUN", help=RESUME_HELP)
    group.add_argument("--replay", metavar="RUN", help=REPLAY_HELP)
    group.add_argument("--updates", type=int, metavar="N", help="with --replay: repeat N (default 20)")
    group.add_argument("--allow-changes", action="store_true", help="with --resume: allow settings or data to change")
    group.add_argument("--dry-run", action="store_true", help="print the plan, and what a new run takes, and stop")
    group.add_argument("--write-config", metavar="FILE", help="write all settings to a new recipe, and stop")
    named, options = parser.parse(argv)
    if options["allow_changes"] and not options["resume"] and not options["replay"]:
        raise UserError("--allow-changes needs --resume")
    if options["updates"] is not None and not options["replay"]:
        raise UserError("--updates needs --replay")
    hub.quiet_libraries()
    try:
        if options["replay"]:
            return replay.replay(options, named, build_run, updates, signals)
        path = resume.find_run_to_resume(options["resume"], named)
        if options["write_config"]:
            return setup.write_config(path, named, options["write_config"])
        if path:
            return resume_run(path, named, options["allow_changes"], options["dry_run"], signals)
        return start_run(named, options["dry_run"], signals)
    except BaseException as error:  # a stopped library may raise an error of its own
        if signals.received is None or isinstance(error, UserError | OSError):
            raise
        raise Stopped(signals.received) from error


if __name__ == "__main__":
    run_command(main)
