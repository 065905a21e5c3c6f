"""Right answers: greedy ones to held-out conversations, of which those that equal the reference are counted.

The reference is the last supervised answer of a conversation, and the prompt is all that comes before it. What counts
as equal depends on the reference alone:

    json     it is JSON objects or arrays, such as calls of tools: the same values, of the same types; the order of keys
             and the space between them do not matter
    number   it is a number, or ends with one after `####` (as GSM8K, https://arxiv.org/abs/2110.14168), a sum's `=`,
             `\\boxed{` or `answer is`: the last number of the answer has the same value
    text     anything else: the same text, but for its case, its white space and its final punctuation
"""

import json
import math
import operator
import re
import sys
import time
import unicodedata
from fractions import Fraction
from typing import NamedTuple

import torch
from tqdm import tqdm

from conversations.chatml import find_opening
from conversations.templates import stop_ids
from evaluation.generation import generate_batches

TAG = re.compile(r"</?tool_call>|```(?:json)?")  # around calls (Hermes, Qwen) and around JSON: a part of the answer
# Thousands, decimals, a fraction, an exponent; not the 2 of x2, nor of 1.0.2.
NUMBER = r"(?<![\w./])[-−]?\$?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:/[1-9]\d*|(?:\.\d+)?(?:e[-+]?\d{1,3})?)|\.\d+)(?!\d|\.\d)"
BEFORE = r"####|[\d)]\s*=|\\boxed{|answer is:?"  # a result
RESULT = re.compile(rf"(?:.*(?:{BEFORE}))?[\s$]*({NUMBER})\s?[%}}$.]*", re.DOTALL | re.IGNORECASE)
Z = 1.959964  # of 95 %, in a standard normal distribution
INTERVAL = 30  # seconds between two lines of progress, where there is no terminal


class Reference(NamedTuple):
    """The last answer of a held-out conversation, and what the model is to answer it to."""

    location: str  # "file:line"
    prompt: torch.Tensor  # ids, (T,)
    text: str
    rule: str  # json, number or text
    value: object  # by the rule; the same for all answers that are equal
    limit: int  # tokens of an answer, its stop token included


# --- what is equal


def find_rule(text):
    """The rule for answers to a reference, by its text, and its value by that rule."""
    if (value := parse_json(text)) is not None:
        return "json", value
    if match := RESULT.fullmatch(text.strip()):
        return "number", parse_number(match[1])
    return "text", normalize(text)


def parse_json(text):
    """JSON objects and arrays that follow each other, as a list of canonical texts; None if there is anything else."""
    rest, found, decoder = text.strip(), [], json.JSONDecoder(object_pairs_hook=make_object)
    try:
        while rest:
            if tag := TAG.match(rest):
                part, end = tag[0], tag.end()
            else:
                value, end = decoder.raw_decode(rest)
                part = json.dumps(value, sort_keys=True)  # unlike Python, it tells true, 1 and 1.0 apart
                if not isinstance(value, dict | list):
                    return None
            found.append(part)
            rest = rest[end:].strip()
    except (ValueError, RecursionError):
        return None
    return found if any(part[0] in "{[" for part in found) else None


