"""Supervised fine-tuning of a causal language model on conversations: the whole loop, to be read top to bottom.

One idea: an update is defined by its window, the `--batch-size` conversations it sees. Its gradient is that of

    sum of the token losses over the window's supervised tokens / number of those tokens

and how the window is cut into micro-batches changes memory and speed, never the result.

    python train.py --epochs 2 --lr 2e-4
"""

import contextlib
import dataclasses
import math
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import hub
import report
from chat import load_tokenizer
from checkpoint import checkpoints, replace_directory, save_checkpoint, step_of
from config import (
    HELD_IN_MEMORY,
    PRESETS,
    Config,
    Parser,
    UserError,
    flag_name,
    recorded_settings,
    resolve,
    run_command,
    shown,
)
from data import Data, collate, micro_batches, prepare, window_at, windows_per_epoch
from eval import VIBE_PROMPTS, answer, evaluate
from model import Precision, choose_precision, load_model, save_model, supervised_logits, ties_hold, token_loss


@dataclass
class Run:
    """All that a run has in hand."""

    config: Config
    precision: Precision
    tokenizer: PreTrainedTokenizerBase
    data: Data
    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    log: report.Log | None = None
    step: int = 0  # updates done: the whole position in training; epoch and window are arithmetic on it
    best_step: int = 0
    best_loss: float = math.inf

    @property
    def directory(self):
        return Path(self.config.output_dir)

    @property
    def total_steps(self):
        per_epoch = windows_per_epoch(len(self.data.train.examples), self.config.batch_size)
        return self.config.max_steps or self.config.epochs * per_epoch


def train_step(model, optimizer, window, lr, *, precision, scaler, pad_id, micro_batch_tokens, max_grad_norm):
    """One update: the gradient of the mean token loss over a window of examples, clipped and applied.

    Returns:
        The numbers worth logging; None where fp16 gradients overflowed: nothing was applied, the scaler has lowered
        its scale, and the window wants to be seen again.

    Raises:
        FloatingPointError: the loss or the gradient is not finite; nothing was applied.
        ValueError: no token of the window is supervised.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    tokens = sum(example.supervised_tokens for example in window)
    if tokens == 0:
        raise ValueError("nothing is supervised in this window: it has no mean loss")
    loss_sum = 0.0
    for micro_batch in micro_batches(window, micro_batch_tokens):
        batch = collate(micro_batch, pad_id, precision.device)
        with precision.autocast():
            micro_loss_sum = token_loss(*supervised_logits(model, batch))
        scaler.scale(micro_loss_sum / tokens).backward()
        loss_sum += micro_loss_sum.detach()
    scaler.unscale_(optimizer)
    grad_norm = clip_grad_norm_(model.parameters(), max_grad_norm or math.inf).item()
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
        "tokens": sum(len(example.input_ids) for example in window),
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
    """The loop: updates from `run.step` on, and what happens between them; ends early once there are `signals`."""
    config, examples = run.config, run.data.train.examples
    per_epoch = windows_per_epoch(len(examples), config.batch_size)
    step_settings = {
        "precision": run.precision,
        "scaler": run.scaler,
        "pad_id": run.tokenizer.pad_token_id,
        "micro_batch_tokens": config.micro_batch_tokens,
        "max_grad_norm": config.max_grad_norm,
    }
    run.model.train()
    # disable=None: a bar only on a terminal
    with tqdm(total=run.total_steps, initial=run.step, unit="update", disable=None) as progress:
        while run.step < run.total_steps and not signals:
            began = time.perf_counter()
            window = window_at(run.step, examples, config.batch_size, config.seed)
            lr = learning_rate(run.step, config.lr, config.warmup_steps, run.total_steps)
            try:
                numbers = train_step(run.model, run.optimizer, window, lr, **step_settings)
            except FloatingPointError as error:
                raise UserError(f"update {run.step + 1}: {error}; see {run.directory}/checkpoints") from error
            if numbers is None:
                continue
            run.step += 1
            numbers["tokens_per_second"] = numbers["tokens"] / (time.perf_counter() - began)
            numbers["epoch"] = run.step / per_epoch
            progress.update()
            progress.set_postfix_str(f"loss {numbers['loss']:.3f}, {numbers['tokens_per_second']:,.0f} tokens/s")
            if run.step % config.log_every == 0:
                run.log.write("train", run.step, numbers)
            if run.step % config.eval_every == 0 or run.step == run.total_steps:
                evaluate_and_keep_best(run)
            if run.step % config.save_every == 0:
                save(run)


def evaluate_and_keep_best(run):
    """Log the loss over the eval split; the model with the lowest so far becomes the run's `best/`."""
    result = log_evaluation(run, "eval", run.step)
    is_best = result.loss < run.best_loss
    tqdm.write(f"  update {run.step:>5}   eval loss {result.loss:.4f}{'   best so far' if is_best else ''}")
    if is_best:
        run.best_step, run.best_loss = run.step, result.loss
        replace_directory(run.directory / "best", lambda path: save_model(run.model, run.tokenizer, path))


