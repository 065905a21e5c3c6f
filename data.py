"""Conversations, encoded: their splits, and cutting these into windows.

A window is the conversations one optimizer update sees; it alone decides what is learned. How it lies in memory, which
decides nothing, is in `layout.py`.

As a command: `python data.py --show 3` prints encoded conversations with the supervised tokens coloured.
"""

import hashlib
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from datasets import Dataset

import hub
import page
from chat import load_tokenizer, preview
from config import Parser, UserError, resolve, run_command, shown
from conversations import parse_source
from corpus import Examples, load_corpus

DATA_FLAGS = (
    "preset",
    "model",
    "dataset",
    "eval_dataset",
    "split",
    "max_examples",
    "max_length",
    "skip_bad_rows",
    "chat_template",
    "supervise",
    "eval_fraction",
    "test_fraction",
    "seed",
)


class Encoded(NamedTuple):
    """The examples made of some conversations, and what became of the rest."""

    examples: Sequence  # of Example
    cut: int = 0  # conversations longer than max_length
    dropped: int = 0  # conversations left out because none of their tokens is supervised
    tokens: int = 0
    supervised: int = 0  # of these tokens
    supervised_lost: int = 0  # to max_length
    stops: bool = True  # whether any answer ends with a supervised stop token
    digest: str = ""  # SHA-256 over the ids and labels of all examples


@dataclass(frozen=True)
class Data:
    """A dataset, encoded, in its three splits."""

    train: Encoded
    eval: Encoded
    test: Encoded
    notes: tuple[str, ...] = ()  # what reading it brought to light
    warnings: tuple[str, ...] = ()

    @property
    def splits(self):
        return {"train": self.train, "eval": self.eval, "test": self.test}

    @property
    def fingerprint(self):
        """SHA-256 over all ids and labels: any change of data, template, tokenizer or splits changes it."""
        return hashlib.sha256(" ".join(split.digest for split in self.splits.values()).encode()).hexdigest()


def prepare(config, tokenizer):
    """Read, check, encode and split the dataset of a `Config`.

    Raises:
        UserError: there is no such dataset, one of its rows is not a conversation, or a split would be empty.
    """
    sources = [parse_source(text) for text in config.dataset]
    corpus = load_corpus(sources, config, tokenizer)
    held_out = load_held_out(config, tokenizer) if config.eval_dataset else None
    digests, source_of = corpus.columns["digest"], corpus.columns["source"]
    notes = [note for part in (corpus, held_out) if part for note in notes_of(part.findings)]

    rows = choose_rows(source_of, sources, config.seed)
    if held_out:
        known, chosen = set(held_out.columns["digest"]), rows
        rows = [row for row in chosen if digests[row] not in known]
        notes.append(f"{len(chosen) - len(rows):,} left out of training because they are in --eval-dataset")
    shares = (0.0 if held_out else config.eval_fraction, config.test_fraction)
    splits = [[rows[i] for i in split] for split in split_rows(len(rows), *shares, config.seed)]
    train, evaluated, test = keep_copies_together(splits, digests)
    copies = len(rows) - len({digests[row] for row in rows})
    if copies:
        notes.append(f"{copies:,} are copies of another, always in the same split as it")

    parts = {
        "train": (corpus, weigh(train, source_of, sources, config.seed)),
        "eval": (held_out, range(len(held_out.rows))) if held_out else (corpus, evaluated),
        "test": (corpus, test),
    }
    splits = {name: take(part, numbers) for name, (part, numbers) in parts.items()}
    for name in ("train", "eval"):
        if not splits[name].examples:
            why = f"nothing is supervised in the {name} split; see --max-length"
            if not splits[name].dropped:
                why = f"the {name} split is empty, as all of its conversations are copies of others"
            raise UserError(f"--dataset {shown(config.dataset)}: {why}")
    return Data(**splits, notes=tuple(notes), warnings=tuple(warnings_about(splits["train"])))


