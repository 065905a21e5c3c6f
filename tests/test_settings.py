"""The law of settings: two runs that differ in one setting differ in what its help promises, and in nothing else.

`LAW` has rows for each field of `Config`, `OTHER_FLAGS` a test for each other flag of train.py. A row names a value
and everything that it changes; what it does not name must be the same, to the last bit. So a setting that nothing
reads, or that acts in a second place, or that is off by one, fails its row.
"""

import collections
import contextlib
import dataclasses
import io
import itertools
import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers.models.llama.modeling_llama import LlamaMLP

import train as train_command
from compute.adapters import trained_parameters
from config import PRESETS, Config, Parser, UserError, flag_name
from conversations.chatml import MESSAGES as CHATML
from running import checkpoint, report, validation
from storage import hub
from storage.records import read_record
from tests import test_replay
from tests.conftest import CONTROL, byte_tokenizer, tiny_llama, write_rows

ROOT = Path(__file__).parents[1]
ALL = 40  # conversations: 30 to train on, 8 to evaluate, 2 to test; 6 updates, the first of them with a rate of 0
UPDATES = 6
BASE = {"model": "model", "dataset": "chats.jsonl", "eval_fraction": 0.2, "epochs": 1, "batch_size": 5, "lr": 1e-2}
BASE |= {"warmup_steps": 1, "seed": 3, "device": "cpu", "dtype": "fp32", "micro_batch_tokens": 250}
BASE |= {"eval_every": 2, "save_every": 3}

# --- one run, observed


