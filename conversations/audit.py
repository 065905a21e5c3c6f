"""Audits: what ids and labels that another trainer prepared would teach, by the turns that are found in the ids.

How turns are marked is learned from what the tokenizer's template makes of a small conversation. A check that finds a
fault in that one, or in one with reasoning or a call, does not suit the template: it is left out, and named among what
was not judged.
"""

import contextlib
import itertools
import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow
import torch

from config import UserError, first_line, rewrite_errors
from conversations.chatml import find_opening
from conversations.masking import IGNORE, Example, encode, mark_supervised
from conversations.preview import preview
from conversations.sources import InvalidRow, Source, find_files, read_rows, read_table
from conversations.templates import CALLED, TOOL_PROBE, get_template, stop_ids

FAULTS = {
    "labels differ": "a label is neither -100 nor the id at its place; labels are not shifted",
    "padding supervised": "labels where attention_mask is 0, or where a control token is repeated to the end",
    "nothing supervised": "no label after the first token",
    "everything supervised": "the words of users, too",
    "boundaries differ": "columns disagree about where conversations begin, or position_ids do not restart at 0",
    "shared attention": "with an attention_mask of ones, eager and sdpa attention ignore where position_ids restart",
    "doubled BOS": "a conversation begins with it twice",  # from here on by the template
    "prompts supervised": "labels outside of the assistant's turns",
    "headers supervised": "labels on what begins the assistant's turns, which is given at inference",
    "stop not supervised": "an answer has labels and its stop token has none, so the model does not learn to stop",
    "gap in an answer": "tokens without labels between the first label of an answer and its stop token",
    "truncated answer": "a conversation ends within an answer that has labels, without a stop token",
    "begins inside a turn": "what came before was cut off, or a column has a boundary where no conversation begins",
    "forged turn": "a control token where none belongs: typed by somebody, or a stop token is missing or doubled",
    "boundary missing": "a BOS, an end of a text or the same system message again, and no boundary: it attends back",
    "no turns": "no row has a turn of the template; try another --model or --chat-template",
}
OF_TEMPLATE = list(FAULTS)[6:]
NOTES = {  # on rows that have what is not a fault by itself
    "unbounded": "where conversations begin within {:,} rows without position_ids and seq_lengths",
    "no turns": "the turns of {:,} rows, which have none of the template",
    "bare answers": "answers without any label in {:,} rows, which may be meant so",
}
COLUMNS = "input_ids labels attention_mask position_ids seq_lengths assistant_masks completion_mask".split()
ROLES, WORDS = ["system", *2 * ["user", "assistant"]], "Brief. Hi Yes. So? No!".split()
PROBE = [{"role": role, "content": text} for role, text in zip(ROLES, WORDS, strict=True)]
THOUGHT = [{**message, "thinking": "Hm?"} if message["role"] == "assistant" else message for message in PROBE[1:]]
RESULT = {"role": "tool", "content": "4", "name": "lookup", "tool_call_id": CALLED["id"]}
CALLS = [{**PROBE[1], "tools": TOOL_PROBE}, {**PROBE[2], "content": "", "tool_calls": [CALLED]}, RESULT, PROBE[4]]
AROUND = 60  # tokens before and after a fault that are shown
NEVER = re.compile("(?!)")


class Markers(NamedTuple):
    """Patterns in ids as characters."""

    padding: re.Pattern  # a control token that is repeated to the end
    turn: re.Pattern = NEVER  # a turn, or what stands between two
    between: re.Pattern = NEVER  # space and control tokens after a turn, which may have labels
    stray: re.Pattern = NEVER  # a control token that does not belong inside a turn
    mark: re.Pattern = NEVER  # a control token with which a turn begins or ends
    inside: re.Pattern = NEVER  # the beginning of what does not begin with a turn
    open: re.Pattern = NEVER  # a turn that has not ended
    doubled: re.Pattern = NEVER  # what a conversation begins with, twice
    system: str = ""  # with which a system message's turn begins, if it is known
    ends_questions: bool = True  # whether a question ends with a token of its own before an answer begins


def as_text(ids):
    """Ids as characters, for regular expressions."""
    return "".join(map(chr, ids))