def load_held_out(config, tokenizer):
    """The corpus of `--eval-dataset`; what is wrong with it is said of that flag."""
    try:
        return load_corpus([parse_source(config.eval_dataset)], config, tokenizer)
    except UserError as error:
        raise UserError(str(error).replace("--dataset", "--eval-dataset")) from error


def prepare_whole(config, tokenizer):
    """All of the dataset of a `Config`, as one `Encoded`."""
    corpus = load_corpus([parse_source(text) for text in config.dataset], config, tokenizer)
    return take(corpus, range(len(corpus.rows)))


def take(corpus, numbers):
    """Some rows of a corpus as `Encoded`; those with nothing supervised are counted and left out."""
    column = corpus.columns
    kept = [number for number in numbers if column["supervised"][number]]
    return Encoded(
        Examples(corpus.rows, kept),
        cut=sum(column["tokens"][number] > corpus.longest for number in numbers),
        dropped=len(numbers) - len(kept),
        tokens=sum(min(column["tokens"][number], corpus.longest) for number in kept),
        supervised=sum(column["supervised"][number] for number in kept),
        supervised_lost=sum(column["supervised_before"][number] - column["supervised"][number] for number in numbers),
        stops=any(column["stops"][number] for number in kept),
        digest=hashlib.sha256("".join(column["digest"][number] for number in kept).encode()).hexdigest(),
    )


def choose_rows(source_of, sources, seed):
    """The rows that are used: all of a source, or a random part of it where it asks for a share or a count."""
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for number, source in enumerate(sources):
        rows = [row for row, of in enumerate(source_of) if of == number]
        wanted = source.count or math.ceil(len(rows) * min(1.0, source.weight))
        if source.count and source.count > len(rows):
            raise UserError(f"--dataset {source.name}#{source.count}: it has {len(rows):,} conversations only")
        order = torch.randperm(len(rows), generator=generator)[:wanted].sort().values.tolist()
        chosen += [rows[i] for i in order]
    return chosen


def weigh(rows, source_of, sources, seed):
    """Training rows, those of a source of weight 2 twice, and of weight 2.5 every other one a third time."""
    generator = torch.Generator().manual_seed(seed)
    weighted = []
    for number, source in enumerate(sources):
        own = [row for row in rows if source_of[row] == number]
        whole, part = divmod(max(1.0, source.weight), 1)
        extra = torch.randperm(len(own), generator=generator)[: round(part * len(own))].tolist()
        weighted += own * int(whole) + [own[i] for i in extra]
    return weighted


def keep_copies_together(splits, digests):
    """Splits in which all rows of one digest are where its first row was put; without copies, as they were."""
    home = {}
    for row, number in sorted((row, number) for number, rows in enumerate(splits) for row in rows):
        home.setdefault(digests[row], number)
    together = [[row for row in rows if home[digests[row]] == number] for number, rows in enumerate(splits)]
    for number, rows in enumerate(splits):
        for row in rows:
            if home[digests[row]] != number:
                together[home[digests[row]]].append(row)
    return together


def notes_of(findings):
    """What reading brought to light, a line each."""
    formats = ", ".join(f"{count:,} as {name}" for name, count in findings.formats.most_common())
    yield f"{findings.rows:,} rows, {formats}"
    if findings.ignored:
        yield f"not used: {', '.join(sorted(findings.ignored))}"
    if findings.bad:
        reasons = "; ".join(f"{count:,} × {reason}" for reason, count in findings.bad.most_common())
        yield f"{findings.bad.total():,} rows left out ({reasons})"


def warnings_about(train):
    """What is implausible about training data, a line each."""
    share = train.supervised / train.tokens
    if not 0.01 <= share <= 0.95:
        yield f"{share:.1%} of the training tokens are supervised; look at them: python data.py --show 3"
    if not train.stops:
        yield "no answer ends within --max-length, so the model will not learn to stop"


