"""The start of a run: data, tokenizer and model, loaded, checked and measured."""

import dataclasses
import os

import torch

from compute.distributed import all_gather, broadcast_from_rank0, rank
from compute.memory import check_model_fits, keep_freed_memory
from compute.self_check import choose_layout
from config import TEMPLATE_SETTINGS, resolve, with_absolute_paths
from conversations.sources import check_sources
from conversations.tokenizer import load_tokenizer
from data import load_data
from model import choose_precision, load_on_ranks, token_loss
from running.resume import check_same_run, get_recorded_measurements
from running.run import Run
from storage import hub
from storage.records import describe


def choose_config(named):
    """The `Config` of a new run, of the settings that the user named and a preset's; and why it is that preset."""
    preset, why = broadcast_from_rank0(hub.choose_preset, named)
    return resolve(with_absolute_paths(named), preset), why


def load_run(config, start=None, allow_changes=False):
    """A `Run` at step 0, without an optimizer, with the model of a `ResumePoint` if there is one; writes nothing."""
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it is first used
    check_sources(config)  # before a model is downloaded for data that is not there
    precision = choose_precision(config.device, config.dtype)
    if precision.device.type == "cpu":
        keep_freed_memory()
    path, local_files_only, tokenizer = load_run_tokenizer(config, start)
    data = load_data(config, tokenizer)
    changes = []
    if start:
        described = describe(config, precision, data)
        changed = check_same_run(config.output_dir, start.described, described, allow_changes)
        changes = [{"step": start.described.get("step", 0), "changed": changed}] if changed else []
    longest = max(split.longest for split in data.splits.values())
    if precision.device.type == "cuda":
        check_model_fits(path, local_files_only, precision, config, longest)
    path = start.model if start and start.model else path
    model = load_on_ranks(path, tokenizer, precision, config.shard, local_files_only)
    layout = choose_layout(
        model,
        token_loss,
        config,
        tokenizer.pad_token_id,
        precision,
        longest=longest,
        **broadcast_from_rank0(get_recorded_measurements, start, config, precision),
    )
    layout = dataclasses.replace(layout, tokens=min(all_gather(layout.tokens)))
    torch.manual_seed(config.seed + rank())  # for dropout, where a model has it
    return Run(config, precision, layout, tokenizer, data, model, scaler=precision.grad_scaler(), changes=changes)


def load_run_tokenizer(config, start):
    """The path of a run's untrained model, whether to use only local files, and the tokenizer.

    A resumed run takes the tokenizer of its checkpoint, unless its template changes, as the original may be gone.
    """
    template, options = config.chat_template, config.template_option
    recorded = start and start.model and [start.described["config"][name] for name in TEMPLATE_SETTINGS]
    if recorded == [template, list(options)]:
        path, local_files_only = str(start.model), True
        template, options = ("chatml" if template == "chatml" else "model"), ()
    else:
        path, local_files_only = hub.find_model(config.model)
    return path, local_files_only, load_tokenizer(path, local_files_only, template, options)
