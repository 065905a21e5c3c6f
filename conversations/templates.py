"""A model's own chat template, and what of its text is the context of an answer, an answer, or neither.

The definition. For each assistant message k, the context is what the template renders from the messages before k with
the generation prompt, exactly as at inference. Supervised is what the template writes after that, up to and including
the token that ends the turn. Where the text of an earlier answer begins the text of a later one, one rendering serves
both. Where it does not, as thoughts are dropped from earlier turns, the conversation becomes several examples: as many
as there are answers whose text begins no other's, which is the fewest.

No text forges a control token: before rendering, a mark is put into every text that looks like one, in contents,
thoughts, names, arguments and schemas. What then looks like a control token is the template's own. The mark is removed
when the parts are encoded, as plain text.
"""

import contextlib
import functools
import itertools
import json
import re
import unicodedata
from typing import NamedTuple

import jinja2
from tokenizers import Tokenizer

from config import UserError, first_line
from conversations.sources import InvalidRow

MARKS = list(map(chr, range(0x12000, 0x12399)))  # cuneiform: printable, so that no template escapes it, and rare
THOUGHT = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)
CALL = re.compile(r"\s*<tool_call>(.*?)</tool_call>", re.DOTALL)
RESULT = re.compile(r"\s*<tool_response>\n?(.*?)\n?</tool_response>\s*", re.DOTALL)
TAG = r"<[^<>]+>"
NO_THOUGHT = re.compile(rf"(?:{TAG}\w*\s*{TAG}|</[^<>]+>)\s*$")  # an empty thought, or only its end: do not think
ARGUMENTS = ("object", "text")  # how templates take those of tool calls

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL_PROBE = [{"type": "function", "function": {"name": "lookup", "description": "Look up.", "parameters": PARAMETERS}}]
CALLED = {"type": "function", "id": "abcdefgh1", "function": {"name": "lookup", "arguments": {"city": "Oslo"}}}
CALL_PROBE = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [CALLED]}]


class TemplateError(InvalidRow):
    """A conversation that the template cannot write."""


class Turn(NamedTuple):
    """An answer as the model meets it."""

    number: int  # of its message
    text: str  # its context, what the model should write, and the token that ends the turn
    begin: int  # where in the text the answer begins


class Piece(NamedTuple):
    """A part of an example's text: an answer with its end of turn, or context."""

    text: str
    mark: str  # which may be in the text; see `Template.guarded`
    answer: int | None = None  # the number of the answer's message


