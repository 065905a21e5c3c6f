"""A model's own chat template, and what of its text is the context of an answer, an answer, or neither.

docs/masking.md has the definition: the context of an answer is what the template renders from the messages before it
with the generation prompt; supervised is what the template writes after that, up to the token that ends the turn.

No text forges a control token: before rendering, a sentinel character is put into every text that looks like one, so
that what then looks like a control token is the template's own. The sentinel is removed when the text is encoded.

A tokenizer splits a text at its control tokens, and encodes each run of text between them by itself. So runs are what
is encoded here, and the ids before an answer are those that transformers makes of the prompt.
"""

import contextlib
import functools
import itertools
import json
import re
import unicodedata
from collections import Counter
from typing import NamedTuple

import jinja2
import jinja2.meta
from tokenizers import Tokenizer

from config import UserError, first_line
from conversations.formats import parse_json_value, parse_tool_call
from conversations.sources import InvalidRow

SENTINEL = "\U00012398"  # cuneiform: rare, and printable, so that no template escapes it
REASONING = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)
CALL = re.compile(r"\s*<tool_call>(.*?)</tool_call>", re.DOTALL)
RESULT = re.compile(r"\s*<tool_response>\n?(.*?)\n?</tool_response>\s*", re.DOTALL)
TAG = r"<[^<>]+>"
# At the end of a prompt: empty reasoning, or only its closing tag, so that the model does not reason.
NO_REASONING = re.compile(rf"(?:{TAG}\w*\s*{TAG}|</[^<>]+>)\s*$")
NO_END = "it does not end an answer with a control token"
NOT_DECODED = "the ids of an answer do not decode to that answer"
RESERVED = {"messages", "tools", "add_generation_prompt", "raise_exception", "strftime_now"}
# What a run is: a control token, or a text: the first of all, after a control token, or what continues another.
TOKEN, FIRST, NEXT, CONTINUED = "token", "first", "next", "continued"
SPACE = "".join(c for c in map(chr, range(0x3001)) if c.isspace() and c not in "\x1c\x1d\x1e\x1f")  # to tokenizers
# The settings, in a tokenizer's JSON, with which Metaspace, ByteLevel and Prepend write no space before a run.
NO_SPACE = {"prepend_scheme": "never", "add_prefix_space": False, "prepend": ""}

CHAT_PROBE = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "reply"}]
CHAT_PROBE += [{"role": "user", "content": "So"}]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL_PROBE = [{"type": "function", "function": {"name": "lookup", "description": "Look up.", "parameters": PARAMETERS}}]
CALLED = {"type": "function", "id": "abcdefgh1", "function": {"name": "lookup", "arguments": {"city": "Oslo"}}}
CALL_PROBE = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [CALLED]}]


class TemplateError(InvalidRow):
    """A conversation that the template cannot write."""


class Turn(NamedTuple):
    """An answer as the model generates it."""

    number: int  # of its message
    text: str  # its context, what the model should write, and the token that ends the turn
    begin: int  # where in the text the answer begins


