"""The formats that conversations are written in, and what a valid conversation is.

A conversation is a list of messages `{"role", "content", "train"}`; `train` says whether an assistant's message may be
supervised. An assistant's message may have `tool_calls`, as OpenAI writes them with arguments as an object, and its
reasoning as `thinking`; a tool's result the `name` of the tool and its `tool_call_id`; the first message the `tools` on
offer, as JSON schemas, and the row's own arguments of the chat template, `template_options`. Every row is checked,
and an invalid one is named by file and line.
"""

import functools
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

from config import UserError
from conversations.sources import InvalidRow, read_rows

ROLES = ("system", "user", "assistant", "tool")
SHOWN_PROBLEMS, SHOWN_LOCATIONS = 10, 3
# ShareGPT's names, and those of its many descendants.
ROLE_NAMES = {role: role for role in ROLES} | {"human": "user", "observation": "tool"}
ROLE_NAMES |= dict.fromkeys(("gpt", "chatgpt", "model", "bing", "bard", "function_call"), "assistant")
KEY_NAMES = {"from": "role", "value": "content"}
REASONING_KEYS = ("thinking", "reasoning_content", "reasoning")  # beside the content
MORE_KEYS = {  # of a message, by its role
    "assistant": ("tool_calls", *REASONING_KEYS, "name", "id"),
    "tool": ("name", "tool_call_id", "id"),
}
SYSTEM_KEYS = ("system", "system_prompt")  # beside the messages, in any format
CHAT_KEYS = (*SYSTEM_KEYS, "tools", "chat_template_kwargs")
# Keys that change what a row or a message means.
UNSUPPORTED = (
    "functions function_call tool_calls reasoning_content reasoning thinking history images videos audios".split()
)
NOT_PLAIN = {"tool_calls": "tools", "thinking": "reasoning"}
EMPTY = (None, False, "", "[]", "{}", [], {})
SWITCHES = "on off true false yes no enabled disabled auto none low medium high".split()
# The flags of axolotl, LLaMA-Factory, mistral-finetune, ms-swift, OpenAI, tinker, torchtune, verl and xtuner.
TRAIN_IF = dict.fromkeys(
    "train training trainable is_trainable weight loss loss_weight learn supervise supervised".split(), True
) | dict.fromkeys("masked is_masked ignore ignored no_loss".split(), False)
FLAG_TEXTS = {"true", "false", "0", "1", *ROLE_NAMES}
FLAG_NAME = re.compile(  # of others, which may mean either, as `mask` does, or a part, as axolotl's `train_detail` does
    r"(^|_|(?<=[a-z])(?=[A-Z]))(?i:(no|un)?(train(able|ed|ing)?|loss|mask(ed|ing)?|weight(s|ed)?|learn(able)?|"
    r"supervis(ed|ion)|grad|backprop))(?=_|$|[A-Z])|^(is_)?((skip|exclude|ignore|include|keep)d?|context_only)$"
)
# The keys of shapes that are not read, and what to do.
QUESTION_KEYS = "prompt question query problem instruction input inputs user human".split()
ANSWER_KEYS = "completion response answer output outputs target targets solution assistant gpt".split()
SHAPES = dict.fromkeys(
    "conversation dialog dialogue chat turns items".split(),
    'use --columns messages={}, if it is a list of objects with "role" and "content"',
) | {
    "rejected": "these are preferences; to train on the chosen answers alone, --columns messages=chosen if it is a "
    'list of messages, or --columns completion=chosen if it is the answer to a "prompt"',
    "input_ids": 'it needs "labels", -100 where a token is not supervised; or name the conversations',
}