def chat(number, **columns):
    """A conversation of two turns that can be told by its number."""
    counted = " ".join(map(str, range(number % 7 + 1)))
    texts = [f"Count to {number}", counted, "Again", counted[::-1]]
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return {"messages": messages, **columns}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The directory that the runs of this file are made in, with the files that their settings name."""
    place = tmp_path_factory.mktemp("settings")
    tokenizer = byte_tokenizer(CONTROL)
    for name, changes in {"model": {}, "other-model": {"rms_norm_eps": 0.1}}.items():
        tokenizer.save_pretrained(place / name)
        tiny_llama(len(tokenizer), **changes).save_pretrained(place / name)
    chats = [chat(number) for number in range(ALL)]
    write_rows(place / "chats.jsonl", chats)
    write_rows(place / "others.jsonl", [chat(number) for number in range(100, 100 + ALL)])
    write_rows(place / "eval.jsonl", [chat(number) for number in range(200, 205)])
    write_rows(place / "systems.jsonl", [chat(number, system="Be brief.") for number in range(ALL)])
    write_rows(place / "personas.jsonl", [chat(number, persona="Be brief.") for number in range(ALL)])
    write_rows(place / "bad.jsonl", [*chats, {"messages": "none"}])  # 1 of 41: 2.4 %
    (place / "spaced.jinja").write_text(CHATML.replace("\n", "\n\n"))
    system = "{% if name %}{{ '<|im_start|>system\n' + name + '<|im_end|>\n' }}{% endif %}"
    (place / "named.jinja").write_text(system + CHATML)
    return place


def read_micro_batch(batch, pad_id):
    """The conversations in a micro-batch: of each the ids, and its supervised tokens with their positions."""
    ids, supervised = batch.inputs["input_ids"], batch.predicting.tolist()
    if "cu_seqlens" in batch.inputs:
        bounds = batch.inputs["cu_seqlens"].tolist()
        spans = list(itertools.pairwise(bounds))
    else:
        lengths = [int(row.ne(pad_id).nonzero().max()) + 1 for row in ids]
        spans = [(row * ids.shape[1], row * ids.shape[1] + length) for row, length in enumerate(lengths)]
    flat, targets = ids.flatten(), dict(zip(supervised, batch.targets.tolist(), strict=True))
    for start, end in spans:
        labels = tuple((position - start, targets[position]) for position in supervised if start <= position < end)
        yield tuple(flat[start:end].tolist()), labels


def load_hub_dataset(_name, _configuration, split, _revision=None):
    """A dataset that the Hub has: conversations from 0 on in the split "train", from 100 on in others."""
    first = 0 if split == "train" else 100
    return Dataset.from_list([chat(number) for number in range(first, first + ALL)])


class Observer:
    """What a run does, update by update, and what it leaves."""

    def __init__(self, stop_after=0):
        self.stop_after = stop_after  # updates
        self.seen = collections.defaultdict(dict)
        self.saved, self.forward_passes, self.run, self.decode = [], 0, None, None

    def number(self, ids):
        return int(re.search(r"Count to (\d+)", self.decode(list(ids)))[1])

    def numbers(self, examples):
        return [self.number(example.input_ids.tolist()) for example in examples]

    def note(self, step, **values):
        for name, value in values.items():
            self.seen[name][step] = value

    def note_weights(self, step):
        weights = trained_parameters(self.run.model)
        self.note(step, weights=torch.cat([weights[name].detach().flatten() for name in sorted(weights)]))

    def build_run(self, *arguments, build=train_command.build_run, **options):
        self.run = build(*arguments, **options)
        self.decode = self.run.tokenizer.decode
        for name, split in self.run.data.splits.items():
            self.seen[name] = self.numbers(split.examples)
        self.note_weights(self.run.step)
        return self.run

    def train_step(self, model, optimizer, window, lr, *, train_step=train_command.train_step, **options):
        self.forward_passes = 0
        metrics = train_step(model, optimizer, window, lr, **options)
        step, found = self.run.step + 1, [list(read_micro_batch(batch, self.run.layout.pad_id)) for batch in window]
        order = sorted((self.number(ids), ids, labels) for batch in found for ids, labels in batch)
        windows, tokens, labels = zip(*order, strict=True)
        self.note(step, windows=windows, tokens=tokens, labels=labels, rates=lr)
        self.note(
            step,
            micro_batches=[
                (batch.inputs.keys(), [self.number(ids) for ids, _ in rows])
                for batch, rows in zip(window, found, strict=True)
            ],
        )
        self.note(step, losses=metrics["loss"], norms=metrics["grad_norm"])
        self.note(step, forward_passes=self.forward_passes / len(window) / model.config.num_hidden_layers)
        self.note(step, deterministic=torch.are_deterministic_algorithms_enabled())
        self.note(step, compiled=all(batch.compiled for batch in window))
        moments = [optimizer.state[weights] for group in optimizer.param_groups for weights in group["params"]]
        self.note(
            step,
            moments=[
                float(sum(state[name].double().square().sum() for state in moments) ** 0.5)
                for name in ("exp_avg", "exp_avg_sq")
            ],
        )
        self.note_weights(step)
        if step == self.stop_after:
            signal.raise_signal(signal.SIGTERM)
        return metrics

    def evaluate(self, model, examples, *arguments, evaluate=validation.evaluate):
        self.evaluated = self.numbers(examples)
        return evaluate(model, examples, *arguments)

    def write_checkpoint(self, model, tokenizer, about, *content, write=checkpoint.write_checkpoint):
        write(model, tokenizer, about, *content)
        self.saved.append(about["step"])

    def plan_of_data(self, run, plan=report.plan_of_data):
        return self.see_plan(plan(run))

    def plan_of_model(self, run, plan=report.plan_of_model):
        return self.see_plan(plan(run))

    def see_plan(self, text):
        for line in text.splitlines():
            self.seen[f"plan {line[2:12].strip()}"] = line[12:].partition("; the first window")[0]  # see micro_batches
        return text

    def headline(self, *arguments, headline=report.headline):
        self.seen["headline"] = headline(*arguments)
        return self.seen["headline"]


def watch(place, settings, observer=None):
    """Run train.py in a directory and observe it; `UserError`s are raised. Returns the observer."""
    observer, stdout = observer or Observer(), io.StringIO()
    arguments = to_arguments(settings)

    def forward(self, x, forward=LlamaMLP.forward):
        observer.forward_passes += 1
        return forward(self, x)

    compile = torch.nn.Module.compile
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(stdout):
        patch.chdir(place)
        patch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as --deterministic sets it, for good
        patch.setattr(os, "fsync", lambda _: None)
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(torch.nn.Module, "compile", lambda *a, **o: compile(*a, **o, backend="eager"))
        patch.setattr(hub, "find_commit", lambda *_: ("c0ffee", False))
        patch.setattr(hub, "load_hub_dataset", load_hub_dataset)
        if "--compile" in arguments:
            torch.compiler.reset()
        else:  # a counter would be compiled too
            patch.setattr(LlamaMLP, "forward", forward)
        for module, name in [
            (train_command, "build_run"),
            (train_command, "train_step"),
            (validation, "evaluate"),
            (checkpoint, "write_checkpoint"),
            (report, "plan_of_data"),
            (report, "plan_of_model"),
            (report, "headline"),
        ]:
            patch.setattr(module, name, getattr(observer, name))
        observer.status = train_command.main(arguments)
        observer.directory = observer.run and observer.run.directory.resolve()
    observer.stdout = stdout.getvalue()
    return observer


def read_run(observer):
    """Everything that is compared of a finished run, by name; what has a value for each update is a dict of these."""
    directory, seen = observer.directory, dict(observer.seen)
    of_kind = collections.defaultdict(dict)
    for line in map(json.loads, (directory / "metrics.jsonl").read_text().splitlines()):
        of_kind[line["kind"]][line["step"]] = line
    for step, line in of_kind["train"].items():
        expected = {"loss": seen["losses"][step], "grad_norm": seen["norms"][step], "lr": seen["rates"][step]}
        assert expected.items() <= line.items()
    seen["logged"] = {step: line["epoch"] for step, line in of_kind["train"].items()}
    seen["metrics"] = {name for line in of_kind["train"].values() for name in line}
    seen["evaluations"] = {step: line["loss"] for step, line in of_kind["eval"].items()}
    seen["tests"] = {step: line["loss"] for step, line in of_kind["test"].items()}
    for when, answers in json.loads((directory / "answers.json").read_text()).items():
        for answer in answers:
            kind = f"{'greedy' if answer['greedy'] else 'sampled'} answers {when}"
            seen[kind] = [*seen.get(kind, []), answer["text"]]
    seen["saved"] = observer.saved
    seen["kept"] = list(checkpoint.list_checkpoints(directory))
    best = (directory / "best").resolve()
    seen["best"] = int(best.parent.name.removeprefix("step-"))
    (file,) = best.glob("*.safetensors")  # the model's, or its adapters'
    weights = load_file(file)
    assert torch.equal(torch.cat([weights[name].flatten() for name in sorted(weights)]), seen["weights"][seen["best"]])
    files = [*directory.glob("*"), *best.parent.rglob("*")]
    seen["files"] = sorted({re.sub(r"tfevents.*|step-.*?/", "", str(path.relative_to(directory))) for path in files})
    record = read_record(directory)
    seen |= {f"record {name}": value for name, value in record.items() if name != "versions"}
    for name, value in seen.items():
        if isinstance(value, str):
            seen[name] = value.replace(str(observer.run.directory), "RUN")
    return seen | {"directory": directory}


@pytest.fixture(scope="module")
def run(place):
    """A function: the observed run of some settings, changes of those of `BASE`; each run is made once."""
    made, numbers = {}, itertools.count()

    def run(**changes):
        key = repr(sorted(changes.items()))
        if key not in made:
            settings = {**BASE, "output_dir": f"run-{next(numbers)}", **changes}
            made[key] = read_run(watch(place, settings))
        return made[key]

    return run


def to_arguments(settings):
    """The command line that names some settings; None: not named."""
    arguments = []
    for name, value in settings.items():
        values = value if isinstance(value, tuple) else () if value is True else (value,)
        if value is not None and value is not False:
            arguments += [flag_name(name), *map(str, values)]
    return arguments


# --- two runs, compared

STEPS = "at other updates"  # and where both have a value, it is the same
DIFFERS = "differs"


def is_same(one, other, tolerance=0):
    if torch.is_tensor(one):
        if one.shape != other.shape:
            return False
        return (one - other).norm() <= tolerance * one.norm()
    if tolerance and isinstance(one, list):
        return all(map(is_same, one, other, [tolerance] * len(one)))
    return abs(one - other) <= tolerance * abs(one) if tolerance else one == other


def differences(one, other, within=None):
    """How two observed runs differ: by name, the first update whose values differ, `STEPS`, both, or `DIFFERS`."""
    found, within = {}, within or {}
    for name in sorted((one.keys() | other.keys()) - {"record config", "directory"}):
        a, b, tolerance = one.get(name), other.get(name), within.get(name, 0)
        if isinstance(a, dict) and isinstance(b, dict) and all(isinstance(key, int) for key in a | b):
            steps = [STEPS] if a.keys() != b.keys() else []
            first = [step for step in sorted(a.keys() & b.keys()) if not is_same(a[step], b[step], tolerance)][:1]
            if steps or first:
                found[name] = tuple(steps + first) if steps and first else (steps + first)[0]
        elif not is_same(a, b):
            found[name] = DIFFERS
    if "weights" in found or within:
        for kind in ("greedy", "sampled"):  # another model may answer alike
            found.pop(f"{kind} answers after", None)
    return found


def learned(applied, gradient=None):
    """The differences where the update of the number `applied` is the first that changes the weights differently.

    `gradient` is the first update that has another loss and gradient, by default the one after that.
    """
    gradient, evaluated = gradient or applied + 1, applied + applied % BASE["eval_every"]
    found = {"weights": applied, "evaluations": evaluated, "tests": UPDATES}
    return found | (dict.fromkeys(("losses", "norms", "moments"), gradient) if gradient <= UPDATES else {})


def names(*texts):
    return dict.fromkeys(texts, DIFFERS)


# The first update has rate 0: data that differ change the weights from the second on.
ANOTHER_MODEL = learned(2, gradient=1) | {"evaluations": 0, "tests": 0}
OTHER_TOKENS = ANOTHER_MODEL | {"tokens": 1, "labels": 1, "micro_batches": 1} | names("record data", "plan tokens")
OTHER_CHATS = OTHER_TOKENS | {"windows": 1} | names("train", "eval", "test")
OTHER_SPLITS = OTHER_CHATS | {"logged": 1} | names("plan data", "plan leaks", "plan updates", "plan cadence")
OTHER_RATES = names("plan schedule")  # beside the update they begin at
BY_UPDATE = (
    "compiled deterministic forward_passes labels logged losses micro_batches moments norms rates tokens windows"
)
OTHER_LENGTH = dict.fromkeys([*BY_UPDATE.split(), "weights", "evaluations", "tests"], STEPS)
OTHER_LENGTH |= names("plan updates", "best", "saved", "kept")
SAME_BUT_ROUNDED = {"losses": 1e-5, "norms": 1e-4, "moments": 1e-4, "weights": 1e-4, "evaluations": 1e-5, "tests": 1e-5}


def at_other_length(applied):
    """The differences of a run of other length, whose rates differ from the update `applied` on."""
    found = OTHER_LENGTH | {"rates": (STEPS, applied)}
    return found | {name: (STEPS, step) for name, step in learned(applied).items() if name != "tests"}


@dataclasses.dataclass
class Row:
    """What a setting's value changes, compared with a run without it."""

    value: object
    differs: dict = dataclasses.field(default_factory=dict)  # as `differences` returns it; all else is the same
    base: dict = dataclasses.field(default_factory=dict)  # more settings, of both runs
    shows: Callable = lambda _base, _run: True  # what else the help promises, of the two runs
    within: dict = dataclasses.field(default_factory=dict)  # names compared within a relative tolerance: rounding
    refused: str = ""  # the value is: the message


