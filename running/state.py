"""A run: its settings, data, model and optimizer in memory, and its state in checkpoints."""

import contextlib
import copy
import math
import pickle
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compute.layout import Layout
from compute.processes import gathered, is_first, rank, world_size
from compute.sharding import is_sharded, part_like, whole_in_first
from config import Config, UserError
from data import Data, windows_per_epoch
from evaluation.facts import run_facts
from model import Precision, put_together, save_model, saved_tensors, with_weights
from running.background import Background, copies_made, on_host, saves_in_background
from running.card import model_card
from running.checkpoints import checkpoint_at, remove_older, save_checkpoint
from running.metrics import Log
from running.shards import agreed, index_of, is_large, read_tensors, save_directory_together, write_tensors
from storage.durable import Damaged, copy_directory, save_directory, verify
from storage.records import describe

torch.serialization.set_crc32_options(False)  # slow, and the manifest's SHA-256 notices more

STATE = "training.pt"  # in a checkpoint: everything that resuming needs except the weights
MOMENTS = "moments"  # in a large checkpoint: the stem of the files that the optimizer's moments are in
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
    begun: int = 0  # the step of the last checkpoint, which may still be being written
    saved: int = 0  # the step of the last one that is written and verified
    background: Background = field(default_factory=Background)  # in which a GPU's run is written
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
        return describe(self.config, self.precision, self.data) | device


def save(run):
    """Write a checkpoint: a model directory, the best model so far, and everything else that resuming needs."""
    with timed(run, "checkpoint"):
        run.begun = run.step
        random, about = gathered(random_state(run.precision.device)), {"step": run.step, **run.described}
        if is_large(run.model):
            run.background.wait()
            save_large(run, about, random)
            run.saved = run.step
            return
        model, moments = put_together(run.model), moments_of(run.optimizer)
        if not is_first():
            run.saved = run.step
            return
        run.log.sync()
        as_it_is, state = copy.copy(run), state_of(run, moments, random)

        def write(model, state):
            save_checkpoint(
                as_it_is.directory,
                about,
                lambda path: write_state(as_it_is, path, model, state),
                as_it_is.config.keep,
                as_it_is.resumed_from,
            )

        write_meanwhile(run, write, model, state, then=lambda: setattr(run, "saved", as_it_is.step))


def write_meanwhile(run, write, model, state=None, then=lambda: None):
    """Call `write(model, state)`, then `then()`; on a GPU in the background, with a copy of both as they are now.

    Args:
        model: of weights that no other process shares.
        state: what `state_of` returns.
    """
    device = run.precision.device
    if not saves_in_background(device):
        write(model, state)
        then()
        return
    run.background.wait()
    if model is run.model:
        weights = [*model.named_parameters(), *model.named_buffers()]
        model = with_weights(model, {name: on_host(tensor) for name, tensor in weights})
    if state:
        moments = {
            number: {name: on_host(value) for name, value in of.items()} for number, of in state["optimizer"].items()
        }
        state = {**state, "optimizer": moments}
    wait_for_copies = copies_made(device)

    def work():
        wait_for_copies()
        write(model, state)

    run.background.write(work, then)


def random_state(device):
    """The state of this process' random numbers, which dropout draws: of the processor, and of its GPU."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def save_best(run):
    """Make `best/` the model as it is now."""
    with timed(run, "best"):
        about, path = {"step": run.step, **run.described}, run.directory / BEST
        card = model_card(run_facts(run.directory)) if is_first() else None

        def write_rest_of(model, directory, weights):
            save_model(model, run.tokenizer, directory, weights)
            (directory / "README.md").write_text(card, encoding="utf-8")

        def write_large(directory):
            own = write_tensors(saved_tensors(run.model), directory, "model")
            if is_first():
                write_rest_of(run.model, directory, weights=False)
            return own

        if is_large(run.model):
            save_directory_together(path, about, write_large)
            return
        model = put_together(run.model)
        if is_first():
            write_meanwhile(
                run,
                lambda model, _: save_directory(path, about, lambda directory: write_rest_of(model, directory, True)),
                model,
            )


def moments_of(optimizer):
    """The state of an optimizer, not its settings, which are the run's; all of it is in the first process."""
    state = optimizer.state_dict()["state"]
    if not any(isinstance(value, DTensor) for moments in state.values() for value in moments.values()):
        return state
    return {
        number: {name: whole_in_first(value) for name, value in moments.items()} for number, moments in state.items()
    }


@contextlib.contextmanager
def timed(run, what):
    """Log the seconds that saving something takes, as `time/what`, and count them."""
    began = time.perf_counter()
    yield
    seconds = time.perf_counter() - began
    run.seconds_saving += seconds
    run.log.add_points(run.step, {f"time/{what}": seconds})


