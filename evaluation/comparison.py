"""Comparison of two models on the same conversations: the difference of their losses, and its interval.

Both are scored on each conversation, so the comparison is paired. The uncertainty is in which conversations were held
out: intervals come from a bootstrap, which draws the conversations anew with replacement.
"""

import re
import sys

import numpy as np
import torch

RESAMPLES = 2000
MIN_CONVERSATIONS = 5  # for an interval
TIE = 1e-3  # nats a token: a smaller difference is a tie
MAX_SHOWN = 10  # conversations that got better most, and as many that got worse
BLOCK = 64  # tokens of a text that the bootstrap draws together, because neighbours depend on each other


def difference(before, after, tokens):
    """The difference of two losses per token over the same conversations (below 0 is better), with its 95 % interval.

    Both loss sums of each conversation, and its number of tokens, are (n,) each.
    """
    before, after, tokens = (np.asarray(values, dtype=np.float64) for values in (before, after, tokens))
    n, change, interval = len(tokens), after - before, None
    if n >= MIN_CONVERSATIONS:
        random = np.random.default_rng(0)
        draws = (random.integers(n, size=n) for _ in range(RESAMPLES))
        differences = [change[rows].sum() / tokens[rows].sum() for rows in draws]
        interval = np.quantile(differences, [0.025, 0.975]).tolist()
    return {
        "before": before.sum() / tokens.sum(),
        "after": after.sum() / tokens.sum(),
        "difference": change.sum() / tokens.sum(),
        "interval": interval,
        "conversations": n,
        "tokens": int(tokens.sum()),
    }


def smallest_difference(losses, tokens):
    """A difference of two losses per token that is not chance (95 %), by (n,) loss sums of one model; None of too few.

    It is on the safe side: that of two models whose losses are spread as this one's, but not correlated. Correlated
    ones, which `difference` compares by pairs, differ by less. The standard error is that of a ratio of sums; the
    degrees of freedom of Student's t are Kish's effective number of conversations, less one.
    """
    losses, tokens = (np.asarray(values, dtype=np.float64) for values in (losses, tokens))
    n, total = len(tokens), tokens.sum()
    if n < MIN_CONVERSATIONS:
        return None
    deviations = losses - losses.sum() / total * tokens
    error = np.sqrt(2 * n / (n - 1) * (deviations**2).sum()) / total
    freedom = max(1.0, total**2 / (tokens**2).sum() - 1)
    return float(error * np.quantile(np.random.default_rng(0).standard_t(freedom, 10 * RESAMPLES), 0.975))


def compare(before, after, examples, locations, excerpts):
    """The comparison of two models over a split, as a dict: in total, by group, and what changed most.

    Args:
        before, after: the token losses of each example, as in `Evaluation.token_losses`.
        locations: the "file:line" of each conversation.
        excerpts: the beginning of each conversation, to recognise it by.
    """
    sums = np.array([[float(one.sum()) for one in losses] for losses in (before, after)])
    tokens = np.array([len(one) for one in before])
    per_token = (sums[1] - sums[0]) / tokens
    columns = {"location": locations, "opening": excerpts, "before": sums[0] / tokens, "after": sums[1] / tokens}
    order = np.argsort(per_token, kind="stable").tolist()
    rows = [{name: column[row] for name, column in columns.items()} for row in order]
    return {
        **difference(*sums, tokens),
        "won": int((per_token <= -TIE).sum()),
        "lost": int((per_token >= TIE).sum()),
        "tied": int((abs(per_token) < TIE).sum()),
        "by_turn": by_turn(before, after, examples),
        "by_source": by_group(sums, tokens, [re.sub(r"(:\d+)?( row \d+)?$", "", location) for location in locations]),
        "better": [row for row in rows[:MAX_SHOWN] if row["after"] < row["before"]],
        "worse": [row for row in rows[::-1][:MAX_SHOWN] if row["after"] > row["before"]],
    }