class Template:
    """The chat template of a tokenizer."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        written = str(tokenizer.chat_template)
        added = {str(token): token for token in tokenizer.added_tokens_decoder.values()}
        self.control = {
            text: token for text, token in added.items() if text.strip() and (token.special or text in written)
        }
        longest_first = sorted(map(re.escape, self.control), key=len, reverse=True)
        self.pattern = re.compile("(" + "|".join(longest_first) + ")") if longest_first else re.compile("(?!)()")
        self.heads = {text[:end] for text in self.control for end in range(1, len(text))}
        self.tails = {text[start:] for text in self.control for start in range(1, len(text))}
        self.edge = max(map(len, self.heads), default=0)
        self.end_of_turn = self.find_end_of_turn()

    def find_end_of_turn(self):
        """The control token that ends an answer, whether or not the conversation goes on after it.

        Raises:
            TemplateError: there is none.
        """
        chat = [
            {"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(("Hi", "reply", "So"))
        ]
        try:
            texts = self.render([chat[:2], chat], None)
        except TemplateError:  # a template that is for tools alone, as one of Hermes'
            texts = self.render([chat[:2], chat], TOOL_PROBE)
        last, earlier = (text.rpartition("reply")[1:] for text in texts)
        tokens = self.pattern.findall(last[1])
        if not (last[0] and tokens):
            raise TemplateError("it does not end an answer with a control token")
        following = self.pattern.findall(earlier[1]) if earlier[0] else []
        same = [
            one for one, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(tokens, following, strict=False))
        ]
        # A template that begins the next turn whatever follows, as Command A's, writes more than the end.
        return str(self.tokenizer.eos_token) if self.tokenizer.eos_token in same else (same or tokens[:1])[-1]

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

    def encode_texts(self, texts):
        """Ids of plain texts, a list each."""
        return [encoding.ids for encoding in self.encoder.encode_batch_fast(texts, add_special_tokens=False)]

    # --- from a conversation to what the template takes

    @functools.cached_property
    def call_form(self):
        """Which of ARGUMENTS makes the template write a tool call as JSON or XML; None where it writes none."""
        for form in ARGUMENTS:
            written = self.probe([taken(message, form) for message in CALL_PROBE], TOOL_PROBE)
            if all(word in written for word in ("lookup", "city", "Oslo")) and not re.search(r"'city'|\\\"", written):
                return form
        return None

    @functools.cached_property
    def stops(self):
        """The control tokens that end an answer: a text, and a call of a tool, after which the tool is next."""
        if self.call_form is None:
            return [self.end_of_turn]
        chat = [taken(message, self.call_form) for message in CALL_PROBE]
        (prompt,), (text,) = self.render([chat[:-1]], TOOL_PROBE, generation=True), self.render([chat], TOOL_PROBE)
        try:
            turn = self.turn(1, prompt, text, *reversed(chat))
            return list(dict.fromkeys([self.end_of_turn, self.pattern.findall(turn.text)[-1]]))
        except TemplateError:  # as the first conversation with a call will be
            return [self.end_of_turn]

    @functools.cached_property
    def takes_thoughts(self):
        """Whether the template writes thoughts that stand beside contents; where not, they are part of the content."""
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", **thought_of("Hm?")}]
        return "Hm?" in self.probe(messages)

    def probe(self, messages, tools=None):
        """What the template writes of the last message; nothing where it does not take it."""
        try:
            (prompt,), (text,) = self.render([messages[:-1]], tools, generation=True), self.render([messages], tools)
        except TemplateError:
            return ""
        return text[common_length(prompt, text) :]

    def structured(self, messages):
        """Messages in which thoughts and tool calls that are written into contents stand beside them.

        Results written so are taken apart only where the calls were written so: else they are what a tool said.
        """
        found, written_calls = [], 0
        for number, message in enumerate(messages, 1):
            message = dict(message)
            if message["role"] == "assistant":
                inside = THOUGHT.fullmatch(message["content"])
                if inside and "thinking" not in message and inside[1].strip():
                    message |= {"thinking": inside[1], "content": inside[2], "inline": True}
                texts = CALL.findall(message["content"]) if self.call_form and "tool_calls" not in message else []
                if texts:
                    calls = [call_in(text, number) for text in texts]
                    message |= {"tool_calls": calls, "content": CALL.sub("", message["content"]).rstrip()}
                written_calls = len(texts)
            results = [message["content"]]
            if message["role"] == "tool":
                wrapped = re.fullmatch(f"(?:{RESULT.pattern})+", message["content"], re.DOTALL)
                inside = RESULT.findall(message["content"]) if wrapped else []
                results = inside if 0 < len(inside) <= written_calls else results
                written_calls -= len(results)
            found += [{**message, "content": content} for content in results]
        return found

    def guarded(self, value, mark):
        """A JSON value in whose texts, keys too, no control token stands or begins or ends."""
        if isinstance(value, str):
            while self.pattern.search(value):
                value = self.pattern.sub(lambda found: found[0][0] + mark + found[0][1:], value)
            said = value.strip()
            if any(said[-length:] in self.heads for length in range(1, min(self.edge, len(said)) + 1)):
                value = value[: len(value.rstrip())] + mark + value[len(value.rstrip()) :]
            if any(said[:length] in self.tails for length in range(1, min(self.edge, len(said)) + 1)):
                start = len(value) - len(value.lstrip())
                value = value[:start] + mark + value[start:]
            return value
        if isinstance(value, dict):
            return {self.guarded(key, mark): self.guarded(item, mark) for key, item in value.items()}
        return [self.guarded(item, mark) for item in value] if isinstance(value, list) else value

    def guarded_message(self, message, mark):
        """A message with guarded texts; its own keys, and its role, are ours."""
        guarded = {key: value if key == "role" else self.guarded(value, mark) for key, value in message.items()}
        for call in guarded.get("tool_calls", []):
            call["type"] = "function"
        return guarded

    def prepared(self, messages):
        """Messages and tools as the template takes them, and the mark that is in them.

        Raises:
            TemplateError: the template writes no tool calls, and there are tools.
        """
        strings = "".join(json.dumps(message, ensure_ascii=False) for message in messages)
        mark = next((mark for mark in MARKS if mark not in strings), None)
        if mark is None:
            raise TemplateError("it has every character that could mark what is text")
        tools = self.guarded(messages[0].get("tools", []), mark) if messages else []
        calls = [number for number, message in enumerate(messages, 1) if message.get("tool_calls")]
        if (calls or tools) and self.call_form is None:
            where = f"message {calls[0]}" if calls else ""
            raise TemplateError(
                "the template writes no tool calls; use a model or a --chat-template FILE that does", where
            )
        chat = []
        for message in messages:
            given = {name: value for name, value in message.items() if name not in ("tools", "train")}
            message = self.guarded_message(given, mark)
            thought, inline = message.pop("thinking", None), message.pop("inline", False)
            if thought is not None and self.takes_thoughts:
                message |= thought_of(thought.strip("\n") if inline else thought)
                message["content"] = message["content"].lstrip("\n") if inline else message["content"]
            elif thought is not None:
                space = "" if inline else "\n"
                message["content"] = f"<think>{space}{thought}{space}</think>{space * 2}{message['content']}"
            elif message["role"] == "assistant" and (empty := THOUGHT.fullmatch(message["content"].replace(mark, ""))):
                message["content"] = f"<think>{empty[1]}</think>{self.guarded(empty[2], mark)}"
            chat.append(taken(message, self.call_form))
        return chat, tools, mark

    # --- from what the template takes to examples

    def render(self, chats, tools, generation=False):
        """The texts that the template makes of some lists of messages.

        Raises:
            TemplateError: it raises an error over one of them.
            UserError: it is no template at all.
        """
        try:
            return self.tokenizer.apply_chat_template(
                chats, tools=tools or None, tokenize=False, add_generation_prompt=generation
            )
        except jinja2.TemplateSyntaxError as error:
            raise not_a_template(error) from error
        except Exception as error:  # a template is somebody's program: it may divide by zero
            roles = ", ".join(message["role"] for message in max(chats, key=len))
            raise TemplateError(f"in a conversation of {roles}, it does not take them: {first_line(error)}") from error

    def turns(self, chat, wanted, tools):
        """The `Turn`s of a conversation's answers, and the text of the whole.

        Raises:
            TemplateError: an answer that is wanted does not follow on its prompt, or has no end.
        """
        answers = [number for number, message in enumerate(chat) if message["role"] == "assistant"]
        prompts = self.render([chat[:number] for number in answers], tools, generation=True)
        ends = [number + 1 for number in answers]
        texts = self.render([chat[:end] for end in ends + [len(chat)] * (ends[-1] < len(chat))], tools)
        turns = []
        for number, prompt, text in zip(answers, prompts, texts, strict=False):
            try:
                turns.append(self.turn(number, prompt, text, chat[number], chat[number - 1] if number else None))
            except TemplateError:
                if number in wanted:
                    raise
        return turns, texts[-1]

    def turn(self, number, prompt, text, answer, question=None):
        """The `Turn` of the last message of a rendered conversation, which is the answer to a rendered prompt.

        Args:
            answer, question: the last two messages, as the template takes them.
        """
        if not text.startswith(prompt):
            begin = self.begin_of_answer(prompt, text, answer, question)
            if begin is None:
                raise TemplateError(
                    "an answer does not follow on what the model is prompted with at inference, "
                    f"which ends with {prompt[-30:]!r}",
                    f"message {number + 1}",
                )
            text = prompt + text[begin:]
        end, after = None, len(text)
        for token in reversed(list(self.pattern.finditer(text, len(prompt)))):  # those with nothing but space after
            if text[token.end() : after].strip():
                break
            after = token.start()
            if end is None or token[0] == self.end_of_turn:
                end = token.end()
        if end is None:
            raise TemplateError("it does not end an answer with a control token", f"message {number + 1}")
        return Turn(number, text[:end], len(prompt))

    def begin_of_answer(self, prompt, text, answer, question):
        """Where an answer begins in a text that does not begin with its prompt; None where it does not follow on it.

        Two kinds of prompts are not written again as the conversation goes on: those that differ before what was asked,
        as Mistral's, whose system message is part of the last question; and those that end with an empty thought, as
        Gemma 4's, so that the model does not think.
        """
        asked = question["content"].strip() if question else ""
        tail = prompt[prompt.rfind(asked) :] if asked else ""
        if tail in text and self.pattern.search(tail):  # which no text can say
            return text.rfind(tail) + len(tail)
        if answer.get("reasoning_content", "").strip() or answer["content"].lstrip().startswith("<think>"):
            return None
        for start in (found.start() for found in re.finditer("<", prompt)):
            empty = NO_THOUGHT.match(prompt, start)
            tags = tuple(re.findall(TAG, empty[0])) if empty else ()
            if empty and text.startswith(prompt[:start]) and not text.startswith(tags, start):
                return start
        return None

    def examples(self, messages, wanted):
        """A conversation as examples: for each its `Piece`s, and the numbers of the answers that it supervises.

        Args:
            messages: as `structured` returns them.
            wanted: the numbers of the messages that are to be supervised.

        Raises:
            TemplateError: the template cannot write it so that every answer stands where the model would begin it, or
                it leaves out something that was said.
        """
        chat, tools, mark = self.prepared(messages)
        turns, whole = self.turns(chat, wanted, tools)
        left = [turn for turn in turns if turn.number in wanted]
        if not left:  # a conversation in which nothing is supervised is counted later
            return [(list(pieces(whole, turns, mark)), set())]
        for turn in left:
            check_answer(messages[turn.number], turn, mark)
            check_context(messages[: turn.number], turn.text, mark)
        texts = []
        for turn in reversed(left):
            if not any(text.startswith(turn.text) for text in texts):
                texts.append(whole if whole.startswith(turn.text) else turn.text)
        chosen = []
        for text in reversed(texts):  # an answer in several examples is supervised in the first, the shortest
            served = {turn.number for turn in left if text.startswith(turn.text)}
            left = [turn for turn in left if turn.number not in served]
            chosen.append((list(pieces(text, turns, mark)), served))
        return chosen


def common_length(one, other):
    """How many characters two texts begin with in common."""
    return next(
        (at for at, pair in enumerate(zip(one, other, strict=False)) if len({*pair}) > 1), min(len(one), len(other))
    )


def taken(message, form):
    """A message as a template takes it: the arguments of its tool calls as an object or as JSON text."""
    if form != "text" or not message.get("tool_calls"):
        return message
    functions = [call["function"] for call in message["tool_calls"]]
    texts = [{**function, "arguments": as_json(function["arguments"])} for function in functions]
    calls = [{**call, "function": text} for call, text in zip(message["tool_calls"], texts, strict=True)]
    return {**message, "tool_calls": calls}


def thought_of(text):
    """A thought as templates take it: most read the first name; gpt-oss's and LFM2's the second."""
    return {"reasoning_content": text, "thinking": text}


def as_json(value):
    return json.dumps(value, ensure_ascii=False)


def call_in(text, number):
    """The tool call that is written as JSON in a text.

    Raises:
        TemplateError: it is none.
    """
    try:
        call = json.loads(text)
        name, arguments = call["name"], call.get("arguments", call.get("parameters", {}))
        if isinstance(name, str) and isinstance(arguments, dict):
            return {"type": "function", "function": {"name": name, "arguments": arguments}}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass
    raise TemplateError('what stands in <tool_call> is not {"name": …, "arguments": {…}} in JSON', f"message {number}")


def texts_in(value):
    """The texts of a JSON value, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from texts_in(item)
    elif isinstance(value, list):
        for item in value:
            yield from texts_in(item)