@dataclass
class ReadReport:
    """A report of what reading some rows found."""

    rows: int = 0
    formats: Counter = field(default_factory=Counter)
    ignored: set = field(default_factory=set)  # columns and keys that no format uses
    found: set = field(default_factory=set)  # columns that rows had, and that were to be dropped or renamed
    bad: Counter = field(default_factory=Counter)  # invalid rows, by reason
    locations: dict = field(default_factory=dict)  # of each reason the first few: (file:line, where in the row)

    def notes(self):
        """Lines about the rows that were read, for the plan."""
        formats = ", ".join(f"{count:,} as {name}" for name, count in self.formats.most_common())
        yield f"{self.rows:,} rows, {formats}"
        if self.ignored:
            yield f"not used: {', '.join(sorted(self.ignored))}"
        if self.bad:
            reasons = "; ".join(f"{count:,} × {reason}" for reason, count in self.bad.most_common())
            yield f"{self.bad.total():,} rows left out ({reasons})"

    def absent_columns(self, drop, columns):
        """Lines about the columns to be dropped or renamed that no row had."""
        renamed = {old: f"{new}={old}" for old, new in columns.items()}
        for flag, wanted in (("--drop-columns", dict(zip(drop, drop, strict=True))), ("--columns", renamed)):
            if absent := [text for name, text in wanted.items() if name not in self.found]:
                yield f"{flag} {' '.join(absent)}: no row has such a column"

    def add_bad_row(self, problem, location):
        """Count a row with an `InvalidRow`."""
        self.bad[problem.reason] += 1
        if self.bad[problem.reason] <= SHOWN_LOCATIONS:
            self.locations.setdefault(problem.reason, []).append((location, problem.where))

    def describe(self, reason):
        """A line about a reason: its only row, or the number of rows and the first of them."""
        count, places = self.bad[reason], self.locations[reason]
        if count == 1:
            return ": ".join(filter(None, (*places[0], reason)))
        shown = ", ".join(f"{location} ({where})" if where else location for location, where in places)
        return f"{count:,} × {reason}: {shown}{', …' if count > len(places) else ''}"

    def check(self, skip_bad_rows):
        """Raise `UserError` if more rows are invalid than the share that may be left out."""
        count = self.bad.total()
        if count <= round(skip_bad_rows * self.rows, 9):
            return
        share = math.ceil(100 * count / self.rows) / 100  # that would do
        advice = f", or leave out such rows with --skip-bad-rows {share:g}" if share < 1 else ""
        problems = [self.describe(reason) for reason in self.bad]
        if count == 1 and not skip_bad_rows:
            raise UserError(f"{problems[0]}; correct that row{advice}")
        limit = f", more than --skip-bad-rows {skip_bad_rows:g}" if skip_bad_rows else ""
        summary = f"{count:,} of {self.rows:,} rows are invalid{limit}; correct them{advice}"
        if more := sum(list(self.bad.values())[SHOWN_PROBLEMS:]):
            problems[SHOWN_PROBLEMS:] = [f"… and {more:,} more"]
        separator = ": " if len(problems) == 1 and count == self.rows else "\n  "
        raise UserError(separator.join([summary, *problems]))


class Reading(NamedTuple):
    """How rows are read."""

    split: str = "train"  # of a Hub dataset that names none
    max_examples: int = 0  # stop after so many rows; 0: all
    skip_bad_rows: float = 0.0  # the share of rows that may be left out
    plain: bool = False  # refuse tools, reasoning and arguments of a template, for which ChatML has no place
    drop: tuple = ()  # the columns without which the rows are read
    columns: Mapping = MappingProxyType({})  # new names of columns, by the names they have
    vocabulary: float = math.inf  # the number of token ids, for rows of them


def read_conversations(sources, report=None, **options):
    """Yield `(location, number of its source, messages)` for each row of some `Source`s, checked; options: `Reading`'s.

    A `ReadReport` is filled, and it is checked once all rows have been read.
    """
    report, reading = ReadReport() if report is None else report, Reading(**options)
    numbered = ((number, row) for number, source in enumerate(sources) for row in read_rows(source, reading.split))
    for number, (location, row) in itertools.islice(numbered, reading.max_examples or None):
        report.rows += 1
        try:
            messages = parse_row(select_columns(row, reading, report.found), report, reading)
        except InvalidRow as problem:
            report.add_bad_row(problem, location)
        else:
            yield location, number, messages
    report.check(reading.skip_bad_rows)
    if report.rows == report.bad.total():
        names = " ".join(source.name for source in sources)
        raise UserError(f"--dataset {names}: it has no valid conversations")


# --- a row


def parse_columns(texts):
    """The new names of columns by those they have, a dict, from `new=old`; `UserError` where that is not clear."""
    columns, known = {}, sorted(set().union(*(keys + more for _, keys, more, _ in FORMATS)))
    for text in texts:
        new, _, old = text.partition("=")
        if not old or new not in known:
            names = f"it is new=old, such as prompt=question, and the new names are {', '.join(known)}"
            raise UserError(f"--columns {text}: {names}")
        if old in columns or new in columns.values():
            raise UserError(f"--columns {text}: {old if old in columns else new} is named twice; name each once")
        columns[old] = new
    return columns


