"""Conversations as training data: their splits, and the windows that updates see.

A window is the examples that one update sees; it alone decides what is learned. `conversations.masking` decides which
tokens of an example are supervised.

As a command: `python data.py --show 3` prints encoded conversations with the supervised tokens coloured, and
`python data.py --audit FILE` judges what another trainer has encoded.
"""

import dataclasses
import functools
import hashlib
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.compute
import torch

from config import Config, Parser, UserError, explain_machine_errors, format_value, resolve, rewrite_errors, run_command
from conversations.audit import print_audit
from conversations.corpus import Corpus, load_corpus
from conversations.leaks import GRAM, find_leaks
from conversations.masking import Example
from conversations.preview import check_page_path, page, preview
from conversations.sources import check_sources, find_files, name_sources, notes_on_directories, parse_source
from conversations.tokenizer import load_tokenizer
from storage import hub
from storage.durable import replace_file

DATA_FLAGS = (
    "preset model dataset eval_dataset split max_examples max_length skip_bad_rows drop_columns columns "
    "chat_template template_option supervise eval_fraction test_fraction seed"
).split()
AUDIT_FLAGS = {"preset", "model", "chat_template", "template_option"}  # of those, what an audit needs


# --- from a dataset to its splits


@dataclass(frozen=True, eq=False)
class Examples(Sequence):
    """The `Example`s of some rows of a corpus, read from disk on access."""

    corpus: Corpus
    numbers: np.ndarray  # of the rows

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        # Of Arrow's arrays, as they are on disk: a Python object for each token would take a hundred times as long.
        lists = (self.corpus.rows[name][int(self.numbers[index])] for name in ("input_ids", "labels"))
        return Example(*(torch.tensor(each.values.to_numpy(), dtype=torch.long) for each in lists))

    def location(self, index):
        """The file and line that the conversation of an example was read from."""
        return self.corpus.rows["location"][int(self.numbers[index])].as_py()

    @property
    def origin(self):
        """The corpus, and the numbers of the conversations in it that the examples were made of."""
        return self.corpus, np.unique(np.searchsorted(self.corpus.bounds, self.numbers, side="right") - 1)


class Split(NamedTuple):
    """The examples made of some conversations, and what became of the rest."""

    examples: Sequence  # of Example
    conversations: int = 0  # of which these examples, and those that were dropped, were made
    truncated: int = 0  # examples longer than max_length
    dropped: int = 0  # examples left out because none of their tokens is supervised
    tokens: int = 0
    longest: int = 0  # tokens of an example
    supervised: int = 0  # of all tokens
    supervised_lost: int = 0  # to max_length
    has_stop: bool = True  # whether any answer ends with a supervised stop token
    digest: str = ""  # SHA-256 over the ids and labels of all examples


@dataclass(frozen=True)
class Data:
    """A dataset, encoded, in its three splits."""

    train: Split
    eval: Split
    test: Split
    notes: list[str] = field(default_factory=list)  # about the rows that were read
    warnings: list[str] = field(default_factory=list)
    eval_sources: dict[str, int] = field(default_factory=dict)  # of several: their names and numbers of examples

    @property
    def splits(self):
        return {"train": self.train, "eval": self.eval, "test": self.test}

    @functools.cached_property
    def leaks(self):
        """The `Leak`s of held-out conversations: what they share with those to train on."""
        return find_leaks(*(split.examples.origin for split in self.splits.values()))

    @property
    def fingerprint(self):
        """SHA-256 over all ids and labels: any change of data, template, tokenizer or splits changes it."""
        return hashlib.sha256(" ".join(split.digest for split in self.splits.values()).encode()).hexdigest()