def stands_in(said, written):
    """Whether a text is in another, as it is or as JSON or Python write it; space around it may be trimmed."""
    said = said.strip()
    return any(form in written for form in (said, as_json(said)[1:-1], repr(said)[1:-1]))


def check_answer(message, turn, mark):
    """Raise `TemplateError` where the template leaves out or changes something that an answer says."""
    written, where = turn.text[turn.begin :].replace(mark, ""), f"message {turn.number + 1}"
    blank = THOUGHT.fullmatch(message["content"])  # a thought that says nothing
    content = blank[2] if blank and not blank[1].strip() else message["content"]
    if content.strip() not in written:
        raise TemplateError("it changes what messages say", where)
    if message.get("thinking", "").strip() not in written:
        raise TemplateError("it leaves the thought out", where)
    calls = [call["function"] for call in message.get("tool_calls", [])]
    for call in calls:
        count = sum(other["name"] == call["name"] for other in calls)
        if written.count(call["name"]) < count or not all(
            stands_in(text, written) for text in texts_in(call["arguments"])
        ):
            raise TemplateError(f"it leaves out a call to {call['name']}, or changes it", where)


def check_context(messages, text, mark):
    """Raise `TemplateError` where the template leaves out a message that is no answer, or a tool."""
    text = text.replace(mark, "")
    for number, message in enumerate(messages, 1):
        if message["role"] != "assistant" and not stands_in(message["content"], text):
            raise TemplateError("it leaves out or changes what it says", f"message {number}")
    for tool in messages[0].get("tools", []) if messages else []:
        if tool["function"]["name"] not in text:
            raise TemplateError(f"it leaves out the tool {tool['function']['name']}")


