"""Audits: what ids and labels that another trainer prepared would teach, by the turns that are found in the ids.

How turns are marked is learned from what the tokenizer's template makes of a small conversation. A check that finds a
fault in that conversation does not suit the template: it is left out, and named among what was not judged.
"""

import itertools
import json
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import torch

from config import UserError, first_line, rewrite_errors
from conversations.chatml import find_opening
from conversations.masking import IGNORE, Example, encode, mark_supervised
from conversations.preview import preview
from conversations.sources import InvalidRow, Source, find_files, read_rows, read_table
from conversations.templates import get_template, stop_ids

FAULTS = {
    "labels differ": "a label is neither -100 nor the id at its place; labels are not shifted",
    "padding supervised": "labels where attention_mask is 0, or where a control token is repeated to the end",
    "nothing supervised": "no label after the first token",
    "everything supervised": "the words of users, too",
    "boundaries differ": "columns disagree about where conversations begin, or position_ids do not restart at 0",
    "shared attention": "with an attention_mask of ones, transformers ignores where position_ids restart",
    "doubled BOS": "a conversation begins with it twice",  # this and what follows depends on the template
    "prompts supervised": "labels outside of the assistant's turns",
    "headers supervised": "labels on what begins the assistant's turns, which is given at inference",
    "stop not supervised": "an answer has labels and its stop token has none: the model does not learn to stop",
    "gap in an answer": "tokens without labels between the first label of an answer and its stop token",
    "truncated answer": "a conversation ends within an answer that has labels, without a stop token",
    "begins inside a turn": "what came before was cut off",
    "forged turn": "a control token inside a turn: it was typed, or the stop token before it is missing",
    "boundary inside a turn": "a column has a boundary where no conversation begins",
    "boundary missing": "a conversation begins where no column has a boundary, so it attends to the one before it",
    "no turns": "no row has a turn of the template; try another --model or --chat-template",
}
OF_TEMPLATE = list(FAULTS)[6:]
COLUMNS = "input_ids labels attention_mask position_ids seq_lengths assistant_masks completion_mask".split()
ROLES, WORDS = ["system", *2 * ["user", "assistant"]], "Brief. Hi Yes. So? No!".split()
PROBE = [{"role": role, "content": text} for role, text in zip(ROLES, WORDS, strict=True)]
PROMPT, HEADER, ANSWER, EITHER = range(4)  # the parts of a conversation; labels of EITHER are not judged
AROUND, PLACES = 60, 3  # tokens before and after a fault that are shown, and rows that are named


NEVER = re.compile("(?!)")


class Markers(NamedTuple):
    """Patterns in ids as characters."""

    padding: re.Pattern  # a control token that is repeated to the end
    opening: str  # with which a conversation begins
    turn: re.Pattern = NEVER  # a turn, or what stands between two
    between: re.Pattern = NEVER  # space and control tokens after a turn, which may have labels
    stray: re.Pattern = NEVER  # a control token that does not belong inside a turn
    end: re.Pattern = NEVER  # a token that ends a turn
    open: re.Pattern = NEVER  # a turn that has not ended
    ends_questions: bool = True  # whether a question ends with such a token, before an answer begins


def as_text(ids):
    """Ids as characters, for regular expressions."""
    return "".join(map(chr, ids))


def one_of(ids):
    """A regular expression of any of some ids."""
    return f"[{re.escape(as_text(ids))}]" if ids else "(?!)"


def load_markers(tokenizer):
    """The `Markers` of a tokenizer, the faults that are not looked for with its template, and why not."""
    control = tokenizer.convert_tokens_to_ids(list(get_template(tokenizer).encoder.control))
    opening = tokenizer.convert_tokens_to_ids(find_opening(tokenizer)) or [tokenizer.bos_token_id or 0]
    markers = Markers(re.compile(rf"({one_of(control)})\1+$", re.DOTALL), as_text(opening))
    try:
        patterns, chat = find_patterns(tokenizer, {*control}, opening)
    except UserError as error:
        return markers, OF_TEMPLATE, f"where turns begin is not known: {first_line(error)}"
    markers = markers._replace(**patterns)
    rows = [{"input_ids": ids.numpy(), "labels": labels.numpy()} for ids, labels in encode([chat], tokenizer)]
    return markers, {fault for row in rows for fault in judge(row, markers)}, "the template itself writes so"