def load_data(config, tokenizer):
    """Read, check, encode and split the dataset of a `Config`; no split may be empty."""
    sources = [parse_source(text) for text in config.dataset]
    corpus = load_corpus(sources, config, tokenizer)
    digests, source_of = corpus.digests, corpus.source_of  # a split, a quantity and a weight are of conversations
    rows = choose_rows(source_of, sources, config.seed)
    notes = [*notes_on_directories(sources), *corpus.notes, *notes_on_quantities(rows, source_of, sources)]
    eval_fraction, evaluated, eval_sources = config.eval_fraction, None, {}
    if config.eval_dataset:
        evaluated, known, eval_notes, eval_sources = load_eval_dataset(config, tokenizer)
        notes += eval_notes
        is_known = pyarrow.compute.is_in(digests.take(rows), known).to_numpy(zero_copy_only=False)
        eval_fraction, rows = 0.0, rows[~is_known]
        if not len(rows):
            raise UserError(f"--dataset {format_value(config.dataset)}: all of its conversations are in --eval-dataset")
        if is_known.any():
            notes.append(f"{is_known.sum():,} left out of training because they are in --eval-dataset")
    splits = split_rows(len(rows), eval_fraction, config.test_fraction, config.seed)
    group_of = digests.dictionary_encode().indices.to_numpy()  # conversations of one digest are a group
    train, shared, test = keep_duplicates_together([rows[split] for split in splits], group_of)
    if duplicates := len(rows) - len(np.unique(group_of[rows])):
        notes.append(f"{duplicates:,} are duplicates of another, always in the same split as it")
    held_out = {"eval": evaluated or make_split(corpus, shared), "test": make_split(corpus, test)}
    if config.exclude_leaks:
        before, origins = len(train), [split.examples.origin for split in held_out.values()]
        while leaks := find_leaks((corpus, train), *origins):  # again, as what is boilerplate depends on what is left
            train = train[~np.isin(group_of[train], group_of[[leak.number for leak in leaks]])]
        notes.append(f"{before - len(train):,} left out of training because held-out conversations share their text")
    splits = {"train": make_split(corpus, repeat_by_weight(train, source_of, sources, config.seed)), **held_out}
    for name in ("train", "eval") if config.eval_fraction or config.eval_dataset else ("train",):
        check_not_empty(name, splits[name], config)
    warnings = warnings_about(splits, tokenizer.model_max_length)
    if config.split != Config().split and all(source.split or find_files(source.name) for source in sources):
        warnings.append(f"--split {config.split} has no effect: files have no splits")
    if unused := [text for number, text in enumerate(config.dataset) if number not in source_of]:
        reason = "it has none, or --max-examples is reached before"
        warnings.append(f"no conversation of {' '.join(unused)} is used: {reason}")
    return Data(**splits, notes=notes, warnings=warnings, eval_sources=eval_sources)


def check_not_empty(name, split, config):
    """Raise `UserError` for a split without examples."""
    if split.examples:
        return
    why = f"nothing is supervised in the {name} split; see --max-length"
    if not split.dropped:
        what = "leaks or duplicates" if config.exclude_leaks else "duplicates"
        why = f"the {name} split is empty, as all of its conversations are {what}; use --eval-dataset"
    raise UserError(f"--dataset {format_value(config.dataset)}: {why}")


def describe_leaks(data):
    """How many held-out conversations are leaks, for reading; empty where none are held out."""
    held_out = sum(len(split.examples.origin[1]) for split in (data.eval, data.test))
    if not held_out:
        return ""
    kinds = ("answers", "prompts")
    answers, prompts = (len({leak.held_out for leak in data.leaks if leak.kind == kind}) for kind in kinds)
    return (
        f"{answers:,} of {held_out:,} held-out conversations share most of their answers with one in training, "
        f"{prompts:,} most of their prompts (in runs of {GRAM} tokens{'; see data.py --leaks' if data.leaks else ''})"
    )


def load_split(config, tokenizer):
    """The dataset of a `Config`, as far as it is used, as one `Split`; it may not be empty."""
    split = make_split(*load_once(config.dataset, config, tokenizer))
    if not split.examples:
        raise UserError(f"--dataset {format_value(config.dataset)}: nothing in it is supervised; see --max-length")
    return split