def by_turn(before, after, examples):
    """The `difference` of each turn: of the first supervised answer of each conversation, of the second, …"""
    sums, tokens, numbers = [], [], []
    for losses, others, example in zip(before, after, examples, strict=True):
        turns = turn_numbers(example)
        for turn in turns.unique().tolist():
            sums.append([float(losses[turns == turn].sum()), float(others[turns == turn].sum())])
            tokens.append(int((turns == turn).sum()))
            numbers.append(turn)
    groups = by_group(np.array(sums).T, np.array(tokens), numbers)
    return [{**group, "name": f"turn {group['name']}"} for group in groups]


def by_group(sums, tokens, names):
    """The `difference` of each group, by "name": of loss sums before and after, (2, n), and n tokens and names."""
    groups = {name: np.array(names) == name for name in sorted(set(names))}
    return [{"name": name, **difference(*sums[:, rows], tokens[rows])} for name, rows in groups.items()]


def turn_numbers(example):
    """The number, from 1, of the supervised answer that each scored token belongs to, (tokens,)."""
    return answer_starts(example).cumsum(0)[1:][example.supervised[1:]]  # the first token is never scored


def answer_starts(example):
    """The mask of the tokens with which supervised answers begin, (T,) bool."""
    supervised = example.supervised
    return supervised & ~torch.cat([supervised.new_zeros(1), supervised[:-1]])


def compare_models(before, after):
    """Parts of a report on two `ModelReport`s: the "comparison" of each split, and "forgetting", if both have a text.

    A split that the models read differently is left out with a warning: its losses are over different tokens.
    """
    found = {"comparison": {}}
    for name in (name for name in before.evaluations if name in after.evaluations):
        losses = [model.evaluations[name].token_losses for model in (before, after)]
        examples, others = (list(model.examples[name]) for model in (before, after))
        pairs = zip(examples, others, strict=False)
        if len(examples) != len(others) or not all(one.labels.equal(other.labels) for one, other in pairs):
            why = "as the two models read it differently (tokenizer, template or context length)"
            print(f"warning: {name}: not compared, {why}", file=sys.stderr)
        elif name == "text":
            found["forgetting"] = compare_texts(*losses)
        else:
            locations = [before.examples[name].location(row) for row in range(len(examples))]
            starts = [before.tokenizer.decode(one.input_ids[:60], skip_special_tokens=True) for one in examples]
            excerpts = [" ".join(text.split())[:60] for text in starts]
            found["comparison"][name] = compare(*losses, examples, locations, excerpts)
    return found


def compare_texts(before, after):
    """The `difference` of two models on a text, by their losses of its slices: over blocks, not conversations."""
    blocks = [torch.cat(losses).double().split(BLOCK) for losses in (before, after)]
    sums = [[block.sum().item() for block in model] for model in blocks]
    found = difference(*sums, [len(block) for block in blocks[0]])
    found["blocks"] = found.pop("conversations")
    return found


def mean_over_runs(reports):
    """The mean and standard deviation over runs of each loss that all of them have, as a dict by its name.

    Each run is evaluated on its own held-out conversations: another seed's run has trained on some of them.
    """
    losses = [report["splits"] | {"text": report.get("text")} for report in reports]
    differences = [report.get("comparison", {}) | {"text": report.get("forgetting")} for report in reports]
    found = {}
    for name in losses[0]:
        measured, compared = ([of_run.get(name) for of_run in each] for each in (losses, differences))
        if all(measured):
            change = spread([each["difference"] for each in compared]) if all(compared) else None
            found[f"{name} loss"] = {**spread([each["loss"] for each in measured]), "difference": change}
    return found


def spread(values):
    return {"values": values, "mean": float(np.mean(values)), "std": float(np.std(values, ddof=1))}  # of a sample


def verdict(found):
    """A `difference` in words: better, worse, or within chance."""
    if not found["interval"]:
        return f"{found['difference']:+.4f}, too few for an interval"
    low, high = found["interval"]
    better = "better" if high < 0 else "worse" if low > 0 else "no difference beyond chance"
    return f"{found['difference']:+.4f}, 95 % interval [{low:+.4f}, {high:+.4f}]: {better}"