def one_of(ids):
    """A regular expression of any of some ids."""
    return f"[{re.escape(as_text(ids))}]" if ids else "(?!)"


def load_markers(tokenizer):
    """The `Markers` of a tokenizer, the faults that are not looked for with its template, and why not."""
    markers = Markers(re.compile(rf"({one_of(tokenizer.added_tokens_decoder)})\1+$", re.DOTALL))
    try:
        patterns, chat = find_patterns(tokenizer)
    except UserError as error:
        return markers, OF_TEMPLATE, f"where turns begin is not known: {first_line(error)}"
    markers, unsuited = markers._replace(**patterns), set()
    for messages in (chat, THOUGHT, CALLS):
        with contextlib.suppress(UserError):  # of a template without reasoning or tools
            for ids, labels in encode([messages], tokenizer):
                unsuited |= judge({"input_ids": ids.numpy(), "labels": labels.numpy()}, markers).keys() & FAULTS.keys()
    return markers, unsuited, "its template writes so"


def find_patterns(tokenizer):
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
    control = {tokenizer.convert_tokens_to_ids(token) for token in template.encoder.control}
    first, second = (as_text(context) for context, _ in turns)
    shared = next(i for i in itertools.count(1) if first[-i] != second[-i]) - 1
    *ended, last = re.split(one_of(ends), first[len(first) - shared :])
    header = re.search(f"{one_of(control)}.*|$", last, re.DOTALL)[0]
    while header and as_text(ids).count(header) < len(turns):
        header = header[:-1]  # what only a prompt has, such as empty reasoning
    if not header:
        raise UserError("no control token begins an answer")
    decoded = tokenizer.backend_tokenizer.decode_batch([[i] for i in range(len(tokenizer))], skip_special_tokens=False)
    space = one_of([number for number, text in enumerate(decoded) if not text.strip()])
    opening = tokenizer.convert_tokens_to_ids(find_opening(tokenizer)) or [tokenizer.bos_token_id or 0]
    marks = [number for number in ids if number in control and number not in opening]
    openers = {marks[0], ord(header[0]), *(after for mark, after in itertools.pairwise(marks) if mark in ends)} - ends
    named = f"{tokenizer.chat_template}{ {tokenizer.unk_token} - {tokenizer.pad_token, tokenizer.bos_token} }"
    stray = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special and str(token) not in named}
    stray, end, opener = one_of(stray - openers - ends), one_of(ends), one_of(openers)
    text, between = f"[^{re.escape(as_text(openers | ends))}]*", f"(?:{space}|{stray})*"
    words = re.sub(f"{space}+$", "", header)
    answer = f"(?P<header>{re.escape(words)}(?:{re.escape(header[len(words) :])})?){text}"
    turn = f"(?:{answer}|{opener}{text})(?P<end>{end}?)|(?P<between>{text})(?P<forged>{end}?)"
    patterns = {"turn": turn, "between": between, "stray": stray, "mark": f"{opener}|{end}"}
    patterns |= {"inside": f"{between}(?!{opener}|{space}|{stray}).", "open": f"{opener}{text}$"}
    patterns |= {} if openers & {*opening} else {"doubled": re.escape(2 * as_text(opening))}
    compiled = {name: re.compile(pattern, re.DOTALL) for name, pattern in patterns.items()}
    system, user, *others = [found[0] for found in compiled["turn"].finditer(as_text(ids)) if found["between"] is None]
    differ = [number for number, (a, b) in enumerate(zip(system, user, strict=False)) if a != b]
    system = system[: differ[0] + 1] if differ and len(others) == 3 else ""  # a turn for each message of PROBE
    return compiled | {"system": system, "ends_questions": bool(ended)}, chat


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
    masks = [columns[name] for name in COLUMNS[-2:] if name in columns]
    if ("labels" not in columns and not masks) or not len(columns.get("input_ids", ())):
        raise InvalidRow('it needs "input_ids" and "labels"; write what the collator returns (docs/audit.md)')
    ids = columns["input_ids"]
    if len({value.sum() if name == "seq_lengths" else len(value) for name, value in columns.items()}) > 1:
        raise InvalidRow("its columns have different lengths")
    if not columns.get("attention_mask", ids + 1).any():
        raise InvalidRow('its "attention_mask" is 0 everywhere')
    if not 0 <= ids.min() <= ids.max() < vocabulary:
        raise InvalidRow(f"it has ids that the tokenizer's {vocabulary:,} are not; try another --model")
    return {"labels": np.where(np.all(masks, axis=0), ids, IGNORE), **columns} if masks else columns