def load_eval_dataset(config, tokenizer):
    """The `Split` of `--eval-dataset`, the digests of its conversations, notes, and the examples of each of several."""
    with rewrite_errors("--dataset", "--eval-dataset"):
        all_of_it = dataclasses.replace(config, max_examples=0)  # which is of --dataset
        corpus, rows = load_once(config.eval_dataset, all_of_it, tokenizer, may_lack_columns=True)
    notes, examples = [f"--eval-dataset: {note}" for note in corpus.notes], {}
    for number, name in enumerate(name_sources(config.eval_dataset) if len(config.eval_dataset) > 1 else ()):
        of_source = make_split(corpus, rows[corpus.source_of[rows] == number])
        examples[name] = len(of_source.examples)
        if not of_source.examples:
            raise UserError(f"--eval-dataset {config.eval_dataset[number]}: nothing in it is supervised")
    if examples:
        counts = ", ".join(f"{count:,} of {name}" for name, count in examples.items())
        notes.append(f"--eval-dataset: {counts}; the loss over all their tokens selects the best model")
    return make_split(corpus, rows), corpus.digests.take(rows), notes, examples


def load_once(dataset, config, tokenizer, may_lack_columns=False):
    """A corpus for an evaluation, and the numbers of the conversations that are used, each of them once."""
    sources = [parse_source(text) for text in dataset]
    for source in sources:
        if source.weight > 1:
            raise UserError(f"--dataset {source.name}:{source.weight:g}: an evaluation uses each conversation once")
    corpus = load_corpus(sources, config, tokenizer, may_lack_columns)
    return corpus, choose_rows(corpus.source_of, sources, config.seed)


def notes_on_quantities(rows, source_of, sources):
    """A line for each source with a quantity: how many of its conversations are used."""
    for number, source in enumerate(sources):
        if (source.weight, source.count) != (1.0, None):
            found, used = (np.count_nonzero(of == number) for of in (source_of, source_of[rows]))
            times = f", {source.weight:g} times an epoch in training" if source.weight > 1 else ""
            yield f"{source.name}: {used:,} of {found:,} conversations used{times}"


def make_split(corpus, conversations):
    """Some conversations of a corpus as a `Split`; examples with nothing supervised are counted and dropped."""
    numbers = corpus.rows_of(conversations)
    column = {name: corpus.columns[name][numbers] for name in ("tokens", "supervised", "supervised_before", "has_stop")}
    is_kept = column["supervised"] > 0
    kept, lengths = numbers[is_kept], np.minimum(column["tokens"][is_kept], corpus.max_length)
    return Split(
        Examples(corpus, kept),
        conversations=len(conversations),
        truncated=int((column["tokens"] > corpus.max_length).sum()),
        dropped=len(numbers) - len(kept),
        tokens=int(lengths.sum()),
        longest=int(lengths.max(initial=0)),
        supervised=int(column["supervised"].sum()),
        supervised_lost=int((column["supervised_before"] - column["supervised"]).sum()),
        has_stop=bool(column["has_stop"][is_kept].any()),
        digest=hashlib.sha256(corpus.columns["digest"].take(kept).buffers()[2] or b"").hexdigest(),  # the texts' bytes
    )


def warnings_about(splits, context_length):
    """A list of lines: everything that is implausible about the splits, mostly about that of training."""
    train, longest = splits["train"], max(split.longest for split in splits.values())
    rows, share = len(train.examples) + train.dropped, train.supervised / train.tokens
    lost = train.supervised_lost / (train.supervised_lost + train.supervised)
    of_rows, there = f"of {rows:,} training conversations are", f"there are conversations of {longest:,} tokens"
    look = "look at them: python data.py --show 3"
    warnings = (
        (not 0.01 <= share <= 0.95, f"{share:.1%} of the training tokens are supervised; {look}"),
        (not train.has_stop, "no answer ends within --max-length, so the model will not learn to stop"),
        (lost > 0.25, f"{lost:.0%} of the supervised tokens are lost to --max-length; a larger one would keep them"),
        (train.truncated > rows / 2, f"{train.truncated:,} {of_rows} truncated by --max-length"),
        (train.dropped > rows / 2, f"{train.dropped:,} {of_rows} left out: nothing in them is supervised"),
        (longest > context_length, f"--max-length: {there}; the context length is {context_length:,}"),
    )
    return [warning for applies, warning in warnings if applies]


