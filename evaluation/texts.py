"""Texts that the user names: prompts, and plain text as examples, which show whether a model forgets."""

import os
import re

import torch

from config import UserError, read_text
from conversations.encoding import FIRST
from conversations.masking import slice_text
from conversations.templates import get_template

MAX_SLICE = 2048  # tokens of a text that are read together, unless --max-length or the context length is smaller


def read_prompts(texts):
    """A list of prompts, where the name of a file stands for its lines; raises `UserError` as `read_text` does."""
    prompts = []
    for text in texts:
        if os.path.exists(text) or re.fullmatch(r"\S+\.(txt|md)", text):
            lines = [line for line in read_text("--prompts", text).split("\n") if line.strip()]
            if not lines:
                raise UserError(f"--prompts {text}: there are no prompts in it")
            prompts += lines
        else:
            prompts.append(text)
    return prompts


def load_text(path, tokenizer, max_length=0):
    """A text file as `Example`s of at most `max_length` tokens (0: MAX_SLICE), without a chat template.

    Each token is predicted from at least half an example, except at the beginning of the text.
    """
    (ids,) = get_template(tokenizer).encoder.encode_runs([read_text("--text", path)], FIRST)
    if len(ids) < 2:
        raise UserError(f"--text {path}: there is no text in it")
    length = min(MAX_SLICE, tokenizer.model_max_length, max_length or MAX_SLICE)
    return slice_text(torch.tensor(ids), length, overlap=length // 2)
