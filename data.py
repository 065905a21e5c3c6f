"""From conversations to supervised examples, their splits, and the windows that updates see.

What the assistant says is supervised: its content, its `<|im_end|>` and the newline after it. Everything else is
context, label -100. A conversation is one example, or a few where its template writes an answer differently once others
follow. A window is the examples that one update sees; it alone decides what is learned.

As a command: `python data.py --show 3` prints encoded conversations with the supervised tokens coloured.
"""

import dataclasses
import functools
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

from config import Config, Parser, UserError, as_text, renaming, resolve, run_command
from conversations import templates
from conversations.corpus import load_corpus
from conversations.formats import ROLES
from conversations.mixture import choose_rows, keep_copies_together, repeat_by_weight
from conversations.preview import page, preview, refuse_other_file
from conversations.sources import Source, files_of, notes_on_directories, parse_source
from conversations.templates import encode_texts
from conversations.tokenizer import CHATML, END, START, load_tokenizer
from storage import hub
from storage.durable import replace_file

IGNORE = -100  # torch's cross_entropy skips this label
DATA_FLAGS = (
    "preset model dataset eval_dataset split max_examples max_length skip_bad_rows chat_template "
    "template_option supervise eval_fraction test_fraction seed"
).split()


# --- from messages to a masked example


class Example(NamedTuple):
    """An encoded conversation; `labels` are unshifted: `labels[i]` is `input_ids[i]` or IGNORE."""

    input_ids: torch.Tensor  # (T,) int64
    labels: torch.Tensor  # (T,) int64

    @property
    def supervised(self):
        """Which tokens have a label: (T,) bool."""
        return self.labels != IGNORE

    @property
    def supervised_tokens(self):
        """How many tokens are predicted and scored; the first has nothing before it to be predicted from."""
        return int(self.supervised[1:].sum())

    def truncated(self, length):
        """The example's first `length` tokens."""
        return Example(self.input_ids[:length], self.labels[:length])


def encode(conversations, tokenizer, supervise="all"):
    """Conversations to `Example`s, in their order, by the tokenizer's template; see `encode_each`."""
    return [example for examples in encode_each(conversations, tokenizer, supervise) for example in examples]


def encode_each(conversations, tokenizer, supervise="all"):
    """Conversations to their `Example`s: for each a list of one, or of as few as its template needs.

    Args:
        conversations: lists of messages, as `conversations.formats` makes them.
        supervise: as for `supervised_messages`.

    Raises:
        UserError: the template cannot write a conversation, which is named.
    """
    wanted_of = functools.partial(supervised_messages, supervise=supervise)
    encode_segments = encode_chatml if tokenizer.chat_template == CHATML else templates.encode
    encoded = encode_segments(conversations, tokenizer, wanted_of)
    return [[labelled(*example) for example in examples] for examples in encoded]


def labelled(segments, supervised):
    """An `Example` of segments `(ids, answer)`, of which the answers with these numbers are supervised."""
    input_ids, labels = [], []
    for ids, answer in segments:
        input_ids += ids
        labels += ids if answer in supervised else [IGNORE] * len(ids)
    return Example(torch.tensor(input_ids), torch.tensor(labels))


def supervised_messages(messages, supervise="all"):
    """Which messages are supervised: a bool each.

    Args:
        supervise: "all" of the assistant's messages, or the "last"; one with `"train": False` never is.
    """
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    chosen = answers if supervise == "all" else answers[-1:]
    return [number in chosen and message.get("train", True) for number, message in enumerate(messages)]


