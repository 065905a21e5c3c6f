"""Previews of encoded conversations, the supervised tokens coloured: as text, and as an HTML page with the counts."""

import html
import itertools
import re
from pathlib import Path

import jinja2
import torch

from config import UserError

PAGE = "<!doctype html><meta name=generator content=plain-sft>"  # the beginning of each of these pages
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # with which a text could write over the terminal
RED, GREEN, PLAIN = "\033[31m", "\033[32m", "\033[0m"


def preview(example, tokenizer, color):
    """An example as text: what is supervised in green, the rest in red; without color, the supervised in `[[…]]`."""
    text = ""
    tokens = zip(example.input_ids.tolist(), example.supervised.tolist(), strict=True)
    for is_supervised, run in itertools.groupby(tokens, key=lambda token: token[1]):
        part = escape_controls(tokenizer.decode([number for number, _ in run]))
        if color:
            text += (GREEN if is_supervised else RED) + part + PLAIN
        else:
            text += f"[[{part}]]" if is_supervised else part
    return text


def escape_controls(text):
    """A text for a terminal: control characters but for tabs and line ends as Python writes them."""
    return CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text)


def check_page_path(path):
    """Raise `UserError` where a page would overwrite a file that is not an earlier page."""
    path = Path(path)
    is_page = path.is_file() and path.read_bytes().startswith(PAGE.encode())
    if path.exists() and not is_page:
        raise UserError(f"--html {path}: it exists and is not an earlier page; name another file")
    if not path.parent.is_dir():
        raise UserError(f"--html {path}: there is no directory {path.parent}")


def page(data, shown, tokenizer, name):
    """A self-contained HTML page about some `Data`, showing some of its examples; a token's id and text on hover."""
    bars = histogram([len(example.input_ids) for example in data.train.examples[:10_000]])
    values = {"data": data, "bars": bars, "shown": shown, "tokenizer": tokenizer, "token_spans": token_spans}
    return render_page(Path(__file__).with_name("preview.html.jinja"), f"Supervised tokens of {name}", **values)


def render_page(path, title, **values):
    """A self-contained HTML page by the template in a file, which extends `base.html.jinja`."""
    loader = jinja2.FileSystemLoader([path.parent, Path(__file__).parent])
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return PAGE + environment.get_template(path.name).render(title=title, **values)


def token_spans(example, tokenizer):
    """Yield a `<span>` for each token; one that is only part of a character joins those that complete it."""
    ids, begin = example.input_ids.tolist(), 0
    for stop in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[begin:stop])
        if text.endswith("\N{REPLACEMENT CHARACTER}") and stop < len(ids) and stop - begin < 8:
            continue
        kind = "t" if example.supervised[begin] else "c"
        numbers = " ".join(map(str, ids[begin:stop]))
        title = html.escape(f"{text!r}, id {numbers}, position {begin}", quote=True)
        yield f'<span class={kind} title="{title}">{html.escape(text)}</span>'
        begin = stop


def histogram(lengths, bars=30):
    """The bars of a histogram of some lengths, dicts of `height` in percent and `title`."""
    size = max(1, -(-max(lengths) // bars))
    counts = torch.bincount(torch.tensor(lengths) // size).tolist()
    titles = (f"{number * size} to {number * size + size - 1} tokens: {count:,}" for number, count in enumerate(counts))
    return [{"height": 100 * count // max(counts), "title": title} for count, title in zip(counts, titles, strict=True)]
