"""Supervised fine-tuning of a causal language model on conversations: the whole loop, to be read top to bottom.

One idea: an update is defined by its window, the `--batch-size` conversations it sees. Its gradient is that of

    sum of the token losses over the window's supervised tokens / number of those tokens

and how the window is cut into micro-batches changes memory and speed, never the result.

    python train.py --epochs 2 --lr 2e-4
"""

import contextlib
import dataclasses
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

import hub
import report
from chat import load_tokenizer
from checkpoint import checkpoints, replace_directory, save_checkpoint
from config import HELD_IN_MEMORY, PRESETS, Config, Parser, UserError, resolve, run_command
from data import collate, micro_batches, prepare, window_at, windows_per_epoch
from eval import VIBE_PROMPTS, answer, evaluate
from model import choose_precision, load_model, save_model, supervised_logits, ties_hold, token_loss


@dataclasses.dataclass
class State:
    """What changes while a run goes on, beside the weights; a checkpoint holds it."""

    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0  # updates done: the whole position in training, epoch and window are arithmetic on it
    best_step: int = 0
    best_loss: float = math.inf


def train_step(model, optimizer, window, lr, *, precision, scaler, pad_id, micro_batch_tokens, max_grad_norm):
    """One update: the gradient of the mean token loss over a window, clipped and applied.

    Returns:
        The numbers worth logging; None where fp16 gradients overflowed: nothing was applied, the scaler has lowered its
        scale, and the window wants to be seen again.

    Raises:
        UserError: the loss or the gradient is not finite; nothing was applied.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    tokens = sum(example.supervised_tokens for example in window)
    loss_sum = torch.zeros((), device=precision.device)
    for micro_batch in micro_batches(window, micro_batch_tokens):
        batch = {name: ids.to(precision.device) for name, ids in collate(micro_batch, pad_id).items()}
        with precision.autocast():
            loss = token_loss(*supervised_logits(model, batch))
        scaler.scale(loss / tokens).backward()
        loss_sum += loss.detach()
    scaler.unscale_(optimizer)
    grad_norm = clip_grad_norm_(model.parameters(), max_grad_norm or math.inf).item()
    mean_loss = loss_sum.item() / tokens
    overflow = not math.isfinite(grad_norm) and math.isfinite(mean_loss) and scaler.is_enabled() and scaler.get_scale() > 1
    if not math.isfinite(grad_norm) and not overflow:
        optimizer.zero_grad()
        raise UserError(f"loss {mean_loss}, gradient norm {grad_norm}: not finite, so the update was not applied")
    scaler.step(optimizer)  # which it leaves out after an overflow
    scaler.update()
    optimizer.zero_grad()
    if overflow:
        return None
    return {
        "loss": mean_loss,
        "grad_norm": grad_norm,  # before clipping
        "lr": lr,
        "tokens": sum(len(example.input_ids) for example in window),
        "supervised_tokens": tokens,
    }


def learning_rate(step, peak, warmup_steps, total_steps):
    """The learning rate of update `step` (from 0): linear from 0 to the peak, then half a cosine to 0.

    The schedule of transformers' `get_cosine_schedule_with_warmup`; with a warm-up, the first update has rate 0.
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(model, weight_decay):
    """Fused AdamW that decays matrices and embeddings, but no biases and norms (the parameters of one dimension)."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), eps=1e-8, fused=True)


def fit(config, model, tokenizer, data, precision, state, log, total_steps):
    """The loop: updates from `state.step` to `total_steps`, with everything that happens between them.

    Returns:
        The number of the signal that stopped it, after saving a checkpoint; None when it ran to the end.
    """
    run, examples = Path(config.output_dir), data.train.examples
    per_epoch = windows_per_epoch(len(examples), config.batch_size)
    step_settings = {
        "precision": precision,
        "scaler": state.scaler,
        "pad_id": tokenizer.pad_token_id,
        "micro_batch_tokens": config.micro_batch_tokens,
        "max_grad_norm": config.max_grad_norm,
    }
    model.train()
    progress = tqdm(total=total_steps, initial=state.step, unit="update", disable=None)  # None: only on a terminal
    with progress, signals_noted() as signals:
        while state.step < total_steps:
            started = time.perf_counter()
            window = window_at(state.step, examples, config.batch_size, config.seed)
            lr = learning_rate(state.step, config.lr, config.warmup_steps, total_steps)
            try:
                done = train_step(model, state.optimizer, window, lr, **step_settings)
            except UserError as error:
                raise UserError(f"update {state.step + 1}: {error}; checkpoints are in {run}/checkpoints") from error
            if done is None:
                continue
            state.step += 1
            done["tokens_per_second"] = done["tokens"] / (time.perf_counter() - started)
            done["epoch"] = state.step / per_epoch
            progress.update()
            progress.set_postfix_str(f"loss {done['loss']:.3f}, {done['tokens_per_second']:.0f} tokens/s")
            if state.step % config.log_every == 0:
                log.write("train", state.step, done)
            if state.step % config.eval_every == 0 or state.step == total_steps:
                evaluate_and_keep_best(config, model, tokenizer, data, precision, state, log)
            if state.step % config.save_every == 0 or signals:
                save_checkpoint(run, state.step, lambda path: write_checkpoint(path, model, tokenizer, state), config.keep)
            if signals:
                return signals[0]
    return None


def evaluate_and_keep_best(config, model, tokenizer, data, precision, state, log):
    """Log the loss over the eval split; the model with the lowest so far becomes the run's `best/`."""
    result = evaluate(model, data.eval.examples, tokenizer.pad_token_id, precision, config.micro_batch_tokens)
    log.write("eval", state.step, result.report())
    is_best = result.loss < state.best_loss
    tqdm.write(f"  update {state.step:>5}   eval loss {result.loss:.4f}{'   best so far' if is_best else ''}")
    if is_best:
        state.best_step, state.best_loss = state.step, result.loss
        replace_directory(Path(config.output_dir) / "best", lambda path: save_model(model, tokenizer, path))