@dataclasses.dataclass
class Shown:
    """The test elsewhere that shows what a setting does."""

    file: str
    test: str


def all_values(run, name):
    """The values of all updates, in order."""
    return [run[name][step] for step in sorted(run[name])]


def each_chat(base, run, name):
    """Pairs of what is known of each conversation in all updates, of two runs with the same windows."""
    for one, other in zip(all_values(base, name), all_values(run, name), strict=True):
        yield from zip(one, other, strict=True)


def are_shifted(base, run):
    """Whether a run has the other's conversations in the same places, with numbers that are higher by 100."""
    pairs = [*zip(all_values(base, "windows"), all_values(run, "windows"), strict=True)]
    pairs += [(base[name], run[name]) for name in ("train", "eval", "test")]
    return all([number + 100 for number in one] == list(other) for one, other in pairs)


def has_splits(run, train, evaluated, test):
    """Whether the splits are so large, and a partition of all conversations."""
    splits = [run[name] for name in ("train", "eval", "test")]
    return [*map(len, splits)] == [train, evaluated, test] and sorted(itertools.chain(*splits)) == list(range(ALL))


def has_rates(*shares):
    """A check that the rates of the updates are these shares of the peak."""
    return lambda _, run: all_values(run, "rates") == pytest.approx([BASE["lr"] * share for share in shares], rel=1e-9)


