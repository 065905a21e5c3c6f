"""The checkpoints of a run: snapshot, write, manifest, rename, verify, prune; restoring.

    checkpoints/step-N/   complete or absent
        model/            an ordinary Hugging Face directory: weights, tokenizer, generation config; or PEFT's
        training.pt       everything else that resuming needs: AdamW's moments, the position, the random states
        MANIFEST.json     the size and SHA-256 of every file, the run's settings, and which step was the best so far
    best                  a relative link to the model/ of the best step, whose checkpoint is never pruned

There is one way to save, for one process and for many: rank 0 gathers what the ranks hold and writes it. On a CPU the
updates wait for that. On a GPU they go on while a thread writes the copy on the host, which takes 12 bytes of rank 0's
host memory for each parameter that is trained.
"""

import contextlib
import math
import pickle
import re
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch.distributed.checkpoint import state_dict

from compute.adapters import get_lora, trained_parameters
from compute.distributed import all_gather, broadcast_from_rank0, is_rank0, is_sharded, rank, world_size
from config import UserError
from evaluation.facts import run_facts
from model import save_model
from running.card import model_card
from storage.durable import CorruptError, atomic_directory, read_manifest, remove_directory, replace_file, replace_link

torch.serialization.set_crc32_options(False)  # slow, and the SHA-256 of the manifest notices more

MODEL, STATE, BEST = "model", "training.pt", "best"
PROGRESS = ("step", "evaluated", "best_step", "best_loss", "overflows")  # fields of `Run` that training.pt holds


# --- saving


def save(run):
    """Save a run as it is now. All ranks call this; rank 0 writes, in a thread where the run has a GPU.

    Raises:
        OSError, CorruptError: it could not be written or read back; older checkpoints are unchanged.
    """
    began = time.perf_counter()
    run.saver.wait()
    if not run.data.eval.examples:
        run.best_step = run.step
    if run.saver.saved == run.step:  # as a signal interrupted the evaluation that now finds it to be the best
        if is_rank0():
            card = checkpoint_path(run.directory, run.step) / MODEL / "README.md"
            if not card.exists():  # else the manifest has its SHA-256
                replace_file(card, model_card(run_facts(run.directory)))
            link_best(run.directory, run.best_step)
        return
    run.saver.start(run.step, write_checkpoint, run.model, run.tokenizer, *take_snapshot(run))
    seconds = time.perf_counter() - began
    run.saver.seconds += seconds
    run.log.draw_line("time", run.step, checkpoint=seconds)


def is_due(run):
    """True if a multiple of `save_every` has come since the last checkpoint, and none is being written now."""
    if run.step // run.save_every <= run.saver.started // run.save_every:
        return False
    return not broadcast_from_rank0(lambda: run.saver.writing is not None)


def take_snapshot(run):
    """The arguments of `write_checkpoint` on rank 0; what other ranks get is not used. All ranks call this."""
    weights, moments = gather_state(run.model, run.optimizer)
    run.log.sync()
    device = run.precision.device
    on_gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    state = {name: getattr(run, name) for name in PROGRESS} | {
        "optimizer": moments,
        "scaler": run.scaler.state_dict(),
        "log": run.log.state(),
        "random": all_gather((torch.get_rng_state(), on_gpu)),  # which dropout draws from
    }
    card = model_card(run_facts(run.directory)) if run.best_step == run.step and is_rank0() else ""
    return {"step": run.step, "best_step": run.best_step, **run.describe()}, weights, state, card


def gather_state(model, optimizer):
    """All weights, or those of adapters alone, and all moments by name, on rank 0's CPU; other ranks get none.

    On a CPU they may be the live ones.
    """
    is_adapted = get_lora(model) is not None
    options = state_dict.StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=is_adapted)
    weights = state_dict.get_model_state_dict(model, options=options)
    named_once = trained_parameters(model) if is_adapted else dict([*model.named_parameters(), *model.named_buffers()])
    moments = state_dict.get_optimizer_state_dict(model, optimizer, options=options).get("state", {})
    return {name: tensor for name, tensor in weights.items() if name in named_once}, moments


def write_checkpoint(model, tokenizer, about, weights, state, card):
    """Write `checkpoints/step-N`, verified on disk; then link the best model and prune older ones. Rank 0 does so.

    Args:
        about: the manifest's entries besides the files: the record of the run, its step and its best step.
        weights: tensors by name, on the CPU, tied ones once.
        state: the content of training.pt.
        card: the model card, where this is the best model so far, else "".
    """
    if not is_rank0():
        return
    directory = Path(about["config"]["output_dir"])
    with atomic_directory(checkpoint_path(directory, about["step"]), about) as checkpoint:
        save_model(model, tokenizer, checkpoint / MODEL, weights)
        if card:
            (checkpoint / MODEL / "README.md").write_text(card, encoding="utf-8")
        save_state(state, checkpoint / STATE)
    link_best(directory, about["best_step"])
    prune(directory, about["step"], about["config"]["keep"])