def make_object(pairs):
    """A JSON object; raises `ValueError` where a key is there twice, as parsers do not agree on what that means."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key is there twice")
    return dict(pairs)


def parse_last_number(text):
    """The value of the last number in a text; None without one."""
    numbers = re.findall(NUMBER, text, re.IGNORECASE)
    return parse_number(numbers[-1]) if numbers else None


def parse_number(text):
    return Fraction(re.sub("[$,]", "", text).replace("−", "-"))


def normalize(text):
    """A text in lower case, with single spaces, without final punctuation, and with each letter written one way (NFC).

    SQuAD's measure (https://arxiv.org/abs/1606.05250) also leaves out all other punctuation, and articles.
    """
    text = " ".join(unicodedata.normalize("NFC", text).lower().split())
    return text.rstrip(".!?… ") or text


PARSERS = {"json": parse_json, "number": parse_last_number, "text": normalize}


# --- the references of a split


def find_references(examples, tokenizer, most_tokens):
    """The `Reference`s of a split, and how many of its conversations have none that can be judged, by the reason.

    An answer ends after twice the tokens of its reference and 16, and no later than after `most_tokens`. Before a
    number there may be workings of any length.
    """
    references, skipped = [], {}
    stops, opening = torch.tensor(stop_ids(tokenizer)), len(find_opening(tokenizer))
    last = {examples.location(row): row for row in range(len(examples))}  # a conversation may be several examples
    for location, example in ((location, examples[row]) for location, row in last.items()):
        start = find_last_answer(example)
        prompt, answer = example.input_ids[:start], example.input_ids[start:]
        ends = torch.isin(answer, stops).nonzero()[:1, 0].tolist()
        tokens = ends[0] + 1 if ends else 0
        reason = "are no answers to anything" if start <= opening else "are cut off" if not ends else ""
        if tokens > most_tokens:
            reason = f"have more than {most_tokens:,} tokens (--max-new-tokens)"
        if reason:
            skipped[reason] = skipped.get(reason, 0) + 1
            continue
        text = tokenizer.decode(answer[:tokens], skip_special_tokens=True).strip()
        rule, value = find_rule(text)
        limit = min(
            most_tokens, tokenizer.model_max_length - start, most_tokens if rule == "number" else 2 * tokens + 16
        )
        references.append(Reference(location, prompt, text, rule, value, limit))
    return references, skipped


def find_last_answer(example):
    """Where the last supervised answer of an example begins."""
    end = int(example.supervised.nonzero()[-1])
    context = (~example.supervised[:end]).nonzero()
    return int(context[-1]) + 1 if len(context) else 0


# --- judging


def judge(model, tokenizer, examples, most_tokens, budget=0):
    """The report on a model's greedy answers to a split, a `data.Examples`, as JSON; for `budget` see `generation`."""
    references, skipped = find_references(examples, tokenizer, most_tokens)
    stops, rows, tokens, began = torch.tensor(stop_ids(tokenizer)), {}, 0, time.monotonic()
    prompts, limits = ([getattr(each, name) for each in references] for name in ("prompt", "limit"))
    batches = generate_batches(model, tokenizer, prompts, limits, budget=budget)
    for number, ids in show_progress(batches, len(references)):
        reference, text = references[number], tokenizer.decode(ids, skip_special_tokens=True).strip()
        finished = bool(torch.isin(ids[-1], stops))
        rows[number] = {
            "location": reference.location,
            "rule": reference.rule,
            "right": finished and PARSERS[reference.rule](text) == reference.value,
            "finished": finished,
            "reference": reference.text,
            "answer": text,
        }
        tokens += len(ids)
    rows = [rows[number] for number in range(len(references))]
    rules = sorted({row["rule"] for row in rows})
    return {
        **count_right(rows),
        "by_rule": {rule: count_right([row for row in rows if row["rule"] == rule]) for rule in rules},
        "unfinished": sum(not row["finished"] for row in rows),
        "not_judged": skipped,
        "tokens": tokens,
        "seconds": time.monotonic() - began,
        "rows": rows,
    }


def count_right(rows):
    right = sum(row["right"] for row in rows)
    return {"conversations": len(rows), "right": right, "interval": wilson_interval(right, len(rows))}


def wilson_interval(right, n):
    """The 95 % interval of a share, `right` of n, as Wilson has it (1927, https://doi.org/10.2307/2276774); None of 0.

    It holds for small n, and for shares of 0 and 1, too: Brown, Cai, DasGupta, https://doi.org/10.1214/ss/1009213286.
    """
    if not n:
        return None
    share, weight = right / n, 1 + Z**2 / n
    middle, half = share + Z**2 / (2 * n), Z * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    return [max(0.0, (middle - half) / weight), min(1.0, (middle + half) / weight)]


def compare_right(before, after):
    """The conversations that only one of two models answers right, by their reports of `judge`, and whether by chance.

    p is that of McNemar's exact test: how likely so uneven a split is if each of these was either model's with 1/2.
    """
    same = operator.itemgetter("location", "reference")  # which another tokenizer's length limit may change
    others = {same(row): row["right"] for row in before["rows"]}
    pairs = [(others[same(row)], row["right"]) for row in after["rows"] if same(row) in others]
    lost, won = pairs.count((True, False)), pairs.count((False, True))
    ways = sum(math.comb(won + lost, k) for k in range(min(won, lost) + 1))
    return {"conversations": len(pairs), "won": won, "lost": lost, "p": min(1.0, 2 * ways / 2 ** (won + lost))}


def show_progress(answers, total):
    """Iterate over answers, and show how many there are: a bar on a terminal, elsewhere a line now and then."""
    last = time.monotonic()
    with tqdm(total=total, unit=" answers", disable=None, leave=False) as bar:
        for done, answer in enumerate(answers, 1):
            yield answer
            bar.update()
            if bar.disable and time.monotonic() - last > INTERVAL:
                last = time.monotonic()
                print(f"  {done:,} of {total:,} answers", file=sys.stderr)
