"""Collation: the conversations of a window become micro-batches, packed end to end or padded to rows.

A window decides what is learned (`data.py`). A layout decides only how much memory an update takes, and how long.
Shapes: B rows of T tokens; B is 1 where conversations are packed. N supervised tokens. V words in the vocabulary.
"""

import math
from bisect import bisect_right
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import accumulate

import torch
from torch.nn.utils.rnn import pad_sequence

from compute.distributed import partition_by_tokens, rank, world_size
from conversations.masking import IGNORE, Example
from data import window_at


@dataclass(frozen=True)
class Batch:
    """A micro-batch as a model takes it."""

    inputs: dict  # the model's arguments: `input_ids`, (B, T), and what says which tokens belong together
    predicting: torch.Tensor  # (N,): the positions in B × T whose next token is supervised
    targets: torch.Tensor  # (N,): those next tokens
    tokens: int  # in its conversations, without padding
    own_logits: bool = False  # this and the next as in `Layout`
    compiled: bool = False

    def map(self, change):
        """The batch with `change` applied to each of its tensors."""
        inputs = {name: change(value) if torch.is_tensor(value) else value for name, value in self.inputs.items()}
        return replace(self, inputs=inputs, predicting=change(self.predicting), targets=change(self.targets))

    def to(self, device):
        """The batch on a device; copies from pinned memory are asynchronous."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))


@dataclass(frozen=True)
class Layout:
    """How examples are collated into micro-batches; `self_check.choose_layout` finds the best for a model."""

    packed: bool  # conversations end to end, each attending to itself; False: padded rows
    tokens: int  # most tokens of a micro-batch, padding counted; a longer conversation is a micro-batch by itself
    pad_id: int
    own_logits: bool = False  # the output head is more than a matrix product: the model computes all logits, (B, T, V)
    pinned: bool = False  # in page-locked memory, for asynchronous copies to a GPU
    compiled: bool = False  # the model's layers are compiled
    masked: bool = True  # padded rows have an attention mask, which few models need: padding is on the right
    why: str = ""  # the reason if a faster one is not exact

    def describe(self):
        """The layout as the plan prints it."""
        name = "packed: conversations end to end" if self.packed else "padded: conversations in rows"
        head = ", all logits made by the model itself" if self.own_logits else ""
        why = f" ({'' if self.packed else 'not packed: '}{self.why})" if self.why else ""
        return f"{name}{head}, {self.tokens:,} tokens at a time{why}{', compiled' if self.compiled else ''}"

    def record(self):
        """What was found out about the model, as JSON: a resumed run does not find it out again."""
        return {"packed": self.packed, "own_logits": self.own_logits, "masked": self.masked, "why": self.why}

    def micro_batches(self, examples):
        """Iterate over the micro-batches of some examples, those with the most tokens first."""
        return map(self.collate, self.plan_micro_batches(examples))

    def local_micro_batches(self, examples):
        """Iterate over the micro-batches of this rank's share of some examples."""
        return map(self.collate, self.partition(examples)[rank()])

    def partition(self, examples):
        """The examples of each rank's micro-batches, equally many for all ranks.

        Ranks with fewer get empty ones: in a sharded model every rank takes part in every forward pass.
        """
        cuts = [self.plan_micro_batches(share) for share in partition_by_tokens(examples, world_size())]
        most = max(map(len, cuts))
        return [cut + [[]] * (most - len(cut)) for cut in cuts]

    def plan_micro_batches(self, examples):
        """Lists of some examples, one for each micro-batch, the one with the most tokens first."""
        if self.packed:
            return sorted(cut_packed(examples, self.tokens), key=lambda batch: -sum(map(length, batch)))
        return cut_padded(examples, self.tokens)

    def collate(self, examples):
        """Collate examples into one micro-batch; no examples into two padding tokens that count for nothing."""
        collate = collate_packed if self.packed else collate_padded
        nothing = Example(torch.tensor([self.pad_id] * 2), torch.tensor([IGNORE] * 2))
        inputs, next_tokens = collate(examples or [nothing], self.pad_id)
        if not self.masked:
            inputs.pop("attention_mask", None)
        predicting = (next_tokens != IGNORE).nonzero()[:, 0]
        tokens = sum(map(length, examples))
        batch = Batch(inputs, predicting, next_tokens[predicting], tokens, self.own_logits, self.compiled)
        return batch.map(torch.Tensor.pin_memory) if self.pinned else batch


