"""Is one model better than another on the same conversations, by how much, and is that more than chance?

Both are scored on each conversation, so the comparison is paired. What is uncertain is which conversations were held
out: an interval comes from drawing them anew, with replacement (a bootstrap over conversations).
"""

import textwrap

import numpy as np
import torch

RESAMPLES = 2000
FEWEST = 5  # conversations of which an interval is made
TIE = 1e-3  # nats a token: below it nobody has won
SHOWN = 10  # of the conversations that changed most


def difference(before, after, tokens, seed=0):
    """The difference of two losses per token over the same conversations, with its 95 % interval.

    Args:
        before, after, tokens: (n,) each: of each conversation both loss sums, and how many tokens they are over.

    Returns:
        A dict of "before", "after", "difference" (of these two, so below 0 where it got better), "interval" ([low,
        high], None of fewer than FEWEST conversations), "conversations", "tokens".
    """
    before, after, tokens = (np.asarray(values, dtype=np.float64) for values in (before, after, tokens))
    n, change = len(tokens), after - before
    interval = None
    if n >= FEWEST:
        interval = np.quantile(resampled(change, tokens, seed), [0.025, 0.975]).tolist()
    return {
        "before": before.sum() / tokens.sum(),
        "after": after.sum() / tokens.sum(),
        "difference": change.sum() / tokens.sum(),
        "interval": interval,
        "conversations": n,
        "tokens": int(tokens.sum()),
    }


def resampled(change, tokens, seed):
    """The difference per token in RESAMPLES draws of n of the n conversations, (RESAMPLES,)."""
    random, n = np.random.default_rng(seed), len(tokens)
    drawn = (random.integers(n, size=n) for _ in range(RESAMPLES))
    return np.array([change[rows].sum() / tokens[rows].sum() for rows in drawn])


def compare(before, after, examples, locations, openings):
    """Everything a comparison of two models over a split says, as a dict.

    Args:
        before, after: for each example the losses of its supervised tokens, as `Evaluation.token_losses` holds them.
        locations: where each conversation was read, "file:line".
        openings: how each begins, to recognise it by.
    """
    sums = np.array([[float(one.sum()) for one in losses] for losses in (before, after)])
    tokens = np.array([len(one) for one in before])
    per_token = (sums[1] - sums[0]) / tokens
    order = np.argsort(per_token, kind="stable")
    rows = [
        {
            "location": locations[row],
            "opening": openings[row],
            "before": sums[0][row] / tokens[row],
            "after": sums[1][row] / tokens[row],
        }
        for row in order.tolist()
    ]
    sources = [location.rpartition(":")[0] for location in locations]
    return {
        **difference(*sums, tokens),
        "won": int((per_token <= -TIE).sum()),
        "lost": int((per_token >= TIE).sum()),
        "tied": int((abs(per_token) < TIE).sum()),
        "by_turn": by_turn(before, after, examples),
        "by_length": by_group(sums, tokens, by_thirds([len(example.input_ids) for example in examples])),
        "by_source": by_group(sums, tokens, [(source, source) for source in sources]),
        "better": [row for row in rows[:SHOWN] if row["after"] < row["before"]],
        "worse": [row for row in rows[::-1][:SHOWN] if row["after"] > row["before"]],
    }


def by_group(sums, tokens, groups):
    """The `difference` of each group of conversations, with its "name".

    Args:
        groups: for each conversation what sorts its group, and the group's name.
    """
    return [
        {"name": name, **difference(*sums[:, rows], tokens[rows])}
        for key, name in sorted(set(groups))
        for rows in [[row for row, group in enumerate(groups) if group == (key, name)]]
    ]


def by_thirds(lengths):
    """Which third of the conversations each belongs to by its length in tokens: `(third, name)`."""
    edges = np.quantile(lengths, [1 / 3, 2 / 3]).astype(int).tolist()
    names = (f"to {edges[0]} tokens", f"to {edges[1]} tokens", f"above {edges[1]} tokens")
    thirds = [int(np.searchsorted(edges, length)) for length in lengths]
    return [(third, names[third]) for third in thirds]


def by_turn(before, after, examples):
    """The `difference` of each turn: of the first supervised answer of each conversation, of the second, …"""
    parts = {}
    for one, other, example in zip(before, after, examples, strict=True):
        turns = turns_of(example)
        for turn in sorted(set(turns.tolist())):
            chosen = turns == turn
            part = (float(one[chosen].sum()), float(other[chosen].sum()), int(chosen.sum()))
            parts.setdefault(turn, []).append(part)
    return [{"name": f"turn {turn}", **difference(*zip(*parts[turn], strict=True))} for turn in sorted(parts)]


def turns_of(example):
    """Which of the conversation's supervised answers each of its scored tokens belongs to, from 1."""
    supervised = example.supervised
    begins = supervised & ~torch.cat([supervised.new_zeros(1), supervised[:-1]])
    return begins.cumsum(0)[1:][supervised[1:]]


def format_comparison(split, found, names):
    """A comparison for reading, as lines.

    Args:
        names: of the two models, the first one first.
    """
    yield f"  {split}: {names[1]} against {names[0]}"
    yield f"    loss {found['before']:.4f} -> {found['after']:.4f}: {verdict(found)}"
    counts = "won {won}, lost {lost}, tied {tied} of {conversations} conversations".format(**found)
    yield f"    {counts}"
    for title in ("by_turn", "by_length", "by_source"):
        if len(found[title]) > 1:
            yield f"    {title.replace('_', ' ')}"
            yield from (f"      {group['name']:<22} {described(group)}" for group in found[title])
    for title, rows in (("got better most", found["better"]), ("got worse most", found["worse"])):
        if rows:
            yield f"    {title}"
        for row in rows:
            numbers = f"{row['before']:.3f} -> {row['after']:.3f}"
            yield f"      {numbers}  {row['location'].rsplit('/', 1)[-1]}  {row['opening']}"


def described(found):
    """A `difference` in a few words."""
    interval = "too few for an interval"
    if found["interval"]:
        interval = "[{:+.4f}, {:+.4f}]".format(*found["interval"])
    return f"{found['difference']:+.4f} {interval} ({found['conversations']} conversations, {found['tokens']:,} tokens)"


def verdict(found):
    """What a `difference` allows to say."""
    if not found["interval"]:
        return f"{found['difference']:+.4f}, too few for an interval"
    low, high = found["interval"]
    better = "better" if high < 0 else "worse" if low > 0 else "no difference beyond chance"
    return f"{found['difference']:+.4f}, 95 % interval [{low:+.4f}, {high:+.4f}]: {better}"


def side_by_side(left, right, width=54):
    """Two texts wrapped into columns, line by line."""
    columns = [[line for part in text.splitlines() for line in textwrap.wrap(part, width)] for text in (left, right)]
    height = max(map(len, columns))
    rows = zip(*(column + [""] * (height - len(column)) for column in columns), strict=True)
    return [f"  {row[0]:<{width}} | {row[1]}".rstrip() for row in rows]
