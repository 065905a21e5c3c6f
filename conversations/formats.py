"""The formats that conversations are written in, and what a valid conversation is.

A conversation is a list of messages `{"role", "content", "train"}`; `train` says whether an assistant's message may be
supervised. An assistant's message may have `tool_calls`, as OpenAI writes them with arguments as an object, and its
`thinking`; a tool's result the `name` of the tool and its `tool_call_id`; the first message the `tools` on offer, as
JSON schemas. Every row is checked before anything is tokenised, and an invalid one is named by file and line.
"""

import json
import math
import re
from collections import Counter
from dataclasses import dataclass, field

from config import UserError
from conversations.sources import InvalidRow, Source, is_message, rows_of

ROLES = ("system", "user", "assistant", "tool")
SHOWN_PROBLEMS, SHOWN_LOCATIONS = 10, 3
# Who speaks, as ShareGPT's many descendants call them.
SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant"}
SPEAKERS |= {"model": "assistant", "bing": "assistant", "bard": "assistant", "system": "system"}
SPEAKERS |= {"tool": "tool", "observation": "tool", "function_call": "assistant"}
THOUGHTS = ("thinking", "reasoning_content", "reasoning")  # beside the content
NAME = re.compile(r"[\w.:/-]+")  # of a tool: with a space or bracket in it, it could be read as something else


@dataclass
class Findings:
    """A report of what reading some rows found."""

    rows: int = 0
    formats: Counter = field(default_factory=Counter)
    ignored: Counter = field(default_factory=Counter)  # columns and keys that no format uses
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

    def add_bad_row(self, reason, location, where=""):
        """Count an invalid row; `where` is the place in the row, such as its message."""
        self.bad[reason] += 1
        if self.bad[reason] <= SHOWN_LOCATIONS:
            self.locations.setdefault(reason, []).append((location, where))

    def problems(self):
        """A line for each reason: its only row, or the number of rows and the first of them."""
        for reason, places in self.locations.items():
            count = self.bad[reason]
            if count == 1:
                yield ": ".join(filter(None, (*places[0], reason)))
                continue
            shown = ", ".join(f"{location} ({where})" if where else location for location, where in places)
            yield f"{count:,} × {reason}: {shown}{', …' if count > len(places) else ''}"

    def check(self, skip_bad_rows):
        """Raise `UserError` if more rows are invalid than the share that may be left out."""
        count = self.bad.total()
        if count <= round(skip_bad_rows * self.rows, 9):
            return
        share = math.ceil(100 * count / self.rows) / 100  # that would do
        flag = "--skip-bad-rows" if share <= 0.1 and not skip_bad_rows else f"--skip-bad-rows {share:g}"
        problems = list(self.problems())
        if count == 1 and not skip_bad_rows:
            advice = f", or leave it out with {flag}" if share < 1 else ""
            raise UserError(f"{problems[0]}; correct that row{advice}")
        allowed = f"more than --skip-bad-rows {skip_bad_rows:g}; " if skip_bad_rows else ""
        allowed += f"{flag} leaves them out" if share < 1 else "correct them"
        more = sum(list(self.bad.values())[SHOWN_PROBLEMS:])
        lines = [f"{count:,} of {self.rows:,} rows are invalid; {allowed}", *problems[:SHOWN_PROBLEMS]]
        raise UserError("\n  ".join(lines + ([f"… and {more:,} more"] if more else [])))


def read_conversations(sources, split="train", max_examples=0, skip_bad_rows=0.0, plain=False, findings=None):
    """Yield `(location, number of its source, messages)` for each row of some sources, checked.

    Args:
        sources: a list of `Source`.
        max_examples: stop after so many rows; 0: all.
        skip_bad_rows: the share of rows that may be left out; 0: none.
        plain: refuse tools and thoughts, for which ChatML has no place.
        findings: a `Findings` to fill.

    Raises:
        UserError: no such source, nothing in it, or (at the end, once all rows have been read) rows that are not
            conversations: the first ten reasons, with their number of rows and the first locations.
    """
    findings = Findings() if findings is None else findings
    for number, source in enumerate(sources):
        for location, row in rows_of(source, split):
            if max_examples and findings.rows == max_examples:
                break
            findings.rows += 1
            try:
                messages = conversation_of(row, findings)
                if plain:
                    refuse_tools_and_thoughts(messages)
            except InvalidRow as problem:
                findings.add_bad_row(problem.reason, location, problem.where)
            else:
                yield location, number, messages
    findings.check(skip_bad_rows)
    if findings.rows == findings.bad.total():
        names = " ".join(source.name for source in sources)
        raise UserError(f"--dataset {names}: it has no valid conversations")