def has_halved_rates(base, run):
    return all_values(run, "rates") == [rate / 2 for rate in all_values(base, "rates")]


def has_newlines_doubled(base, run):
    newline = byte_tokenizer(CONTROL).encode("\n")[0]
    return all(
        [id for id in one if id != newline] == [id for id in other if id != newline]
        and 2 * one.count(newline) == other.count(newline)
        for one, other in each_chat(base, run, "tokens")
    )


def has_last_answer_only(base, run):
    return all(
        other == one[-len(other) :] and one[-len(other) - 1][0] < other[0][0] - 1
        for one, other in each_chat(base, run, "labels")
    )


def sees_all_twice(_, run):
    epochs = [sum(all_values(run, "windows")[half : half + UPDATES], ()) for half in (0, UPDATES)]
    return epochs[0] != epochs[1] and all(sorted(seen) == sorted(run["train"]) for seen in epochs)


def decays_matrices_alone(base, run):
    """By 0.5 and not by 0.1, times the rate, in the first update that has one."""
    weights = base["weights"][1]
    decay, is_norm = base["weights"][2] - run["weights"][2], weights == 1
    expected = BASE["lr"] * 0.4 * weights * ~is_norm
    return is_norm.any() and torch.allclose(decay, expected, rtol=1e-3, atol=1e-8)


def has_another_beta2(base, run):
    """The first moments are the same; the second ones begin as (1 - beta2) times the square of the gradient."""
    (first, second), (same, other) = base["moments"][1], run["moments"][1]
    return first == same and other == pytest.approx(100 * second) and base["moments"][2][0] == run["moments"][2][0]