def collate_packed(examples, _pad_id):
    """Examples end to end: the model's inputs, (1, T), and the label of the token after each position, (T,).

    `position_ids` restart with each conversation; `attention.packed_attention` takes the sequence boundaries.
    """
    lengths = list(map(length, examples))
    inputs = {
        "input_ids": torch.cat([example.input_ids for example in examples])[None],
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "cu_seqlens": torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
        "max_seqlen": max(lengths),
    }
    return inputs, torch.cat(shift_labels(examples))


def collate_padded(examples, pad_id):
    """Examples as rows padded on the right: the model's inputs, (B, T), and the label after each position, (B · T,)."""
    pad = partial(pad_sequence, batch_first=True)
    inputs = {
        "input_ids": pad([example.input_ids for example in examples], padding_value=pad_id),
        "attention_mask": pad([torch.ones_like(example.input_ids) for example in examples]),
    }
    return inputs, pad(shift_labels(examples), padding_value=IGNORE).flatten()


def shift_labels(examples):
    """Of each example, the label of the token after each position, (T,). Labels are shifted here and nowhere else."""
    return [torch.cat([example.labels[1:], example.labels.new_full((1,), IGNORE)]) for example in examples]


def length(example):
    """The tokens of an example."""
    return len(example.input_ids)


def cut_padded(examples, budget, length=length):
    """Lists of examples of at most `budget` padded tokens, longest first; an example that is too long is alone.

    The examples may be anything of which `length` gives the tokens.
    """
    batches = []
    for example in sorted(examples, key=length, reverse=True):
        # The first example of a batch is its longest: all its rows are padded to that length.
        if batches and (len(batches[-1]) + 1) * length(batches[-1][0]) <= budget:
            batches[-1].append(example)
        else:
            batches.append([example])
    return batches


def cut_packed(examples, budget):
    """Lists of examples of at most `budget` tokens: the longest that remains, then the longest that still fit."""
    remaining, batches = sorted(examples, key=length), []
    while remaining:
        batch = [remaining.pop()]
        room = budget - length(batch[0])
        while fitting := bisect_right(remaining, room, key=length):
            batch.append(remaining.pop(fitting - 1))
            room -= length(batch[-1])
        batches.append(batch)
    return batches


def random_examples(lengths, vocabulary):
    """Examples of random tokens, all supervised; the same at every call."""
    ids = torch.randint(vocabulary, (sum(lengths),), generator=torch.Generator().manual_seed(0))
    return [Example(part, part) for part in ids.split(lengths)]


def vocabulary_size(model):
    """The number of tokens that a model both reads and predicts."""
    head = model.get_output_embeddings()
    return min(model.get_input_embeddings().num_embeddings, math.inf if head is None else len(head.weight))


class PrefetchedWindows:
    """This rank's micro-batches of each window, collated in a thread while the update before it runs."""

    def __init__(self, examples, batch_size, seed, layout):
        thread = ThreadPoolExecutor(max_workers=1)

        def collate(step):
            return list(layout.local_micro_batches(window_at(step, examples, batch_size, seed)))

        # Starts to collate a window, and remembers this update's and the next. Called once a GPU has its work, as
        # collating takes Python's time from launching it.
        self.prefetch = lru_cache(maxsize=2)(lambda step: thread.submit(collate, step))

    def get(self, step):
        """This rank's micro-batches of the window that update `step` (from 0) sees."""
        return self.prefetch(step).result()