# --- which conversations are used, how often, and in which split


def choose_rows(source_of, sources, seed):
    """The rows that are used: all of a source, or a random part of it where it has a share or a count."""
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for number, source in enumerate(sources):
        rows = np.flatnonzero(source_of == number)
        wanted = source.count or math.ceil(len(rows) * min(1.0, source.weight))
        if wanted > len(rows):
            raise UserError(f"--dataset {source.name}#{source.count}: {len(rows):,} conversations of it were read")
        order = torch.randperm(len(rows), generator=generator)[:wanted].sort().values
        chosen.append(rows[order.numpy()])
    return np.concatenate(chosen)


def repeat_by_weight(rows, source_of, sources, seed):
    """Training rows, those of a source of weight 2 twice, and of weight 2.5 every other one a third time."""
    generator = torch.Generator().manual_seed(seed)
    repeated = []
    for number, source in enumerate(sources):
        of_source = rows[source_of[rows] == number]
        times, fraction = divmod(max(1.0, source.weight), 1)
        extra = torch.randperm(len(of_source), generator=generator)[: round(fraction * len(of_source))]
        repeated += [of_source] * int(times) + [of_source[extra.numpy()]]
    return np.concatenate(repeated)


def keep_duplicates_together(splits, group_of):
    """Splits in which all rows of one group are where its first row was put; without duplicates, unchanged."""
    split_of = np.full(len(group_of), -1)  # of each row
    for number, rows in enumerate(splits):
        split_of[rows] = number
    used = np.flatnonzero(split_of >= 0)
    _, first, groups = np.unique(group_of[used], return_index=True, return_inverse=True)
    split_of[used] = split_of[used[first]][groups]  # where the first row of its group was put
    together = []
    for number, rows in enumerate(splits):
        own_first = np.concatenate([rows, *splits[:number], *splits[number + 1 :]])
        together.append(own_first[split_of[own_first] == number])
    return together


def split_rows(n, eval_fraction, test_fraction, seed):
    """Row numbers of the train, eval and test splits of `n` rows, shares rounded up.

    Eval and test are held out together and then separated, as in the reference experiment, whose 2,000 rows become the
    same 1,800 / 100 / 100.
    """
    n_eval, n_test = (math.ceil(round(share * n, 9)) for share in (eval_fraction, test_fraction))
    n_train = n - n_eval - n_test
    if n_train < 1 or (n_eval < 1 and eval_fraction):
        raise UserError(
            f"--eval-fraction {eval_fraction} and --test-fraction {test_fraction} of {n} conversations leave "
            f"{max(0, n_train)} to train on and {n_eval} to evaluate; "
            "use more conversations, other shares or --eval-dataset"
        )
    train, held_out = hold_out(np.arange(n), n_eval + n_test, seed)
    return train, *hold_out(held_out, n_test, seed)


def hold_out(rows, count, seed):
    """The rows without `count` of them, and those, shuffled as `datasets.train_test_split` does."""
    if count not in (0, len(rows)):
        rows = rows[np.random.default_rng(seed).permutation(len(rows))]
    return rows[count:], rows[:count]


# --- from a split to windows


def windows_per_epoch(n, batch_size):
    """The number of updates in an epoch over `n` examples; the last window may be short."""
    return math.ceil(n / batch_size)


def window_at(step, examples, batch_size, seed):
    """The window that update `step` (from 0) sees: a list of at most `batch_size` examples."""
    return [examples[index] for index in window_indices(step, len(examples), batch_size, seed)]


def window_indices(step, n, batch_size, seed):
    """The numbers, of `n` examples, of those in the window of update `step` (from 0)."""
    epoch, position = divmod(step, windows_per_epoch(n, batch_size))
    return epoch_order(n, seed + epoch)[position * batch_size : (position + 1) * batch_size].tolist()


