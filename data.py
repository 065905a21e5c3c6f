"""Conversations: reading and checking them, splitting, encoding, and cutting them into windows and micro-batches.

A window is the conversations one optimizer update sees; it alone decides what is learned. A micro-batch is the part of
a window that is in memory at once; it decides nothing.

As a command: `python data.py --show 3` prints encoded conversations with the supervised tokens coloured.
"""

import hashlib
import itertools
import json
import math
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from datasets import Dataset

import hub
from chat import IGNORE, ROLES, Example, encode, load_tokenizer, preview
from config import Parser, UserError, resolve, run_command

DATA_FLAGS = (
    "preset",
    "model",
    "dataset",
    "split",
    "max_examples",
    "max_length",
    "eval_fraction",
    "test_fraction",
    "seed",
)


class Encoded(NamedTuple):
    """The examples made of some conversations, and what became of the rest."""

    examples: list[Example]
    cut: int  # conversations longer than max_length
    dropped: int  # conversations left out because none of their tokens is supervised


class Data(NamedTuple):
    """A dataset, encoded, in its three splits."""

    train: Encoded
    eval: Encoded
    test: Encoded

    @property
    def fingerprint(self):
        """SHA-256 over all ids and labels: any change of data, template, tokenizer or splits changes it."""
        digest = hashlib.sha256()
        for split in self:
            for example in split.examples:
                digest.update(len(example.input_ids).to_bytes(8, "little"))
                digest.update(torch.cat(example).numpy().tobytes())
            digest.update(b"end of split")
        return digest.hexdigest()


def prepare(config, tokenizer):
    """Read, split and encode the dataset of a `Config`.

    Raises:
        UserError: there is no such dataset, one of its rows is not a conversation, or a split would be empty.
    """
    conversations = read_conversations(config.dataset, config.split, config.max_examples)
    splits = split_rows(len(conversations), config.eval_fraction, config.test_fraction, config.seed)
    data = Data(*(encode_all([conversations[row] for row in rows], tokenizer, config.max_length) for rows in splits))
    for name in ("train", "eval"):
        if not getattr(data, name).examples:
            raise UserError(f"--dataset {config.dataset}: nothing is supervised in the {name} split; see --max-length")
    return data


def encode_all(conversations, tokenizer, max_length=0):
    """Encode, cut after `max_length` tokens (0: what the model attends to), drop the unsupervised."""
    longest = max_length or tokenizer.model_max_length
    examples = encode(conversations, tokenizer)
    short = [Example(ids[:longest], labels[:longest]) for ids, labels in examples]
    kept = [example for example in short if example.supervised_tokens]
    cut = sum(len(example.input_ids) > longest for example in examples)
    return Encoded(kept, cut, dropped=len(short) - len(kept))


def read_conversations(dataset, split, max_examples=0):
    """The first `max_examples` conversations (0: all) of a .jsonl file or a Hub dataset, each a list of messages.

    Raises:
        UserError: no such file or dataset, nothing in it, or a row that is not a conversation (`file:line` is named).
    """
    rows = read_jsonl(Path(dataset)) if is_file(dataset) else read_hub(dataset, split)
    conversations, problems = [], []
    for where, row in itertools.islice(rows, max_examples or None):
        problem = row if isinstance(row, str) else what_is_wrong(row)
        if problem:
            problems.append(f"{where}: {problem}")
        else:
            conversations.append([{"role": m["role"], "content": m["content"]} for m in row["messages"]])
    if problems:
        more = f" (and {len(problems) - 1} more such rows)" if len(problems) > 1 else ""
        raise UserError(problems[0] + more)
    if not conversations:
        raise UserError(f"--dataset {dataset}: there are no conversations in it")
    return conversations


def is_file(dataset):
    """Whether a dataset's name is a file here, rather than a Hub id.

    Raises:
        UserError: it is plainly meant to be a file, but there is none, or none that can be read.
    """
    path = Path(dataset)
    if path.is_file() and path.suffix == ".jsonl":
        return True
    if path.exists():
        raise UserError(f"--dataset {dataset}: not a .jsonl file with one conversation a line")
    if path.suffix in (".jsonl", ".json", ".parquet", ".csv", ".txt") or hub.looks_like_a_path(dataset):
        raise UserError(f"--dataset {dataset}: there is no such file")
    return False


def read_jsonl(path):
    """Yield `(file:line, row)`; a line that is not JSON yields what is wrong with it, as a str, in place of its row."""
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
                row = row if isinstance(row, dict) else "not a JSON object"
            except ValueError as error:  # UnicodeDecodeError is one too
                row = f"not valid JSON: {error}"
            yield f"{path}:{number}", row


