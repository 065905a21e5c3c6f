"""From a conversation to token ids and labels: ChatML, and which tokens are supervised.

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

from config import UserError, first_line
from hub import LOADING_ERRORS

IGNORE = -100  # torch's cross_entropy skips this label
ROLES = ("system", "user", "assistant")
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


def load_tokenizer(path, local_files_only=False):
    """The tokenizer of a model, made to speak ChatML: control tokens, template, stop and padding token.

    Args:
        path, local_files_only: as `hub.find_model` returns them.

    Returns:
        The tokenizer. `<|im_end|>` is its eos token, `model_max_length` is what the model attends to. Where tokens had
        to be added it has more of them than the model has embeddings: `model.load_model` resizes.

    Raises:
        UserError: there is no tokenizer at `path`, or it cannot keep ChatML's tokens apart from text.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=local_files_only)
        config = AutoConfig.from_pretrained(path, local_files_only=local_files_only).get_text_config()
    except LOADING_ERRORS as error:
        raise UserError(f"--model {path}: no usable tokenizer and configuration ({first_line(error)})") from error
    missing = [token for token in (START, END) if token not in tokenizer.get_vocab()]
    padding = "<|endoftext|>" if "<|endoftext|>" in tokenizer.get_vocab() else tokenizer.pad_token
    if padding in (None, END):  # whoever masks padding by its id would mask every stop
        padding = "<|pad|>"
        missing.append(padding)
    if missing:
        print(f"added to the tokenizer, and new rows to the embeddings: {' '.join(missing)}", file=sys.stderr)
    tokenizer.add_special_tokens({"additional_special_tokens": [START, END]}, replace_extra_special_tokens=False)
    tokenizer.add_special_tokens({"eos_token": END, "pad_token": padding})
    tokenizer.chat_template = CHATML
    tokenizer.model_max_length = getattr(config, "max_position_embeddings", tokenizer.model_max_length)
    if {START, END} & set(tokenizer.convert_ids_to_tokens(encode_texts([START + END], tokenizer)[0])):
        raise UserError(
            f"--model {path}: its tokenizer reads {START} in a message as a control token; it cannot be used"
        )
    return tokenizer


def encode_texts(texts, tokenizer):
    """Ids of plain texts, a list each; what looks like a special token in them stays text."""
    if not texts:
        return []
    return tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]


def encode(conversations, tokenizer):
    """Conversations to `Example`s, one each, in their order.

    Args:
        conversations: lists of `{"role", "content"}` messages with a role of ROLES.
    """
    start, end = tokenizer.convert_tokens_to_ids([START, END])
    header = {role: [start, *encode_texts([role + "\n"], tokenizer)[0]] for role in ROLES}
    footer = [end, *encode_texts(["\n"], tokenizer)[0]]
    texts = [message["content"] for messages in conversations for message in messages]
    contents = iter(encode_texts(texts, tokenizer))
    examples = []
    for messages in conversations:
        input_ids, labels = [], []
        for message in messages:
            opening, said = header[message["role"]], next(contents) + footer
            input_ids += opening + said
            labels += [IGNORE] * len(opening) + (said if message["role"] == "assistant" else [IGNORE] * len(said))
        examples.append(Example(torch.tensor(input_ids), torch.tensor(labels)))
    return examples


def encode_prompt(prompt, tokenizer):
    """A user's prompt up to the point where the assistant answers: ids (T,), all context."""
    question = encode([[{"role": "user", "content": prompt}]], tokenizer)[0].input_ids
    answer = encode([[{"role": "assistant", "content": ""}]], tokenizer)[0]
    header = answer.input_ids[answer.labels == IGNORE]
    return torch.cat([question, header])


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