def pieces(text, turns, mark):
    """Cut a rendered text into `Piece`s at the answers whose text it begins with; the mark is kept in them."""
    position = 0
    for turn in turns:
        if text.startswith(turn.text):
            yield from (
                Piece(text[position : turn.begin], mark),
                Piece(text[turn.begin : len(turn.text)], mark, turn.number),
            )
            position = len(turn.text)
    yield Piece(text[position:], mark)


def difference_of_marks(tokenizer):
    """What a template's own `{% generation %}` marks mark that is not supervised, and the other way; None: nothing."""
    texts = ("Hi", "Hello.", "And now?", "So.")
    chat = [{"role": ("user", "assistant")[at % 2], "content": text, "train": True} for at, text in enumerate(texts)]
    marked = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    examples = encode([chat], tokenizer, lambda messages: [message["role"] == "assistant" for message in messages])[0]
    supervised = [number for row, answers in examples for ids, answer in row if answer in answers for number in ids]
    theirs = itertools.compress(marked["input_ids"], marked["assistant_masks"])
    ours, theirs = tokenizer.decode(supervised), tokenizer.decode(list(theirs))
    return None if ours == theirs else f"they mark {theirs!r} where {ours!r} is supervised"


@functools.lru_cache(maxsize=4)
def template_of(tokenizer, _written):
    """The `Template` of a tokenizer, made once; `_written` is what it says, for when that changes."""
    return Template(tokenizer)