def read_file(path, **options):
    """All conversations of one file, as a list: `read_conversations` without locations and sources."""
    return [messages for _, _, messages in read_conversations([Source(str(path))], **options)]


def conversation_of(row, findings):
    """The messages of a row in any known format, checked.

    Raises:
        InvalidRow: it is not a conversation, or has nothing to train.
    """
    if isinstance(row, InvalidRow):
        raise row
    if isinstance(row, list) and row and is_message(row[0]):
        row = {"messages" if "role" in row[0] else "conversations": row}
    if not isinstance(row, dict):
        raise InvalidRow("not a JSON object")
    row = {name: value for name, value in row.items() if value is not None}  # a table's way to leave a key out
    name, keys, read = next((entry for entry in FORMATS if set(entry[1]) <= row.keys()), (None, (), None))
    if name is None:
        known = ", ".join("+".join(keys) for _, keys, _ in FORMATS)
        raise InvalidRow(f"no known format: it has none of {known}", f"keys {', '.join(row)}"[:80] if row else "")
    read_keys = {*keys, *SYSTEM, *TOOLS, *OPTIONAL.get(name, ())}
    refuse_unsupported(row.keys() - read_keys, row)
    system, messages, tools = system_message(row), read(row, findings), tools_of(row)
    refuse_unmatched_calls(messages, tools)
    if system and any(message["role"] == "system" for message in messages):
        raise InvalidRow('a "system" beside the messages, and a system message among them')
    messages = system + messages
    replies = [message for message in messages if message["role"] == "assistant"]
    if not replies:
        raise InvalidRow("no message is the assistant's: nothing would be supervised")
    if not any(message["train"] for message in replies):
        raise InvalidRow("every message of the assistant's is excluded from training")
    if tools:
        messages[0] = {**messages[0], "tools": tools}
    findings.formats[name] += 1
    findings.ignored.update(row.keys() - read_keys)
    return messages


def refuse_unsupported(names, values, where=""):
    """Raise `InvalidRow` for a key without which a row or message would mean something else, unless it is empty."""
    for name in UNSUPPORTED:
        if name in names and values[name] not in EMPTY:
            raise InvalidRow(f'"{name}" is not supported; write it into the content, or remove it', where)


def system_message(row):
    """The system message that some formats write beside the messages, in a list; empty where there is none."""
    texts = [row[name] for name in SYSTEM if row.get(name) not in EMPTY]
    return messages_of(*(("system", "system", text) for text in texts[:1]))


def read_messages(row, findings, key="messages", roles=None, names=("role", "content")):
    """Messages as role and content, or as they are called in `names`, with roles as they are called in `roles`."""
    if isinstance(row[key], str):
        raise InvalidRow(f'"{key}" is a text, not a list of messages; if it is JSON, decode it')
    if not isinstance(row[key], list) or not row[key]:
        raise InvalidRow(f'"{key}" is not a list of messages')
    role_key, content_key = names
    messages = []
    for number, given in enumerate(row[key], 1):
        where = f"message {number}"
        if not isinstance(given, dict):
            raise InvalidRow("not an object with a role and a content", where)
        nulls = {name for name, value in given.items() if value is None}
        given = {name: value for name, value in given.items() if value is not None}
        if role_key not in given:
            advice = '; with "from" and "value" the key is "conversations"' if "from" in given else ""
            raise InvalidRow(f'no "{role_key}"{advice}', where)
        role = given[role_key] if roles is None or not isinstance(given[role_key], str) else roles.get(given[role_key])
        if roles is None and role == "function":  # OpenAI's, before there were tools
            role = "tool"
        if role not in ROLES:
            known = ", ".join(ROLES if roles is None else roles)
            raise InvalidRow(f"an unknown {role_key} (known: {known})", f"{where}, {given[role_key]!r:.40}")
        refuse_unsupported(given.keys() - (OF_A_MESSAGE if role == "assistant" else ()), given, where)
        more = read_more(given, role, where)
        content = given.get(content_key)
        if roles and given[role_key] == "function_call":
            more, content = {**more, "tool_calls": calls_of(content, where)}, ""
        if content is None and not more:
            raise InvalidRow("its content is null" if content_key in nulls else f'no "{content_key}"', where)
        may_be_empty = bool(more.keys() & {"tool_calls", "thinking", "tool_call_id"})
        message = {"role": role, "content": text_of("" if content is None else content, where, may_be_empty)}
        messages.append({**message, "train": is_trained(given, where), **more})
        used = {role_key, content_key, "train", "weight", *(OF_A_MESSAGE if role in ("assistant", "tool") else ())}
        findings.ignored.update(f"{key}[].{name}" for name in given.keys() - used)
    return messages