def find_starts(columns, kept):
    """Where conversations begin among the tokens that are `kept`, by the columns that show it, and faults in that."""
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
    ids, labels, mask = (columns.get(name, np.ones(1)) for name in COLUMNS[:3])
    if (differ := np.flatnonzero((labels != IGNORE) & (labels != ids))).size:
        return {"labels differ": differ}
    text, is_kept = as_text(ids.tolist()), np.broadcast_to(mask != 0, len(ids))
    if repeated := markers.padding.search(text):  # the first may be a stop token, or the end of a text
        first = repeated.start()
        has_end = labels[first] != IGNORE or bool(markers.open.search(text, 0, first))
        is_kept = is_kept & (np.arange(len(ids)) < first + has_end)
    supervised, kept = np.append(False, labels[1:] != IGNORE), np.flatnonzero(is_kept)
    padding = {"padding supervised": np.flatnonzero(supervised & ~is_kept)}
    text, supervised = as_text(ids[kept].tolist()), supervised[kept]
    starts, found = find_starts(columns, kept)
    found |= {"nothing supervised": [0] * (not supervised.any()), "no turns": [0] * (not markers.mark.search(text))}
    found["doubled BOS"] = [start for start in starts if markers.doubled.match(text, start)]
    bounds = [*itertools.pairwise([*starts, len(text)])]
    inside = [at for at, end in bounds if markers.mark.search(text, at, end) and markers.inside.match(text, at)]
    found["begins inside a turn"] = [at for at, end in bounds if at in inside and supervised[at:end].any()]
    for begin, end in bounds:
        for fault, tokens in judge_turns(text[begin:end], supervised[begin:end], markers, end in inside):
            found[fault] = found.get(fault, []) + [begin + token for token in tokens]
    if (found.get("prompts supervised") or markers.turn is NEVER) and np.delete(supervised, starts).all():
        found |= {"everything supervised": [0], "prompts supervised": [], "headers supervised": []}
    found = padding | {fault: kept[sorted(at)] for fault, at in found.items() if at}
    return {fault: at for fault, at in found.items() if len(at)}


def judge_turns(text, supervised, markers, is_cut):
    """Yield `(fault, tokens)` for the turns in the ids of a conversation, by which tokens have labels, (T,).

    Args:
        text: the ids, as characters.
        is_cut: whether a boundary cuts off the rest of the last turn.
    """

    def find_labels(begin, end):
        return (begin + np.flatnonzero(supervised[begin:end])).tolist()

    turn, before, systems = None, [], set()  # control tokens between turns
    for found in markers.turn.finditer(text):
        begin, end = found.span()
        strays = [stray.start() for stray in markers.stray.finditer(text, begin, end)]
        if found["between"] is not None:
            if turn and found["forged"]:
                yield "forged turn", [end - 1]
            elif turn:
                yield "prompts supervised", find_labels(markers.between.match(text, begin, end).end(), end)
            before = strays if turn else []
            continue
        yield "boundary missing", before or [begin] * (found[0] in systems)
        systems |= {found[0]} if markers.system and found[0].startswith(markers.system) else set()
        yield "forged turn", [stray for stray in strays if stray < len(text) - 1]  # the last may end a text
        is_answer, words = found["header"] is not None, found.end("header")
        if turn and not turn["end"] and (turn["header"] or not is_answer or markers.ends_questions):
            yield "forged turn", [begin]
        elif is_answer:
            yield "headers supervised", find_labels(begin, words)
            labels = find_labels(words, end)
            yield "bare answers", [begin] * (not labels)
            yield "gap in an answer", [at for at in range(labels[0] if labels else end, end - 1) if not supervised[at]]
            if labels and found["end"] and labels[-1] < end - 1:
                yield "stop not supervised", [end - 1]
            if labels and not found["end"] and end == len(text) and not is_cut:
                yield "truncated answer", [end - 1]
        else:
            yield "prompts supervised", find_labels(begin, end)
        turn, before = found, []