def write_checkpoint(directory, model, tokenizer, state):
    """Fill a directory with all that resuming needs: a model directory, and `training.pt` beside it."""
    save_model(model, tokenizer, directory)
    generators = {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}
    saved = dataclasses.asdict(dataclasses.replace(state, optimizer=None, scaler=None))
    torch.save(
        {
            **saved,
            "optimizer": state.optimizer.state_dict(),
            "scaler": state.scaler.state_dict(),
            "generators": generators,
        },
        directory / "training.pt",
    )


def restore(checkpoint, state):
    """Put what `write_checkpoint` saved back into `state` and the random generators."""
    saved = torch.load(checkpoint / "training.pt", map_location="cpu", weights_only=True)
    state.optimizer.load_state_dict(saved["optimizer"])
    state.scaler.load_state_dict(saved["scaler"])
    state.step, state.best_step, state.best_loss = saved["step"], saved["best_step"], saved["best_loss"]
    torch.set_rng_state(saved["generators"]["cpu"])
    if len(saved["generators"]["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(saved["generators"]["cuda"])


@contextlib.contextmanager
def signals_noted():
    """A list that SIGINT and SIGTERM are noted in, so that the update under way ends well; a second one kills at once."""
    noted = []

    def note(number, frame):
        noted.append(number)
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(config, checkpoint=None, dry_run=False):
    """A whole run, from settings to summary; with a checkpoint, the rest of one. Returns the exit status."""
    run, began = Path(config.output_dir), time.perf_counter()
    precision = choose_precision(config.device, config.dtype)
    path, local_files_only = hub.find_model(config.model)
    tokenizer = load_tokenizer(path, local_files_only)
    data = prepare(config, tokenizer)
    model = load_model(checkpoint or path, tokenizer, precision.device, local_files_only)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    total_steps = config.max_steps or config.epochs * windows_per_epoch(len(data.train.examples), config.batch_size)
    print(report.plan(config, data, model, precision, total_steps))
    if dry_run:
        return 0

    torch.manual_seed(config.seed)
    state = State(make_optimizer(model, config.weight_decay), precision.grad_scaler())
    if checkpoint:
        restore(checkpoint, state)
    else:
        run.mkdir(parents=True, exist_ok=True)
        report.write_config(run, config, data)
    log = report.Log(run, state.step)
    if not checkpoint:
        examine("before", 0, ("eval", "test"), config, model, tokenizer, data, precision, log)
    stopped = fit(config, model, tokenizer, data, precision, state, log, total_steps)
    if stopped:
        log.close()
        print(f"stopped after update {state.step}; to go on: python train.py --resume {run}", file=sys.stderr)
        return 128 + stopped

    # What is judged and shown is the best model as it is on disk, not the last one in memory.
    del model, state.optimizer
    model = load_model(run / "best", tokenizer, precision.device)
    if not ties_hold(model):
        raise UserError(f"{run}/best: its output head came back untied from its embeddings")
    test = examine("after", state.best_step, ("test",), config, model, tokenizer, data, precision, log)
    log.close(config, {"best_eval_loss": state.best_loss, **({"test_loss": test["test"].loss} if test else {})})
    print(f"\n{total_steps} updates in {time.perf_counter() - began:.0f} s\n\n{report.summary(run)}")
    return 0


def examine(when, step, splits, config, model, tokenizer, data, precision, log):
    """Log a model's loss over splits and its answers "before" or "after" training; returns the evaluations by split."""
    results = {}
    for name in splits:
        examples = getattr(data, name).examples
        if examples:
            results[name] = evaluate(model, examples, tokenizer.pad_token_id, precision, config.micro_batch_tokens)
            log.write(name, step, results[name].report())
    log.write_answers(when, step, [answer(model, tokenizer, prompt, config.seed) for prompt in VIBE_PROMPTS])
    return results


def new_run(config):
    """The `Config` with its run directory: the one asked for, or `runs/<preset or dataset>-<time>`.

    Raises:
        UserError: it already holds a run, or cannot be written.
    """
    named = config.preset if config.dataset == PRESETS[config.preset]["dataset"] else Path(config.dataset).stem
    run = Path(config.output_dir or f"runs/{named}-{time.strftime('%Y%m%d-%H%M%S')}")
    if (run / "config.json").exists():
        raise UserError(f"--output-dir {run}: there is a run in it already; go on with --resume {run}, or name another")
    existing = next(parent for parent in (run, *run.absolute().parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"--output-dir {run}: {existing} is not a directory that can be written to")
    return dataclasses.replace(config, output_dir=str(run))


def resumed_run(run, named):
    """The `Config` and the newest checkpoint of a run to go on with; what only holds things in memory may change.

    Raises:
        UserError: there is no checkpoint, or a setting was named that would make it another run.
    """
    if not (run / "config.json").exists():
        raise UserError(f"--resume {run}: there is no run there")
    recorded = json.loads((run / "config.json").read_text())["config"]
    changed = [name for name, value in named.items() if name not in HELD_IN_MEMORY and value != recorded[name]]
    if changed:
        flags = ", ".join(f"--{name.replace('_', '-')} {recorded[name]} -> {named[name]}" for name in changed)
        raise UserError(f"--resume {run}: {flags} would make it another run; leave it out, or start a new run")
    if not checkpoints(run):
        raise UserError(f"--resume {run}: it has no checkpoint yet; start it anew with another --output-dir")
    return Config(**{**recorded, **named, "output_dir": str(run)}), checkpoints(run)[-1]


def main(argv):
    """`python train.py [flags]`; exit status 0 done, 1 error, 130 or 143 stopped by a signal after saving."""
    parser = Parser(prog="train.py", description="Fine-tune a causal language model on conversations.")
    parser.add_argument("--resume", metavar="RUN", help="go on with a run directory from its newest checkpoint")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop; nothing is written")
    parser.add_config_flags()
    named, options = parser.parse(argv)
    hub.quiet_libraries()
    if options["resume"]:
        config, checkpoint = resumed_run(Path(options["resume"]), named)
        print(f"resuming {config.output_dir} from {checkpoint.name}")
    else:
        preset, why = hub.choose_preset(named)
        config, checkpoint = new_run(resolve(named, preset)), None
        print(f"preset {preset} ({why}): {config.model} on {config.dataset}, into {config.output_dir}")
    return train(config, checkpoint, options["dry_run"])


if __name__ == "__main__":
    run_command(main)
