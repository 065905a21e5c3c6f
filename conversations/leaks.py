"""Leaks: held-out conversations of which training has a near-copy. Exact copies never are in two splits.

A leak has more than half of the tokens of its answers, or of its prompts, in one training conversation, as in Tulu 3
(arXiv:2411.15124). Tokens count in grams, runs of 13. Grams of more than 10 training conversations are boilerplate, and
their tokens count on neither side, as in GPT-3 (arXiv:2005.14165, appendix C). A shorter text is never a leak.
"""

import itertools
from typing import NamedTuple

import numpy as np

from conversations.masking import IGNORE

GRAM = 13  # tokens
COMMON = 10  # training conversations
CHUNK = 1_000_000  # tokens that are compared at once
# Of the hash: its bits are well mixed. Two grams have one hash by chance once in 2^64 pairs, and one gram is no leak.
MULTIPLIER = 0x9E3779B97F4A7C15


class Leak(NamedTuple):
    """The prompts or answers of a held-out conversation, most of them in one of training."""

    held_out: str  # where it was read
    train: str
    kind: str  # "answers" or "prompts"
    tokens: int  # that they share
    shared: list[int]  # the ids of the first gram that they share
    number: int  # of the training conversation, in its corpus


def find_leaks(train, *held_out):
    """The `Leak`s of held-out conversations, of each as many as there are training conversations that have its text.

    Args:
        train, held_out: a corpus and the numbers of the conversations in it, of training and of each held-out split.
    """
    splits = [[np.concatenate(parts) for parts in zip(*read_tokens(*split), strict=True)] for split in held_out]
    keys = np.concatenate([keys for keys, _ in splits])
    owner = np.concatenate([len(splits) * owner + number for number, (_, owner) in enumerate(splits)])
    text_of = 2 * owner + (keys & 1)
    starts = np.flatnonzero(is_gram(text_of))  # where the grams of held-out texts begin in `keys`, by their hashes
    hashes = hash_grams(keys)[starts]
    order = np.argsort(hashes, kind="stable")
    hashes, starts = hashes[order], starts[order]
    if not len(starts):
        return []
    gram, trained, is_common = match_grams(hashes, *train)
    sizes = np.searchsorted(hashes, hashes[gram], side="right") - gram  # each gram in all of its places
    at = starts[np.arange(sizes.sum()) + np.repeat(gram - sizes.cumsum() + sizes, sizes)]
    trained = np.repeat(trained, sizes)
    order = np.lexsort((at, trained, text_of[at]))
    at, trained, text = at[order], trained[order], text_of[at[order]]
    counts = np.ones(len(keys), dtype=bool)
    for shift in range(GRAM):
        counts[starts[is_common] + shift] = False
    before = np.append(0, counts.cumsum())  # the tokens that count before each
    begins_pair = (np.diff(text, prepend=-1) != 0) | (np.diff(trained, prepend=-1) != 0)  # of two conversations
    begins = np.where(begins_pair, at, np.maximum(at, np.roll(at, 1) + GRAM))  # where the gram before it ends
    first = np.flatnonzero(begins_pair)
    shared = np.diff(np.append(0, (before[at + GRAM] - before[begins]).cumsum())[np.append(first, len(at))])
    found = (shared >= GRAM) & (2 * shared > np.bincount(text_of, weights=counts)[text[first]])
    leaks = []
    for row, tokens in zip(first[found].tolist(), shared[found].tolist(), strict=True):
        number, split = divmod(int(text[row]) // 2, len(splits))
        places = ((held_out[split][0], number), (train[0], int(trained[row])))
        locations = [
            corpus.rows["location"][int(corpus.bounds[conversation])].as_py() for corpus, conversation in places
        ]
        ids = (keys[at[row] : at[row] + GRAM] // 2).tolist()
        leaks.append(Leak(*locations, ("prompts", "answers")[text[row] % 2], tokens, ids, int(trained[row])))
    return leaks


def read_tokens(corpus, conversations):
    """Yield some conversations of a corpus in chunks: of each token a key, and the number of its conversation.

    The key is twice the id, plus 1 if the token is supervised: no answer is taken for a prompt.
    """
    conversation_of = np.repeat(np.arange(len(corpus.bounds) - 1), np.diff(corpus.bounds))  # of each row
    is_read = np.isin(conversation_of, conversations) & (corpus.columns["supervised"] > 0)
    lengths = np.minimum(corpus.columns["tokens"], corpus.max_length)
    chunk_of = np.add.reduceat(lengths, corpus.bounds[:-1]).cumsum() // CHUNK  # of each conversation
    cuts = np.flatnonzero(np.diff(chunk_of)) + 1
    for start, end in itertools.pairwise([0, *corpus.bounds[cuts].tolist(), len(corpus.rows)]):
        rows = np.repeat(np.arange(start, end), lengths[start:end])
        kept, part = is_read[rows], corpus.rows.slice(start, end - start)
        ids, labels = (part[name].combine_chunks().flatten().to_numpy()[kept] for name in ("input_ids", "labels"))
        yield 2 * ids.astype(np.int64) + (labels != IGNORE), conversation_of[rows[kept]]


def match_grams(hashes, corpus, conversations):
    """The pairs of a gram and a training conversation that has it, (n,) each, and which of `hashes` are boilerplate.

    A gram is the first place of its hash in `hashes`. Pairs of boilerplate are left out: a gram has `COMMON` at most.
    """
    groups = corpus.digests.take(conversations).dictionary_encode().indices.to_numpy()
    conversations = conversations[np.unique(groups, return_index=True)[1]]  # each of several duplicates counts once
    total, shift = len(corpus.bounds), np.uint64(64 - min(32, 4 + len(hashes).bit_length()))
    may_be = np.zeros(1 << (64 - int(shift)), dtype=bool)
    may_be[hashes >> shift] = True  # by its first bits, most of training is not a gram of these
    count, pairs = np.zeros(len(hashes), dtype=int), []
    for keys, conversation_of in read_tokens(corpus, conversations):
        hashed = hash_grams(keys)
        at = np.flatnonzero(may_be[hashed >> shift] & is_gram(2 * conversation_of + (keys & 1)))
        gram = np.searchsorted(hashes, hashed[at]).clip(max=len(hashes) - 1)
        is_same = hashes[gram] == hashed[at]
        found = np.unique(gram[is_same] * total + conversation_of[at[is_same]])
        count += np.bincount(found // total, minlength=len(count))
        pairs.append(found[count[found // total] <= COMMON])
    gram, conversation = np.divmod(np.concatenate(pairs), total)
    kept = count[gram] <= COMMON
    return gram[kept], conversation[kept], count[np.searchsorted(hashes, hashes)] > COMMON


def is_gram(text_of):
    """Whether a gram begins at each token: whether it and those after it are in one text, (tokens - GRAM + 1,)."""
    run = np.append(0, (np.diff(text_of) != 0).cumsum())[: len(text_of)]
    return run[: max(0, len(run) - GRAM + 1)] == run[GRAM - 1 :]


def hash_grams(keys):
    """The 64-bit polynomial hash of the gram at each token, (tokens - GRAM + 1,)."""
    keys, count = keys.astype(np.uint64), max(0, len(keys) - GRAM + 1)
    return sum(keys[i : i + count] * np.uint64(pow(MULTIPLIER, i, 1 << 64)) for i in range(GRAM))
