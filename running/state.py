"""A run: all that it has in hand, and its state on disk."""

import contextlib
import math
import pickle
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import report
from checkpoint import Damaged, checkpoint_at, copy_directory, save_checkpoint, save_directory, verify
from config import Config, UserError
from data import Data, windows_per_epoch
from layout import Layout
from model import Precision, save_model

torch.serialization.set_crc32_options(False)  # slow, and the manifest's SHA-256 notices more

STATE = "training.pt"  # in a checkpoint: all that resuming needs beside the weights
BEST = "best"  # in a run's directory the best model so far; in a checkpoint too, where it is not the checkpoint's own
COUNTED = ("step", "evaluated", "best_step", "best_loss", "overflows", "log_lines")  # of a Run, in that file


@dataclass
class Run:
    """All that a run has in hand."""

    config: Config
    precision: Precision
    layout: Layout
    tokenizer: PreTrainedTokenizerBase
    data: Data
    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    log: report.Log | None = None
    step: int = 0  # updates done: the whole position in training; epoch and window are arithmetic on it
    evaluated: int = 0  # the step of the last evaluation
    best_step: int = 0
    best_loss: float = math.inf
    overflows: int = 0  # fp16 gradients left out so far
    log_lines: int = 0  # of the metrics, when the last checkpoint was written
    saved: int = 0  # the step of the last checkpoint
    seconds_saving: float = 0.0  # checkpoints
    changes: list = field(default_factory=list)  # made on purpose when the run went on, for its record
    resumed_from: int | None = None  # the step of the checkpoint that this process began with

    @property
    def directory(self):
        return Path(self.config.output_dir)

    @property
    def total_steps(self):
        per_epoch = windows_per_epoch(len(self.data.train.examples), self.config.batch_size)
        return self.config.max_steps or self.config.epochs * per_epoch

    @property
    def described(self):
        return report.describe(self.config, self.precision, self.data)


def save(run):
    """Write a checkpoint: a model directory, the best model so far, and all else that resuming needs."""
    with timed(run, "checkpoint"):
        run.log.sync()
        about = {"step": run.step, **run.described}
        save_checkpoint(run.directory, about, lambda path: write_state(run, path), run.config.keep, run.resumed_from)
        run.saved = run.step


def save_best(run):
    """Make `best/` the model as it is now."""
    with timed(run, "best"):
        about = {"step": run.step, **run.described}
        save_directory(run.directory / BEST, about, lambda path: save_model(run.model, run.tokenizer, path))


@contextlib.contextmanager
def timed(run, what):
    """Log the seconds that saving something takes, as `time/what`, and count them."""
    began = time.perf_counter()
    yield
    seconds = time.perf_counter() - began
    run.seconds_saving += seconds
    run.log.draw_numbers("time", run.step, **{what: seconds})


def write_state(run, directory):
    """Fill the directory of a checkpoint: the models in one thread, the rest in another."""
    run.log_lines = run.log.lines
    state = {name: getattr(run, name) for name in COUNTED} | {
        "optimizer": run.optimizer.state_dict()["state"],  # not its settings, which are the run's
        "scaler": run.scaler.state_dict(),
        "random": torch.get_rng_state(),
        "random_cuda": torch.cuda.get_rng_state_all(),
    }
    with ThreadPoolExecutor() as threads, open(directory / STATE, "wb") as file:
        models = threads.submit(write_models, run, directory)
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch's words for what the file's own error says better
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None
        models.result()


def write_models(run, directory):
    """Write the model, and in `best/` the best one where that is another."""
    best = run.directory / BEST
    if run.best_step == run.step:
        copy_directory(best, directory)
        return
    save_model(run.model, run.tokenizer, directory)
    if run.best_step:
        verify(best)  # so that no damage to it is copied
        copy_directory(best, directory / BEST)


def restore(run, checkpoint):
    """Take up what `write_state` wrote, but for the weights, which the model was loaded with.

    Raises:
        UserError: it holds what is no tensor, number or text, and might be a program; nothing of it was run.
    """
    try:
        state = torch.load(checkpoint / STATE, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{checkpoint / STATE}: it holds more than tensors and numbers; do not trust it") from error
    for name in COUNTED:
        setattr(run, name, state[name])
    run.saved = run.resumed_from = run.step
    run.optimizer.load_state_dict({**run.optimizer.state_dict(), "state": state["optimizer"]})
    if state["scaler"] and run.scaler.is_enabled():
        run.scaler.load_state_dict(state["scaler"])
    torch.set_rng_state(state["random"])
    if len(state["random_cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["random_cuda"])


def ensure_best(run):
    """Make `best/` again from the last checkpoint, where it is damaged or the best of updates that were taken back.

    Raises:
        Damaged: the checkpoint is, too, or is older than the best model; resuming the run will make it again.
    """
    best, checkpoint = run.directory / BEST, checkpoint_at(run.directory, run.saved)
    try:
        if verify(best)["step"] == run.best_step:
            return
    except Damaged as why:
        if run.best_step > run.saved:
            raise
        print(f"{best} is made again: {why}", file=sys.stderr)
    verify(checkpoint)
    source = checkpoint if run.best_step == run.saved else checkpoint / BEST
    about = {"step": run.best_step, **run.described}
    save_directory(best, about, lambda path: copy_directory(source, path, without=[STATE]))
