"""How the conversations of a window lie in memory: cut into micro-batches, packed end to end or padded to rows.

A window decides what is learned (`data.py`). Nothing here does: it decides how much memory an update takes, and how
long.
"""

from bisect import bisect_right
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch.nn.utils.rnn import pad_sequence

from compute.processes import rank, shares_by_tokens, world_size
from conversations.masking import IGNORE, Example
from data import window_at


@dataclass(frozen=True)
class Batch:
    """A micro-batch as a model takes it. B is 1 where conversations are packed; T is then all of their tokens."""

    inputs: dict  # what the model is called with: `input_ids`, (B, T), and what says which tokens belong together
    predicting: torch.Tensor  # (N,): the positions, counted through B × T, whose next token is supervised
    targets: torch.Tensor  # (N,): those next tokens
    tokens: int  # of its conversations; padding is not counted
    own_logits: bool = False  # whether the model must make its logits itself; see `Layout`
    compiled: bool = False  # whether the loss is, too

    def map(self, change):
        """The batch with every tensor of it changed."""
        inputs = {
            name: change(value) if isinstance(value, torch.Tensor) else value for name, value in self.inputs.items()
        }
        return replace(self, inputs=inputs, predicting=change(self.predicting), targets=change(self.targets))

    def to(self, device):
        """The batch on a device; copies from pinned memory are asynchronous."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))


@dataclass(frozen=True)
class Layout:
    """How examples become micro-batches. `self_check.choose_layout` finds the one for a model."""

    packed: bool  # conversations end to end, each attending to itself; else rows, padded to the longest
    tokens: int  # in a micro-batch at most, padding counted; a conversation that is longer is one by itself
    pad_id: int
    own_logits: bool = False  # the model does more than multiply by its output head, so it makes all (B, T, V) of them
    pinned: bool = False  # for copies to a GPU that do not wait
    compiled: bool = False  # whether the model's layers are
    why: str = ""  # where it is not packed

    def describe(self):
        """The layout, as the plan prints it."""
        name = "packed: conversations end to end" if self.packed else "padded: conversations in rows"
        head = ", all logits made by the model itself" if self.own_logits else ""
        why = f" (not packed: {self.why})" if self.why else ""
        compiled = ", compiled (--no-compile: not)" if self.compiled else ""
        return f"{name}{head}, {self.tokens:,} tokens at a time{why}{compiled}"

    def batches(self, examples):
        """The micro-batches of some examples, those with the most tokens first."""
        return map(self.batch, self.cut(examples))

    def share(self, examples):
        """The micro-batches of this process' share of some examples."""
        return map(self.batch, self.shares(examples)[rank()])

    def shares(self, examples):
        """Each process' share of some examples, as lists of lists: all have equally many micro-batches.

        Whoever would have fewer gets empty ones, since every process has to take part in every forward pass of a model
        whose weights they share.
        """
        cuts = [self.cut(share) for share in shares_by_tokens(examples, world_size())]
        most = max(map(len, cuts))
        return [cut + [[]] * (most - len(cut)) for cut in cuts]

    def batch(self, examples):
        """Examples as one micro-batch; of none two tokens that nobody said, neither counted nor supervised."""
        lay = pack if self.packed else self.pad
        inputs, next_tokens = lay(examples or [Example(*torch.tensor([[self.pad_id] * 2, [IGNORE] * 2]))])
        predicting = (next_tokens != IGNORE).nonzero()[:, 0]
        tokens = sum(map(length, examples))
        batch = Batch(inputs, predicting, next_tokens[predicting], tokens, self.own_logits, self.compiled)
        return batch.map(torch.Tensor.pin_memory) if self.pinned else batch

    def cut(self, examples):
        """Lists of examples, the largest first."""
        if self.packed:
            return sorted(cut_packed(examples, self.tokens), key=lambda batch: -sum(map(length, batch)))
        return cut_padded(examples, self.tokens)

    def pad(self, examples):
        """Examples as rows padded on the right: the model's inputs, (B, T), and what comes after each position."""

        def padded(rows, value):
            return pad_sequence(rows, batch_first=True, padding_value=value)

        inputs = {
            "input_ids": padded([example.input_ids for example in examples], self.pad_id),
            "attention_mask": padded([torch.ones_like(example.input_ids) for example in examples], 0),
        }
        return inputs, padded([shifted(example.labels) for example in examples], IGNORE).flatten()


def pack(examples):
    """Examples end to end: the model's inputs, (1, T), and what comes after each position.

    `position_ids` start anew with each conversation; `attention.packed_attention` takes the sequence boundaries.
    """
    lengths = list(map(length, examples))
    inputs = {
        "input_ids": torch.cat([example.input_ids for example in examples])[None],
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "cu_seqlens": torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
        "max_seqlen": max(lengths),
    }
    return inputs, torch.cat([shifted(example.labels) for example in examples])


def shifted(labels):
    """The label of the token after each position, (T,): the one place where labels are shifted."""
    return torch.cat([labels[1:], labels.new_full((1,), IGNORE)])


def length(example):
    """The tokens of an example."""
    return len(example.input_ids)


def cut_padded(examples, budget):
    """Cut examples into lists of at most `budget` padded tokens, longest first; one that is too long is alone."""
    batches = []
    for example in sorted(examples, key=length, reverse=True):
        # The first of a batch is its longest, which all of its rows are padded to.
        if batches and (len(batches[-1]) + 1) * length(batches[-1][0]) <= budget:
            batches[-1].append(example)
        else:
            batches.append([example])
    return batches


def cut_packed(examples, budget):
    """Cut examples into lists of at most `budget` tokens: the longest that is left and the longest that still fit."""
    left, batches = sorted(examples, key=length), []
    while left:
        batch = [left.pop()]
        room = budget - length(batch[0])
        while fitting := bisect_right(left, room, key=length):
            batch.append(left.pop(fitting - 1))
            room -= length(batch[-1])
        batches.append(batch)
    return batches


def random_examples(lengths, vocabulary):
    """Examples of random tokens, all of them supervised; always the same."""
    ids = torch.randint(vocabulary, (sum(lengths),), generator=torch.Generator().manual_seed(0))
    return [Example(part, part) for part in ids.split(lengths)]


class PrefetchedWindows:
    """This process' shares of the windows, each made in a thread when the update before it is under way."""

    def __init__(self, examples, batch_size, seed, layout):
        self.arguments, self.layout = (examples, batch_size, seed), layout
        self.thread, self.ahead = ThreadPoolExecutor(max_workers=1), {}

    def at(self, step):
        """The micro-batches of the window that update `step` (from 0) sees: all of them, or this process' share."""
        self.prefetch(step)
        self.ahead = {step: self.ahead[step]}
        return self.ahead[step].result()

    def prefetch(self, step):
        """Begin to make a window; on a GPU once it has its work, as this takes Python's time from what launches it."""
        if step not in self.ahead:
            self.ahead[step] = self.thread.submit(self.make, step)

    def make(self, step):
        return list(self.layout.share(window_at(step, *self.arguments)))
