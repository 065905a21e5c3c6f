"""Did it forget? The loss of a model on plain text: what it knew of language before it learned to answer."""

from pathlib import Path

import torch

from config import UserError
from conversations.masking import IGNORE, Example
from conversations.templates import encode_texts
from evaluation.comparison import difference

PLAIN_TEXT = Path(__file__).parents[1] / "examples" / "plain_text.txt"
WINDOW = 2048  # tokens of a text that are read together, where --max-length and the model allow it
BLOCK = 64  # neighbouring tokens depend on each other: an interval comes from drawing blocks of them


def read_text(path, tokenizer):
    """The ids of a text file, as plain text: what looks like a control token is none.

    Raises:
        UserError: there is no such file, it is not UTF-8, or it has fewer than two tokens.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UserError(f"--text {path}: there is no such file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--text {path}: not UTF-8 at byte {error.start + 1}; save it as UTF-8") from error
    (ids,) = encode_texts([text], tokenizer)
    if len(ids) < 2:
        raise UserError(f"--text {path}: there is no text in it")
    return torch.tensor(ids)


def windows(ids, length):
    """`Example`s of a text, in which each token but the text's first is scored once.

    A window begins in the middle of the one before it, and scores what that one has not. So only at the beginning of
    the text is a token predicted from less than half a window.

    Args:
        ids: (T,), of the whole text.
        length: tokens of a window; less than 2 is 2.
    """
    length = max(length, 2)
    examples, start, scored = [], 0, 0
    while scored < len(ids):
        end = min(start + length, len(ids))
        labels = ids[start:end].clone()
        labels[: scored - start] = IGNORE
        examples.append(Example(ids[start:end], labels))
        start, scored = end - length // 2, end
    return examples


def forgetting(before, after):
    """The `difference` of two models on a text, over blocks of it.

    Args:
        before, after: the losses of its tokens, as `Evaluation.token_losses` holds them.
    """
    blocks = [torch.cat(losses).double().split(BLOCK) for losses in (before, after)]
    sums = [[block.sum().item() for block in model] for model in blocks]
    found = difference(*sums, [len(block) for block in blocks[0]])
    found["blocks"] = found.pop("conversations")
    return found