def clips_to(most):
    """A check of the first moments after the first update: a tenth of the gradient as it was applied."""
    return lambda _, run: run["moments"][1][0] == pytest.approx(0.1 * min(most, run["norms"][1]), rel=1e-4)


def fits_into(most):
    def shows(_, run):
        numbers, ids = (itertools.chain(*all_values(run, name)) for name in ("windows", "tokens"))
        lengths = dict(zip(numbers, map(len, ids), strict=True))
        batches = [numbers for update in run["micro_batches"].values() for _, numbers in update]
        return all(len(numbers) == 1 or sum(map(lengths.get, numbers)) <= most for numbers in batches)

    return shows


def has(**values):
    """A check of observed values; of those by update, of their updates alone."""

    def shows(_, run):
        found = {name: list(run[name]) if isinstance(run[name], dict) else run[name] for name in values}
        return found == values

    return shows


def always(name, value):
    """A check that something has a value at every update."""
    return lambda _, run: set(run[name].values()) == {value}


LAW = {
    # --- data
    "preset": [
        Row("quickstart", names("headline")),  # with another dataset than its own it sets the model alone
        Shown("tests/test_settings.py", "test_a_preset_is_the_settings_it_stands_for"),
    ],
    "model": Row(
        "other-model", ANOTHER_MODEL | names("headline", "plan model", "sampled answers before", "record base")
    ),
    "dataset": Row("others.jsonl", OTHER_CHATS | names("headline", "plan leaks"), shows=are_shifted),
    "split": [
        Row("other", OTHER_CHATS | names("plan leaks"), {"dataset": "acme/chats"}, shows=are_shifted),
        Row("other", names("plan warning")),  # of files
    ],
    "max_examples": Row(
        ALL - 1,
        OTHER_TOKENS
        | {"windows": 1, "evaluations": 2, "tests": UPDATES}
        | names("train", "plan data", "plan rows", "plan cadence"),
        shows=lambda _, run: sorted(run["train"] + run["eval"] + run["test"]) == list(range(ALL - 1)),
    ),
    "max_length": Row(
        70,
        OTHER_TOKENS | names("plan data"),
        shows=lambda base, run: (
            all(one[:70] == other for one, other in each_chat(base, run, "tokens"))
            and all(one[: len(other)] == other for one, other in each_chat(base, run, "labels"))
        ),
    ),
    "skip_bad_rows": [
        Row(0.03, base={"dataset": "bad.jsonl", "skip_bad_rows": 0.5}),
        Row(0.02, base={"dataset": "bad.jsonl", "skip_bad_rows": 0.5}, refused="1 of 41 rows"),
    ],
    "drop_columns": Row(
        ("system",),
        OTHER_TOKENS,
        {"dataset": "systems.jsonl"},
        shows=lambda base, run: all(one[-len(other) :] == other for one, other in each_chat(base, run, "tokens")),
    ),
    "columns": Row(
        ("system=persona",),
        OTHER_TOKENS | names("plan rows"),
        {"dataset": "personas.jsonl"},
        shows=lambda base, run: all(other[-len(one) :] == one for one, other in each_chat(base, run, "tokens")),
    ),
    "chat_template": Row(
        "spaced.jinja", OTHER_TOKENS | names("plan leaks", "sampled answers before"), shows=has_newlines_doubled
    ),
    "template_option": Row(
        ("name=Ada",),
        OTHER_TOKENS | names("sampled answers before"),
        {"chat_template": "named.jinja"},
        shows=lambda base, run: all(other[-len(one) :] == one for one, other in each_chat(base, run, "tokens")),
    ),
    "supervise": Row(
        "last", ANOTHER_MODEL | {"labels": 1} | names("plan tokens", "record data"), shows=has_last_answer_only
    ),
    "eval_dataset": Row(
        ("eval.jsonl",),
        OTHER_SPLITS | names("plan rows"),
        {"max_steps": UPDATES},
        shows=lambda _, run: (
            run["eval"] == list(range(200, 205)) and sorted(run["train"] + run["test"]) == list(range(ALL))
        ),
    ),
    "eval_fraction": [
        Row(0.1, OTHER_SPLITS, {"max_steps": UPDATES}, shows=lambda _, run: has_splits(run, 34, 4, 2)),
        Row(
            0,
            OTHER_SPLITS | {"evaluations": STEPS} | names("saved", "kept"),
            {"max_steps": UPDATES},
            shows=lambda _, run: has_splits(run, 38, 0, 2) and run["best"] == UPDATES and run["saved"] == [3, 6],
        ),
    ],
    "test_fraction": [
        Row(0.2, OTHER_SPLITS, {"max_steps": UPDATES}, shows=lambda _, run: has_splits(run, 24, 8, 8)),
        Row(
            0,
            OTHER_SPLITS | {"tests": STEPS},
            {"max_steps": UPDATES},
            shows=lambda _, run: has_splits(run, 32, 8, 0) and not run["tests"],
        ),
    ],
    "exclude_leaks": [
        Row(
            True,
            {name: changed for name, changed in OTHER_SPLITS.items() if name not in ("eval", "test")}
            | {"evaluations": 2, "tests": UPDATES}
            | names("plan rows"),
            {"max_steps": UPDATES},
            shows=lambda base, run: set(run["train"]) < set(base["train"]) and run["eval"] == base["eval"],
        ),
        Row(True, base={"eval_fraction": 0, "test_fraction": 0}, refused="no effect where nothing is held out"),
    ],
    # --- what is learned
    "epochs": [
        Row(2, OTHER_LENGTH, {"schedule": "constant"}, shows=sees_all_twice),
        Row(2, at_other_length(3), shows=has(rates=list(range(1, 13)))),
    ],
    "max_steps": [
        Row(4, OTHER_LENGTH, {"schedule": "constant"}, shows=has(windows=[1, 2, 3, 4])),
        Row(4, at_other_length(3), shows=has_rates(0, 1, 0.75, 0.25)),
        Row(8, OTHER_LENGTH, {"schedule": "constant"}, shows=has(windows=list(range(1, 9)))),  # in a second epoch
    ],
    "batch_size": Row(
        10,
        ANOTHER_MODEL
        | dict.fromkeys(("windows", "tokens", "labels", "micro_batches", "logged"), 1)
        | {"evaluations": 2, "tests": 3}
        | names("plan updates", "plan cadence"),
        {"max_steps": 3},
        shows=lambda base, run: sorted(base["windows"][1] + base["windows"][2]) == [*run["windows"][1]],
    ),
    "lr": Row(5e-3, learned(2) | {"rates": 2} | OTHER_RATES, shows=has_halved_rates),
    "schedule": [
        Row("linear", learned(3) | {"rates": 3} | OTHER_RATES, shows=has_rates(0, 1, 0.8, 0.6, 0.4, 0.2)),
        Row("constant", learned(3) | {"rates": 3} | OTHER_RATES, shows=has_rates(0, 1, 1, 1, 1, 1)),
        Row("wsd", learned(3) | {"rates": 3} | OTHER_RATES, shows=has_rates(0, 1, 1, 1, 1, 1)),
    ],
    "warmup_steps": [
        Row(
            3,
            learned(2) | {"rates": 2} | OTHER_RATES,
            {"schedule": "constant"},
            shows=has_rates(0, 1 / 3, 2 / 3, 1, 1, 1),
        ),
        Row(0.3, base={"warmup_steps": 2}),
    ],
    "min_lr": Row(
        0.5, learned(3) | {"rates": 3} | OTHER_RATES, {"schedule": "linear"}, shows=has_rates(0, 1, 0.9, 0.8, 0.7, 0.6)
    ),
    "decay_fraction": Row(
        0.5, learned(5) | {"rates": 5} | OTHER_RATES, {"schedule": "wsd"}, shows=has_rates(0, 1, 1, 1, 0.75, 0.25)
    ),
    "adam_beta2": Row(0.9, learned(2) | {"moments": 1}, shows=has_another_beta2),
    "weight_decay": Row(0.5, learned(2), shows=decays_matrices_alone),
    "max_grad_norm": [
        Row(0.01, learned(2) | {"moments": 1}, shows=clips_to(0.01)),
        Row(0, learned(2) | {"moments": 1}, shows=clips_to(float("inf"))),
    ],
    "lora_rank": Row(  # B is zero until the second update, so that the first two losses are the same
        4,
        learned(2, gradient=1)
        | {"weights": 0, "losses": 3}
        | names("plan model", "plan device", "plan adapters", "files"),
    ),
    "lora_alpha": [
        Row(64, learned(2, gradient=1) | {"losses": 3} | names("plan adapters"), {"lora_rank": 4}),
        Row(64, refused="--lora-alpha has no effect without --lora-rank"),
    ],
    "seed": Row(4, OTHER_CHATS | names("sampled answers before"), shows=lambda _, run: has_splits(run, 30, 8, 2)),
    # --- memory and speed
    "device": [Row("auto"), Row("cuda:99", refused=r"this machine has \d+ CUDA devices")],
    "dtype": [
        Row("bf16", ANOTHER_MODEL | names("record precision", "record device", "plan device")),
        Row(
            "bf16",
            names("record precision", "record device", "plan device"),
            within={"losses": 0.02, "norms": 0.05, "moments": 0.05, "weights": 0.1, "evaluations": 0.02, "tests": 0.02},
        ),
    ],
    "layout": Row(
        "padded",
        {"micro_batches": 1} | names("record layout", "plan layout"),
        within=SAME_BUT_ROUNDED,
        shows=lambda _, run: all(
            [*keys] == ["input_ids"] for rows in run["micro_batches"].values() for keys, _ in rows
        ),
    ),
    "micro_batch_tokens": Row(
        100,
        {"micro_batches": 1} | names("record micro_batch_tokens", "plan layout"),
        within=SAME_BUT_ROUNDED,
        shows=fits_into(100),
    ),
    "shard": [
        Row(2, refused="it takes several processes"),
        Shown("tests/test_processes.py", "test_any_number_of_ranks_gives_the_same_updates"),
        Shown("tests/test_processes.py", "test_weights_are_sharded_and_gathered"),
    ],
    "compile": Row(
        True,
        {"compiled": 1, "forward_passes": 1} | names("metrics", "plan layout"),  # passes are not counted
        base={"max_steps": 2, "eval_fraction": 0},  # as compiling takes its time, in each mode of the model
        within=SAME_BUT_ROUNDED,
        shows=always("compiled", True),
    ),
    "deterministic": Row(True, {"deterministic": 1}, shows=always("deterministic", True)),
    "gradient_checkpointing": Row(
        True, {"forward_passes": 1}, within=SAME_BUT_ROUNDED, shows=always("forward_passes", 2)
    ),
    # --- the run
    "output_dir": Row(
        "named",
        base={"output_dir": None},
        shows=lambda base, run: (
            re.search(r"/runs/chats-\d{8}-\d{6}$", str(base["directory"]))
            and run["directory"] == base["directory"].parents[1] / "named"
        ),
    ),
    "log_every": Row(2, {"logged": STEPS}, shows=has(logged=[2, 4, 6])),
    "eval_every": [
        Row(
            4,
            {"evaluations": STEPS} | names("saved", "record eval_every", "plan cadence"),
            shows=has(evaluations=[0, 4, 6], saved=[3, 4, 6]),
        ),
        Row(0.5, base={"eval_every": 3}),
        Row(
            0,
            {"evaluations": STEPS} | names("saved", "kept", "record eval_every", "plan cadence"),
            shows=has(evaluations=[0, 6]),
        ),
    ],
    "save_every": [
        Row(1, names("saved", "kept", "record save_every", "plan cadence"), shows=has(saved=[1, 2, 3, 4, 5, 6])),
        Row(0.5, base={"save_every": 3}),
        Row(0, names("saved", "record save_every", "plan cadence"), shows=has(saved=[2, 4, 6])),  # the best ones
    ],
    "keep": [
        Row(1, names("kept"), shows=has(kept=[6])),
        Row(3, names("kept"), shows=has(kept=[2, 3, 4, 6])),  # the best model was 2's when 3 was saved
    ],
}