def select_columns(row, reading, found):
    """A row without some columns, and with other names for some, which no other column of it may have."""
    drop, columns = reading.drop, reading.columns
    if not isinstance(row, dict) or not (chosen := row.keys() & {*drop, *columns}):
        return row
    found |= chosen
    renamed = {columns[name]: row[name] for name in row if name in columns and name not in drop}
    rest = {name: value for name, value in row.items() if name not in chosen}
    for name in renamed.keys() & rest.keys():
        if rest[name] not in EMPTY:
            raise InvalidRow(f'--columns: it has a "{name}" already; --drop-columns {name}')
    return rest | renamed


def parse_row(row, report, reading):
    """The messages of a row in any known format; `InvalidRow` if it has none, or nothing that can be supervised."""
    if isinstance(row, InvalidRow):
        raise row
    if not isinstance(row, dict):
        raise InvalidRow("not a JSON object")
    given, row = row, {name: value for name, value in row.items() if value is not None}  # None: an empty cell
    name, keys, more, parse = next((entry for entry in FORMATS if row.keys() >= {*entry[1]}), FORMATS[-1])
    if name == "text":  # which beside a known shape is not what the row is about
        explain_format(row, given)
    unused = {key: value for key, value in row.items() if key not in keys and key not in more}
    check_columns(row, unused)
    if ignored := unused.keys() & {*reading.columns.values()}:
        advice = f"--drop-columns {' '.join(keys)}"
        raise InvalidRow(f'--columns: "{min(ignored)}" is not read where the row is one of {name}; {advice}')
    messages = parse(row, report)
    if name not in ("text", "tokens"):
        messages = parse_chat(messages, row, reading.plain)
    elif name == "tokens" and not 0 <= min(messages[0]["content"]) <= max(messages[0]["content"]) < reading.vocabulary:
        raise InvalidRow(f"a token id is not from 0 to {reading.vocabulary - 1}, as the tokenizer's are")
    report.formats[name] += 1
    report.ignored |= unused.keys()
    return messages


def explain_format(row, given):
    """Raise `InvalidRow` for a row in no format, with what to do if its shape is a known one; a text may be read.

    `given` is the row with its empty cells.
    """
    for _, keys, _, _ in FORMATS:
        if given.keys() >= {*keys} and row.keys() & {*keys} and (missing := {*keys} - row.keys()):
            raise InvalidRow("its content is empty", f'"{min(missing)}"')
    texts = [key for key, value in row.items() if isinstance(value, str)]
    question, answer = (next((key for key in keys if key in texts), "") for keys in (QUESTION_KEYS, ANSWER_KEYS))
    if question and answer:
        names = {question: "instruction", "context": "input", answer: "output"}  # Alpaca's
        advice = " ".join(f"{new}={old}" for old, new in names.items() if old in row and old != new)
        raise InvalidRow(f'no known format: it has "{question}" and "{answer}"; use --columns {advice}')
    for key, advice in SHAPES.items():
        if key in row:
            raise InvalidRow(f'no known format: it has "{key}"; {advice.format(key)}')
    if "text" not in row:
        known = ", ".join("+".join(keys) for _, keys, _, _ in FORMATS)
        raise InvalidRow(f"no known format: it has none of {known}", f"keys {', '.join(row)}"[:80] if row else "")


def check_columns(row, unused):
    """Raise `InvalidRow` for a column that cannot be read, or without which the row would mean something else."""
    for name, value in row.items():
        if isinstance(value, InvalidRow):
            raise InvalidRow(f"{value.reason}; correct it, or --drop-columns {name}", f'"{name}"')
    check_supported(unused)
    for name, value in unused.items():
        text = str(value).lower()
        if not parse_train({name: value}) or (name in ("label", "kto_tag") and text == "false"):  # for KTO
            problem = f'"{name}": {text}, which says that the completion is not wanted'
            raise InvalidRow(f"{problem}; remove the row, or --drop-columns {name}")


def check_supported(unused, where=""):
    """Raise `InvalidRow` for a key without which a row or message would mean something else, unless it is empty."""
    for name in filter(unused.__contains__, UNSUPPORTED):
        value = unused[name]
        is_switch = name in REASONING_KEYS and str(value).lower() in SWITCHES  # of a dataset, and not the reasoning
        if value not in EMPTY and not is_switch:
            advice = "write it into the content, or remove it" + f" (--drop-columns {name})" * (not where)
            raise InvalidRow(f'"{name}" is not supported; {advice}', where)