def find_patterns(tokenizer, control, opening):
    """The patterns of turns in `Markers`, from what the template makes of a small conversation, and that conversation.

    Raises:
        UserError: the template does not take the conversation, or no control token begins an answer.
    """
    template, chat = get_template(tokenizer), mark_supervised(PROBE, "all")
    try:
        turns, ids = template.encode(chat)
    except UserError:  # many templates have no system message
        turns, ids = template.encode(chat := chat[1:])
    (text,) = template.render([chat], {})
    ends = [template.pattern.search(text, text.index(message["content"]))[0] for message in PROBE[2::2]]
    ends = {*stop_ids(tokenizer), *tokenizer.convert_tokens_to_ids(ends)}
    first, second = (as_text(context) for context, _ in turns)
    shared = first[len(first) + 1 - next(i for i in itertools.count(1) if first[-i] != second[-i]) :]
    *ended, last = re.split(one_of(ends), shared)
    header = re.search(f"{one_of(control)}.*|$", last, re.DOTALL)[0]
    while header and as_text(ids).count(header) < len(turns):
        header = header[:-1]  # what only a prompt has, such as empty reasoning
    if not header:
        raise UserError("no control token begins an answer")
    decoded = tokenizer.backend_tokenizer.decode_batch([[i] for i in range(len(tokenizer))], skip_special_tokens=False)
    space = one_of([number for number, text in enumerate(decoded) if not text.strip()])
    words = re.sub(f"{space}+$", "", header)
    marks = [number for number in ids if number in control and number not in opening]
    openers = {marks[0], ord(header[0]), *(after for mark, after in itertools.pairwise(marks) if mark in ends)} - ends
    unknown = {tokenizer.unk_token} - {tokenizer.pad_token, tokenizer.bos_token}  # what has no token may become it
    known = f"{tokenizer.chat_template}{unknown}"
    stray = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special and str(token) not in known}
    stray, end, text = one_of(stray - openers - ends), one_of(ends), f"[^{re.escape(as_text(openers | ends))}]*"
    answer = f"(?P<header>{re.escape(words)}(?:{re.escape(header[len(words) :])})?){text}"
    turn = f"(?:{answer}|{one_of(openers)}{text})(?P<end>{end}?)|(?P<between>{text})(?P<forged>{end}?)"
    patterns = {
        "turn": turn,
        "between": f"(?:{space}|{stray})*",
        "stray": stray,
        "end": end,
        "open": f"{one_of(openers)}{text}$",
    }
    return {name: re.compile(each, re.DOTALL) for name, each in patterns.items()} | {
        "ends_questions": bool(ended)
    }, chat


class Turns(NamedTuple):
    """The turns in the ids of a conversation."""

    parts: np.ndarray  # (T,): of each token PROMPT, HEADER, ANSWER or EITHER
    answers: list  # where the words of each begin, where the turn ends, and whether a stop token ends it
    forged: list  # the numbers of tokens
    unbounded: list  # of control tokens with which another conversation seems to begin
    begins_inside: bool
    ends_inside: bool