class Template:
    """The chat template of a tokenizer."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        source = str(tokenizer.chat_template)
        added = {str(token): token for token in tokenizer.added_tokens_decoder.values()}
        self.control = {
            text: token for text, token in added.items() if text.strip() and (token.special or text in source)
        }
        longest_first = sorted(map(re.escape, self.control), key=len, reverse=True)
        self.pattern = re.compile(f"({'|'.join(longest_first) or '(?!)'})")
        # The beginnings and ends of control tokens, which a text and what the template writes beside it could complete.
        self.prefixes = tuple({text[:end] for text in self.control for end in range(1, len(text))})
        self.suffixes = tuple({text[start:] for text in self.control for start in range(1, len(text))})
        self.token_ids = {(TOKEN, text): [tokenizer.convert_tokens_to_ids(text)] for text in self.control}
        self.encoders = {}
        self.end_of_turn = self.find_end_of_turn()

    # --- what the template writes, by trying it

    def render(self, chats, options, generation=False):
        """The texts that the template makes of some lists of messages; whatever it raises is a `TemplateError`."""
        try:
            return self.tokenizer.apply_chat_template(
                chats, tokenize=False, add_generation_prompt=generation, **options
            )
        except jinja2.TemplateSyntaxError as error:
            raise syntax_error(error) from error
        except Exception as error:  # a template is somebody's program: it may divide by zero
            roles = ", ".join(message["role"] for message in max(chats, key=len))
            raise TemplateError(f"in a conversation of {roles}, it does not take them: {first_line(error)}") from error

    def find_end_of_turn(self):
        """The control token that ends an answer, whether or not the conversation goes on after it."""
        texts = self.render([CHAT_PROBE[:2], CHAT_PROBE], {})
        last, earlier = (self.pattern.findall(text.rpartition("reply")[2]) if "reply" in text else [] for text in texts)
        if not last:
            raise TemplateError(NO_END)
        same = common_prefix(last, earlier)
        # A template that begins the next turn whatever follows, as Command A's, writes more than the end.
        return str(self.tokenizer.eos_token) if self.tokenizer.eos_token in same else (same or last[:1])[-1]

    def probe(self, messages, **options):
        """The text that the template writes for the last message; empty where it does not take it."""
        try:
            (prompt,), (text,) = (
                self.render([messages[:-1]], options, generation=True),
                self.render([messages], options),
            )
        except TemplateError:
            return ""
        return text[len(common_prefix(prompt, text)) :]

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
        if self.call_form is None:
            return [self.end_of_turn]
        chat = [to_template_message(message, self.call_form) for message in CALL_PROBE]
        try:
            (turn,) = self.turns(chat, {1}, {"tools": TOOL_PROBE})[0]
            return list(dict.fromkeys([self.end_of_turn, self.pattern.findall(turn.text)[-1]]))
        except TemplateError:  # as the first conversation with a call will be
            return [self.end_of_turn]

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

    def escape_control_tokens(self, value):
        """A JSON value with the sentinel inside of every control token in its texts, keys too, and at partial ones."""
        if isinstance(value, dict):
            return {self.escape_control_tokens(key): self.escape_control_tokens(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.escape_control_tokens(item) for item in value]
        if not isinstance(value, str):
            return value
        while self.pattern.search(value):
            value = self.pattern.sub(lambda found: found[0][0] + SENTINEL + found[0][1:], value)
        begin, end = len(value) - len(value.lstrip()), len(value.rstrip())  # a template may trim the space around it
        if value[:end].endswith(self.prefixes):
            value = value[:end] + SENTINEL + value[end:]
        if value[begin:].startswith(self.suffixes):
            value = value[:begin] + SENTINEL + value[begin:]
        return value

    def prepare(self, messages):
        """Messages as the template takes them, and its other arguments: the tools, and the options of the row."""
        if SENTINEL in json.dumps(messages, ensure_ascii=False):
            raise TemplateError("it has the character U+12398, which marks typed control tokens; remove it")
        first = messages[0] if messages else {}
        tools, given = first.get("tools"), first.get("template_options", {})
        options = {name: value for name, value in given.items() if value is not None}  # null in Parquet: not given
        if options and (unread := options.keys() - self.arguments):
            raise TemplateError(f"the chat template has no argument {min(unread)}, which the row gives it")
        calls = [number for number, message in enumerate(messages, 1) if message.get("tool_calls")]
        if (calls or tools) and self.call_form is None:
            reason = "the template writes no tool calls; use a model or a --chat-template FILE that does"
            raise TemplateError(reason, f"message {calls[0]}" if calls else "")
        options = self.escape_control_tokens({"tools": tools or None, **options})
        return [self.prepare_message(message) for message in messages], options

    def prepare_message(self, message):
        """A message with escaped texts and with its reasoning where the template takes it."""
        escaped = {
            key: value if key in ("role", "inline") else self.escape_control_tokens(value)
            for key, value in message.items()
            if key not in ("tools", "template_options", "train")
        }
        for call in escaped.get("tool_calls", []):
            call["type"] = "function"
        reasoning, inline = escaped.pop("thinking", None), escaped.pop("inline", False)
        if reasoning is not None and self.takes_reasoning:
            escaped |= reasoning_keys(reasoning.strip("\n") if inline else reasoning)
            escaped["content"] = escaped["content"].lstrip("\n") if inline else escaped["content"]
        elif reasoning is not None:
            space = "" if inline else "\n"
            escaped["content"] = f"<think>{space}{reasoning}{space}</think>{space * 2}{escaped['content']}"
        elif message["role"] == "assistant" and (empty := REASONING.fullmatch(message["content"])):
            escaped["content"] = f"<think>{empty[1]}</think>{self.escape_control_tokens(empty[2])}"
        return to_template_message(escaped, self.call_form)

    # --- from what the template takes to examples

    def turns(self, chat, wanted, options):
        """The `Turn`s of a conversation's answers, without those that are neither wanted nor valid, and its text."""
        answers = [number for number, message in enumerate(chat) if message["role"] == "assistant"]
        prompts = self.render([chat[:number] for number in answers], options, generation=True)
        ends = dict.fromkeys([*(number + 1 for number in answers), len(chat)])
        texts = self.render([chat[:end] for end in ends], options)
        turns = []
        for number, prompt, text in zip(answers, prompts, texts, strict=False):
            try:
                turns.append(self.turn(number, prompt, text, chat[number], chat[number - 1] if number else None))
            except TemplateError:
                if number in wanted:
                    raise
        return turns, texts[-1]

    def turn(self, number, prompt, text, answer, question):
        """The `Turn` of a rendered conversation's last message, the answer to a rendered prompt."""
        where = f"message {number + 1}"
        if not text.startswith(prompt):
            begin = self.find_answer(prompt, text, answer, question)
            if begin is None:
                reason = "the rendered answer does not begin with the generation prompt, which ends with"
                raise TemplateError(f"{reason} {prompt[-30:]!r}", where)
            text = prompt + text[begin:]
        end, after = None, len(text)
        for token in reversed(list(self.pattern.finditer(text, len(prompt)))):  # those with nothing but space after
            if text[token.end() : after].strip():
                break
            after = token.start()
            if end is None or token[0] == self.end_of_turn:
                end = token.end()
        if end is None:
            raise TemplateError(NO_END, where)
        return Turn(number, text[:end], len(prompt))

    def find_answer(self, prompt, text, answer, question):
        """The position of an answer in a text that does not begin with its prompt; None where it cannot be determined.

        Two kinds of prompts are not written again as the conversation goes on: those that differ before the question,
        as Mistral's, whose system message is part of the last question; and those that end with empty reasoning, as
        Gemma 4's, so that the model does not reason.
        """
        question_text = question["content"].strip() if question else ""
        tail = prompt[prompt.rfind(question_text) :] if question_text else ""
        if tail in text and self.pattern.search(tail):  # a text cannot contain a control token
            return text.rfind(tail) + len(tail)
        if answer.get("reasoning_content", "").strip() or answer["content"].lstrip().startswith("<think>"):
            return None
        for start in (found.start() for found in re.finditer("<", prompt)):
            empty = NO_REASONING.match(prompt, start)
            tags = tuple(re.findall(TAG, empty[0])) if empty else ()
            if empty and text.startswith(prompt[:start]) and not text.startswith(tags, start):
                return start
        return None

    def examples(self, messages):
        """A conversation as examples, as `join_turns` returns them.

        Args:
            messages: as `extract_inline` returns them; those with `train` are supervised.
        """
        chat, options = self.prepare(messages)
        wanted = {number for number, message in enumerate(messages) if message["train"]}
        turns, full_text = self.turns(chat, wanted, options)
        turns = [turn for turn in turns if turn.number in wanted]
        for turn in turns:
            check_turn(messages, turn)
        prompts = [turn.text[: turn.begin] for turn in turns]
        full, *contexts = self.encode(map(self.split, [full_text, *prompts]))
        examples = join_turns(list(zip(contexts, map(self.encode_answer, turns), strict=True)), full)
        longest = {spans[-1][0] for _, spans in examples if spans}  # the other contexts begin these
        for prompt, context in zip(prompts, contexts, strict=True):
            if len(context) in longest:
                self.check_context(prompt, context)
        return examples

    # --- from texts to ids

    def split(self, text, kind=FIRST):
        """A rendered text as runs `(kind, text)`. Some control tokens absorb the space beside them, as Phi's do."""
        parts, runs = self.pattern.split(text), []
        tokens = [None, *map(self.control.get, parts[1::2]), None]
        for run, (before, after) in zip(parts[::2], itertools.pairwise(tokens), strict=True):
            run = run.lstrip(SPACE) if before and before.rstrip else run
            run = run.rstrip(SPACE) if after and after.lstrip else run
            runs += [(NEXT if before else kind, run.replace(SENTINEL, ""))] if run else []
            runs += [(TOKEN, str(after))] if after else []
        return runs

    def encode(self, texts):
        """The ids of some texts, which `split` returned, a list each; a run that they share is encoded once."""
        texts, ids = list(texts), dict(self.token_ids)
        for kind in (FIRST, NEXT):
            runs = list({run for text in texts for run in text if run[0] == kind})
            ids |= zip(runs, self.encode_runs([text for _, text in runs], kind), strict=True)
        return [[number for run in text for number in ids[run]] for text in texts]

    def encode_runs(self, texts, kind=NEXT):
        """The ids of texts of a kind, a list each; what looks like a control token in them stays text."""
        encodings = self.get_encoder(kind).encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def get_encoder(self, kind):
        """The tokenizer of runs of a kind."""
        if kind not in self.encoders:
            self.encoders[kind] = make_encoder(self.tokenizer, self.control, kind)
        return self.encoders[kind]

    def encode_answer(self, turn):
        """The ids of an answer, as they follow its prompt."""
        prompt, answer = turn.text[: turn.begin], turn.text[turn.begin :]
        before, runs = self.split(prompt)[-1:], self.split(answer, NEXT if prompt else FIRST)
        ids = self.encode([run] for run in runs)
        if before and TOKEN not in (before[0][0], runs[0][0]):  # the answer continues a run of the prompt
            ((kind, header),) = before
            header, both = self.encode_runs([header, header + runs[0][1]], kind)
            ids[0] = self.continue_run(header, both, runs[0][1], turn.number)
        for run, (kind, text) in zip(ids, runs, strict=True):
            if kind != TOKEN:
                self.check_decoded(run, text, turn.number)
        return list(itertools.chain.from_iterable(ids))

    def continue_run(self, header, both, text, number):
        """The ids of an answer's text that follows a header in one run, by the ids of the header and of both.

        The prompt ends with the header's own ids, even where the header and the answer together have other ids.
        """
        if both[: len(header)] == header:
            return both[len(header) :]
        (ids,) = self.encode_runs([text], CONTINUED)
        before = self.tokenizer.backend_tokenizer.decode(header, skip_special_tokens=False)
        self.check_decoded(header + ids, before + text, number)
        return ids

    def check_decoded(self, ids, text, number):
        """Raise `TemplateError` where ids of an answer do not decode to its text."""
        decoded = self.tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False)
        if decoded != text and normalize(decoded) != normalize(text):
            raise TemplateError(NOT_DECODED, f"message {number + 1}")

    def check_context(self, text, ids):
        """Raise `TemplateError` where transformers makes other ids of a prompt, unless it has a typed control token."""
        plain = text.replace(SENTINEL, "")
        if self.pattern.findall(plain) != self.pattern.findall(text):
            return
        if self.tokenizer(plain, add_special_tokens=False, verbose=False)["input_ids"] != ids:
            raise TemplateError("its tokenizer gives the parts other ids than the full text")


