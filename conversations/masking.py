"""The masking: from the messages of a conversation to token ids and labels.

What the assistant writes is supervised: its content, its `<|im_end|>` and the newline after it. Everything else is
context, with the label -100. A conversation is one example, or a few where its template writes an answer differently
once others follow it. docs/masking.md has the definition.
"""

import functools
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from conversations import chatml, templates
from conversations.chatml import encode_chatml, is_chatml
from conversations.templates import encode_texts

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
    """Conversations to `Example`s, in their order, by the tokenizer's template; see `encode_each`."""
    return [example for examples in encode_each(conversations, tokenizer, supervise) for example in examples]


def encode_each(conversations: list, tokenizer, supervise="all", max_length=None) -> list[list[Example]]:
    """Conversations to their `Example`s, for each a list; the arguments and errors are those of `encode_as_lists`."""
    encoded = encode_as_lists(conversations, tokenizer, supervise, max_length)
    tensor = functools.partial(torch.tensor, dtype=torch.long)
    return [[Example(tensor(ids), tensor(labels)) for ids, labels in examples] for examples in encoded]


def encode_as_lists(conversations, tokenizer, supervise="all", max_length=None):
    """Conversations to their examples, pairs of lists `(ids, labels)`: for each one, or as few as its template needs.

    The tokenizer begins at once, in a thread; an iterator makes the examples. A million tensors would take a minute.

    Args:
        conversations: lists of messages, as `conversations.formats` makes them.
        supervise: "all" of the assistant's messages, or the "last"; one with `"train": False` never is.
        max_length: the tokens after which a text without turns is cut; None: the context length.

    Raises:
        UserError: the template cannot write a conversation, which is named.
    """
    without_turns = [encode_without_turns(messages, tokenizer, max_length) for messages in conversations]
    chats = [messages for messages, found in zip(conversations, without_turns, strict=True) if found is None]
    marked = [mark_supervised(messages, supervise) for messages in chats]
    encode_marked = encode_chatml if is_chatml(tokenizer) else templates.encode
    encoded = iter(encode_marked(marked, tokenizer))
    return (found or [(ids, make_labels(ids, spans)) for ids, spans in next(encoded)] for found in without_turns)


def encode_without_turns(messages, tokenizer, max_length=None):
    """The examples of a text or of token ids with labels, as `conversations.formats` has them; None for a chat.

    A text ends with the stop token, and begins with BOS where the tokenizer writes one. A longer one is cut; each
    part begins with the last token of the one before it, so that every token but the first is predicted once.
    """
    message = messages[0] if messages else {}
    role = message.get("role")
    if role == "tokens":
        return [(message["content"], message["labels"])]
    if role != "text":
        return None
    has_bos = tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    begin = [tokenizer.bos_token_id] if has_bos else []
    ids = begin + encode_texts([message["content"]], tokenizer)[0] + [tokenizer.eos_token_id]
    length = max_length or tokenizer.model_max_length
    labels = [IGNORE] * len(begin) + ids[len(begin) :]
    starts = range(0, max(1, len(ids) - 1), max(1, length - 1))
    return [(ids[start : start + length], labels[start : start + length]) for start in starts]


def mark_supervised(messages, supervise):
    """The messages with `"train"` set in each: True for an assistant's message that is supervised, else False."""
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    chosen = set(answers if supervise == "all" else answers[-1:])
    return [
        {**message, "train": number in chosen and message.get("train", True)} for number, message in enumerate(messages)
    ]


def make_labels(ids, spans):
    """The labels of ids of which some spans `(begin, end)` are supervised; lists."""
    labels = [IGNORE] * len(ids)
    for begin, end in spans:
        labels[begin:end] = ids[begin:end]
    return labels


def encode_prompt(prompt: str | list, tokenizer) -> torch.Tensor:
    """A user's prompt, or messages, with the header of the answer, which the model generates next: ids (T,)."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    encode_messages = chatml.encode_prompt if is_chatml(tokenizer) else templates.encode_prompt
    return torch.tensor(encode_messages(messages, tokenizer))
