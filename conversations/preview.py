"""Previews of encoded conversations, the supervised tokens coloured: as text, and as an HTML page with the counts."""

import html
import itertools
import re
from pathlib import Path

import jinja2
import torch

from config import UserError

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
pre { white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid #ddd; border-radius: 6px; padding: 1rem }
.t { color: #0a5a2a; background: #dff3e4 } .c { color: #8a2a2a; background: #fbeeee }
pre:hover span { box-shadow: inset 1px 0 #999 } pre span:hover { outline: 2px solid #444 }
td, th { text-align: right; padding: .1rem .8rem } td:first-child { text-align: left }
.bars { display: flex; align-items: flex-end; gap: 1px; height: 160px } .bars i { flex: 1; background: #4a7fb5 }
.warning { background: #fff3cd; padding: .5rem 1rem; border-radius: 6px }
"""
PAGE = "<!doctype html><meta name=generator content=plain-sft>"  # the beginning of each of these pages
MASKS = """<meta charset=utf-8><title>{{ title }}</title><style>{{ style | safe }}</style><h1>{{ title }}</h1>
{% for warning in data.warnings %}<p class=warning>{{ warning }}</p>{% endfor %}
<ul>{% for note in data.notes %}<li>{{ note }}</li>{% endfor %}</ul>
<table><tr><th><th>conversations<th>tokens<th>supervised<th>truncated<th>supervised tokens lost<th>nothing supervised
{% for name, split in data.splits.items() -%}
<tr><td>{{ name }}
{%- for count in (split.examples | length, split.tokens, split.supervised, split.truncated, split.supervised_lost,
                  split.dropped) %}<td>{{ "{:,}".format(count) }}{% endfor %}
{% endfor %}</table>
<h2>Length in tokens, up to {{ "{:,}".format(data.train.longest) }}</h2><div class=bars>
{%- for bar in bars %}<i style="height: {{ bar.height }}%" title="{{ bar.title }}"></i>{% endfor %}</div>
<h2>{{ shown | length }} conversations</h2>
<p><span class=t>supervised</span> <span class=c>context only</span></p>
{% for example in shown -%}
<h3>{{ loop.index }}: {{ example.input_ids | length }} tokens, {{ example.supervised_tokens }} of them supervised</h3>
<pre>{{ spans(example) | join | safe }}</pre>
{% endfor %}"""
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # with which a text could write over the terminal
RED, GREEN, PLAIN = "\033[31m", "\033[32m", "\033[0m"


def preview(example, tokenizer, color):
    """An example as text: what is supervised in green, the rest in red; without color, the supervised in `[[…]]`."""
    text, begin = "", 0
    for is_supervised, group in itertools.groupby(example.supervised.tolist()):
        end = begin + len(list(group))
        part = CONTROLS.sub(lambda found: ascii(found[0])[1:-1], tokenizer.decode(example.input_ids[begin:end]))
        if color:
            text += (GREEN if is_supervised else RED) + part + PLAIN
        else:
            text += f"[[{part}]]" if is_supervised else part
        begin = end
    return text


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
    return PAGE + jinja2.Environment(autoescape=True).from_string(MASKS).render(
        title=f"Supervised tokens of {name}",
        style=STYLE,
        data=data,
        bars=histogram([len(example.input_ids) for example in data.train.examples[:10_000]]),
        shown=shown,
        spans=lambda example: token_spans(example, tokenizer),
    )


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