def parse_train(given, where=""):
    """Whether the flags of a message, a part of one or a row let it be supervised; `InvalidRow` if they are unclear."""
    flags = {}
    for name in filter(is_flag, given):
        value = given[name]
        if name in TRAIN_IF and value in (0, 1):  # False and True are these too
            flags[name] = bool(value) == TRAIN_IF[name]
        elif name in TRAIN_IF or not isinstance(value, str) or value.lower() in FLAG_TEXTS:
            advice = 'write "train": true or false, or remove it' + f" (--drop-columns {name})" * (not where)
            raise InvalidRow(f'"{name}" does not tell clearly whether to train on it; {advice}', where)
    if len(set(flags.values())) > 1:
        raise InvalidRow(f"{' and '.join(flags)} contradict each other", where)
    return all(flags.values())


@functools.lru_cache(10_000)  # as all rows have the same few keys
def is_flag(name):
    """Whether a key is named like a flag of training."""
    return name in TRAIN_IF or bool(FLAG_NAME.search(name))


# --- a conversation


def parse_chat(messages, row, plain):
    """Messages with the system text, the tools and the arguments of the template that a row has beside them."""
    tools, options = parse_tools(row), parse_column(row, "chat_template_kwargs", dict, "a JSON object")
    options = {name: item for name, item in options.items() if item not in (None, "", [], {})}  # as tables fill it
    if any(message["role"] == "tool" or "tool_calls" in message for message in messages):
        match_results_to_calls(messages, tools)
    if plain:
        check_plain(messages, tools, options)
    messages = place_system_text(messages, row)
    trained = [message["train"] for message in messages if message["role"] == "assistant"]
    if not trained:
        raise InvalidRow("no message is the assistant's: nothing would be supervised")
    if not any(trained):
        raise InvalidRow("every message of the assistant's is excluded from training")
    messages[0] |= {key: value for key, value in (("tools", tools), ("template_options", options)) if value}
    return messages


def check_plain(messages, tools, options):
    """Raise `InvalidRow` for what ChatML has no place for."""
    found = [(name, "") for name, value in (("tools", tools), ("chat_template_kwargs", options)) if value]
    for number, message in enumerate(messages, 1):
        found += [(NOT_PLAIN[key], f"message {number}") for key in NOT_PLAIN if key in message]
    if found:
        what, where = found[0]
        advice = "use --chat-template model, or a file, with a template that has it, or write it into the content"
        also = "" if where else f", or --drop-columns {what}"
        raise InvalidRow(f"--chat-template chatml has no {what}; {advice}{also}", where)


def place_system_text(messages, row):
    """The messages, without empty system messages, after the system text beside them, if that is not among them."""
    messages = [message for message in messages if message["role"] != "system" or message["content"].strip()]
    given = [parse_text(row[key], f'"{key}"', may_be_empty=True) for key in SYSTEM_KEYS if row.get(key) not in EMPTY]
    texts = {text.strip(): text for text in given if text.strip()}
    among = {message["content"].strip() for message in messages if message["role"] == "system"}
    if len(texts) > 1 or (among and texts.keys() - among):
        raise InvalidRow("different system texts beside the messages, or beside and among them")
    system = [{"role": "system", "content": text, "train": True} for text in texts.values()]
    return messages if among else system + messages


def match_results_to_calls(messages, tools):
    """Name the tool of each result; raise `InvalidRow` for a call to no tool, or a result without a call."""
    known = {tool["function"]["name"] for tool in tools}
    has_calls, open_calls = any("tool_calls" in message for message in messages), []
    for number, message in enumerate(messages, 1):
        if message["role"] != "tool":
            open_calls = list(message.get("tool_calls", ()))
            for name in [call["function"]["name"] for call in open_calls]:
                if known and name not in known:
                    raise InvalidRow("a call to a tool that is not among its tools", f"message {number}, {name!r:.40}")
        elif has_calls or "tool_call_id" in message:
            identity, name = message.get("tool_call_id"), message.get("name")
            answered = [call for call in open_calls if identity in (None, call.get("id", identity))]
            answered = [call for call in answered if name in (None, call["function"]["name"])]
            if not answered:
                raise InvalidRow("a tool's result without a call that it answers", f"message {number}")
            open_calls.remove(answered[0])
            message["name"] = answered[0]["function"]["name"]


# --- a message