def find_turns(text, markers):
    """The `Turns` in the ids of a conversation, as characters; None where it has none."""
    parts, answers, forged, unbounded = np.full(len(text), PROMPT), [], [], []
    turn, begins_inside, before = None, False, []  # control tokens between turns
    for found in markers.turn.finditer(text):
        begin, end = found.span()
        strays = [stray.start() for stray in markers.stray.finditer(text, begin, end)]
        if found["between"] is not None:
            words = markers.between.match(text, begin, end).end()
            begins_inside |= turn is None and words < end
            forged += [end - 1] if turn and found["forged"] else []
            parts[begin : words if turn and not found["forged"] else end] = EITHER
            before = strays if turn else []
            continue
        answers_question = turn and not turn["header"] and found["header"] and not markers.ends_questions
        if turn and not turn["end"] and not answers_question:
            forged.append(begin)
            parts[begin:end] = EITHER
        elif found["header"]:
            parts[begin : found.end("header")], parts[found.end("header") : end] = HEADER, ANSWER
            answers.append((found.end("header"), end, bool(found["end"])))
        forged += [stray for stray in strays if stray < len(text) - 1]  # where a text may end, too
        unbounded += before
        turn, before = found, []
    if not (turn or (begins_inside and markers.end.search(text))):
        return None
    return Turns(parts, answers, forged, unbounded, begins_inside, bool(turn) and not turn["end"])


def parse_columns(row, vocabulary):
    """The columns of a row as arrays, (T,) each, TRL's masks as labels; an `InvalidRow` where it cannot be judged."""
    if not isinstance(row, dict):
        raise row if isinstance(row, InvalidRow) else InvalidRow("it is not an object")
    columns = {name: row[name] for name in COLUMNS if row.get(name) is not None}
    for name, value in columns.items():
        values = value[0] if isinstance(value, list) and len(value) == 1 and isinstance(value[0], list) else value
        if not isinstance(values, list) or not all(isinstance(number, int) for number in values):
            raise InvalidRow(f'"{name}" is not a list of integers')
        columns[name] = np.array(values)
    masks = [columns.pop(name) for name in COLUMNS[-2:] if name in columns]
    if ("labels" not in columns and not masks) or not len(columns.get("input_ids", ())):
        raise InvalidRow('it needs "input_ids" and "labels"; write what the collator returns, as in docs/audit.md')
    ids, lengths = columns["input_ids"], columns.get("seq_lengths")
    if any(len(value) != len(ids) for value in (*columns.values(), *masks) if value is not lengths):
        raise InvalidRow("its columns have different lengths")
    if lengths is not None and lengths.sum() != len(ids):
        raise InvalidRow('"seq_lengths" are not those of its "input_ids"')
    if not 0 <= ids.min() <= ids.max() < vocabulary:
        raise InvalidRow(f"ids outside of the tokenizer's {vocabulary:,}: try another --model")
    return {"labels": np.where(np.all(masks, axis=0), ids, IGNORE), **columns} if masks else columns


def find_starts(columns, kept):
    """Where conversations begin among the tokens that are `kept`, by all columns that tell; and the faults in that."""
    starts, wrong = [], []
    if "position_ids" in columns:
        positions = columns["position_ids"][kept]
        starts.append({0, *(np.flatnonzero(np.diff(positions) != 1) + 1).tolist()})
        wrong += [start for start in starts[-1] if positions[start]]
    if "seq_lengths" in columns:
        starts.append({0, *(end for end in columns["seq_lengths"].cumsum().tolist() if end < len(kept))})
    mask = columns.get("attention_mask", np.zeros(1))
    if mask.max() > 1:  # it numbers the conversations
        starts.append({0, *(np.flatnonzero(np.diff(mask[kept])) + 1).tolist()})
    every = {0}.union(*starts)
    wrong += every.difference(every.intersection(*starts))
    return sorted(every), {"boundaries differ": wrong, "shared attention": [*every - {0}] * int(mask.max() == 1)}


