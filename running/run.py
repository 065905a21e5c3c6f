"""A run in memory: its settings, data, model and optimizer, and its position in training."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compute.distributed import is_rank0, world_size
from compute.layers import list_extra_losses
from compute.layout import Layout
from config import Config, count_updates
from data import Data, windows_per_epoch
from model import Precision
from running.checkpoint import Saver, link_best
from running.metrics import Log, NullLog
from storage.durable import replace_file
from storage.records import describe


@dataclass
class Run:
    """Everything that a run works with, and its position in training."""

    config: Config
    precision: Precision
    layout: Layout
    tokenizer: PreTrainedTokenizerBase
    data: Data
    model: PreTrainedModel
    optimizer: torch.optim.Optimizer | None = None
    scaler: torch.amp.GradScaler | None = None
    log: Log | None = None
    eval_every: int = 1  # updates between two evaluations
    save_every: int = 1  # and between two checkpoints
    base: dict | None = None  # the model that training started from, as `storage.adapter.describe_base` describes it
    commits: dict = field(default_factory=dict)  # of what is on the Hub: {"model": {name: commit}, "dataset": {…}}
    step: int = 0  # updates done; epoch, window and learning rate are arithmetic on it
    evaluated: int = 0  # the step of the last evaluation
    best_step: int = 0
    best_loss: float = math.inf  # on the eval split, at best_step
    overflows: int = 0  # updates skipped so far because fp16 gradients overflowed
    log_state: dict = field(default_factory=dict)  # of the checkpoint that was resumed from
    changes: list = field(default_factory=list)  # of settings and data, allowed by the user when it was resumed
    resumed: list = field(default_factory=list)  # with other versions or on another machine, and what differed
    saver: Saver = field(init=False)

    def __post_init__(self):
        self.saver = Saver(in_background=self.precision.device.type == "cuda")

    @property
    def directory(self):
        return Path(self.config.output_dir)

    @property
    def steps_per_epoch(self):
        return windows_per_epoch(len(self.data.train.examples), self.config.batch_size)

    @property
    def tokens_per_update(self):
        """The mean tokens of a window."""
        return self.data.train.tokens / self.steps_per_epoch

    @property
    def total_steps(self):
        return self.config.max_steps or self.config.epochs * self.steps_per_epoch

    @property
    def warmup_steps(self):
        return count_updates(self.config.warmup_steps, self.total_steps)

    @property
    def decay_steps(self):
        """The updates in which the schedule "wsd" decays."""
        return count_updates(self.config.decay_fraction, self.total_steps)

    def open(self):
        """Begin to write in the run's directory: rank 0 records what the run is, and opens its log."""
        self.log = NullLog()
        if is_rank0():
            record = {**self.describe(), "changes": self.changes, "resumed": self.resumed}
            replace_file(self.directory / "config.json", json.dumps(record, indent=2) + "\n")
            link_best(self.directory, self.best_step)
            self.log = Log(self.directory, self.step, **self.log_state)

    def describe(self):
        """The record of the run in `config.json` and in a checkpoint's manifest, a dict of JSON values."""
        decided = {"device": self.precision.describe(), "micro_batch_tokens": self.layout.tokens}
        decided |= {"layout": self.layout.record(), "losses_left_out": list_extra_losses(self.model)}
        processor = f"{torch.cpu.get_capabilities().get('cpu_name')} ({torch.backends.cpu.get_cpu_capability()})"
        decided |= {"processor": processor, "processes": world_size(), "base": self.base}
        decided |= {"commits": self.commits, "eval_every": self.eval_every, "save_every": self.save_every}
        return describe(self.config, self.precision, self.data) | decided