def read_more(given, role, where):
    """What a message may have beside its content: tool calls and a thought, or whose result it is."""
    more = {}
    for key in ("name", "tool_call_id") if role == "tool" else ():
        if given.get(key) not in EMPTY:
            more[key] = text_of(given[key], where, what=f'"{key}"')
    if "name" in more and not NAME.fullmatch(more["name"]):
        raise InvalidRow("the name of a tool may have letters, digits and . _ - : / only", where)
    if role != "assistant":
        return more
    thoughts = [given[key] for key in THOUGHTS if given.get(key) not in EMPTY]
    if any(thought != thoughts[0] for thought in thoughts):
        raise InvalidRow(f"more than one of {', '.join(THOUGHTS)}", where)
    if thoughts:
        more["thinking"] = text_of(thoughts[0], where, what="its thought")
    calls = [given[key] for key in ("tool_calls", "function_call") if given.get(key) not in EMPTY]
    if calls:
        more["tool_calls"] = calls_of(calls[0], where)
    return more


def parsed(value, what, where):
    """A JSON value that may be written as JSON text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise InvalidRow(f"{what} is not JSON", where) from error
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise InvalidRow(f"{what} has something that is not valid JSON", where) from error
    return value


def calls_of(value, where):
    """Tool calls as OpenAI writes them, from a call or a list of calls, of OpenAI's or of name and arguments alone."""
    calls = parsed(value, "its tool call", where)
    found = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise InvalidRow("a tool call without a name", where)
        name, arguments = function["name"], function.get("arguments", function.get("parameters"))
        if not NAME.fullmatch(name):
            raise InvalidRow("the name of a tool may have letters, digits and . _ - : / only", where)
        arguments = {} if arguments in (None, "") else parsed(arguments, "the text of its arguments", where)
        if not isinstance(arguments, dict):
            raise InvalidRow("the arguments of a tool call are not a JSON object", where)
        identity = {"id": call["id"]} if isinstance(call.get("id"), str) and call["id"] else {}
        found.append({"type": "function", **identity, "function": {"name": name, "arguments": arguments}})
    return found


def tools_of(row):
    """The tools on offer, as JSON schemas in OpenAI's form; empty where there are none."""
    key = next((key for key in TOOLS if row.get(key) not in EMPTY), None)
    tools = [] if key is None else parsed(row[key], f'"{key}"', "")
    if not isinstance(tools, list):
        raise InvalidRow(f'"{key}" is not a list of tools')
    found = []
    for number, tool in enumerate(tools, 1):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise InvalidRow("not an object with the name of a function", f"tool {number}")
        if not NAME.fullmatch(function["name"]):
            raise InvalidRow("the name of a tool may have letters, digits and . _ - : / only", f"tool {number}")
        found.append({"type": "function", "function": function})
    return found


def refuse_unmatched_calls(messages, tools):
    """Name the tool of each result; raise `InvalidRow` for a call to no tool, or a result without a call."""
    known = {tool["function"]["name"] for tool in tools}
    has_calls, open_calls = any("tool_calls" in message for message in messages), []
    for number, message in enumerate(messages, 1):
        where = f"message {number}"
        for call in message.get("tool_calls", []):
            if known and call["function"]["name"] not in known:
                where = f"{where}, {call['function']['name']!r:.40}"
                raise InvalidRow("a call to a tool that is not among its tools", where)
        if message["role"] != "tool":
            open_calls = list(message.get("tool_calls", []))
        elif has_calls or "tool_call_id" in message:
            identity, name = message.get("tool_call_id"), message.get("name")
            fits = [
                call
                for call in open_calls
                if identity in (None, call.get("id", identity)) and name in (None, call["function"]["name"])
            ]
            if not fits:
                raise InvalidRow("a tool's result without a call that it answers", where)
            open_calls.remove(fits[0])
            message["name"] = fits[0]["function"]["name"]