def parse_messages(row, report, key="messages"):
    """Messages with `role` and `content`, or with ShareGPT's `from` and `value`."""
    if isinstance(row[key], str):
        raise InvalidRow(f'"{key}" is a string, not a list of messages; if it is JSON, decode it')
    if not isinstance(row[key], list) or not row[key]:
        raise InvalidRow(f'"{key}" is not a list of messages')
    messages = []
    for number, given in enumerate(row[key], 1):
        message, unused = parse_message(given, f"message {number}")
        messages.append(message)
        if unused:
            report.ignored.update(f"{key}[].{name}" for name in unused)
    return messages


def parse_message(given, where):
    """A message, and the keys it has that are not used."""
    if not isinstance(given, dict):
        raise InvalidRow("not an object with a role and a content", where)
    if not {"role", "content"} <= given.keys() or None in given.values():
        names = {old: new for old, new in KEY_NAMES.items() if given.get(new) is None}
        given = {names.get(name, name): value for name, value in given.items() if value is not None}
    if "role" not in given:
        raise InvalidRow('no "role"', where)
    role = ROLE_NAMES.get(str(given["role"]))
    if role is None:
        raise InvalidRow(f"an unknown role (known: {', '.join(ROLES)})", f"{where}, {given['role']!r:.40}")
    if given["role"] == "function_call":  # ShareGPT's: a call in place of a content
        given = {**given, "content": "", "tool_calls": given.get("content")}
    flags, beside, unused = sort_keys(role, *given)
    train = parse_train({key: given[key] for key in flags}, where) if flags else True
    check_supported({key: given[key] for key in unused}, where)
    more = parse_more({key: given[key] for key in beside if given[key] not in EMPTY}, role, where) if beside else {}
    if "content" not in given and not more and role != "system":
        raise InvalidRow("no content", where)
    may_be_empty = role == "system" or bool(more.keys() & {"tool_calls", "thinking", "tool_call_id"})
    content = parse_text(given.get("content", ""), where, may_be_empty=may_be_empty)
    return {"role": role, "content": content, "train": train, **more}, unused


@functools.lru_cache(10_000)  # as all messages have the same few keys
def sort_keys(role, *names):
    """The keys of a message that are flags of training, those that stand beside its content, and those not used."""
    beside = [name for name in names if name in MORE_KEYS.get(role, ())]
    unused = [name for name in names if name not in ("role", "content", *beside, *TRAIN_IF)]
    return [name for name in names if is_flag(name)], beside, unused


def parse_more(given, role, where):
    """What a message has beside its content: tool calls and reasoning, or the call whose result it is."""
    more = {}
    if role == "tool":
        more = {key: parse_text(given[key], where, f'"{key}"') for key in ("name", "tool_call_id") if key in given}
    if role == "assistant":
        reasoning = [given[key] for key in REASONING_KEYS if key in given]
        if any(text != reasoning[0] for text in reasoning):
            raise InvalidRow(f"more than one of {', '.join(REASONING_KEYS)}", where)
        if reasoning:
            more["thinking"] = parse_text(reasoning[0], where, "its reasoning")
        if "tool_calls" in given:
            calls = parse_json_value(given["tool_calls"], "its tool call", where)
            calls = calls if isinstance(calls, list) else [calls]
            more["tool_calls"] = [parse_tool_call(call, where) for call in calls]
    return more


def parse_text(content, where, what="its content", may_be_empty=False):
    """A content as a string: a string, or a list of text parts, joined."""
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        if len(texts) < len(content) or not all(isinstance(text, str) for text in texts):
            raise InvalidRow(f'{what} has parts that are not {{"type": "text", "text": …}}', where)
        if not all(parse_train(part, where) for part in content):
            raise InvalidRow(f"{what} has a part that is not to be trained on, which only a message can be", where)
        content = "".join(texts)
    if not isinstance(content, str):
        raise InvalidRow(f"{what} is not a string", where)
    if not (may_be_empty or content.strip()):
        raise InvalidRow(f"{what} is empty", where)
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise InvalidRow(f"{what} has half a surrogate pair, which is not valid Unicode", where) from error
    return content


# --- tools


def parse_column(row, name, kind, kind_name):
    """The JSON list or object that a row may have in a column, as it is or as JSON text; an empty one for none."""
    value = kind() if row.get(name) in EMPTY else parse_json_value(row[name], f'"{name}"', "")
    if not isinstance(value, kind):
        raise InvalidRow(f'"{name}" is not {kind_name}')
    return value


def parse_json_value(value, what, where):
    """A JSON value that may be written as JSON text."""
    try:
        value = json.loads(value) if isinstance(value, str) else value
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        detail = f": {error}" if isinstance(error, TypeError) else ""  # of a date or the like, from a table
        raise InvalidRow(f"{what} is not valid JSON{detail}", where) from error
    return value