def split_rows(n, eval_fraction, test_fraction, seed):
    """Row numbers of the train, eval and test splits of `n` rows, shares rounded up.

    Shuffled by `datasets.train_test_split`, once to hold out eval and test together and once to part the two, as the
    reference experiment does: its 2,000 rows become the same 1,800 / 100 / 100.

    Raises:
        UserError: a split that should have rows would have none.
    """
    n_eval, n_test = (math.ceil(round(share * n, 9)) for share in (eval_fraction, test_fraction))
    n_train = n - n_eval - n_test
    if n_train < 1 or (n_eval < 1 and eval_fraction):
        raise UserError(
            f"--eval-fraction {eval_fraction} and --test-fraction {test_fraction} of {n} conversations leave "
            f"{max(0, n_train)} to train on and {n_eval} to evaluate; use more conversations or other shares"
        )
    if n_eval + n_test == 0:
        return list(range(n)), [], []
    first = Dataset.from_dict({"row": range(n)}).train_test_split(test_size=n_eval + n_test, seed=seed)
    if n_test == 0:
        return first["train"]["row"][:], first["test"]["row"][:], []
    if n_eval == 0:
        return first["train"]["row"][:], [], first["test"]["row"][:]
    second = first["test"].train_test_split(test_size=n_test, seed=seed)
    return first["train"]["row"][:], second["train"]["row"][:], second["test"]["row"][:]


def windows_per_epoch(n, batch_size):
    """How many updates an epoch over `n` examples takes; the last window may be short."""
    return math.ceil(n / batch_size)


def window_at(step, examples, batch_size, seed):
    """The window that update `step` (from 0) sees: a list of at most `batch_size` examples."""
    return [examples[index] for index in window_indices(step, len(examples), batch_size, seed)]


def window_indices(step, n, batch_size, seed):
    """Which of `n` examples are the window of update `step` (from 0).

    An epoch's order is `torch.randperm(n)` under a generator seeded with seed + epoch, which is `Trainer`'s too.
    """
    epoch, position = divmod(step, windows_per_epoch(n, batch_size))
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed + epoch)).tolist()
    return order[position * batch_size : (position + 1) * batch_size]


def main(argv):
    """`python data.py --show N`: print encoded conversations of the training split."""
    parser = Parser(prog="data.py", description="Print encoded conversations, the supervised tokens coloured.")
    parser.add_argument("--show", type=int, default=3, metavar="N", help="how many conversations (default 3)")
    parser.add_argument("--json", action="store_true", help="one object a line: input_ids and labels")
    parser.add_argument("--html", metavar="FILE", help="write a page of them, with a histogram and the counts")
    parser.add_config_flags(DATA_FLAGS)
    named, options = parser.parse(argv)
    if options["show"] < 1:
        raise UserError(f"--show must be at least 1, not {options['show']}")
    hub.quiet_libraries()
    config = resolve(named, hub.choose_preset(named)[0])
    tokenizer = load_tokenizer(*hub.find_model(config.model), config.chat_template)
    data = prepare(config, tokenizer)
    examples = data.train.examples[: options["show"]]
    if options["html"]:
        names = " ".join(Path(name).name for name in config.dataset)
        Path(options["html"]).write_text(page.page(data, examples, tokenizer, names), encoding="utf-8")
        print(f"written to {options['html']}")
        return 0
    if not options["json"]:
        print("\n".join((*data.notes, *(f"warning: {warning}" for warning in data.warnings))))
    for number, example in enumerate(examples, 1):
        if options["json"]:
            print(json.dumps({"input_ids": example.input_ids.tolist(), "labels": example.labels.tolist()}))
            continue
        print(f"--- {number}: {len(example.input_ids)} tokens, {example.supervised_tokens} of them supervised")
        print(preview(example, tokenizer, color=sys.stdout.isatty()))
    return 0


if __name__ == "__main__":
    run_command(main)