def read_prepared(name):
    """Yield `(location, row)` of a file, or of a directory that `datasets` has saved."""
    files = sorted(Path(name).expanduser().rglob("data-*.arrow"))
    for file in files:
        try:
            yield from read_table(file, pyarrow.ipc.open_stream(pyarrow.memory_map(str(file))))
        except pyarrow.ArrowException as error:
            raise UserError(f"--audit {file}: cannot be read: {first_line(error)}") from error
    with rewrite_errors("--dataset", "--audit"):
        if not files and not find_files(name):
            raise UserError(f"--audit {name}: there is no such file")
        yield from () if files else read_rows(Source(name), None)


def print_audit(name, tokenizer, shown, as_json):
    """Judge the rows of a file; print `shown` rows of each fault, the counts of all, and what was not judged.

    Returns:
        The exit status: 1 if there are faults.
    """
    markers, left_out, why = load_markers(tokenizer)
    total, faults = Counter(rows=0, tokens=0, supervised=0), {}
    for location, row in read_prepared(name):
        total["rows"] += 1
        try:
            columns = parse_columns(row, len(tokenizer))
            found = judge(columns, markers)
            total["judged"] += 1
            total["unbounded"] += not columns.keys() & {"position_ids", "seq_lengths"}
            total["tokens"] += len(columns["labels"])
            total["supervised"] += int((columns["labels"][1:] != IGNORE).sum())
        except InvalidRow as problem:
            columns, found = {}, {f"invalid row, {problem.reason}": [0]}
        total.update(found.keys() & NOTES)
        found = {fault: at for fault, at in found.items() if fault not in left_out and fault not in NOTES}
        for fault, at in found.items():
            of = faults.setdefault(fault, {"rows": 0, "tokens": 0, "first": []})
            of |= {"rows": of["rows"] + 1, "tokens": of["tokens"] + len(at), "first": [*of["first"], location][:3]}
            if as_json:
                print(json.dumps({"location": location, "fault": fault, "token": int(at[0]), "tokens": len(at)}))
        new = [int(at[0]) for fault, at in found.items() if columns and faults[fault]["rows"] <= shown]
        if new and not as_json:
            print(f"--- {location}: {', '.join(f'{fault} (token {at[0]})' for fault, at in found.items())}")
            part = slice(max(0, new[0] - AROUND), new[0] + AROUND)
            example = Example(*(torch.tensor(columns[column][part]) for column in COLUMNS[:2]))
            print(preview(example, tokenizer, color=sys.stdout.isatty()))
    if not total["rows"]:
        raise UserError(f"--audit {name}: it has no rows")
    if "no turns" not in left_out and total["no turns"] == total["judged"] > 0:
        faults["no turns"] = {"rows": total.pop("no turns"), "tokens": total["tokens"], "first": [name]}
    not_judged = [f"{', '.join(fault for fault in FAULTS if fault in left_out)}: {why}"] * bool(left_out)
    not_judged += [note.format(total[key]) for key, note in NOTES.items() if total[key] and key not in left_out]
    print_summary(total, {fault: faults[fault] for fault in (*FAULTS, *faults) if fault in faults}, not_judged, as_json)
    return int(bool(faults))


def print_summary(total, faults, not_judged, as_json):
    """Print the counts of rows and tokens, of each fault, and what was not judged, for reading or as one object."""
    total = {each: total[each] for each in ("rows", "tokens", "supervised")}
    if as_json:
        print(json.dumps({**total, "faults": faults, "not_judged": not_judged}))
        return
    share = total["supervised"] / max(1, total["tokens"])
    print(f"{total['rows']:,} rows, {total['tokens']:,} tokens, {share:.1%} of them supervised")
    for fault, of in faults.items():
        first = ", ".join(of["first"]) + ", …" * (of["rows"] > len(of["first"]))
        print(f"{fault}: {of['rows']:,} rows, {of['tokens']:,} tokens ({first}): {FAULTS.get(fault, 'not judged')}")
    for each in not_judged:
        print(f"not judged: {each}")
    if not faults:
        print("no faults in what was judged")