@functools.lru_cache(maxsize=2)  # this epoch's, and the next one's, whose first window is read ahead
def epoch_order(n, seed):
    """The order in which an epoch sees `n` examples, (n,); `Trainer` shuffles in the same way, with seed + epoch."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


# --- the command


@explain_machine_errors("use a lower --max-examples, or a machine with more")
def main(argv):
    """`python data.py --show N`: print encoded conversations of the training split."""
    parser = Parser(prog="data.py", description="Print encoded conversations, the supervised tokens coloured.")
    parser.add_argument("--show", type=int, default=3, metavar="N", help="how many conversations (default 3)")
    parser.add_argument("--json", action="store_true", help="one object a line: input_ids and labels")
    parser.add_argument("--html", metavar="FILE", help="write a page of them, with a histogram and the counts")
    parser.add_argument("--leaks", action="store_true", help="instead list what held-out conversations share with them")
    parser.add_argument("--audit", metavar="FILE", help="instead judge the ids and labels that another trainer made")
    parser.add_config_flags([*DATA_FLAGS, "exclude_leaks"])
    named, options = parser.parse(argv)
    if options["show"] < 1:
        raise UserError(f"--show must be at least 1, not {options['show']}")
    if options["html"]:
        if other := [name for name in ("json", "leaks", "audit") if options[name]]:
            raise UserError(f"--html and --{other[0]}: use one of them")
        check_page_path(options["html"])
    if options["audit"] and (other := [*named.keys() - AUDIT_FLAGS, *["leaks"] * options["leaks"]]):
        raise UserError(f"--audit judges a file as it is; leave out --{min(other).replace('_', '-')}")
    hub.quiet_libraries()
    config = resolve(named, hub.choose_preset(named)[0])
    if not options["audit"]:
        check_sources(config)
    tokenizer = load_tokenizer(*hub.find_model(config.model), config.chat_template, config.template_option)
    if options["audit"]:
        return print_audit(options["audit"], tokenizer, options["show"], options["json"])
    data = load_data(config, tokenizer)
    examples = data.train.examples[: options["show"]]
    if options["leaks"]:
        print_leaks(data, tokenizer, options["json"])
    elif options["html"]:
        names = " ".join(Path(name).name for name in config.dataset)
        replace_file(options["html"], page(data, examples, tokenizer, names))
        print(f"written to {options['html']}")
    elif options["json"]:
        for example in examples:
            print(json.dumps({"input_ids": example.input_ids.tolist(), "labels": example.labels.tolist()}))
    else:
        print_examples(data, examples, tokenizer)
    return 0


def print_leaks(data, tokenizer, as_json):
    """Print a line for each leak, for reading or as an object."""
    for leak in data.leaks:
        found = {**leak._asdict(), "shared": tokenizer.decode(leak.shared)}
        line = "{held_out} shares {tokens} tokens of its {kind} with {train}: {shared!r}…".format(**found)
        print(json.dumps(found) if as_json else line)
    print(describe_leaks(data) or "nothing is held out", file=sys.stderr)


def print_examples(data, examples, tokenizer):
    """Print what is known about some `Data`, and the first examples of its training split."""
    counts = ", ".join(
        f"{name} {len(split.examples):,} ({split.truncated:,} truncated, {split.dropped:,} dropped)"
        for name, split in data.splits.items()
    )
    notes = filter(None, (*data.notes, counts, describe_leaks(data)))
    print("\n".join((*notes, *(f"warning: {warning}" for warning in data.warnings))))
    for number, example in enumerate(examples):
        counts = f"{len(example.input_ids)} tokens, {example.supervised_tokens} of them supervised"
        print(f"--- {number + 1}: {counts} ({data.train.examples.location(number)})")
        print(preview(example, tokenizer, color=sys.stdout.isatty()))


if __name__ == "__main__":
    run_command(main, single_process=True)
