"""From a conversation to token ids and labels: ChatML, and which tokens are supervised.

A model's own template instead of ChatML is the business of templates.py.

ChatML writes every message as `<|im_start|>{role}\\n{content}<|im_end|>\\n`. What the assistant says is supervised: its
content, its `<|im_end|>` and the newline after it. Everything else is context, label -100.

The pieces are encoded one by one and the two control tokens are put in as ids: text can therefore never become a
control token, and a reply is encoded as the model meets it at inference, right after its header.
"""

import itertools
import sys
from typing import NamedTuple

import torch
from transformers import AutoConfig, AutoTokenizer

import templates
from config import UserError, first_line
from hub import LOADING_ERRORS
from templates import encode_texts

IGNORE = -100  # torch's cross_entropy skips this label
ROLES = ("system", "user", "assistant", "tool")
START, END = "<|im_start|>", "<|im_end|>"
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class Example(NamedTuple):
    """An encoded conversation; `labels` are unshifted: `labels[i]` is `input_ids[i]` or IGNORE."""

    input_ids: torch.Tensor  # (T,) int64
    labels: torch.Tensor  # (T,) int64

    @property
    def supervised_tokens(self):
        """How many tokens are predicted and scored; the first has nothing before it to be predicted from."""
        return int((self.labels[1:] != IGNORE).sum())


def load_tokenizer(path, local_files_only=False, chat_template="chatml"):
    """The tokenizer of a model, made to speak ChatML or its own template: control tokens, stop and padding token.

    Args:
        path, local_files_only: as `hub.find_model` returns them.
        chat_template: "chatml", or "model" for the template that the tokenizer came with.

    Returns:
        The tokenizer. What ends a turn is its eos token, `model_max_length` is what the model attends to. Where tokens
        had to be added it has more of them than the model has embeddings: `model.load_model` resizes.

    Raises:
        UserError: there is no tokenizer at `path`, it cannot keep control tokens apart from text, or its own template
            is missing or cannot be masked.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=local_files_only)
        config = AutoConfig.from_pretrained(path, local_files_only=local_files_only).get_text_config()
    except LOADING_ERRORS as error:
        raise UserError(f"--model {path}: no usable tokenizer and configuration ({first_line(error)})") from error
    if chat_template == "chatml":
        control, end = [START, END], END
        tokenizer.chat_template = CHATML
    elif tokenizer.chat_template is None:
        raise UserError(f"--chat-template model: {path} has no chat template; use --chat-template chatml")
    else:
        control, end = [], templates.Template(tokenizer).end_of_turn
    missing = [token for token in control if token not in tokenizer.get_vocab()]
    padding = "<|endoftext|>" if "<|endoftext|>" in tokenizer.get_vocab() else tokenizer.pad_token
    if padding in (None, end):  # whoever masks padding by its id would mask every stop
        padding = "<|pad|>"
        missing.append(padding)
    if missing:
        print(f"added to the tokenizer, and new rows to the embeddings: {' '.join(missing)}", file=sys.stderr)
    if control:
        tokenizer.add_special_tokens({"additional_special_tokens": control}, replace_extra_special_tokens=False)
    tokenizer.add_special_tokens({"eos_token": end, "pad_token": padding})
    tokenizer.model_max_length = getattr(config, "max_position_embeddings", tokenizer.model_max_length)
    for token in control or [end]:
        if token in tokenizer.convert_ids_to_tokens(encode_texts([token], tokenizer)[0]):
            raise UserError(
                f"--model {path}: its tokenizer reads {token} in a message as a control token; it cannot be used"
            )
    return tokenizer


def supervised_messages(messages, supervise="all"):
    """Which messages are supervised: a bool each.

    Args:
        supervise: "all" of the assistant's messages, or the "last"; one with `"train": False` never is.
    """
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    chosen = answers if supervise == "all" else answers[-1:]
    return [number in chosen and message.get("train", True) for number, message in enumerate(messages)]


def encode(conversations, tokenizer, supervise="all"):
    """Conversations to `Example`s, one each, in their order, by the tokenizer's template.

    Args:
        conversations: lists of `{"role", "content"}` messages with a role of ROLES, and perhaps `"train": False`.
        supervise: as for `supervised_messages`.
    """
    by_template = encode_chatml if tokenizer.chat_template == CHATML else templates.encode
    examples = []
    for messages, runs in zip(conversations, by_template(conversations, tokenizer), strict=True):
        is_supervised = supervised_messages(messages, supervise)
        input_ids = [number for ids, _ in runs for number in ids]
        labels = []
        for ids, answer in runs:
            labels += ids if answer is not None and is_supervised[answer] else [IGNORE] * len(ids)
        examples.append(Example(torch.tensor(input_ids), torch.tensor(labels)))
    return examples


def encode_chatml(conversations, tokenizer):
    """Ids of conversations in ChatML, for each a list of `(ids, answer)` as `templates.encode` returns."""
    start, end = tokenizer.convert_tokens_to_ids([START, END])
    header = {role: [start, *encode_texts([role + "\n"], tokenizer)[0]] for role in ROLES}
    footer = [end, *encode_texts(["\n"], tokenizer)[0]]
    texts = [message["content"] for messages in conversations for message in messages]
    contents = iter(encode_texts(texts, tokenizer))
    encoded = []
    for messages in conversations:
        runs = []
        for number, message in enumerate(messages):
            answer = number if message["role"] == "assistant" else None
            runs += [(header[message["role"]], None), (next(contents) + footer, answer)]
        encoded.append(runs)
    return encoded


def encode_prompt(prompt, tokenizer):
    """A user's prompt up to the point where the assistant answers: ids (T,), all context."""
    example = encode([[{"role": "user", "content": prompt}, {"role": "assistant", "content": "x"}]], tokenizer)[0]
    return example.input_ids[: (example.labels != IGNORE).int().argmax()]


RED, GREEN, PLAIN = "\033[31m", "\033[32m", "\033[0m"


def preview(example, tokenizer, color):
    """An example as text: what is supervised in green, the rest in red; without color, the supervised in `[[…]]`."""
    supervised = (example.labels != IGNORE).tolist()
    edges = [i for i in range(len(supervised)) if i == 0 or supervised[i] != supervised[i - 1]] + [len(supervised)]
    text = ""
    for begin, stop in itertools.pairwise(edges):
        span = tokenizer.decode(example.input_ids[begin:stop])
        if color:
            text += (GREEN if supervised[begin] else RED) + span + PLAIN
        else:
            text += f"[[{span}]]" if supervised[begin] else span
    return text