def judge(columns, markers):
    """The faults of a row by its columns: a dict of the numbers of the tokens that have each, (n,)."""
    ids, labels, mask = (columns.get(name) for name in COLUMNS[:3])
    if (differ := np.flatnonzero((labels != IGNORE) & (labels != ids))).size:
        return {"labels differ": differ}
    text = as_text(ids.tolist())
    mask, repeated = np.ones(len(ids)) if mask is None else mask, markers.padding.search(text)
    if repeated:  # the first may be a stop token, or the end of a text
        first = repeated.start()
        mask = mask * (
            np.arange(len(ids)) < first + bool(labels[first] != IGNORE or markers.open.search(text, 0, first))
        )
    is_kept, supervised = mask != 0, np.append(False, labels[1:] != IGNORE)
    padding, kept = np.flatnonzero(supervised & ~is_kept), np.flatnonzero(is_kept)
    text, supervised = as_text(ids[kept].tolist()), supervised[kept]
    starts, found = find_starts(columns, kept)
    bounds = list(itertools.pairwise([*starts, len(text)]))
    turns = [find_turns(text[begin:end], markers) for begin, end in bounds]
    has_prompts = markers.turn is NEVER or any((each.parts == PROMPT).any() for each in turns if each)
    is_all = has_prompts and supervised.any() and np.delete(supervised, starts).all()
    found |= {"nothing supervised": [0] * (not supervised.any()), "everything supervised": [0] * int(is_all)}
    found["no turns"] = [0] * (not any(turns))
    found["doubled BOS"] = [start for start in starts if text.startswith(2 * markers.opening, start)]
    for (begin, end), each in zip(bounds, turns, strict=True):
        for fault, tokens in judge_turns(each, supervised[begin:end], is_all) if each else ():
            found[fault] = found.get(fault, []) + [begin + token for token in tokens]
    cut = found["boundary inside a turn"] = [
        at
        for at, before, after in zip(starts[1:], turns[:-1], turns[1:], strict=True)
        if before and after and before.ends_inside and after.begins_inside
    ]
    second = [start + len(markers.opening) for start in found["doubled BOS"]]  # may be what begins a turn
    explained = {"begins inside a turn": cut, "truncated answer": [at - 1 for at in cut], "forged turn": second}
    for fault, tokens in explained.items():
        found[fault] = [at for at in found.get(fault, ()) if at not in tokens]
    found = {fault: kept[sorted(at)] for fault, at in found.items() if at}
    return found | ({"padding supervised": padding} if len(padding) else {})


def judge_turns(turns, supervised, is_all):
    """Yield `(fault, tokens)` for the turns of a conversation, by which of its tokens have labels, (T,)."""
    yield "forged turn", turns.forged
    yield "boundary missing", turns.unbounded
    yield "begins inside a turn", [0] * int(turns.begins_inside and supervised.any())
    if not is_all:
        yield "prompts supervised", np.flatnonzero(supervised & (turns.parts == PROMPT)).tolist()
        yield "headers supervised", np.flatnonzero(supervised & (turns.parts == HEADER)).tolist()
    for begin, end, has_stop in turns.answers:
        has_label = supervised[begin:end]
        if has_label.any():
            gap = np.flatnonzero(~has_label[:-1])
            yield "gap in an answer", (begin + gap[gap > has_label.argmax()]).tolist()
            if not has_stop and end == len(supervised):
                yield "truncated answer", [end - 1]
            elif has_stop and not has_label[-1]:
                yield "stop not supervised", [end - 1]


def read_prepared(name):
    """Yield `(location, row)` of a file, or of a directory that `datasets` has saved."""
    path = Path(name).expanduser()
    if (path / "dataset_dict.json").is_file():
        raise UserError(f"--audit {name}: it has several splits; name the directory of one of them")
    if (path / "state.json").is_file():
        try:
            table = datasets.load_from_disk(str(path)).with_format("arrow")
        except Exception as error:  # whatever the library has against its files
            raise UserError(f"--audit {name}: it cannot be loaded: {first_line(error)}") from error
        yield from read_table(name, table.iter(1000))
        return
    with rewrite_errors("--dataset", "--audit"):
        if not find_files(name):
            raise UserError(f"--audit {name}: there is no such file")
        yield from read_rows(Source(name), None)


