"""A run: its settings, data, model and optimizer in memory, and its state in checkpoints."""

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

from compute.layout import Layout
from config import Config, UserError
from data import Data, windows_per_epoch
from model import Precision, save_model
from running import report
from running.checkpoints import checkpoint_at, save_checkpoint
from running.metrics import Log
from storage.durable import Damaged, copy_directory, save_directory, verify

torch.serialization.set_crc32_options(False)  # slow, and the manifest's SHA-256 notices more

STATE = "training.pt"  # in a checkpoint: everything that resuming needs except the weights
BEST = "best"  # in a run's directory the best model so far; in a checkpoint too, where it is not the checkpoint's own
COUNTED = ("step", "evaluated", "best_step", "best_loss", "overflows")  # of a Run, in that file


@dataclass
class Run:
    """Everything a run works with, and its position."""

    config: Config
    precision: Precision
    layout: Layout
    tokenizer: PreTrainedTokenizerBase
    data: Data
    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    log: Log | None = None
    step: int = 0  # updates done: the position in training; epoch and window are arithmetic on it
    evaluated: int = 0  # the step of the last evaluation
    best_step: int = 0
    best_loss: float = math.inf
    overflows: int = 0  # updates skipped so far because fp16 gradients overflowed
    logged: dict = field(default_factory=dict)  # the log's state in the checkpoint that was resumed from
    saved: int = 0  # the step of the last checkpoint
    seconds_saving: float = 0.0  # checkpoints
    changes: list = field(default_factory=list)  # of settings, made on purpose when the run was resumed
    resumed_from: int | None = None  # the step of the checkpoint that this process resumed from

    @property
    def directory(self):
        return Path(self.config.output_dir)

    @property
    def total_steps(self):
        per_epoch = windows_per_epoch(len(self.data.train.examples), self.config.batch_size)
        return self.config.max_steps or self.config.epochs * per_epoch

    @property
    def described(self):
        device = {"device": self.precision.describe(), "micro_batch_tokens": self.layout.tokens}
        return report.describe(self.config, self.precision, self.data) | device


def save(run):
    """Write a checkpoint: a model directory, the best model so far, and everything else that resuming needs."""
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
    run.log.add_scalars("time", run.step, **{what: seconds})


def write_state(run, directory):
    """Fill the directory of a checkpoint: the models in one thread, the rest in another."""
    state = {name: getattr(run, name) for name in COUNTED} | {
        "optimizer": run.optimizer.state_dict()["state"],  # not its settings, which are the run's
        "scaler": run.scaler.state_dict(),
        "log": run.log.state(),
        "random": torch.get_rng_state(),
        "random_cuda": torch.cuda.get_rng_state(run.precision.device) if on_gpu(run) else None,
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
    """Load what `write_state` wrote, except the weights, which the model was loaded with.

    Raises:
        UserError: it holds more than tensors, numbers and texts; nothing of it was executed.
    """
    try:
        state = torch.load(checkpoint / STATE, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{checkpoint / STATE}: it holds more than tensors and numbers; do not trust it") from error
    for name in COUNTED:
        setattr(run, name, state[name])
    run.saved = run.resumed_from = run.step
    run.logged = state["log"]
    run.optimizer.load_state_dict({**run.optimizer.state_dict(), "state": state["optimizer"]})
    if state["scaler"] and run.scaler.is_enabled():
        run.scaler.load_state_dict(state["scaler"])
    torch.set_rng_state(state["random"])
    if state["random_cuda"] is not None and on_gpu(run):
        torch.cuda.set_rng_state(state["random_cuda"], run.precision.device)


def on_gpu(run):
    return run.precision.device.type == "cuda"


def ensure_best(run):
    """Restore `best/` from the last checkpoint, where it is damaged or is the best of updates that were discarded.

    Raises:
        Damaged: the checkpoint is damaged, too, or is older than the best model; resuming the run repairs that.
    """
    best, checkpoint = run.directory / BEST, checkpoint_at(run.directory, run.saved)
    try:
        if verify(best)["step"] == run.best_step:
            return
    except Damaged as why:
        if run.best_step > run.saved:
            raise
        print(f"{best} is restored: {why}", file=sys.stderr)
    verify(checkpoint)
    source = checkpoint if run.best_step == run.saved else checkpoint / BEST
    about = {"step": run.best_step, **run.described}
    save_directory(best, about, lambda path: copy_directory(source, path, without=[STATE]))