def rows():
    for name, of_name in LAW.items():
        for number, row in enumerate(of_name if isinstance(of_name, list) else [of_name]):
            yield pytest.param(name, row, id=f"{name}-{number}")


@pytest.mark.parametrize(("name", "row"), rows())
def test_a_setting_does_what_it_says_and_nothing_else(name, row, run):
    if isinstance(row, Shown):
        assert f"\ndef {row.test}(" in (ROOT / row.file).read_text()
        return
    settings = {**row.base, name: row.value}
    if row.refused:
        with pytest.raises(UserError, match=row.refused):
            run(**settings)
        return
    base, changed = run(**row.base), run(**settings)
    assert differences(base, changed, row.within) == row.differs
    shown = row.shows(base, changed)
    assert shown, f"{flag_name(name)} {row.value} does not do what its help says"
    before, after = base["record config"], changed["record config"]
    assert {each for each in after if before[each] != after[each]} - {"output_dir"} == {name} - {"output_dir"}


def test_a_preset_is_the_settings_it_stands_for(place, run, monkeypatch):
    files = {"model": str(place / "model"), "dataset": (str(place / "chats.jsonl"),)}
    monkeypatch.setitem(PRESETS, "quickstart", BASE | files)
    changed = run(preset="quickstart", **dict.fromkeys(BASE))
    assert differences(run(), changed) == names("headline")
    assert changed["record config"] | {"preset": "none", "output_dir": ""} == run()["record config"] | {
        "output_dir": ""
    }