def log_evaluation(run, split, step):
    """Evaluate the run's model over its "eval" or "test" split and log that under `step`."""
    examples, tokens = getattr(run.data, split).examples, run.config.micro_batch_tokens
    result = evaluate(run.model, examples, run.tokenizer.pad_token_id, run.precision, tokens)
    run.log.write(split, step, result.report())
    return result


def examine(run, when, step):
    """Log what a model can do "before" or "after" training: its loss over the test split, and its answers."""
    if run.data.test.examples:
        log_evaluation(run, "test", step)
    answers = [answer(run.model, run.tokenizer, prompt, run.config.seed) for prompt in VIBE_PROMPTS]
    run.log.write_answers(when, step, answers)


def save(run):
    """Write a checkpoint: a model directory, and all else that resuming needs in a `training.pt` beside the weights."""

    def write(directory):
        save_model(run.model, run.tokenizer, directory)
        state = {
            "step": run.step,
            "best_step": run.best_step,
            "best_loss": run.best_loss,
            "optimizer": run.optimizer.state_dict(),
            "scaler": run.scaler.state_dict(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all(),
        }
        torch.save(state, directory / "training.pt")

    save_checkpoint(run.directory, run.step, write, run.config.keep)


def restore(run, checkpoint):
    """Take up what `save` wrote, but for the weights, which the model was loaded with."""
    state = torch.load(checkpoint / "training.pt", map_location="cpu", weights_only=True)
    run.step, run.best_step, run.best_loss = state["step"], state["best_step"], state["best_loss"]
    run.optimizer.load_state_dict(state["optimizer"])
    run.scaler.load_state_dict(state["scaler"])
    torch.set_rng_state(state["random"])
    if len(state["random_cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["random_cuda"])


@contextlib.contextmanager
def signals_noted():
    """A list in which SIGINT and SIGTERM are noted, so that the update under way ends well; a second one kills."""
    noted = []

    def note(number, _frame):
        noted.append(number)
        signal.signal(number, signal.SIG_DFL)
        print("stopping after what is under way; once more to leave at once", file=sys.stderr)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def set_up(config, checkpoint):
    """A `Run` ready to go: everything loaded, from the checkpoint where there is one; nothing written yet."""
    precision = choose_precision(config.device, config.dtype)
    path, local_files_only = hub.find_model(config.model)
    tokenizer = load_tokenizer(path, local_files_only, config.chat_template)
    data = prepare(config, tokenizer)
    model = load_model(checkpoint or path, tokenizer, precision.device, local_files_only)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = make_optimizer(model, config.weight_decay)
    run = Run(config, precision, tokenizer, data, model, optimizer, precision.grad_scaler())
    torch.manual_seed(config.seed)
    if checkpoint:
        restore(run, checkpoint)
    return run


def train(config, checkpoint=None, dry_run=False):
    """A whole run, from settings to summary; with a checkpoint, the rest of one. Returns the exit status."""
    began = time.perf_counter()
    run = set_up(config, checkpoint)
    print(report.plan(config, run.data, run.model, run.precision, run.total_steps))
    if dry_run:
        return 0
    with signals_noted() as signals:
        if not checkpoint:
            run.directory.mkdir(parents=True, exist_ok=True)
            report.write_config(run.directory, config, run.data)
        run.log = report.Log(run.directory, run.step)
        if not checkpoint:
            log_evaluation(run, "eval", 0)
            examine(run, "before", 0)
        fit(run, signals)
        stopped_by = signals[0] if signals else 0
        if stopped_by and run.step not in map(step_of, checkpoints(run.directory)):
            save(run)
    if stopped_by:
        run.log.close()
        print(f"stopped after update {run.step}; to go on: python train.py --resume {run.directory}", file=sys.stderr)
        return 128 + stopped_by
    finish(run)
    print(f"\n{run.total_steps} updates, {time.perf_counter() - began:.0f} s\n\n{report.summary(run.directory)}")
    return 0


def finish(run):
    """Judge the best model as it is on disk, not the last one in memory: its test loss and its answers."""
    run.optimizer = run.model = None  # room for it
    run.model = load_model(run.directory / "best", run.tokenizer, run.precision.device)
    if not ties_hold(run.model):
        raise UserError(f"{run.directory}/best: its output head came back untied from its embeddings")
    examine(run, "after", run.best_step)
    run.log.close(run.config, {"best_eval_loss": run.best_loss})


def new_run(config):
    """The `Config` with its run directory: the one asked for, or `runs/<preset or dataset>-<time>`.

    Raises:
        UserError: it already holds a run, or cannot be written.
    """
    name = config.preset if config.dataset == PRESETS[config.preset]["dataset"] else Path(config.dataset[0]).stem
    directory = Path(config.output_dir or f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}")
    if (directory / "config.json").exists():
        raise UserError(f"--output-dir {directory}: it holds a run already; --resume {directory}, or name another")
    existing = next(parent for parent in (directory, *directory.absolute().parents) if parent.exists())
    try:
        tempfile.TemporaryDirectory(dir=existing).cleanup()
    except OSError as error:
        raise UserError(f"--output-dir {directory}: cannot write to {existing} ({error.strerror})") from error
    return dataclasses.replace(config, output_dir=str(directory))


def resumed_run(directory, named):
    """The `Config` and the newest checkpoint of a run to go on with; only what holds things in memory may change.

    Raises:
        UserError: there is no checkpoint, or a setting was named that would make it another run.
    """
    if not (directory / "config.json").exists():
        raise UserError(f"--resume {directory}: there is no run there")
    recorded = recorded_settings(directory)
    changed = [name for name, value in named.items() if name not in HELD_IN_MEMORY and value != recorded[name]]
    if changed:
        flags = ", ".join(f"{flag_name(name)} {shown(recorded[name])} -> {shown(named[name])}" for name in changed)
        raise UserError(f"--resume {directory}: {flags} would make it another run; leave that out, or start anew")
    newest = max(checkpoints(directory), key=step_of, default=None)
    if newest is None and not report.is_finished(directory):
        raise UserError(f"--resume {directory}: it has no checkpoint yet; remove it and start anew")
    config = resolve({**recorded, **named, "output_dir": str(directory)}, recorded["preset"])
    return config, newest


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
        if report.is_finished(config.output_dir):
            print(f"{config.output_dir} is finished already\n\n{report.summary(config.output_dir)}")
            return 0
        print(f"resuming {config.output_dir} from {checkpoint.name}")
    else:
        preset, why = hub.choose_preset(named)
        config, checkpoint = new_run(resolve(named, preset)), None
        print(f"preset {preset} ({why}): {config.model} on {shown(config.dataset)}, into {config.output_dir}")
    return train(config, checkpoint, options["dry_run"])


if __name__ == "__main__":
    run_command(main)