def state_of(run, moments, random):
    """What `training.pt` holds: all that resuming needs but the weights, as it is now.

    Args:
        moments: all of them, as `moments_of` gives them.
        random: the `random_state` of each process.
    """
    return {name: getattr(run, name) for name in COUNTED} | {
        "optimizer": moments,
        "scaler": run.scaler.state_dict(),
        "log": copy.deepcopy(run.log.state()),
        "random": random,
    }


def write_state(run, directory, model, state):
    """Fill the directory of a checkpoint: the models in one thread, the rest in another."""
    with ThreadPoolExecutor() as threads:
        models = threads.submit(write_models, run, model, directory)
        write_rest(directory, state)
        models.result()


def write_rest(directory, state):
    """Write all of a checkpoint that is no model."""
    with open(directory / STATE, "wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch's words for what the file's own error says better
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def write_models(run, model, directory, weights=True):
    """Write the model, and in `best/` the best one where that is another.

    Args:
        weights: whether to write the model's own, too.
    """
    best = run.directory / BEST
    if run.best_step == run.step:
        copy_directory(best, directory)
        return
    save_model(model, run.tokenizer, directory, weights)
    if run.best_step:
        verify(best)  # so that no damage to it is copied
        copy_directory(best, directory / BEST)


def save_large(run, about, random):
    """Write a checkpoint with all processes; the weights and moments are safetensors under the names of the weights."""
    names = {weights: name for name, weights in run.model.named_parameters()}
    all_weights = [weights for group in run.optimizer.param_groups for weights in group["params"]]
    shared, others = {}, {}
    for number, of in run.optimizer.state_dict()["state"].items():
        for name, value in of.items():
            if isinstance(value, DTensor):
                shared[f"{name}.{names[all_weights[number]]}"] = value
            else:
                others.setdefault(number, {})[name] = value

    def write(directory):
        own = write_tensors(shared, directory, MOMENTS)
        if run.best_step != run.step:
            own += write_tensors(saved_tensors(run.model), directory, "model")
        if is_first():
            write_models(run, run.model, directory, weights=False)
            write_rest(directory, state_of(run, others, random))
        return own

    agreed(run.log.sync)
    save_directory_together(checkpoint_at(run.directory, run.step), about, write)
    agreed(lambda: is_first() and remove_older(run.directory, run.step, run.config.keep, run.resumed_from))


def restore(run, checkpoint):
    """Load what `write_state` wrote, except the weights, which the model was loaded with.

    Raises:
        UserError: it holds more than tensors, numbers and texts; nothing of it was executed.
    """
    try:
        state = torch.load(checkpoint / STATE, map_location="cpu", weights_only=True, mmap=is_sharded(run.model))
    except pickle.UnpicklingError as error:
        raise UserError(f"{checkpoint / STATE}: it holds more than tensors and numbers; do not trust it") from error
    for name in COUNTED:
        setattr(run, name, state[name])
    run.begun = run.saved = run.resumed_from = run.step
    run.logged = state["log"]
    all_weights = [weights for group in run.optimizer.param_groups for weights in group["params"]]
    moments = {
        number: {name: part_like(value, all_weights[number]) for name, value in of.items()}
        for number, of in state["optimizer"].items()
    }
    if index_of(checkpoint, MOMENTS).exists():  # of a large checkpoint
        numbers = {weights: number for number, weights in enumerate(all_weights)}
        by_name = {name: numbers[weights] for name, weights in run.model.named_parameters()}
        for full_name, value in read_tensors(checkpoint, MOMENTS):
            name, of = full_name.split(".", 1)
            moments[by_name[of]][name] = part_like(value, all_weights[by_name[of]]).clone()  # the file may vanish
    run.optimizer.load_state_dict({**run.optimizer.state_dict(), "state": moments})
    if state["scaler"] and run.scaler.is_enabled():
        run.scaler.load_state_dict(state["scaler"])
    # Under another number of processes, dropout draws others anyway: new ones, that no process has drawn before.
    if len(state["random"]) != world_size():
        torch.manual_seed(hash((run.config.seed, run.step, rank())))
        return
    on_cpu, on_gpu = state["random"][rank()]
    torch.set_rng_state(on_cpu)
    if on_gpu is not None and run.precision.device.type == "cuda":
        torch.cuda.set_rng_state(on_gpu, run.precision.device)


def ensure_best(run):
    """Restore `best/` from the last checkpoint, where it is damaged or is the best of updates that were discarded.

    Raises:
        Damaged: the checkpoint is damaged, too, or is older than the best model; resuming the run repairs that.
    """
    run.background.wait()
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
    save_directory(best, about, lambda path: copy_directory(source, path, without=[STATE, f"{MOMENTS}*"]))