def write_base_recipe(path):
    lines = [f"{flag_name(name).removeprefix('--')} = {json.dumps(value)}" for name, value in BASE.items()]
    path.write_text("\n".join(lines).replace('"chats.jsonl"', '["chats.jsonl"]'))


def test_a_recipe_is_its_flags(place, run):
    write_base_recipe(place / "recipe.toml")
    recipe = {**dict.fromkeys(BASE), "config": "recipe.toml"}
    assert differences(run(), run(**recipe)) == {}
    assert differences(run(lr=5e-3), run(**{**recipe, "lr": 5e-3})) == {}


def test_a_written_recipe_makes_the_same_run_and_writing_it_makes_none(place, run):
    observer = watch(place, {**BASE, "output_dir": "not-made", "write_config": "written.toml"})
    assert (observer.status, observer.run) == (0, None)
    assert not (place / "not-made").exists()
    text = (place / "written.toml").read_text()
    (place / "written.toml").write_text(text.replace("not-made", "made"))
    assert differences(run(), run(**dict.fromkeys(BASE), output_dir=None, config="written.toml")) == {}


def test_a_dry_run_has_the_same_plan_and_learns_and_writes_nothing(place, run):
    observer, base = watch(place, {**BASE, "output_dir": "not-made", "dry_run": True}), run()
    assert observer.status == 0
    plan = {name for name in base if name.startswith("plan ")}
    assert {name: observer.seen[name] for name in plan} == {name: base[name] for name in plan}
    assert re.search("\n  memory .*\n  time .*\n  disk .*\n$", observer.stdout)
    assert set(observer.seen["rates"].values()) == {0.0}
    assert observer.saved == []
    assert not (place / "not-made").exists()


