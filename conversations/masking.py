"""The masking: from the messages of a conversation to token ids and labels.

What the assistant writes is supervised: its content, its `<|im_end|>` and the newline after it. Everything else is
context, with the label -100. A conversation is one example, or a few where its template writes an answer differently
once others follow it. docs/masking.md has the definition.
"""

import itertools
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from config import UserError
from conversations.chatml import encode_chatml, find_opening, is_chatml
from conversations.encoding import FIRST
from conversations.templates import get_template

IGNORE = -100  # torch's cross_entropy skips this label


class Example(NamedTuple):
    """An encoded conversation; `labels` are unshifted: `labels[i]` is `input_ids[i]` or IGNORE."""

    input_ids: torch.Tensor  # (T,) int64
    labels: torch.Tensor  # (T,) int64

    @property
    def supervised(self):
        """The mask of the tokens that have a label: (T,) bool."""
        return self.labels != IGNORE

    @property
    def supervised_tokens(self):
        """The number of labels that are predicted; nothing comes before the first token to predict it from."""
        return int(self.supervised[1:].sum())


def encode(conversations: list, tokenizer: PreTrainedTokenizerBase, supervise: str = "all") -> list[Example]:
    """Conversations to `Example`s, in their order; the arguments and errors are those of `encode_as_lists`."""
    examples = itertools.chain.from_iterable(encode_as_lists(conversations, tokenizer, supervise))
    return [Example(*(torch.tensor(values, dtype=torch.long) for values in pair)) for pair in examples]


def encode_as_lists(conversations, tokenizer, supervise="all", max_length=None):
    """Conversations to their examples, pairs of lists `(ids, labels)`: for each one, or as few as its template needs.

    The tokenizer begins at once, in a thread; an iterator makes the examples, and goes on after one that is refused.
    A million tensors would take a minute.

    Args:
        conversations: lists of messages, as `conversations.formats` makes them.
        supervise: "all" of the assistant's messages, or the "last"; one with `"train": False` never is.
        max_length: the tokens after which a text without turns is cut; None: the context length.

    Raises:
        UserError: the template cannot write a conversation, which is named.
    """
    chats = [mark_supervised(messages, supervise) for messages in conversations if is_chat(messages)]
    encoded = encode_chatml(chats, tokenizer) if is_chatml(tokenizer) else map(get_template(tokenizer).encode, chats)
    opening = tokenizer.convert_tokens_to_ids(find_opening(tokenizer))

    def finish(messages):
        if is_chat(messages):
            return make_examples(*next(encoded))
        return encode_plain(messages[0], tokenizer, opening, max_length or tokenizer.model_max_length)

    return map(finish, conversations)


def is_chat(messages):
    """Whether a conversation has turns, unlike a text and token ids as `conversations.formats` has them."""
    return not messages or messages[0]["role"] not in ("text", "tokens")


def encode_plain(message, tokenizer, opening, length):
    """The examples of a text, or the one of token ids with labels.

    A text begins with `opening`, the ids that the tokenizer puts before one, and ends with the stop token. It is cut
    into parts of `length` tokens, each beginning with the last token of the one before it.
    """
    if message["role"] == "tokens":
        return [(message["content"], message["labels"])]
    (ids,) = get_template(tokenizer).encoder.encode_runs([message["content"]], FIRST)
    ids = torch.tensor([*opening, *ids, tokenizer.eos_token_id])
    examples = slice_text(ids, length, overlap=1)
    examples[0].labels[: len(opening)] = IGNORE
    return [(example.input_ids.tolist(), example.labels.tolist()) for example in examples]


def slice_text(ids, length, overlap):
    """A text, (T,), as `Example`s of `length` tokens that predict each token but the first exactly once.

    Each begins with the last `overlap` tokens of the one before it, which are only context there.
    """
    examples = []
    for start in range(0, max(1, len(ids) - overlap), max(1, length - overlap)):
        labels = ids[start : start + length].clone()
        labels[1 : overlap if start else 1] = IGNORE
        examples.append(Example(ids[start : start + length], labels))
    return examples


def mark_supervised(messages, supervise):
    """The messages with `"train"` set in each: True for an assistant's message that is supervised, else False."""
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    chosen = set(answers if supervise == "all" else answers[-1:])
    return [
        {**message, "train": number in chosen and message.get("train", True)} for number, message in enumerate(messages)
    ]


def make_examples(turns, ids):
    """The fewest examples that have every turn; each answer is supervised once, in the first example that has it.

    An example has a turn where it begins with the ids of its context and its answer.

    Args:
        turns: for each answer that is supervised the ids of its context and its own.
        ids: those of all messages, of which the example with the last turn is made where it can be.
    """
    examples = []  # from the last to the first
    for context, answer in reversed(turns):
        turn = context + answer
        found = [example for example in examples if example[0][: len(turn)] == turn]
        if not found:
            longest = ids if ids[: len(turn)] == turn else turn
            found = [(longest, [IGNORE] * len(longest))]
            examples += found
        found[-1][1][len(context) : len(turn)] = answer
    return examples[::-1] or [(ids, [IGNORE] * len(ids))]


def encode_prompt(prompt: str | list, tokenizer) -> torch.Tensor:
    """A user's prompt, or messages, with the header of the answer, which the model generates next: ids (T,)."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    try:
        "".join(message["content"] for message in messages).encode()
    except UnicodeEncodeError as error:
        raise UserError("a prompt or the system message is not UTF-8; write it in UTF-8") from error
    if is_chatml(tokenizer):
        (example,) = encode([[*messages, {"role": "assistant", "content": "x"}]], tokenizer, "last")
        return example.input_ids[: example.supervised.nonzero()[0]]
    return torch.tensor(get_template(tokenizer).encode_prompt(messages))
