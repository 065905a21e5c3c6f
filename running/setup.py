"""The start of a run: data, tokenizer and model, loaded, checked and measured."""

import dataclasses
import math
import os

import torch

from compute.adapters import Lora, get_lora
from compute.attention import has_varlen_kernel
from compute.distributed import all_gather, broadcast_from_rank0, rank, world_size
from compute.memory import check_model_fits, count_parameters, keep_freed_memory
from compute.self_check import choose_layout
from config import TEMPLATE_SETTINGS, Config, UserError, count_updates, resolve, with_absolute_paths, write_recipe
from conversations.sources import check_sources, pin_commits
from conversations.tokenizer import load_tokenizer
from data import load_data
from model import choose_precision, load_on_ranks, token_loss
from running import report
from running.resume import check_same_run, get_recorded_measurements, list_machine_changes, load_resumed_config
from running.run import Run
from storage import hub
from storage.adapter import describe_base

# How many tokens a forward pass takes in the time of a checkpoint; both times grow with the parameters. Of SmolLM2-135M
# measured on two CPU cores; on a GPU calculated (4 s at 400,000 tokens/s trained).
CHECKPOINT_TOKENS = {"cpu": 3_500, "cuda": 5_000_000}
# The tokens of a run from which compiling a model of MEASURED parameters, SmolLM2-135M, pays. It takes an H200 15 s and
# saves 3.6 µs a token; two CPU cores half a minute and 0.2 ms, in bf16; in fp32 it saves them nothing.
COMPILE_TOKENS, MEASURED = {"cpu": 2**20, "cuda": 2**24}, 135e6


def choose_config(named):
    """The `Config` of a new run, of the settings that the user named and a preset's; and why it is that preset."""
    preset, why = broadcast_from_rank0(hub.choose_preset, named)
    return resolve(with_absolute_paths(named), preset), why


def write_config(directory, named, file):
    """Write the settings of a new run, or of the one in a directory, to a recipe. Returns the exit status."""
    if directory:  # for another run, which will have a directory of its own
        config = dataclasses.replace(load_resumed_config(directory, named)[0], output_dir="")
    else:
        config, _ = choose_config(named)
    broadcast_from_rank0(write_recipe, config, file)
    print(f"written to {file}")
    return 0


def load_run(config, start=None, allow_changes=False):
    """A `Run` at step 0, without an optimizer, with the model of a `ResumePoint` if there is one.

    Prints its plan: the part about the data before the model is loaded. Writes nothing.
    """
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it is first used
    recorded = start.described.get("commits", {}) if start else {}
    commits = {"dataset": check_sources(config, recorded.get("dataset", ()))}  # before a model that lacks its data
    commits["model"] = recorded.get("model", {}) if start else hub.find_model_commit(config.model)
    pinned = Config(**pin_commits(vars(config), commits))
    precision = choose_precision(config.device, config.dtype)
    if precision.device.type == "cpu":
        keep_freed_memory()
    path, local_files_only, tokenizer = load_run_tokenizer(pinned, start)
    data = load_data(pinned, tokenizer)
    run = Run(config, precision, None, tokenizer, data, None, scaler=precision.grad_scaler(), commits=commits)
    run.changes = check_same_run(run, start.described, allow_changes) if start else []
    run.eval_every, run.save_every = choose_cadence(run, start)
    print(report.plan_of_data(run))
    longest = max(split.longest for split in data.splits.values())
    if precision.device.type == "cuda":
        check_model_fits(path, local_files_only, precision, config, longest)
    path, lora = (start.model, None) if start and start.model else (path, Lora.of(config))
    run.model = load_on_ranks(path, tokenizer, precision, config.shard, local_files_only, lora)
    run.base = load_base(run, path, local_files_only, start)
    options = {"longest": longest, "long_run": compiling_pays(run)}
    options |= broadcast_from_rank0(get_recorded_measurements, start, config, precision)
    layout = choose_layout(run.model, token_loss, config, tokenizer.pad_token_id, precision, **options)
    run.layout = dataclasses.replace(layout, tokens=min(all_gather(layout.tokens)))
    run.config = dataclasses.replace(config, compile=layout.compiled)  # as the record has it, by which it is resumed
    if start and (differs := list_machine_changes(start.described, run.describe())):
        run.resumed = [{"step": start.described.get("step", 0), "differs": differs}]
    print(report.plan_of_model(run))
    torch.manual_seed(config.seed + rank())  # for dropout, where a model has it
    return run


def load_base(run, path, local_files_only, start):
    """The record of the model that training started from: the one just loaded, unless that was a checkpoint's.

    Raises:
        UserError: the run is resumed, and the base model's files are not as they were when it began.
    """
    recorded = start.described.get("base") if start else None
    if start and start.model and not run.config.lora_rank:
        return recorded
    lora = get_lora(run.model)
    base = lora.base if lora else broadcast_from_rank0(describe_base, path, local_files_only)
    if changed := sorted({name for name, _ in (recorded or base)["files"].items() ^ base["files"].items()}):
        why = f"its base model {recorded['model']} has changed since ({', '.join(changed)})"
        raise UserError(f"--resume {run.directory}: {why}; put that back, or start a new run")
    return base


def compiling_pays(run):
    """True in a run in 16 bits that is long enough for each process, on a device that compiles packed layers.

    A GPU needs its attention kernel for that; a CPU compiles none whose activations are recomputed.
    """
    device, tokens = run.precision.device, run.total_steps * run.tokens_per_update / world_size()
    can = has_varlen_kernel(device) if device.type == "cuda" else not run.config.gradient_checkpointing
    trained, frozen, _ = count_parameters(run.model)
    saving = min(1, (trained + frozen) / MEASURED)  # of a small model, less
    return can and run.precision.dtype is not None and tokens * saving > COMPILE_TOKENS[device.type]


def choose_cadence(run, start=None):
    """The updates between two evaluations, and between two checkpoints; a resumed run keeps those it had.

    By default each kind takes a twentieth of the time, counted in tokens of a forward pass. An evaluation may write the
    best model, so that evaluations have the distance of checkpoints, but for a short run, which has five at least.
    """
    config, total = run.config, run.total_steps
    if start and all(start.described["config"][name] == getattr(config, name) for name in ("eval_every", "save_every")):
        return start.described["eval_every"], start.described["save_every"]
    update = 3 * run.tokens_per_update  # forward and backward
    save_every = max(10, math.ceil(20 * CHECKPOINT_TOKENS[run.precision.device.type] / update))
    eval_every = max(10, math.ceil(20 * run.data.eval.tokens / update), min(save_every, math.ceil(total / 5)))
    return (
        count_updates(config.eval_every, total) or eval_every,
        count_updates(config.save_every, total) or save_every,
    )


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
    return path, local_files_only, load_tokenizer(path, local_files_only, template, options, not config.lora_rank)