def stop_ids(tokenizer):
    """The ids at which an answer ends: the first is that of the tokenizer's stop token."""
    stops = template_of(tokenizer, str(tokenizer.chat_template)).stops
    return list(dict.fromkeys([tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(stops)]))


def encode_texts(texts, tokenizer):
    """Ids of plain texts, a list each; what looks like a special token in them stays text."""
    if not texts:
        return []
    return tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]


def encode_prompt(messages, tokenizer):
    """Ids of messages with the generation prompt, as the model meets them at inference; a list."""
    with naming(messages):
        template = template_of(tokenizer, str(tokenizer.chat_template))
        chat, tools, mark = template.prepared(template.structured(messages))
        (text,) = template.render([chat], tools, generation=True)
    return [number for ids, _ in encode_pieces([[Piece(text, mark)]], template)[0] for number in ids]


def encode(conversations, tokenizer, wanted_of):
    """Ids of conversations by the tokenizer's own template.

    Args:
        wanted_of: gives, for messages, whether each is to be supervised.

    Returns:
        For each conversation its examples: a list of `(segments, supervised)`. Segments are `(ids, answer)`: the number
        of the message whose answer, with its end of turn, these ids are, or None for whatever is no answer. Supervised
        are the numbers of the answers that are so in this example.

    Raises:
        UserError: the template cannot write a conversation, which is named.
    """
    template = template_of(tokenizer, str(tokenizer.chat_template))
    chosen = []
    for messages in conversations:
        with naming(messages):
            messages = template.structured(messages)
            wanted = {number for number, wanted in enumerate(wanted_of(messages)) if wanted}
            chosen.append(template.examples(messages, wanted))
    written = [pieces for examples in chosen for pieces, _ in examples]
    encoded = encode_pieces(written, template)
    reasons, rows = check_ids(written, encoded, template), iter(encoded)
    found = []
    for messages, examples in zip(conversations, chosen, strict=True):
        found.append([(next(rows), supervised) for _, supervised in examples])
        with naming(messages):
            for reason in itertools.islice(reasons, len(examples)):
                if reason:
                    raise TemplateError(*reason)
    return found