def encode_chatml(conversations, tokenizer, wanted_of):
    """Ids of conversations in ChatML, one example each, in the form that `templates.encode` returns.

    Contents are encoded one by one, as plain text, and the two control tokens are put in as ids. So no text can become
    a control token, and a reply is encoded as the model meets it at inference, right after its header.
    """
    start, end = tokenizer.convert_tokens_to_ids([START, END])
    header = {role: [start, *encode_texts([role + "\n"], tokenizer)[0]] for role in ROLES}
    footer = [end, *encode_texts(["\n"], tokenizer)[0]]
    texts = [message["content"] for messages in conversations for message in messages]
    contents = iter(encode_texts(texts, tokenizer))
    encoded = []
    for messages in conversations:
        segments = []
        for number, message in enumerate(messages):
            answer = number if message["role"] == "assistant" else None
            segments += [(header[message["role"]], None), (next(contents) + footer, answer)]
        supervised = {number for number, wanted in enumerate(wanted_of(messages)) if wanted}
        encoded.append([(segments, supervised)])
    return encoded


def encode_prompt(prompt, tokenizer):
    """A user's prompt, or messages, up to the point where the assistant answers: ids (T,), all context."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if tokenizer.chat_template != CHATML:
        return torch.tensor(templates.encode_prompt(messages, tokenizer))
    example = encode([[*messages, {"role": "assistant", "content": "x"}]], tokenizer, "last")[0]
    return example.input_ids[: example.supervised.int().argmax()]


# --- from a dataset to its splits


class Examples(Sequence):
    """The `Example`s of some rows of a corpus, read from disk when asked for."""

    def __init__(self, rows, numbers):
        # Arrow's arrays, as they are on disk: a Python object for each token would take a hundred times as long.
        self.columns, self.numbers = [rows.data.column(name) for name in ("input_ids", "labels")], numbers
        self.locations = rows.select_columns(["location"])

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = self.numbers[index]
        return Example(*(torch.tensor(column[row].values.to_numpy(), dtype=torch.long) for column in self.columns))

    def location(self, index):
        """Where the conversation of an example was read: file and line."""
        return self.locations[self.numbers[index]]["location"]


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
    unknown: int = 0  # supervised tokens that the tokenizer does not know
    empty_thoughts: int = 0  # answers that are supervised with a thought that says nothing
    stops: bool = True  # whether any answer ends with a supervised stop token
    digest: str = ""  # SHA-256 over the ids and labels of all examples


@dataclass(frozen=True)
class Data:
    """A dataset, encoded, in its three splits."""

    train: Split
    eval: Split
    test: Split
    notes: tuple[str, ...] = ()  # what reading it found
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
    corpus = load_corpus(sources, config, tokenizer, encode_each)
    held_out = load_held_out(config, tokenizer) if config.eval_dataset else None
    digests, source_of = corpus.digests, corpus.source_of  # a split, an amount and a weight are of conversations
    notes = [*notes_on_directories(sources), *corpus.findings.notes(), *corpus.notes()]
    if held_out:
        notes += [f"--eval-dataset: {note}" for note in (*held_out.findings.notes(), *held_out.notes())]

    rows = choose_rows(source_of, sources, config.seed)
    notes += notes_on_amounts(rows, source_of, sources)
    if held_out:
        evaluated, chosen = held_out_rows(config, held_out), rows
        known = {held_out.digests[row] for row in evaluated}
        rows = [row for row in chosen if digests[row] not in known]
        if not rows:
            raise UserError(f"--dataset {as_text(config.dataset)}: all of its conversations are in --eval-dataset")
        if len(rows) < len(chosen):
            notes.append(f"{len(chosen) - len(rows):,} left out of training because they are in --eval-dataset")
    shares = (0.0 if held_out else config.eval_fraction, config.test_fraction)
    splits = [[rows[i] for i in split] for split in split_rows(len(rows), *shares, config.seed)]
    train, shared, test = keep_copies_together(splits, digests)
    copies = len(rows) - len({digests[row] for row in rows})
    if copies:
        notes.append(f"{copies:,} are copies of another, always in the same split as it")

    parts = {
        "train": (corpus, repeat_by_weight(train, source_of, sources, config.seed)),
        "eval": (held_out, evaluated) if held_out else (corpus, shared),
        "test": (corpus, test),
    }
    splits = {name: select(part, numbers) for name, (part, numbers) in parts.items()}
    for name in ("train", "eval"):
        if not splits[name].examples:
            why = f"nothing is supervised in the {name} split; see --max-length"
            if not splits[name].dropped:
                why = f"the {name} split is empty, as all of its conversations are copies of others; use --eval-dataset"
            raise UserError(f"--dataset {as_text(config.dataset)}: {why}")
    warnings = [*warnings_about(splits), *warnings_of_unused(config, sources, splits, tokenizer)]
    return Data(**splits, notes=tuple(notes), warnings=tuple(warnings))


def load_held_out(config, tokenizer):
    """The corpus of `--eval-dataset`, which `--max-examples` does not limit."""
    with renaming("--dataset", "--eval-dataset"):
        sources = [parse_source(config.eval_dataset)]
        return load_corpus(sources, dataclasses.replace(config, max_examples=0), tokenizer, encode_each)


def held_out_rows(config, held_out):
    """The rows of `--eval-dataset` that are used."""
    with renaming("--dataset", "--eval-dataset"):
        return used_once([parse_source(config.eval_dataset)], held_out, config.seed)


def prepare_for_evaluation(config, tokenizer):
    """The dataset of a `Config`, as far as it is used, as one `Split`.

    Raises:
        UserError: there is no such dataset, one of its rows is not a conversation, or nothing in it is supervised.
    """
    sources = [parse_source(text) for text in config.dataset]
    corpus = load_corpus(sources, config, tokenizer, encode_each)
    split = select(corpus, used_once(sources, corpus, config.seed))
    if not split.examples:
        raise UserError(f"--dataset {as_text(config.dataset)}: nothing in it is supervised; see --max-length")
    return split


def used_once(sources, corpus, seed):
    """The rows that an evaluation uses, each of them once.

    Raises:
        UserError: a source is to be used more than once.
    """
    for source in sources:
        if source.weight > 1:
            raise UserError(f"--dataset {source.name}:{source.weight:g}: an evaluation uses each conversation once")
    return choose_rows(corpus.source_of, sources, seed)


def notes_on_amounts(rows, source_of, sources):
    """How many conversations of a source are used, where it asks for an amount: a line each."""
    for number, source in enumerate(sources):
        if source != Source(source.name, source.config):
            found, used = source_of.count(number), sum(source_of[row] == number for row in rows)
            times = f", {source.weight:g} times an epoch in training" if source.weight > 1 else ""
            yield f"{source.name}: {used:,} of {found:,} conversations used{times}"


def select(corpus, conversations):
    """Some conversations of a corpus as a `Split`; examples with nothing supervised are counted and left out."""
    column = corpus.columns
    numbers = [row for number in conversations for row in corpus.conversations[number]]
    kept = [number for number in numbers if column["supervised"][number]]
    return Split(
        Examples(corpus.rows, kept),
        conversations=len(conversations),
        truncated=sum(column["tokens"][number] > corpus.longest for number in numbers),
        dropped=len(numbers) - len(kept),
        tokens=sum(min(column["tokens"][number], corpus.longest) for number in kept),
        longest=max((min(column["tokens"][number], corpus.longest) for number in kept), default=0),
        supervised=sum(column["supervised"][number] for number in kept),
        supervised_lost=sum(column["supervised_before"][number] - column["supervised"][number] for number in numbers),
        unknown=sum(column["unknown"][number] for number in kept),
        empty_thoughts=sum(column["empty_thoughts"][number] for number in kept),
        stops=any(column["stops"][number] for number in kept),
        digest=hashlib.sha256("".join(column["digest"][number] for number in kept).encode()).hexdigest(),
    )


def warnings_about(splits):
    """What is implausible about the splits of a dataset, a line each."""
    train = splits["train"]
    share = train.supervised / train.tokens
    if not 0.01 <= share <= 0.95:
        yield f"{share:.1%} of the training tokens are supervised; look at them: python data.py --show 3"
    if train.unknown:
        yield f"{train.unknown:,} supervised tokens are characters that the tokenizer does not know"
    if train.empty_thoughts:
        yield (
            f"{train.empty_thoughts:,} answers are supervised with an empty thought; where the template writes it, "
            "--template-option enable_thinking=false may make it part of the prompt"
        )
    if not train.stops:
        yield "no answer ends within --max-length, so the model will not learn to stop"
    lost = train.supervised_lost / (train.supervised_lost + train.supervised)
    if lost > 0.25:
        yield f"{lost:.0%} of the supervised tokens are lost to --max-length; a larger one would keep them"
    rows = len(train.examples) + train.dropped
    if train.truncated > rows / 2:
        yield f"{train.truncated:,} of {rows:,} training conversations are truncated by --max-length"
    if train.dropped > rows / 2:
        yield f"{train.dropped:,} of {rows:,} training conversations are left out: nothing in them is supervised"


def warnings_of_unused(config, sources, splits, tokenizer):
    """Which settings say something else than what happens, a line each."""
    longest, attended = max(split.longest for split in splits.values()), tokenizer.model_max_length
    if longest > attended:
        yield f"--max-length: there are conversations of {longest:,} tokens, and the model was made for {attended:,}"
    if config.split != Config().split and all(map(files_of, (source.name for source in sources))):
        yield f"--split {config.split} has no effect: files have no splits"


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
            f"{max(0, n_train)} to train on and {n_eval} to evaluate; "
            "use more conversations, other shares or --eval-dataset"
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


# --- from a split to windows


def windows_per_epoch(n, batch_size):
    """How many updates an epoch over `n` examples takes; the last window may be short."""
    return math.ceil(n / batch_size)


def window_at(step, examples, batch_size, seed):
    """The window that update `step` (from 0) sees: a list of at most `batch_size` examples."""
    return [examples[index] for index in window_indices(step, len(examples), batch_size, seed)]


def window_indices(step, n, batch_size, seed):
    """Which of `n` examples are the window of update `step` (from 0)."""
    epoch, position = divmod(step, windows_per_epoch(n, batch_size))
    return epoch_order(n, seed + epoch)[position * batch_size : (position + 1) * batch_size].tolist()


@functools.lru_cache(maxsize=2)  # this epoch's, and the next one's, whose first window is read ahead
def epoch_order(n, seed):
    """The order in which an epoch sees `n` examples, (n,); `Trainer` shuffles in the same way, with seed + epoch."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


