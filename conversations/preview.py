"""Previews of encoded conversations, the supervised tokens coloured: as text, and as an HTML page with the counts."""

import html
import itertools
import re
from pathlib import Path

from config import UserError

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
pre { white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid #ddd; border-radius: 6px; padding: 1rem }
.t { color: #0a5a2a; background: #dff3e4 } .c { color: #8a2a2a; background: #fbeeee }
pre:hover span { box-shadow: inset 1px 0 #999 } pre span:hover { outline: 2px solid #444 }
td, th { text-align: right; padding: .1rem .8rem } td:first-child { text-align: left }
.bar { fill: #4a7fb5 } text { font-size: 11px; fill: #555 }
.warning { background: #fff3cd; padding: .5rem 1rem; border-radius: 6px }
"""
PAGE = "<!doctype html><meta name=generator content=plain-sft>"  # how each of these pages begins
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # with which a text could write over the terminal
RED, GREEN, PLAIN = "\033[31m", "\033[32m", "\033[0m"


def preview(example, tokenizer, color):
    """An example as text: what is supervised in green, the rest in red; without color, the supervised in `[[…]]`."""
    supervised = example.supervised.tolist()
    text, begin = "", 0
    for is_supervised, group in itertools.groupby(supervised):
        end = begin + len(list(group))
        part = CONTROLS.sub(lambda found: ascii(found[0])[1:-1], tokenizer.decode(example.input_ids[begin:end]))
        if color:
            text += (GREEN if is_supervised else RED) + part + PLAIN
        else:
            text += f"[[{part}]]" if is_supervised else part
        begin = end
    return text


def refuse_other_file(path):
    """Raise `UserError` where a page would overwrite something that is not an earlier page."""
    path = Path(path)
    if not is_replaceable(path):
        raise UserError(f"--html {path}: it exists and is not an earlier page; name another file")
    if not path.parent.is_dir():
        raise UserError(f"--html {path}: there is no directory {path.parent}")


def is_replaceable(path):
    """Whether there is nothing at a path, or an earlier page."""
    return not path.exists() or (path.is_file() and path.read_bytes().startswith(PAGE.encode()))


def page(data, shown, tokenizer, name):
    """A self-contained HTML page about some `Data`, showing some of its examples; a token's id and text on hover."""
    title = html.escape(f"Supervised tokens of {name}")
    parts = [f"{PAGE}<meta charset=utf-8><title>{title}</title><style>{STYLE}</style><h1>{title}</h1>"]
    parts += [f"<p class=warning>{html.escape(warning)}</p>" for warning in data.warnings]
    parts += ["<ul>", *(f"<li>{html.escape(note)}</li>" for note in data.notes), "</ul>", table(data)]
    lengths = [len(example.input_ids) for example in data.train.examples[:10_000]]
    parts += ["<h2>Length in tokens</h2>", histogram(lengths)]
    parts += [
        f"<h2>{len(shown)} conversations</h2><p><span class=t>supervised</span> <span class=c>context only</span></p>"
    ]
    for number, example in enumerate(shown, 1):
        counts = f"{len(example.input_ids)} tokens, {example.supervised_tokens} of them supervised"
        parts.append(f"<h3>{number}: {counts}</h3>")
        parts.append(f"<pre>{''.join(token_spans(example, tokenizer))}</pre>")
    return "\n".join(parts) + "\n"


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


def table(data):
    """A table of what is in each split, and what was truncated and left out."""
    heads = ("conversations", "tokens", "supervised", "truncated", "supervised tokens lost", "nothing supervised")
    rows = [f"<tr><th>{''.join(f'<th>{head}' for head in heads)}"]
    for name, split in data.splits.items():
        counts = (len(split.examples), split.tokens, split.supervised)
        left_out = (split.truncated, split.supervised_lost, split.dropped)
        rows.append(f"<tr><td>{name}{''.join(f'<td>{number:,}' for number in counts + left_out)}")
    return f"<table>{''.join(rows)}</table>"


def histogram(lengths, bars=30, width=860, height=160):
    """An SVG histogram of some lengths."""
    longest = max(lengths)
    size = max(1, -(-longest // bars))
    counts = [0] * (longest // size + 1)
    for length in lengths:
        counts[length // size] += 1
    step, drawn = width / len(counts), []
    for number, count in enumerate(counts):
        tall = height * count / max(counts)
        title = f"{number * size} to {number * size + size - 1} tokens: {count:,}"
        box = f'x="{number * step:.1f}" y="{height - tall:.1f}" width="{step - 1:.1f}" height="{tall:.1f}"'
        drawn.append(f"<rect class=bar {box}><title>{title}</title></rect>")
    drawn.append(f'<text x="0" y="{height + 14}">0</text>')
    drawn.append(f'<text x="{width}" y="{height + 14}" text-anchor="end">{longest:,}</text>')
    return f'<svg width="{width}" height="{height + 20}">{"".join(drawn)}</svg>'
