"""A model's own chat template, parsed so that its answers can be masked and no text can forge a turn.

The template is rendered with a placeholder for each content. What stands between the placeholders is the template's own
and may hold control tokens; what goes into them is somebody's text and is encoded as text. Nothing is trusted: every
conversation is also rendered as it is, and where the two ways differ, or an answer does not stand where the model would
begin it at inference, the template is refused with that conversation as the example.
"""

import re
import unicodedata
from typing import NamedTuple

import jinja2

from config import UserError, first_line

OPEN, CLOSE = "\ue000", "\ue001"  # from Unicode's private use area: no template has them


class Piece(NamedTuple):
    """A part of a rendered conversation: the template's own text, or the slot of a message's content."""

    text: str
    slot: int | None = None
    answer: int | None = None  # the message whose answer, with its end of turn, this belongs to


class Template:
    """The chat template of a tokenizer, and what it makes of each sequence of roles."""

    def __init__(self, tokenizer):
        self.tokenizer, self.layouts = tokenizer, {}
        special = sorted(map(str, tokenizer.get_added_vocab()), key=len, reverse=True)
        self.control = re.compile("(" + "|".join(map(re.escape, special)) + ")") if special else re.compile("(?!)()")
        ending = self.layout(("user", "assistant"))[-2]  # before the literal, perhaps empty, that closes the text
        self.end_of_turn = self.control.search(ending.text).group()

    def render(self, messages, generation=False):
        """The text that the template makes of some messages."""
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)

    def layout(self, roles):
        """The list of `Piece`s of a conversation with such roles.

        Raises:
            UserError: the template drops, repeats or reorders contents, rewrites earlier turns, or does not end an
                answer with a control token.
        """
        if roles not in self.layouts:
            self.layouts[roles] = list(self.parse(roles))
        return self.layouts[roles]

    def parse(self, roles):
        """Yield the `Piece`s of a conversation of placeholders; see `layout`."""
        messages = [{"role": role, "content": f"{OPEN}{number}{CLOSE}"} for number, role in enumerate(roles)]
        try:
            parts = re.split(f"{OPEN}([0-9]+){CLOSE}", self.render(messages))
            answers = [number for number, role in enumerate(roles) if role == "assistant"]
            prompts = {number: self.render(messages[:number], generation=True) for number in answers}
        except jinja2.TemplateError as error:
            self.refuse(roles, f"it does not take them: {first_line(error)}")
        if parts[1::2] != [str(number) for number in range(len(roles))]:
            self.refuse(roles, "it drops, repeats or reorders contents")
        before = ""  # the text that has been yielded, with placeholders
        literal = parts[0]  # the template's text after it
        for number, role in enumerate(roles):
            following = parts[2 * number + 2]
            if role != "assistant":
                yield from (Piece(literal), Piece("", number))
                before, literal = before + literal + messages[number]["content"], following
                continue
            opening = (before + literal).removeprefix(prompts[number])
            if len(opening) == len(before + literal) or opening.strip():
                self.refuse(roles, "an answer does not follow on what the model is prompted with at inference")
            ending = self.control.search(following)
            if not ending or following[: ending.start()].strip():
                self.refuse(roles, "it does not end an answer with a control token")
            yield Piece(literal[: len(literal) - len(opening)])
            yield from (Piece(opening, None, number), Piece("", number, number))
            yield Piece(following[: ending.end()], None, number)
            before += literal + messages[number]["content"] + following[: ending.end()]
            literal = following[ending.end() :]
        yield Piece(literal)

    def fill(self, messages):
        """The `Piece`s of a conversation with their texts, checked against what the template makes of it."""
        layout = self.layout(tuple(message["role"] for message in messages))
        rendered = self.render([{"role": message["role"], "content": message["content"]} for message in messages])
        for change in (str, str.strip):  # many templates trim contents
            filled = [
                piece if piece.slot is None else piece._replace(text=change(messages[piece.slot]["content"]))
                for piece in layout
            ]
            if "".join(piece.text for piece in filled) == rendered:
                return filled
        self.refuse_conversation(messages, "it changes what messages say")

    def refuse(self, roles, why):
        raise UserError(
            f"--chat-template model: the model's template cannot be masked; in a conversation of {', '.join(roles)}, "
            f"{why}; use --chat-template chatml"
        )

    def refuse_conversation(self, messages, why):
        said = " | ".join(f"{message['role']}: {message['content']:.40}" for message in messages[:4])
        raise UserError(
            f"--chat-template model: the model's template cannot be masked: {why}, in the conversation «{said}»; "
            "use --chat-template chatml"
        )


def encode_texts(texts, tokenizer):
    """Ids of plain texts, a list each; what looks like a special token in them stays text."""
    if not texts:
        return []
    return tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]


def encode(conversations, tokenizer):
    """Ids of conversations by the tokenizer's own template.

    Returns:
        For each conversation a list of `(ids, answer)`: the number of the message whose content, with its end of turn,
        these ids are, or None for whatever is no answer.

    Raises:
        UserError: the template cannot be masked; a conversation is named as an example.
    """
    template = Template(tokenizer)
    filled = [template.fill(messages) for messages in conversations]
    cut = [list(segments(pieces, template.control)) for pieces in filled]
    texts = iter(encode_texts([run for row in cut for is_control, run, _ in row if not is_control], tokenizer))

    def ids_of(is_control, run):
        return [tokenizer.convert_tokens_to_ids(run)] if is_control else next(texts)

    encoded = [[(ids_of(is_control, run), answer) for is_control, run, answer in row] for row in cut]
    for messages, pieces, row in zip(conversations, filled, encoded, strict=True):
        check(messages, pieces, row, template)
    return encoded


def segments(pieces, control):
    """Cut pieces into `(is a control token, text, answer)`: what is encoded at once.

    A template's text and a content are encoded together, as in a prompt at inference; an answer begins a new segment,
    as it does at inference.
    """
    text, owner = "", None
    for piece in pieces:
        for part in control.split(piece.text):
            is_control = piece.slot is None and control.fullmatch(part)
            if text and (is_control or piece.answer != owner):
                yield False, text, owner
                text = ""
            if is_control:
                yield True, part, piece.answer
            elif part:
                text, owner = text + part, piece.answer
    if text:
        yield False, text, owner


def check(messages, pieces, row, template):
    """Hold an encoded conversation against the template's own ids, and each answer against what it should say."""
    tokenizer = template.tokenizer
    for answer in {answer for _, answer in row} - {None}:
        ids = [number for run, whose in row for number in run if whose == answer]
        expected = "".join(piece.text for piece in pieces if piece.answer == answer)
        if normalized(tokenizer.decode(ids)) != normalized(expected):
            template.refuse_conversation(messages, "the ids of an answer do not decode to that answer")
    contents = [message["content"] for message in messages]
    if any(template.control.search(text) or text != text.lstrip() for text in contents):
        return  # encoded at once, such a text would be something else, which is why it is not
    whole = tokenizer("".join(piece.text for piece in pieces), add_special_tokens=False)["input_ids"]
    if [number for run, _ in row for number in run] != whole:
        template.refuse_conversation(messages, "its tokenizer gives the parts other ids than the whole")


def normalized(text):
    """A text without what tokenizers may normalise."""
    return unicodedata.normalize("NFKC", text).strip()