def refuse_tools_and_thoughts(messages):
    """Raise `InvalidRow` for what ChatML has no place for."""
    advice = "use --chat-template model, or a file, with a template that has them, or write them into the content"
    if "tools" in messages[0]:
        raise InvalidRow(f"--chat-template chatml has no tools; {advice}")
    for number, message in enumerate(messages, 1):
        if "tool_calls" in message:
            raise InvalidRow(f"--chat-template chatml has no tools; {advice}", f"message {number}")
        if "thinking" in message:
            raise InvalidRow(f"--chat-template chatml has no thoughts; {advice}", f"message {number}")


def text_of(content, where, may_be_empty=False, what="its content"):
    """A content as text: a string, or a list of text parts, joined."""
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        if len(texts) < len(content) or not all(isinstance(text, str) for text in texts):
            raise InvalidRow(f'{what} has parts that are not {{"type": "text", "text": …}}', where)
        content = "".join(texts)
    if not isinstance(content, str):
        raise InvalidRow(f"{what} is not a text", where)
    if not (may_be_empty or content.strip()):
        raise InvalidRow(f"{what} is empty", where)
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise InvalidRow(f"{what} has half a surrogate pair, which is not valid Unicode", where) from error
    return content


def is_trained(message, where):
    """Whether a message may be supervised: `"train"`, or OpenAI's `"weight"` of 0 or 1."""
    trained = message.get("train", message.get("weight", True))
    if trained not in (0, 1):  # False and True are these too
        raise InvalidRow('"train" must be true or false, "weight" 0 or 1', where)
    return bool(trained)


def read_sharegpt(row, findings):
    """ShareGPT: messages with `from` and `value`, under `conversations`; some write role and content there."""
    first = row["conversations"][0] if isinstance(row["conversations"], list) and row["conversations"] else None
    if isinstance(first, dict) and "role" in first:
        return read_messages(row, findings, "conversations")
    return read_messages(row, findings, "conversations", SPEAKERS, ("from", "value"))


def read_prompt_and_completion(row, findings):
    """A prompt and its completion, as texts or as messages; only the completion is trained.

    Raises:
        InvalidRow: among others, where a label says that the completion is not wanted.
    """
    if row.get("label") is False:
        raise InvalidRow('"label": false, which says that the completion is not wanted; remove the row')
    if isinstance(row["prompt"], str) and isinstance(row["completion"], str):
        return messages_of(("user", "prompt", row["prompt"]), ("assistant", "completion", row["completion"]))
    if not (isinstance(row["prompt"], list) and isinstance(row["completion"], list)):
        raise InvalidRow('"prompt" and "completion" are not both texts, or both lists of messages')
    prompt, completion = (read_messages(row, findings, key) for key in ("prompt", "completion"))
    return [{**message, "train": False} for message in prompt] + completion


def read_alpaca(row, _findings):
    """Alpaca: an instruction, perhaps with an input, and the output; perhaps earlier turns, as its history."""
    parts = [row["instruction"], row.get("input", "")]
    if not all(isinstance(part, str) for part in parts):
        raise InvalidRow('"instruction" or "input" is not a text')
    question = "\n\n".join(part for part in parts if part.strip())
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise InvalidRow('"history" is not a list of [question, answer] pairs')
    earlier = [
        (role, "history", text) for turn in history for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    return messages_of(*earlier, ("user", "instruction", question), ("assistant", "output", row["output"]))


def messages_of(*spoken):
    """Messages from `(role, key, content)`s."""
    return [{"role": role, "content": text_of(content, f'"{key}"'), "train": True} for role, key, content in spoken]


FORMATS = (
    ("messages", ("messages",), read_messages),
    ("ShareGPT", ("conversations",), read_sharegpt),
    ("prompt/completion", ("prompt", "completion"), read_prompt_and_completion),
    ("Alpaca", ("instruction", "output"), read_alpaca),
)
OPTIONAL = {"Alpaca": ("input", "history")}
SYSTEM = ("system", "system_prompt")  # beside the messages, in any format
# Keys that change what a row or a message means.
UNSUPPORTED = "function_call tool_calls reasoning_content reasoning thinking history images videos audios".split()
OF_A_MESSAGE = ("tool_calls", "function_call", *THOUGHTS, "name", "tool_call_id", "id")
TOOLS = ("tools", "functions")  # beside the messages
EMPTY = (None, False, "", "[]", "{}", [], {})