def not_a_template(error):
    """A `UserError` about a template's syntax."""
    return UserError(f"--chat-template: line {error.lineno}: {first_line(error)}")


@contextlib.contextmanager
def naming(messages):
    """Let what a template refuses name the conversation."""
    try:
        yield
    except TemplateError as error:
        said = " | ".join(f"{message['role']}: {message['content']:.40}" for message in messages[:4])
        where = f", in the conversation «{said}»" if messages else ""
        raise UserError(f"--chat-template: the template cannot be masked: {error}{where}") from error


def encode_pieces(examples, template):
    """For each list of `Piece`s its segments `(ids, answer)`."""
    cut = [list(segments(pieces, template)) for pieces in examples]
    texts = iter(template.encode_texts([run for row in cut for is_control, run, _ in row if not is_control]))

    def ids_of(is_control, run):
        return [template.tokenizer.convert_tokens_to_ids(run)] if is_control else next(texts)

    return [[(ids_of(is_control, run), answer) for is_control, run, answer in row] for row in cut]


def segments(pieces, template):
    """Cut pieces into `(is a control token, text, answer)`: what is encoded at once.

    A template's text and a content are encoded together, as in a prompt at inference; an answer begins a new segment,
    as it does at inference. Some control tokens take the space beside them in, as Phi's do.
    """
    text, owner, takes_space = "", None, False
    for piece in pieces:
        for part in template.pattern.split(piece.text):
            token = template.control.get(part)
            if text and (token or piece.answer != owner):
                text = text.replace(piece.mark, "")
                yield False, text.rstrip() if token and token.lstrip and piece.answer == owner else text, owner
                text = ""
            if token:
                yield True, part, piece.answer
                takes_space, owner = token.rstrip, piece.answer
            elif part:
                continues = piece.answer is None or piece.answer == owner
                part = part.lstrip() if takes_space and not text and continues else part
                text, owner, takes_space = text + part, piece.answer, takes_space and not part
    if text:
        yield False, text.replace(piece.mark, ""), owner


def check_ids(written, encoded, template):
    """Hold encoded examples against the ids of their whole text, and each answer against what it should say.

    Args:
        written: for each example its `Piece`s.
        encoded: for each its segments.

    Yields:
        For each why it is refused, or None.
    """
    texts = ["".join(piece.text for piece in pieces) for pieces in written]
    wholes = template.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    for pieces, text, row, whole in zip(written, texts, encoded, wholes, strict=True):
        ids = {}
        for run, answer in row:
            ids.setdefault(answer, []).extend(run)
        for piece in pieces:
            if piece.answer is not None:
                said = piece.text.replace(piece.mark, "")
                if normalized(template.tokenizer.decode(ids.get(piece.answer, []))) != normalized(said):
                    yield "the ids of an answer do not decode to that answer", f"message {piece.answer + 1}"
                    break
        else:
            # Encoded at once, such texts would be something else, which is why they are not.
            apart = pieces[0].mark in text or any(
                begins_with_space(*pair, template) for pair in itertools.pairwise(pieces)
            )
            same = apart or [number for run, _ in row for number in run] == whole
            yield None if same else ("its tokenizer gives the parts other ids than the whole",)


def begins_with_space(before, piece, template):
    """Whether an answer begins with space, and what stands before it is text."""
    follows_token = any(before.text.endswith(token) for token in template.control)
    return piece.answer is not None and piece.text[:1].isspace() and not follows_token


def normalized(text):
    """A text without what tokenizers may normalise."""
    return unicodedata.normalize("NFKC", text).strip()
