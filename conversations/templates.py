"""A model's own chat template: what of its text is the context of an answer, the answer, or neither.

docs/masking.md has the definition: the context of an answer is what the template renders from the messages before it
with the generation prompt; supervised is what the template writes after that, up to the token that ends the turn.
"""

import contextlib
import functools
import itertools
import json
import re
from collections import Counter

import jinja2
import jinja2.meta

from config import UserError, first_line
from conversations.encoding import SENTINEL, Encoder, TemplateError
from conversations.formats import parse_json_value, parse_tool_call
from conversations.sources import InvalidRow

REASONING = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)
CALL = re.compile(r"\s*<tool_call>(.*?)</tool_call>", re.DOTALL)
RESULT = re.compile(r"\s*<tool_response>\n?(.*?)\n?</tool_response>\s*", re.DOTALL)
TAG = r"<[^<>]+>"
# At the end of a prompt: empty reasoning, or only its closing tag, so that the model does not reason.
NO_REASONING = re.compile(rf"(?:{TAG}\w*\s*{TAG}|</[^<>]+>)\s*$")
NO_END = "it does not end an answer with a control token"
RESERVED = {"messages", "tools", "add_generation_prompt", "raise_exception", "strftime_now"}

CHAT_PROBE = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "reply"}]
CHAT_PROBE += [{"role": "user", "content": "So"}]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL_PROBE = [{"type": "function", "function": {"name": "lookup", "description": "Look up.", "parameters": PARAMETERS}}]
CALLED = {"type": "function", "id": "abcdefgh1", "function": {"name": "lookup", "arguments": {"city": "Oslo"}}}
CALL_PROBE = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "", "tool_calls": [CALLED]}]


