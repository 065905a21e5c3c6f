"""The masking: from the messages of a conversation to token ids and labels.

What the assistant writes is supervised: its content, its `<|im_end|>` and the newline after it. Everything else is
context, with the label -100. A conversation is one example, or a few where its template writes an answer differently
once others follow it. docs/masking.md has the definition.
"""

from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from conversations import chatml, templates
from conversations.chatml import encode_chatml, is_chatml

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


def encode_each(conversations: list, tokenizer, supervise: str = "all") -> list[list[Example]]:
    """Conversations to their `Example`s: for each a list of one, or of as few as its template needs.

    Args:
        conversations: lists of messages, as `conversations.formats` makes them.
        supervise: "all" of the assistant's messages, or the "last"; one with `"train": False` never is.

    Raises:
        UserError: the template cannot write a conversation, which is named.
    """
    marked = [mark_supervised(messages, supervise) for messages in conversations]
    encode_marked = encode_chatml if is_chatml(tokenizer) else templates.encode
    return [[make_example(*example) for example in examples] for examples in encode_marked(marked, tokenizer)]


def mark_supervised(messages, supervise):
    """The messages with `"train"` set in each: True for an assistant's message that is supervised, else False."""
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    chosen = set(answers if supervise == "all" else answers[-1:])
    return [
        {**message, "train": number in chosen and message.get("train", True)} for number, message in enumerate(messages)
    ]


def make_example(ids, spans):
    """An `Example` of ids in which some spans `(begin, end)` are supervised."""
    input_ids = torch.tensor(ids, dtype=torch.long)
    labels = torch.full_like(input_ids, IGNORE)
    for begin, end in spans:
        labels[begin:end] = input_ids[begin:end]
    return Example(input_ids, labels)


def encode_prompt(prompt: str | list, tokenizer) -> torch.Tensor:
    """A user's prompt, or messages, with the header of the answer, which the model generates next: ids (T,)."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    encode_messages = chatml.encode_prompt if is_chatml(tokenizer) else templates.encode_prompt
    return torch.tensor(encode_messages(messages, tokenizer))