def save_state(state, path):
    """Write `training.pt`; raises `OSError` where the disk is full, say."""
    with open(path, "wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch hides the operating system's error, which says more
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def link_best(directory, best_step):
    """Let a run's `best` point to the model of a step, atomically; 0: there is no best model yet."""
    if best_step:
        replace_link(directory / BEST, checkpoint_path("", best_step) / MODEL)
    elif (directory / BEST).is_symlink():  # a directory is a copy that followed the link: all that is left of a model
        (directory / BEST).unlink()


def prune(directory, step, keep):
    """Remove a run's checkpoints up to `step`, but for the newest `keep` and the best model that each of them names."""
    done, best_steps = {each: path for each, path in list_checkpoints(directory).items() if each <= step}, {}
    for each, path in done.items():
        with contextlib.suppress(CorruptError):  # one that resuming has skipped
            best_steps[each] = read_manifest(path)["best_step"]
    kept = list(best_steps)[-keep:]
    for each, path in done.items():
        if each not in {*kept, *(best_steps[each] for each in kept)}:
            remove_directory(path)


class Saver:
    """Writes checkpoints one at a time, in a thread; a run on a CPU waits for it at once."""

    def __init__(self, in_background):
        self.in_background, self.thread = in_background, ThreadPoolExecutor(max_workers=1)
        self.writing: Future | None = None
        self.started = 0  # the step of the last checkpoint, which may still be being written
        self.saved = 0  # the step of the last one that is written and verified
        self.seconds = 0.0  # that the run waited for checkpoints

    def start(self, step, write, *arguments):
        """Call `write(*arguments)`, which writes the checkpoint of `step`."""
        self.started, self.writing = step, self.thread.submit(write, *arguments)
        if not self.in_background:
            self.wait()

    def check(self):
        """Raise what has failed since; nothing is waited for."""
        if self.writing and self.writing.done():
            self.wait()

    def wait(self):
        """Return when the last checkpoint is written, or raise what has failed."""
        if self.writing:
            writing, self.writing = self.writing, None
            writing.result()
            self.saved = self.started

    def close(self):
        """Return when nothing is being written any more, whatever came of it."""
        self.thread.shutdown()


# --- finding


def list_checkpoints(directory):
    """A run's checkpoint directories, by the number of updates before each, oldest first."""
    paths = [path for path in (Path(directory) / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return dict(sorted((int(path.name.removeprefix("step-")), path) for path in paths))


def checkpoint_path(directory, step):
    """The directory of a run's checkpoint after `step` updates."""
    return Path(directory) / "checkpoints" / f"step-{step}"


# --- restoring


def restore(run, start):
    """Load `training.pt` into a run whose model is that of the same `ResumePoint`. All ranks call this."""
    path = start.path / STATE
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_sharded(run.model))
    except pickle.UnpicklingError as error:
        raise UserError(f"{path}: it holds more than tensors and numbers; do not trust it") from error
    for name in PROGRESS:
        setattr(run, name, state[name])
    if start.best_is_lost:
        run.best_step, run.best_loss, run.evaluated = 0, math.inf, 0
    run.log_state = state["log"]
    run.saver.started = run.saver.saved = run.step
    # The optimizer's settings are the run's own: the user may have changed them.
    optimizer = state_dict.get_optimizer_state_dict(run.model, run.optimizer) | {"state": state["optimizer"]}
    options = state_dict.StateDictOptions(full_state_dict=True, strict=False)
    state_dict.set_optimizer_state_dict(run.model, run.optimizer, optimizer, options=options)
    for name, weights in run.model.named_parameters():
        if name not in state["optimizer"]:  # no update has reached it: torch's function has made moments of zeros
            run.optimizer.state.pop(weights, None)
    if state["scaler"] and run.scaler.is_enabled():
        run.scaler.load_state_dict(state["scaler"])
    if len(state["random"]) != world_size():  # another number of ranks draws other numbers anyway: new ones
        torch.manual_seed(hash((run.config.seed, run.step, rank())))
        return
    on_cpu, on_gpu = state["random"][rank()]
    torch.set_rng_state(on_cpu)
    if on_gpu is not None and run.precision.device.type == "cuda":
        torch.cuda.set_rng_state(on_gpu, run.precision.device)