class Template:
    """The chat template of a tokenizer."""

    def __init__(self, tokenizer):
        self.tokenizer, self.encoder = tokenizer, Encoder(tokenizer)
        self.pattern = self.encoder.pattern  # of control tokens
        self.ending = re.compile(rf"(?:{self.pattern.pattern}\s*)+\Z")
        self.end_of_turn = self.find_end_of_turn()

    # --- what the template writes, by trying it

    def render(self, chats, options, generation=False):
        """The texts that the template makes of some lists of messages; whatever it raises is a `TemplateError`."""
        try:
            return self.tokenizer.apply_chat_template(
                chats, tokenize=False, add_generation_prompt=generation, **options
            )
        except Exception as error:  # a template is somebody's program: it may divide by zero
            roles = ", ".join(message["role"] for message in max(chats, key=len))
            raise TemplateError(f"in a conversation of {roles}, it does not take them: {first_line(error)}") from error

    def find_end_of_turn(self):
        """The control token that ends an answer, whether or not the conversation goes on after it."""
        texts = self.render([CHAT_PROBE[:2], CHAT_PROBE], {})
        last, earlier = (self.pattern.findall(text.rpartition("reply")[2]) if "reply" in text else [] for text in texts)
        if not last:
            raise TemplateError(NO_END)
        pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(last, earlier, strict=False))
        same = [token for token, _ in pairs]
        # A template that begins the next turn whatever follows, as Command A's, writes more than the end.
        return str(self.tokenizer.eos_token) if self.tokenizer.eos_token in same else (same or last[:1])[-1]

    def probe(self, messages, **options):
        """The text that the template writes after the last question; empty where it does not take the messages."""
        try:
            (text,) = self.render([messages], options)
        except TemplateError:
            return ""
        return text.rpartition(messages[-2]["content"])[2]

    @functools.cached_property
    def call_form(self):
        """The form of arguments, "object" or "text", that the template writes as JSON or XML; None: it has no calls."""
        for form in ("object", "text"):
            written = self.probe([to_template_message(message, form) for message in CALL_PROBE], tools=TOOL_PROBE)
            if all(word in written for word in ("lookup", "city", "Oslo")) and not re.search(r"'city'|\\\"", written):
                return form
        return None

    @functools.cached_property
    def stops(self):
        """The control tokens that end an answer: a text, and a call of a tool, after which the tool is next."""
        stops = [self.end_of_turn]
        if self.call_form:
            chat = [to_template_message(message, self.call_form) for message in CALL_PROBE]
            with contextlib.suppress(TemplateError):  # as the first conversation with a call will raise
                ((_, _, answer),), _ = self.turns(chat, {1}, {"tools": TOOL_PROBE})
                stops.append(self.pattern.findall(answer)[-1])
        return list(dict.fromkeys(stops))

    @functools.cached_property
    def arguments(self):
        """The names of what a caller may give the template."""
        return arguments_of(self.tokenizer.chat_template)

    @functools.cached_property
    def takes_reasoning(self):
        """Whether the template writes reasoning that stands beside contents; else it becomes part of the content."""
        return "Hm?" in self.probe([CHAT_PROBE[0], {**CHAT_PROBE[1], **reasoning_keys("Hm?")}])

    # --- from a conversation to what the template takes

    def extract_inline(self, messages):
        """Messages in which reasoning and tool calls that are written into contents stand beside them.

        Results written so are taken apart only where the calls were written so: else they are a tool's own text.
        """
        found, inline_calls = [], 0
        for number, message in enumerate(messages, 1):
            message = dict(message)
            if message["role"] == "assistant":
                inside = REASONING.fullmatch(message["content"])
                if inside and "thinking" not in message and inside[1].strip():
                    message |= {"thinking": inside[1], "content": inside[2], "inline": True}
                texts = CALL.findall(message["content"]) if self.call_form and "tool_calls" not in message else []
                if texts:
                    calls = [parse_inline_call(text, f"message {number}") for text in texts]
                    message |= {"tool_calls": calls, "content": CALL.sub("", message["content"]).rstrip()}
                inline_calls = len(texts)
            contents = [message["content"]]
            if message["role"] == "tool":
                if re.fullmatch(f"(?:{RESULT.pattern})+", message["content"], re.DOTALL):
                    results = RESULT.findall(message["content"])
                    contents = results if len(results) <= inline_calls else contents
                inline_calls -= len(contents)
            found += [{**message, "content": content} for content in contents]
        return found

    def prepare(self, messages):
        """Messages as the template takes them, and its other arguments: the tools, and the options of the row."""
        if SENTINEL in json.dumps(messages, ensure_ascii=False):
            raise TemplateError("it has the character U+12398, which marks typed control tokens; remove it")
        first = messages[0] if messages else {}
        tools, options = first.get("tools"), first.get("template_options", {})
        if options and (unread := options.keys() - self.arguments):
            raise TemplateError(f"the chat template has no argument {min(unread)}, which the row gives it")
        calls = [number for number, message in enumerate(messages, 1) if message.get("tool_calls")]
        if (calls or tools) and self.call_form is None:
            reason = "the template writes no tool calls; use a model or a --chat-template FILE that does"
            raise TemplateError(reason, f"message {calls[0]}" if calls else "")
        options = self.encoder.escape({"tools": tools or None, **options})
        return [self.prepare_message(message) for message in messages], options

    def prepare_message(self, message):
        """A message with escaped texts and with its reasoning where the template takes it."""
        escaped = {
            key: value if key in ("role", "inline") else self.encoder.escape(value)
            for key, value in message.items()
            if key not in ("tools", "template_options", "train")
        }
        reasoning, inline = escaped.pop("thinking", None), escaped.pop("inline", False)
        if reasoning is not None and self.takes_reasoning:
            escaped |= reasoning_keys(reasoning.strip("\n") if inline else reasoning)
            escaped["content"] = escaped["content"].lstrip("\n") if inline else escaped["content"]
        elif reasoning is not None:
            space = "" if inline else "\n"
            escaped["content"] = f"<think>{space}{reasoning}{space}</think>{space * 2}{escaped['content']}"
        elif message["role"] == "assistant" and (empty := REASONING.fullmatch(message["content"])):
            escaped["content"] = f"<think>{empty[1]}</think>{self.encoder.escape(empty[2])}"
        return to_template_message(escaped, self.call_form)

    # --- from what the template takes to what it writes, and its ids

    def turns(self, chat, wanted, options):
        """The turns of the answers with some numbers, `(number, prompt, answer)`, and the text of all messages."""
        answers = [number for number, message in enumerate(chat) if message["role"] == "assistant"]
        prompts = self.render([chat[:number] for number in answers], options, generation=True)
        ends = dict.fromkeys([*(number + 1 for number in answers), len(chat)])
        texts = self.render([chat[:end] for end in ends], options)
        turns = [
            (number, prompt, self.cut_answer(chat[: number + 1], prompt, text))
            for number, prompt, text in zip(answers, prompts, texts, strict=False)
            if number in wanted
        ]
        return turns, texts[-1]

    def cut_answer(self, chat, prompt, text):
        """The answer in the text of a chat that ends with it: from where its prompt ends to the end of the turn."""
        where = f"message {len(chat)}"
        begin = len(prompt) if text.startswith(prompt) else self.find_answer(chat, prompt, text)
        if begin is None:
            reason = "the rendered answer does not begin with the generation prompt, which ends with"
            raise TemplateError(f"{reason} {prompt[-30:]!r}", where)
        answer = text[begin:]
        if not (end := self.ending.search(answer)):
            raise TemplateError(NO_END, where)
        tokens = list(self.pattern.finditer(answer, end.start()))
        return answer[: next((token for token in tokens if token[0] == self.end_of_turn), tokens[-1]).end()]

    def find_answer(self, chat, prompt, text):
        """The position of an answer in a text that does not begin with its prompt; None where it cannot be determined.

        Two kinds of prompts are not written again as the conversation goes on: those that differ before the question,
        as Mistral's, whose system message is part of the last question; and those that end with empty reasoning, as
        Gemma 4's, so that the model does not reason.
        """
        question = chat[-2]["content"].strip() if len(chat) > 1 else ""
        tail = prompt[prompt.rfind(question) :] if question else ""
        if tail in text and self.pattern.search(tail):  # a text cannot contain a control token
            return text.rfind(tail) + len(tail)
        if chat[-1].get("reasoning_content", "").strip() or chat[-1]["content"].lstrip().startswith("<think>"):
            return None
        for start in (found.start() for found in re.finditer("<", prompt)):
            empty = NO_REASONING.match(prompt, start)
            tags = tuple(re.findall(TAG, empty[0])) if empty else ()
            if empty and text.startswith(prompt[:start]) and not text.startswith(tags, start):
                return start
        return None

    def encode(self, messages):
        """The ids of a conversation, as `masking.make_examples` takes them: those of its turns, and of all messages."""
        with with_conversation(messages):
            messages = self.extract_inline(messages)
            chat, options = self.prepare(messages)
            wanted = {number for number, message in enumerate(messages) if message["train"]}
            turns, full_text = self.turns(chat, wanted, options)
            for turn in turns:
                check_turn(messages, *turn)
            prompts = [prompt for _, prompt, _ in turns]
            ids, *contexts = self.encoder.encode(map(self.encoder.split, [full_text, *prompts]))
            answers = [self.encoder.encode_answer(*turn) for turn in turns]
            for number, (prompt, context) in enumerate(zip(prompts, contexts, strict=True), 1):
                if not any(later[: len(context)] == context for later in contexts[number:]):  # which is checked itself
                    self.encoder.check_context(prompt, context)
        return list(zip(contexts, answers, strict=True)), ids

    def encode_prompt(self, messages):
        """The ids of messages with the generation prompt, as at inference; a list."""
        with with_conversation(messages):
            chat, options = self.prepare(self.extract_inline(messages))
            (text,) = self.render([chat], options, generation=True)
            (ids,) = self.encoder.encode([self.encoder.split(text)])
            self.encoder.check_context(text, ids)
            return ids


