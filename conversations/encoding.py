"""The ids of rendered texts, in which nothing but what the template itself writes is a control token.

No text forges one: before rendering, a sentinel character is put into every text that looks like a control token, so
that what then looks like one is the template's own. The sentinel is removed when the text is encoded.

A tokenizer splits a text at its control tokens, and encodes each run of text between them by itself. So runs are what
is encoded here, and the ids before an answer are those that transformers makes of the prompt.
"""

import itertools
import json
import re
import unicodedata

from tokenizers import Tokenizer

from conversations.sources import InvalidRow

SENTINEL = "\U00012398"  # cuneiform: rare, and printable, so that no template escapes it
# What a run is: a control token, or a text: the first of all, after a control token, or what continues another.
TOKEN, FIRST, NEXT, CONTINUED = "token", "first", "next", "continued"
SPACE = "".join(c for c in map(chr, range(0x3001)) if c.isspace() and c not in "\x1c\x1d\x1e\x1f")  # to tokenizers
# The settings, in a tokenizer's JSON, with which Metaspace, ByteLevel and Prepend write no space before a run.
NO_SPACE = {"prepend_scheme": "never", "add_prefix_space": False, "prepend": ""}


class TemplateError(InvalidRow):
    """A conversation that the template cannot write."""


class Encoder:
    """The control tokens of a tokenizer that has a chat template, and the ids of texts between them."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        source = str(tokenizer.chat_template)
        added = {str(token): token for token in tokenizer.added_tokens_decoder.values()}
        self.control = {
            text: token for text, token in added.items() if text.strip() and (token.special or text in source)
        }
        longest_first = sorted(map(re.escape, self.control), key=len, reverse=True)
        self.pattern = re.compile(f"({'|'.join(longest_first) or '(?!)'})")
        # The beginnings and ends of control tokens, which a text and what the template writes beside it could complete.
        self.prefixes = tuple({text[:end] for text in self.control for end in range(1, len(text))})
        self.suffixes = tuple({text[start:] for text in self.control for start in range(1, len(text))})
        self.token_ids = {(TOKEN, text): [tokenizer.convert_tokens_to_ids(text)] for text in self.control}
        self.encoders = {}

    def escape(self, value):
        """A JSON value with the sentinel inside of every control token in its texts, keys too, and at partial ones."""
        if isinstance(value, dict):
            return {self.escape(key): self.escape(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.escape(item) for item in value]
        if not isinstance(value, str):
            return value
        while self.pattern.search(value):
            value = self.pattern.sub(lambda found: found[0][0] + SENTINEL + found[0][1:], value)
        begin, end = len(value) - len(value.lstrip()), len(value.rstrip())  # a template may trim the space around it
        if value[:end].endswith(self.prefixes):
            value = value[:end] + SENTINEL + value[end:]
        if value[begin:].startswith(self.suffixes):
            value = value[:begin] + SENTINEL + value[begin:]
        return value

    def split(self, text, kind=FIRST):
        """A rendered text as runs `(kind, text)`. Some control tokens absorb the space beside them, as Phi's do."""
        parts, runs = self.pattern.split(text), []
        tokens = [None, *map(self.control.get, parts[1::2]), None]
        for run, (before, after) in zip(parts[::2], itertools.pairwise(tokens), strict=True):
            run = run.lstrip(SPACE) if before and before.rstrip else run
            run = run.rstrip(SPACE) if after and after.lstrip else run
            runs += [(NEXT if before else kind, run.replace(SENTINEL, ""))] if run else []
            runs += [(TOKEN, str(after))] if after else []
        return runs

    def encode(self, texts):
        """The ids of some texts, which `split` returned, a list each; a run that they share is encoded once."""
        texts, ids = list(texts), dict(self.token_ids)
        for kind in (FIRST, NEXT):
            runs = list({run for text in texts for run in text if run[0] == kind})
            ids |= zip(runs, self.encode_runs([text for _, text in runs], kind), strict=True)
        return [[number for run in text for number in ids[run]] for text in texts]

    def encode_runs(self, texts, kind=NEXT):
        """The ids of texts of a kind, a list each; what looks like a control token in them stays text."""
        if kind not in self.encoders:
            self.encoders[kind] = make_encoder(self.tokenizer, self.control, kind)
        encodings = self.encoders[kind].encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode_answer(self, number, prompt, answer):
        """The ids of an answer, message `number` from 0, as they follow its prompt; all but the number are texts."""
        before, runs = self.split(prompt)[-1:], self.split(answer, NEXT if prompt else FIRST)
        ids = self.encode([run] for run in runs)
        if before and TOKEN not in (before[0][0], runs[0][0]):  # the answer continues a run of the prompt
            ((kind, header),) = before
            header, both = self.encode_runs([header, header + runs[0][1]], kind)
            ids[0] = self.continue_run(header, both, runs[0][1], number)
        for run, (kind, text) in zip(ids, runs, strict=True):
            if kind != TOKEN:
                self.check_decoded(run, text, number)
        return list(itertools.chain.from_iterable(ids))

    def continue_run(self, header, both, text, number):
        """The ids of an answer's text that follows a header in one run, by the ids of the header and of both.

        The prompt ends with the header's own ids, even where the header and the answer together have other ids.
        """
        ids = both[len(header) :]
        if both[: len(header)] != header:
            (ids,) = self.encode_runs([text], CONTINUED)
            before = self.tokenizer.backend_tokenizer.decode(header, skip_special_tokens=False)
            self.check_decoded(header + ids, before + text, number)
        self.check_decoded(ids, text, number)
        return ids

    def check_decoded(self, ids, text, number):
        """Raise `TemplateError` where ids of an answer do not decode to its text."""
        decoded = self.tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False)
        if decoded != text and normalize(decoded) != normalize(text):
            raise TemplateError("the ids of an answer do not decode to that answer", f"message {number + 1}")

    def check_context(self, text, ids):
        """Raise `TemplateError` where transformers makes other ids of a prompt, unless it has a typed control token."""
        plain = text.replace(SENTINEL, "")
        if self.pattern.findall(plain) != self.pattern.findall(text):
            return
        if self.tokenizer(plain, add_special_tokens=False, verbose=False)["input_ids"] != ids:
            raise TemplateError("its tokenizer gives the parts other ids than the full text")


def make_encoder(tokenizer, control, kind):
    """A tokenizer of runs of a kind, to which no text is a control token, even one that is not marked "special"."""

    def edit(part):
        places = [CONTINUED, NEXT] if part.get("prepend_scheme") == "first" else [CONTINUED]
        if kind in places and isinstance(part.get("type"), str):  # else it is the vocabulary
            part |= {name: NO_SPACE[name] for name in part.keys() & NO_SPACE.keys()}
        return part

    state = json.loads(tokenizer.backend_tokenizer.to_str(), object_hook=edit)
    for token in state["added_tokens"]:
        token["special"] |= token["content"] in control
    encoder = Tokenizer.from_str(json.dumps(state))
    encoder.encode_special_tokens = True
    encoder.no_padding()
    encoder.no_truncation()
    return encoder


def normalize(text):
    """A text without what tokenizers may normalize."""
    return unicodedata.normalize("NFKC", text).strip()
