"""A conversation with a model in a terminal: its answers stream, and it remembers what was said.

Piped, prompts are read line by line and nothing but the answers is printed.
"""

import contextlib
import json
import sys
from pathlib import Path

from transformers import TextStreamer

from config import UserError
from conversations.masking import encode_prompt
from evaluation.generation import generate, seed_of, system_message
from storage.durable import replace_file

HELP = "/reset forgets the conversation, /undo the last exchange, /save FILE writes it; Ctrl-D leaves"


class Chat:
    """The state of a conversation: its messages, and how they are answered."""

    def __init__(self, model, tokenizer, sampling, max_new_tokens, system=""):
        self.model, self.tokenizer, self.sampling, self.max_new_tokens = model, tokenizer, sampling, max_new_tokens
        self.system = system_message(system)
        self.messages = list(self.system)

    def say(self, prompt):
        """Stream the answer to a prompt to stdout and remember both; Ctrl-C stops it, and its beginning is remembered.

        Where the conversation has become longer than the model attends to, its first exchanges are forgotten.
        """
        self.messages.append({"role": "user", "content": prompt})
        while (room := self.tokenizer.model_max_length - len(ids := self.encoded())) < 1:
            if not self.forget_first():
                self.messages.pop()
                print("(too long for the model)", file=sys.stderr)
                return
        streamer = Streamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        seeds = [seed_of(self.sampling.seed, ids)]
        with contextlib.suppress(KeyboardInterrupt):
            generate(self.model, self.tokenizer, [ids], self.sampling, min(self.max_new_tokens, room), seeds, streamer)
        streamer.end()
        if said := streamer.text.strip():
            self.messages.append({"role": "assistant", "content": said})
        else:
            self.messages.pop()  # nobody has said anything
            print("(no answer; the exchange is not kept)", file=sys.stderr)

    def encoded(self):
        """The ids of the conversation up to where the model answers."""
        return encode_prompt(self.messages, self.tokenizer)

    def forget_first(self):
        """Forget the first exchange; whether there was one before the last prompt."""
        first = len(self.system)
        if len(self.messages) - first < 3:
            return False
        del self.messages[first : first + 2]
        return True

    def command(self, line):
        """Do what a line that begins with a slash says, and return what to tell."""
        name, _, argument = line.partition(" ")
        if name == "/reset":
            self.messages = list(self.system)
            return "forgotten"
        if name == "/undo":
            if len(self.messages) == len(self.system):
                return "there is nothing to undo"
            del self.messages[-2:]
            return "the last exchange is forgotten"
        if name == "/save":
            if len(self.messages) == len(self.system):
                return "there is nothing to save yet"
            return save(argument.strip(), self.messages)
        return HELP


class Streamer(TextStreamer):
    """Prints an answer as it comes, and keeps its text."""

    text = ""

    def on_finalized_text(self, text, stream_end=False):
        self.text += text
        print(text, flush=True, end="\n" if stream_end else "")

    def end(self):
        """Print what is still held back, where the answer was stopped."""
        if not self.next_tokens_are_prompt:
            super().end()


def save(name, messages):
    """Write a conversation as a row that `train.py` reads, to a new file; returns what to tell."""
    path = Path(name).expanduser()
    if not name:
        return "/save needs the name of a file"
    if path.exists():
        return f"{path} exists; name another file"
    try:
        replace_file(path, json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    except OSError as error:
        return f"{path}: {error.strerror}"
    return f"written to {path}"


def run_chat(chat):
    """Talk until Ctrl-D, or the end of what is piped in."""
    asked = sys.stdin.isatty()
    if asked:
        import readline  # noqa: F401  line editing and history in `input`

        print(HELP)
    while True:
        try:
            line = input("> " if asked else "").strip()
        except EOFError:
            print(end="\n" if asked else "")
            return
        except KeyboardInterrupt:
            if not asked:
                raise
            print()
            continue
        except UnicodeDecodeError as error:
            raise UserError(f"stdin is not UTF-8: {error.reason}") from error
        if line.startswith("/"):
            print(chat.command(line), file=sys.stderr)
        elif line:
            chat.say(line)