def make_encoder(tokenizer, control, kind):
    """A tokenizer of runs of a kind, to which no text is a control token, even one that is not marked "special"."""

    def edit(part):
        places = [CONTINUED, NEXT] if part.get("prepend_scheme") == "first" else [CONTINUED]
        if kind in places and isinstance(part.get("type"), str):  # else it is the vocabulary
            part |= {name: NO_SPACE[name] for name in part.keys() & NO_SPACE.keys()}
        return part

    state = json.loads(tokenizer.backend_tokenizer.to_str(), object_hook=edit)
    for token in state["added_tokens"]:
        token["special"] |= token["content"] in control
    encoder = Tokenizer.from_str(json.dumps(state))
    encoder.encode_special_tokens = True
    encoder.no_padding()
    encoder.no_truncation()
    return encoder


def join_turns(turns, full):
    """The fewest examples that have every turn, `(ids, spans)`; a span is where a supervised answer begins and ends.

    Each answer is supervised once, in the first example that has it: whose ids begin with those of the turn.

    Args:
        turns: for each answer that is supervised the ids of its context and its own.
        full: the ids of the conversation.
    """
    examples, left = [], [(context + answer, (len(context), len(context) + len(answer))) for context, answer in turns]
    for ids, _ in reversed(left):
        if not any(example[: len(ids)] == ids for example in examples):
            examples.append(full if full[: len(ids)] == ids else ids)
    joined = []
    for example in reversed(examples or [full]):
        served = [turn for turn in left if example[: len(turn[0])] == turn[0]]
        left = [turn for turn in left if turn not in served]
        joined.append((example, [span for _, span in served]))
    return joined


