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
import re
import sys
import time
import unicodedata
from fractions import Fraction

import torch
from tqdm import tqdm

from conversations.chatml import find_opening
from conversations.templates import stop_ids
from evaluation.comparison import answer_starts
from evaluation.generation import generate_batches

TAG = re.compile(r"</?tool_call>|```(?:json)?")  # around calls (Hermes, Qwen) and around JSON: a part of the answer
# Thousands, decimals, a fraction, an exponent; not the 2 of x2, nor of 1.0.2. From U+0590 on there may be no spaces.
BEGIN = r"(?<![^\W\u0590-\U0010ffff])(?<![\d./])"
NUMBER = BEGIN + r"[-−]?\$?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:/[1-9]\d*|(?:\.\d+)?(?:e[-+]?\d{1,3})?)|\.\d+)(?!\d|\.\d)"
BEFORE = r"####|[\d)]\s*=|\\boxed{|answer is:?"  # a result
RESULT = re.compile(rf"(?:.*(?:{BEFORE}))?[\s$]*{NUMBER}\s?[%}}$.。]*", re.DOTALL | re.IGNORECASE)
Z = 1.959964  # of 95 %, in a standard normal distribution
INTERVAL = 30  # seconds between two lines of progress, where there is no terminal


# --- what is equal


def parse_json(text):
    """JSON objects and arrays that follow each other, as a list of canonical texts; None if there is anything else."""
    # An object becomes one of a single list, in which a key may be there twice.
    decoder = json.JSONDecoder(object_pairs_hook=lambda pairs: {"": sorted(pairs, key=lambda pair: pair[0])})
    rest, found = text.strip(), []
    try:
        while rest:
            if tag := TAG.match(rest):
                part, end = tag[0], tag.end()
            else:
                value, end = decoder.raw_decode(rest)
                part = json.dumps(value)  # unlike Python, it distinguishes true, 1 and 1.0
            found.append(part)
            rest = rest[end:].strip()
    except (ValueError, RecursionError):
        return None
    values = [part for part in found if not TAG.match(part)]
    return found if values and all(value[0] in "{[" for value in values) else None


def parse_last_number(text):
    """The value of the last number in a text, or its text where it has too many digits for one; None without any."""
    numbers = re.findall(NUMBER, text, re.IGNORECASE)
    if not numbers:
        return None
    text = re.sub("[$,]", "", numbers[-1]).replace("−", "-")
    return Fraction(text) if len(text) <= sys.int_info.default_max_str_digits else text


def normalize(text):
    """A text in lower case, with single spaces, without final punctuation, and with each letter written one way (NFC).

    SQuAD's measure (https://arxiv.org/abs/1606.05250) also leaves out all other punctuation, and articles.
    """
    text = " ".join(unicodedata.normalize("NFC", text).lower().split())
    return text.rstrip(".!?…。．｡！？।؟۔ ") or text


PARSERS = {"json": parse_json, "number": parse_last_number, "text": normalize}  # equal answers have equal values


def choose_rule(reference):
    """The rule for answers to a reference, by its text."""
    return "json" if parse_json(reference) else "number" if RESULT.fullmatch(reference.strip()) else "text"


# --- judging


def find_references(examples, tokenizer, most_tokens):
    """The prompts, ids, of a split and the most tokens of each answer; what is known of each; why others have none.

    An answer ends after twice the tokens of its reference and 16, and no later than after `most_tokens`. Before a
    number there may be workings of any length.
    """
    prompts, limits, rows, skipped = [], [], [], {}
    stops, opening = torch.tensor(stop_ids(tokenizer)), len(find_opening(tokenizer))
    last = {examples.location(row): row for row in range(len(examples))}  # a conversation may be several examples
    for location, row in last.items():
        example = examples[row]
        ids, start = example.input_ids, int(answer_starts(example).nonzero()[-1])  # of the last answer
        ends = torch.isin(ids[start:], stops).nonzero()[:1, 0].tolist()
        tokens = ends[0] + 1 if ends else 0
        reason = "are no answers to anything" if start <= opening else "are cut off" if not ends else ""
        if tokens > most_tokens:
            reason = f"have more than {most_tokens:,} tokens (--max-new-tokens)"
        if reason:
            skipped[reason] = skipped.get(reason, 0) + 1
            continue
        reference = tokenizer.decode(ids[start : start + tokens], skip_special_tokens=True).strip()
        rule = choose_rule(reference)
        limit = most_tokens if rule == "number" else min(most_tokens, 2 * tokens + 16)
        prompts.append(ids[:start])
        limits.append(min(limit, tokenizer.model_max_length - start))
        rows.append({"location": location, "rule": rule, "reference": reference})
    return prompts, limits, rows, skipped


def judge(model, tokenizer, examples, most_tokens, budget=0):
    """The report on a model's greedy answers to a split, a `data.Examples`, as JSON; budget: of `generate_batches`."""
    prompts, limits, rows, skipped = find_references(examples, tokenizer, most_tokens)
    began, tokens = time.monotonic(), 0
    batches = generate_batches(model, tokenizer, prompts, limits, budget=budget)
    for number, text, finished, length in show_progress(batches, len(rows)):
        row, tokens = rows[number], tokens + length
        parse = PARSERS[row["rule"]]
        right = finished and parse(text) == parse(row["reference"])
        row |= {"answer": text, "finished": finished, "right": right}
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


def show_progress(batches, total):
    """Iterate over the answers of batches, and show how many are left: by a bar on a terminal, else a line at times."""
    last = time.monotonic()
    with tqdm(total=total, unit=" answers", disable=None, leave=False) as bar:
        for answers in batches:
            yield from answers
            bar.update(len(answers))
            total -= len(answers)
            if bar.disable and time.monotonic() - last > INTERVAL:
                last = time.monotonic()
                print(f"  {total:,} more answers to generate", file=sys.stderr)


def count_right(rows):
    """The number of right answers, and the 95 % interval of their share, as Wilson has it; None of no answers.

    It holds for small numbers and for shares of 0 and 1, too (Brown, Cai, DasGupta, doi.org/10.1214/ss/1009213286).
    """
    right, n, interval = sum(row["right"] for row in rows), len(rows), None
    if n:
        share, weight = right / n, 1 + Z**2 / n
        middle, half = share + Z**2 / (2 * n), Z * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
        interval = [max(0.0, (middle - half) / weight), min(1.0, (middle + half) / weight)]
    return {"conversations": n, "right": right, "interval": interval}


def compare_right(before, after):
    """The conversations that only one of two models answers right, by their reports of `judge`, and whether by chance.

    p is that of McNemar's exact test: how likely so uneven a split is if each of these was either model's with 1/2.
    """
    # By the reference, too, as another tokenizer's length limit may leave another answer the last.
    others, mine = (
        {(row["location"], row["reference"]): row["right"] for row in report["rows"]} for report in (before, after)
    )
    pairs = [(others[key], right) for key, right in mine.items() if key in others]
    lost, won = pairs.count((True, False)), pairs.count((False, True))
    ways = sum(math.comb(won + lost, k) for k in range(min(won, lost) + 1))
    return {"conversations": len(pairs), "won": won, "lost": lost, "p": min(1.0, 2 * ways / 2 ** (won + lost))}
