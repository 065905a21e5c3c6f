"""A model's own chat template, and what of its text is the context of an answer, an answer, or neither.

docs/masking.md has the definition: the context of an answer is what the template renders from the messages before it
with the generation prompt; supervised is what the template writes after that, up to the token that ends the turn.

No text forges a control token: before rendering, a sentinel character is put into every text that looks like one, so
that what then looks like a control token is the template's own. The sentinel is removed when the parts are encoded.
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
        self.end_of_turn = self.find_end_of_turn()

    # --- what the template writes, by trying it

    def render(self, chats, tools, generation=False):
        """The texts that the template makes of some lists of messages; whatever it raises is a `TemplateError`."""
        try:
            return self.tokenizer.apply_chat_template(
                chats, tools=tools or None, tokenize=False, add_generation_prompt=generation
            )
        except jinja2.TemplateSyntaxError as error:
            raise syntax_error(error) from error
        except Exception as error:  # a template is somebody's program: it may divide by zero
            roles = ", ".join(message["role"] for message in max(chats, key=len))
            raise TemplateError(f"in a conversation of {roles}, it does not take them: {first_line(error)}") from error

    def find_end_of_turn(self):
        """The control token that ends an answer, whether or not the conversation goes on after it."""
        texts = self.render([CHAT_PROBE[:2], CHAT_PROBE], None)
        last, earlier = (self.pattern.findall(text.rpartition("reply")[2]) if "reply" in text else [] for text in texts)
        if not last:
            raise TemplateError(NO_END)
        same = common_prefix(last, earlier)
        # A template that begins the next turn whatever follows, as Command A's, writes more than the end.
        return str(self.tokenizer.eos_token) if self.tokenizer.eos_token in same else (same or last[:1])[-1]

    def probe(self, messages, tools=None):
        """The text that the template writes for the last message; empty where it does not take it."""
        try:
            (prompt,), (text,) = self.render([messages[:-1]], tools, generation=True), self.render([messages], tools)
        except TemplateError:
            return ""
        return text[len(common_prefix(prompt, text)) :]

    @functools.cached_property
    def call_form(self):
        """The form of arguments, "object" or "text", that the template writes as JSON or XML; None: it has no calls."""
        for form in ("object", "text"):
            written = self.probe([to_template_message(message, form) for message in CALL_PROBE], TOOL_PROBE)
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
            (turn,) = self.turns(chat, {1}, TOOL_PROBE)[0]
            return list(dict.fromkeys([self.end_of_turn, self.pattern.findall(turn.text)[-1]]))
        except TemplateError:  # as the first conversation with a call will be
            return [self.end_of_turn]

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
        """Messages and tools as the template takes them."""
        if SENTINEL in json.dumps(messages, ensure_ascii=False):
            raise TemplateError("it has the character U+12398, which marks typed control tokens; remove it")
        tools = messages[0].get("tools", []) if messages else []
        calls = [number for number, message in enumerate(messages, 1) if message.get("tool_calls")]
        if (calls or tools) and self.call_form is None:
            reason = "the template writes no tool calls; use a model or a --chat-template FILE that does"
            raise TemplateError(reason, f"message {calls[0]}" if calls else "")
        return [self.prepare_message(message) for message in messages], self.escape_control_tokens(tools)

    def prepare_message(self, message):
        """A message with escaped texts and with its reasoning where the template takes it."""
        escaped = {
            key: value if key in ("role", "inline") else self.escape_control_tokens(value)
            for key, value in message.items()
            if key not in ("tools", "train")
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

    def turns(self, chat, wanted, tools):
        """The `Turn`s of a conversation's answers, without those that are neither wanted nor valid, and its text."""
        answers = [number for number, message in enumerate(chat) if message["role"] == "assistant"]
        prompts = self.render([chat[:number] for number in answers], tools, generation=True)
        ends = dict.fromkeys([*(number + 1 for number in answers), len(chat)])
        texts = self.render([chat[:end] for end in ends], tools)
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
        """A conversation as examples: for each its pieces, and the numbers of the answers that it supervises.

        Args:
            messages: as `extract_inline` returns them; those with `train` are supervised.
        """
        chat, tools = self.prepare(messages)
        wanted = {number for number, message in enumerate(messages) if message["train"]}
        turns, full_text = self.turns(chat, wanted, tools)
        left = [turn for turn in turns if turn.number in wanted]
        if not left:  # a conversation in which nothing is supervised is counted later
            return [(list(split_at_answers(full_text, turns)), set())]
        for turn in left:
            check_turn(messages, turn)
        texts = []
        for turn in reversed(left):
            if not any(text.startswith(turn.text) for text in texts):
                texts.append(full_text if full_text.startswith(turn.text) else turn.text)
        examples = []
        for text in reversed(texts):  # an answer in several examples is supervised in the first, the shortest
            served = {turn.number for turn in left if text.startswith(turn.text)}
            left = [turn for turn in left if turn.number not in served]
            examples.append((list(split_at_answers(text, turns)), served))
        return examples

    # --- from examples to ids

    @functools.cached_property
    def encoder(self):
        """A tokenizer to which no text is a control token, not even those that are added but not "special"."""
        state = json.loads(self.tokenizer.backend_tokenizer.to_str())
        for token in state["added_tokens"]:
            token["special"] |= token["content"] in self.control
        encoder = Tokenizer.from_str(json.dumps(state))
        encoder.encode_special_tokens = True
        encoder.no_padding()
        encoder.no_truncation()
        return encoder

    def encode(self, pieces):
        """The segments `(ids, answer)` of an example, checked; `answer` is a message's number, or None for context."""
        runs = list(self.split_at_tokens(pieces))
        texts = [run for is_token, run, _ in runs if not is_token]
        encodings = iter(self.encoder.encode_batch_fast(texts, add_special_tokens=False))
        segments = [
            ([self.tokenizer.convert_tokens_to_ids(run)] if is_token else next(encodings).ids, answer)
            for is_token, run, answer in runs
        ]
        for text, number in pieces:
            if number is not None:
                ids = [token for run, answer in segments if answer == number for token in run]
                if normalize(self.tokenizer.decode(ids)) != normalize(text.replace(SENTINEL, "")):
                    raise TemplateError("the ids of an answer do not decode to that answer", f"message {number + 1}")
        full_text = "".join(text for text, _ in pieces)
        # Some texts have other ids when they are encoded in one go, and are meant to: typed control tokens, and answers
        # that begin with space after a text.
        differs = SENTINEL in full_text or any(
            answer is not None and text[:1].isspace() and not before.endswith(tuple(self.control))
            for (before, _), (text, answer) in itertools.pairwise(pieces)
        )
        if not differs:
            full_ids = self.tokenizer(full_text, add_special_tokens=False, verbose=False)["input_ids"]
            if [token for run, _ in segments for token in run] != full_ids:
                raise TemplateError("its tokenizer gives the parts other ids than the full text")
        return segments

    def split_at_tokens(self, pieces):
        """Yield runs of pieces that are encoded in one go: `(is a control token, text, answer)`.

        A template's text and a content are encoded together, as in a prompt at inference; an answer begins a new run,
        as it does at inference. Some control tokens absorb the space beside them, as Phi's do.
        """
        text, owner, absorbs_space = "", None, False
        for piece, answer in pieces:
            for part in self.pattern.split(piece):
                token = self.control.get(part)
                if text and (token or answer != owner):
                    text = text.replace(SENTINEL, "")
                    yield False, text.rstrip() if token and token.lstrip and answer == owner else text, owner
                    text = ""
                if token:
                    yield True, part, answer
                    absorbs_space, owner = token.rstrip, answer
                elif part:
                    continues = answer is None or answer == owner
                    part = part.lstrip() if absorbs_space and not text and continues else part
                    text, owner, absorbs_space = text + part, answer, absorbs_space and not part
        if text:
            yield False, text.replace(SENTINEL, ""), owner


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


def split_at_answers(text, turns):
    """Cut a rendered text into pieces `(text, answer)` at the answers whose text it begins with.

    An answer's piece has the number of its message, and ends with the end of its turn; that of context has None.
    """
    position = 0
    for turn in turns:
        if text.startswith(turn.text):
            yield text[position : turn.begin], None
            yield turn.text[turn.begin :], turn.number
            position = len(turn.text)
    yield text[position:], None


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
        chat, tools = template.prepare(template.extract_inline(messages))
        (text,) = template.render([chat], tools, generation=True)
        return [number for ids, _ in template.encode([(text, None)]) for number in ids]


def encode(conversations, tokenizer):
    """Conversations by the tokenizer's own template: for each its examples, lists of segments `(ids, supervised)`."""
    template, encoded = get_template(tokenizer), []
    for messages in conversations:
        with with_conversation(messages):
            examples = []
            for pieces, supervised in template.examples(template.extract_inline(messages)):
                examples.append([(ids, answer in supervised) for ids, answer in template.encode(pieces)])
            encoded.append(examples)
    return encoded


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