def common_prefix(one, other):
    """The part that two sequences both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return one[: next((at for at, pair in pairs if pair[0] != pair[1]), min(len(one), len(other)))]


def normalize(text):
    """A text without what tokenizers may normalize."""
    return unicodedata.normalize("NFKC", text).strip()


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


def check_turn(messages, turn):
    """Raise `TemplateError` where the template leaves out or changes a message, a part of the answer, or a tool."""
    text, written = turn.text.replace(SENTINEL, ""), turn.text[turn.begin :].replace(SENTINEL, "")
    *context, answer = messages[: turn.number + 1]
    where = f"message {turn.number + 1}"
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


def encode_texts(texts, tokenizer):
    """Ids of plain texts, a list each; what looks like a special token in them stays text."""
    if not texts:
        return []
    options = {"add_special_tokens": False, "split_special_tokens": True, "return_attention_mask": False}
    return tokenizer(texts, **options, verbose=False)["input_ids"]


def encode_prompt(messages, tokenizer):
    """The ids of messages with the generation prompt, as at inference; a list."""
    template = get_template(tokenizer)
    with with_conversation(messages):
        chat, options = template.prepare(template.extract_inline(messages))
        (text,) = template.render([chat], options, generation=True)
        (ids,) = template.encode([template.split(text)])
        template.check_context(text, ids)
        return ids


def encode(conversations, tokenizer):
    """Yield the examples of each conversation, by the tokenizer's own template, as `join_turns` returns them."""
    template = get_template(tokenizer)
    for messages in conversations:
        with with_conversation(messages):
            yield template.examples(template.extract_inline(messages))


def arguments_of(template):
    """The names that a chat template, or some in a dict, reads and does not set: those that a caller may give."""
    environment, names = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]), set()
    try:
        for text in template.values() if isinstance(template, dict) else [template]:
            names |= jinja2.meta.find_undeclared_variables(environment.parse(text))
    except jinja2.TemplateSyntaxError as error:
        raise syntax_error(error) from error
    return {name for name in names - RESERVED - environment.globals.keys() if not name.endswith("_token")}


def syntax_error(error):
    """A `UserError` about a template's syntax."""
    return UserError(f"--chat-template: line {error.lineno}: {first_line(error)}")


@contextlib.contextmanager
def with_conversation(messages):
    """Let a `TemplateError` become a `UserError` that quotes the conversation."""
    try:
        yield
    except TemplateError as error:
        quoted = " | ".join(f"{message['role']}: {message['content']:.40}" for message in messages[:4])
        where = f", in the conversation «{quoted}»" if messages else ""
        raise UserError(f"--chat-template: the template cannot be masked: {error}{where}") from error