@pytest.mark.parametrize(
    ("fraction", "line"),
    [
        (0, None),
        (0.01, "none: fewer than 5 conversations to evaluate on cannot tell a difference from chance"),
        (0.2, r"a difference of 0\.\d+ or more in eval loss is not chance \(95 %, 8 conversations\); --against.*"),
    ],
)
def test_the_plan_ends_with_the_difference_that_the_eval_split_can_show(place, tmp_path, fraction, line):
    observer = watch(place, {**BASE, "eval_fraction": fraction, "max_steps": 1, "output_dir": tmp_path / "run"})
    found = re.findall("\n  evidence  (.*)\n", observer.stdout)
    assert len(found) == bool(line)
    assert not line or re.fullmatch(line, found[0])


@pytest.fixture
def stopped(place, tmp_path):
    """The observer of a run that a signal has stopped after three updates."""
    observer = watch(place, {**BASE, "output_dir": tmp_path / "run"}, Observer(stop_after=3))
    assert observer.status == 128 + signal.SIGTERM
    assert max(observer.seen["windows"]) == observer.stop_after
    observer.stop_after = 0
    return observer


@pytest.mark.parametrize("named", ["by its directory", "by auto"])
def test_a_resumed_run_is_one_that_was_never_stopped(place, run, stopped, tmp_path, named):
    auto = {**BASE, "output_dir": tmp_path / "run", "resume": "auto"}
    watch(place, auto if named == "by auto" else {"resume": tmp_path / "run"}, stopped)
    assert differences(run(), read_run(stopped)) == {}


def test_changes_that_are_allowed_act_from_where_a_run_is_resumed(place, run, stopped, tmp_path):
    changes = {"resume": tmp_path / "run", "lr": 5e-3}
    with pytest.raises(UserError, match=r"(?s)--allow-changes.--lr 0.01 -> 0.005$"):
        watch(place, changes, stopped)
    watch(place, {**changes, "allow_changes": True}, stopped)
    changed = read_run(stopped)
    assert differences(run(), changed) == learned(4) | {"rates": 4} | OTHER_RATES | names("record changes")
    assert [run()["rates"][step] / 2 for step in (4, 5, 6)] == [changed["rates"][step] for step in (4, 5, 6)]
    with pytest.raises(UserError, match="--allow-changes needs --resume"):
        watch(place, {**BASE, "allow_changes": True})


OTHER_FLAGS = {
    "--config": test_a_recipe_is_its_flags,
    "--write-config": test_a_written_recipe_makes_the_same_run_and_writing_it_makes_none,
    "--dry-run": test_a_dry_run_has_the_same_plan_and_learns_and_writes_nothing,
    "--resume": test_a_resumed_run_is_one_that_was_never_stopped,
    "--allow-changes": test_changes_that_are_allowed_act_from_where_a_run_is_resumed,
    "--replay": test_replay.test_a_run_is_equal_to_itself_and_nothing_is_written,
    "--updates": test_replay.test_a_run_is_equal_to_itself_and_nothing_is_written,
}


def test_every_flag_has_a_row(monkeypatch):
    assert LAW.keys() == Config.__dataclass_fields__.keys()
    flags = []

    def parse(self, _):
        flags.extend(flag for action in self._actions for flag in action.option_strings[:1])
        raise UserError("seen")

    monkeypatch.setattr(Parser, "parse", parse)
    with pytest.raises(UserError, match="seen"):
        train_command.main([])
    assert set(flags) == {*map(flag_name, LAW), *OTHER_FLAGS, "-h"}