def parse_function(value, problem, where):
    """The function in a tool or a call, of OpenAI's form or by itself: an object with a name."""
    function = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"].strip():
        raise InvalidRow(problem, where)
    return function


def parse_tool_call(call, where):
    """A tool call as OpenAI writes it, from one of OpenAI's or of name and arguments alone."""
    function = parse_function(call, "a tool call without a name", where)
    arguments = function.get("arguments", function.get("parameters")) or {}
    arguments = parse_json_value(arguments, "the text of its arguments", where)
    if not isinstance(arguments, dict):
        raise InvalidRow("the arguments of a tool call are not a JSON object", where)
    identity = {"id": call["id"]} if isinstance(call.get("id"), str) and call["id"] else {}
    return {"type": "function", **identity, "function": {"name": function["name"], "arguments": arguments}}


def parse_tools(row):
    """The tools on offer in a row, as JSON schemas in OpenAI's form; empty where there are none."""
    tools = parse_column(row, "tools", list, "a list of tools")
    problem = "not an object with the name of a function"
    functions = [parse_function(tool, problem, f"tool {number}") for number, tool in enumerate(tools, 1)]
    return [{"type": "function", "function": function} for function in functions]


# --- the formats


def parse_texts(row, _report, **roles):
    """Messages of the texts that a row has in some columns, by their roles."""
    return [{"role": role, "content": parse_text(row[key], f'"{key}"'), "train": True} for key, role in roles.items()]


def parse_prompt_and_completion(row, report):
    """A prompt and its completion, as strings or as messages; only the completion is supervised."""
    kinds = {type(row["prompt"]), type(row["completion"])}
    if kinds == {str}:
        return parse_texts(row, report, prompt="user", completion="assistant")
    if kinds != {list}:
        raise InvalidRow('"prompt" and "completion" are not both strings, or both lists of messages')
    prompt, completion = (parse_messages(row, report, key) for key in ("prompt", "completion"))
    return [{**message, "train": False} for message in prompt] + completion


def parse_alpaca(row, report):
    """Alpaca: an instruction, perhaps with an input, and the output."""
    parts = [row["instruction"], row.get("input", "")]
    if not all(isinstance(part, str) for part in parts):
        raise InvalidRow('"instruction" or "input" is not a string')
    question = "\n\n".join(part for part in parts if part.strip())
    return parse_texts({**row, "instruction": question}, report, instruction="user", output="assistant")


def parse_tokens(row, _report):
    """Token ids with their labels, as others have made them; right padding is cut off."""
    ids, labels, mask = (row.get(key) for key in ("input_ids", "labels", "attention_mask"))
    mask = [1] * len(ids) if mask is None and isinstance(ids, list) else mask
    for key, value in (("input_ids", ids), ("labels", labels), ("attention_mask", mask)):
        if not isinstance(value, list) or not all(type(number) is int for number in value):
            raise InvalidRow(f'"{key}" is not a list of integers')
        if len(value) != len(ids):
            raise InvalidRow(f'"{key}" and "input_ids" have different lengths')
    length = sum(number == 1 for number in mask)
    if mask != [1] * length + [0] * (len(mask) - length):
        raise InvalidRow('"attention_mask" is not 1 for all tokens, nor 0 for padding at the end alone')
    ids, labels = ids[:length], labels[:length]
    if any(label not in (-100, number) for number, label in zip(ids, labels, strict=True)):
        advice = "; they are not shifted here" if labels[:-1] == ids[1:] else ""
        raise InvalidRow(f'a label is neither -100 nor the token at its place in "input_ids"{advice}')
    if all(label == -100 for label in labels[1:]):
        raise InvalidRow("no label of a token after the first: nothing would be supervised")
    return [{"role": "tokens", "content": ids, "labels": labels}]


# The name of each format, the keys by which it is known, its other keys, and its parser.
FORMATS = (
    ("messages", ("messages",), CHAT_KEYS, parse_messages),
    ("ShareGPT", ("conversations",), CHAT_KEYS, functools.partial(parse_messages, key="conversations")),
    ("prompt/completion", ("prompt", "completion"), CHAT_KEYS, parse_prompt_and_completion),
    ("Alpaca", ("instruction", "output"), ("input", *CHAT_KEYS), parse_alpaca),
    ("tokens", ("input_ids", "labels"), ("attention_mask",), parse_tokens),
    ("text", ("text",), (), functools.partial(parse_texts, text="text")),
)
