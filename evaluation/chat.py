"""Chat with a model in a terminal: answers stream, and the model sees the conversation so far.

Piped prompts are read line by line, and stdout gets nothing but the answers.
"""

import sys

from transformers import TextStreamer

from config import UserError
from conversations.masking import encode_prompt
from evaluation.generation import generate

HELP = "/reset starts a new conversation, /undo removes the last exchange; Ctrl-C stops an answer, Ctrl-D quits"


class Chat:
    """A conversation with a model: its messages, and how they are answered."""

    def __init__(self, model, tokenizer, sampling, max_new_tokens, system=""):
        self.model, self.tokenizer, self.sampling, self.max_new_tokens = model, tokenizer, sampling, max_new_tokens
        self.system = [{"role": "system", "content": system}] if system else []
        self.messages = []

    def respond(self, prompt):
        """Stream the answer to a prompt and keep both; Ctrl-C ends the answer where it is (in a pipe, the chat).

        The first exchanges are dropped when the conversation is longer than the context length.
        """
        self.messages.append({"role": "user", "content": prompt})
        while len(ids := self.encode()) >= self.tokenizer.model_max_length:
            del self.messages[:2]
            if not self.messages:
                print("(longer than the context length)", file=sys.stderr)
                return
        streamer = Streamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        try:
            generate(self.model, self.tokenizer, [ids], self.sampling, self.max_new_tokens, streamer)
        except KeyboardInterrupt:
            streamer.end()  # prints what is held back
            if not sys.stdin.isatty():  # nobody goes on typing
                raise
        if answer := streamer.text.strip():
            self.messages.append({"role": "assistant", "content": answer})
        else:
            self.messages.pop()
            print("(no answer; the prompt is not kept)", file=sys.stderr)

    def encode(self):
        """The ids of the conversation up to where the model answers, (T,)."""
        return encode_prompt([*self.system, *self.messages], self.tokenizer)

    def run_command(self, line):
        """Run a line that begins with a slash; returns a line for the user."""
        if line == "/reset":
            self.messages.clear()
            return "new conversation"
        if line == "/undo" and self.messages:
            del self.messages[-2:]
            return "removed the last exchange"
        return "there is nothing to undo" if line == "/undo" else HELP


class Streamer(TextStreamer):
    """Prints an answer as it is generated, and keeps its text."""

    text = ""

    def on_finalized_text(self, text, stream_end=False):
        self.text += text
        super().on_finalized_text(text, stream_end)


def run_chat(chat):
    """Answer prompts from stdin until Ctrl-D or the end of a pipe."""
    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401  line editing and history in `input`

        print(HELP)
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except EOFError:
            print(end="\n" if interactive else "")
            return
        except KeyboardInterrupt:
            if not interactive:
                raise
            print()
            continue
        except UnicodeDecodeError as error:
            raise UserError(f"stdin is not UTF-8: {error.reason}") from error
        if line.startswith("/"):
            print(chat.run_command(line), file=sys.stderr)
        elif line:
            chat.respond(line)