def to_template_message(message, form):
    """A message as a template takes it: the arguments of its tool calls as an "object" or as JSON "text"."""
    if form != "text" or not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        calls.append({**call, "function": {**call["function"], "arguments": arguments}})
    return {**message, "tool_calls": calls}


def reasoning_keys(text):
    """Reasoning by the names that templates read: most read the first; gpt-oss's and LFM2's the second."""
    return {"reasoning_content": text, "thinking": text}


def parse_inline_call(text, where):
    """The tool call that is written as JSON in a text."""
    try:
        return parse_tool_call(parse_json_value(text, "it", where), where)
    except InvalidRow as error:
        reason = 'what stands in <tool_call> is not {"name": …, "arguments": {…}} in JSON'
        raise TemplateError(reason, where) from error


def texts_in(value):
    """Yield the texts of a JSON value, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from texts_in([*value, *value.values()])
    elif isinstance(value, list):
        for item in value:
            yield from texts_in(item)


def contains(written, text):
    """Whether a text was written, as it is or as JSON or Python write it; space around it may be trimmed."""
    text = text.strip()
    return any(form in written for form in (text, json.dumps(text, ensure_ascii=False)[1:-1], repr(text)[1:-1]))


def check_turn(messages, number, prompt, written):
    """Raise `TemplateError` where the template leaves out or changes a message, a part of the answer, or a tool."""
    text, written = (part.replace(SENTINEL, "") for part in (prompt + written, written))
    *context, answer = messages[: number + 1]
    where = f"message {number + 1}"
    empty = REASONING.fullmatch(answer["content"])  # where it is not empty, it stands beside the content
    content = empty[2] if empty and not empty[1].strip() else answer["content"]
    if content.strip() not in written:
        raise TemplateError("it changes what messages say", where)
    if answer.get("thinking", "").strip() not in written:
        raise TemplateError("it leaves out the reasoning", where)
    calls = [call["function"] for call in answer.get("tool_calls", [])]
    for name, count in Counter(call["name"] for call in calls).items():
        arguments = texts_in([call["arguments"] for call in calls if call["name"] == name])
        if written.count(name) < count or not all(contains(written, argument) for argument in arguments):
            raise TemplateError(f"it leaves out a call to {name}, or changes it", where)
    for number, message in enumerate(context, 1):
        if message["role"] != "assistant" and not contains(text, message["content"]):
            raise TemplateError("it leaves out or changes what it says", f"message {number}")
    for tool in messages[0].get("tools", []):
        if tool["function"]["name"] not in text:
            raise TemplateError(f"it leaves out the tool {tool['function']['name']}")
    for name, value in messages[0].get("template_options", {}).items():
        # A word may be a switch; several are a text.
        if not all(contains(text, option) for option in texts_in(value) if len(option.split()) > 1):
            raise TemplateError(f"it leaves out or changes the row's {name}")


@functools.lru_cache(maxsize=4)
def cached_template(tokenizer, _source):  # its text, for when that changes
    return Template(tokenizer)


def get_template(tokenizer):
    """The `Template` of a tokenizer."""
    return cached_template(tokenizer, str(tokenizer.chat_template))


def stop_ids(tokenizer):
    """The ids at which an answer ends: the first is that of the tokenizer's stop token."""
    stops = tokenizer.convert_tokens_to_ids(get_template(tokenizer).stops)
    return list(dict.fromkeys([tokenizer.eos_token_id, *stops]))


def arguments_of(template):
    """The names that a chat template, or some in a dict, reads and does not set: those that a caller may give."""
    environment, names = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]), set()
    try:
        for text in template.values() if isinstance(template, dict) else [template]:
            names |= jinja2.meta.find_undeclared_variables(environment.parse(text))
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"--chat-template: line {error.lineno}: {first_line(error)}") from error
    return {name for name in names - RESERVED - environment.globals.keys() if not name.endswith("_token")}


@contextlib.contextmanager
def with_conversation(messages):
    """Let a `TemplateError` become a `UserError` that quotes the conversation."""
    try:
        yield
    except TemplateError as error:
        quoted = " | ".join(f"{each['role']}: {' '.join(each['content'].split()):.40}" for each in messages[:4])
        where = f", in the conversation «{quoted}»" if messages else ""
        raise UserError(f"--chat-template: the template cannot be masked: {error}{where}") from error