def read_hub(dataset, split):
    """Yield `(dataset row N, row)` of a Hub dataset's split."""
    for number, row in enumerate(hub.load_hub_dataset(dataset, split)):
        yield f"{dataset} ({split}) row {number}", row


def what_is_wrong(row):
    """Why a row is not a conversation, in a few words; None where it is one."""
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        return 'no "messages": a list of {"role": …, "content": …}'
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            return f'message {number} has no "content" that is a text'
        if message.get("role") not in ROLES:
            return f"message {number} has the role {message.get('role')!r}, not one of {', '.join(ROLES)}"
    return None


def split_rows(n, eval_fraction, test_fraction, seed):
    """Row numbers of the train, eval and test splits of `n` rows, shares rounded up.

    Shuffled by `datasets.train_test_split`, once to hold out eval and test together and once to part the two, as the
    reference experiment does: its 2,000 rows become the same 1,800 / 100 / 100.

    Raises:
        UserError: a split that should have rows would have none.
    """
    n_eval, n_test = (math.ceil(round(share * n, 9)) for share in (eval_fraction, test_fraction))
    n_train = n - n_eval - n_test
    if n_eval < 1 or n_train < 1:
        raise UserError(
            f"--eval-fraction {eval_fraction} and --test-fraction {test_fraction} of {n} conversations leave "
            f"{max(0, n_train)} to train on and {n_eval} to evaluate; use more conversations or other shares"
        )
    first = Dataset.from_dict({"row": range(n)}).train_test_split(test_size=n_eval + n_test, seed=seed)
    if n_test == 0:
        return first["train"]["row"][:], first["test"]["row"][:], []
    second = first["test"].train_test_split(test_size=n_test, seed=seed)
    return first["train"]["row"][:], second["train"]["row"][:], second["test"]["row"][:]


def windows_per_epoch(n, batch_size):
    """How many updates an epoch over `n` examples takes; the last window may be short."""
    return math.ceil(n / batch_size)


def window_at(step, examples, batch_size, seed):
    """The window that update `step` (from 0) sees: a list of at most `batch_size` examples.

    An epoch's order is `torch.randperm(n)` under a generator seeded with seed + epoch, which is `Trainer`'s too.
    """
    epoch, position = divmod(step, windows_per_epoch(len(examples), batch_size))
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed + epoch)).tolist()
    return [examples[row] for row in order[position * batch_size : (position + 1) * batch_size]]


def micro_batches(examples, token_budget):
    """Cut examples into lists of at most `token_budget` padded tokens, longest first; one that is too long is alone."""
    batches = []
    for example in sorted(examples, key=lambda example: -len(example.input_ids)):
        # The first of a batch is its longest, which all of its rows are padded to.
        if batches and (len(batches[-1]) + 1) * len(batches[-1][0].input_ids) <= token_budget:
            batches[-1].append(example)
        else:
            batches.append([example])
    return batches


def collate(examples, pad_id, device="cpu"):
    """Pad examples on the right to the longest: `input_ids`, `attention_mask` and `labels`, each (B, T) int64."""

    def pad(rows, value):
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value).to(device)

    return {
        "input_ids": pad([example.input_ids for example in examples], pad_id),
        "attention_mask": pad([torch.ones_like(example.input_ids) for example in examples], 0),
        "labels": pad([example.labels for example in examples], IGNORE),
    }


def main(argv):
    """`python data.py --show N`: print encoded conversations of the training split."""
    parser = Parser(prog="data.py", description="Print encoded conversations, the supervised tokens coloured.")
    parser.add_argument("--show", type=int, default=3, metavar="N", help="how many conversations (default 3)")
    parser.add_argument("--json", action="store_true", help="one object a line: input_ids and labels")
    parser.add_config_flags(DATA_FLAGS)
    named, options = parser.parse(argv)
    if options["show"] < 1:
        raise UserError(f"--show must be at least 1, not {options['show']}")
    hub.quiet_libraries()
    config = resolve(named, hub.choose_preset(named)[0])
    tokenizer = load_tokenizer(*hub.find_model(config.model))
    data = prepare(config, tokenizer)
    for number, example in enumerate(data.train.examples[: options["show"]], 1):
        if options["json"]:
            print(json.dumps({"input_ids": example.input_ids.tolist(), "labels": example.labels.tolist()}))
            continue
        print(f"--- {number}: {len(example.input_ids)} tokens, {example.supervised_tokens} of them supervised")
        print(preview(example, tokenizer, color=sys.stdout.isatty()))
    return 0


if __name__ == "__main__":
    run_command(main)