# --- the command


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
    if options["html"]:
        if options["json"]:
            raise UserError("--html and --json: use one of them")
        refuse_other_file(options["html"])
    hub.quiet_libraries()
    config = resolve(named, hub.choose_preset(named)[0])
    tokenizer = load_tokenizer(*hub.find_model(config.model), config.chat_template, config.template_option)
    data = prepare(config, tokenizer)
    examples = data.train.examples[: options["show"]]
    locations = [data.train.examples.location(index) for index in range(len(examples))]
    if options["html"]:
        names = " ".join(Path(name).name for name in config.dataset)
        replace_file(options["html"], page(data, examples, tokenizer, names))
        print(f"written to {options['html']}")
        return 0
    if not options["json"]:
        counts = ", ".join(
            f"{name} {len(split.examples):,} ({split.truncated:,} truncated, {split.dropped:,} dropped)"
            for name, split in data.splits.items()
        )
        print("\n".join((*data.notes, counts, *(f"warning: {warning}" for warning in data.warnings))))
    for number, (example, where) in enumerate(zip(examples, locations, strict=True), 1):
        if options["json"]:
            print(json.dumps({"input_ids": example.input_ids.tolist(), "labels": example.labels.tolist()}))
            continue
        counts = f"{len(example.input_ids)} tokens, {example.supervised_tokens} of them supervised"
        print(f"--- {number}: {counts} ({where})")
        print(preview(example, tokenizer, color=sys.stdout.isatty()))
    return 0


if __name__ == "__main__":
    from data import main  # not this copy of it: processes that encode import `encode` by its module's name

    run_command(main, single_process=True)