def print_audit(name, tokenizer, shown, as_json):
    """Judge the rows of a file; print `shown` rows of each fault, the counts of all, and what was not judged.

    Returns:
        The exit status: 1 if there are faults.
    """
    markers, left_out, why = load_markers(tokenizer)
    total = Counter(rows=0, tokens=0, supervised=0)
    places, counts = defaultdict(list), Counter()  # of each fault: the rows, and the number of tokens
    for location, row in read_prepared(name):
        columns, total["rows"] = {}, total["rows"] + 1
        try:
            columns = parse_columns(row, len(tokenizer))
            found = judge(columns, markers)
            total["judged"] += 1
            total["bounded"] += bool(columns.keys() & {"position_ids", "seq_lengths"})
            total["turnless"] += "no turns" in found
            total["tokens"] += len(columns["labels"])
            total["supervised"] += np.count_nonzero(columns["labels"][1:] != IGNORE)
        except InvalidRow as problem:
            found = {f"invalid row, {problem.reason}": [0]}
        found = {fault: at for fault, at in found.items() if fault not in {*left_out, "no turns"}}
        for fault, at in found.items():
            places[fault].append(location)
            counts[fault] += len(at)
            if as_json:
                print(json.dumps({"location": location, "fault": fault, "token": int(at[0]), "tokens": len(at)}))
        new = [fault for fault in found if columns and len(places[fault]) <= shown]
        if new and not as_json:
            print_row(location, columns, found, new[0], tokenizer)
    if not total["rows"]:
        raise UserError(f"--audit {name}: it has no rows")
    left_out = [fault for fault in FAULTS if fault in left_out]
    not_judged = [f"{', '.join(left_out)} ({why})"] if left_out else []
    if not total["bounded"]:
        not_judged.append("where conversations begin within a row: no row has position_ids or seq_lengths")
    if "no turns" not in left_out and total["turnless"] == total["judged"] > 0:
        places["no turns"], counts["no turns"] = [name] * total["rows"], total["tokens"]
    elif total["turnless"]:
        not_judged.append(f"the turns of {total['turnless']:,} rows: they have none of the template")
    print_summary(total, places, counts, not_judged, as_json)
    return int(bool(places))


def print_summary(total, places, counts, not_judged, as_json):
    """Print how many rows there are, the counts of each fault, and what was not judged."""
    total = {name: total[name] for name in ("rows", "tokens", "supervised")}
    if as_json:
        faults = {fault: {"rows": len(rows), "tokens": counts[fault]} for fault, rows in places.items()}
        print(json.dumps({**total, "faults": faults, "not_judged": not_judged}))
        return
    share = total["supervised"] / max(1, total["tokens"])
    print(f"{total['rows']:,} rows, {total['tokens']:,} tokens, {share:.1%} of them supervised")
    for fault in sorted(places, key=[*FAULTS, *places].index):
        first = ", ".join(list(dict.fromkeys(places[fault]))[:PLACES])
        more = ", …" * (len(places[fault]) > PLACES)
        print(f"{fault}: {len(places[fault]):,} rows, {counts[fault]:,} tokens: {first}{more}")
        print(f"  {FAULTS[fault]}" if fault in FAULTS else "")
    for each in not_judged:
        print(f"not judged: {each}")
    print("no faults in what was judged" * (not places))


def print_row(location, columns, found, fault, tokenizer):
    """Print the faults of a row, and the tokens around the first one of a fault."""
    print(f"--- {location}: {', '.join(f'{each} (token {tokens[0]})' for each, tokens in found.items())}")
    part = slice(max(0, found[fault][0] - AROUND), found[fault][0] + AROUND)
    example = Example(*(torch.tensor(columns[name][part]) for name in ("input_ids", "labels")))
    print(preview(example, tokenizer, color=sys.stdout.isatty()))
