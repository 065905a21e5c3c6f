"""The tokenizer of a model, with ChatML or the model's own chat template.

ChatML writes every message as `<|im_start|>{role}\\n{content}<|im_end|>\\n`.
"""

import contextlib
import json
import re
import sys
from pathlib import Path

import jinja2
import jinja2.meta
from transformers import AutoConfig, AutoTokenizer

from config import UserError, rewrite_errors
from conversations import templates
from conversations.templates import encode_texts
from storage.hub import LOADING_ERRORS, explain_load_error, pretrained

START, END = "<|im_start|>", "<|im_end|>"
NO_LIMIT = 2**31 - 1  # tokens, for a model without a context length
# The marks around an answer are for TRL's `assistant_only_loss` and the like; rendering leaves no trace of them.
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' + '\n' }}{% endgeneration %}"
    "{% else %}"
    "{{ message['content'] + '<|im_end|>' + '\n' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def load_tokenizer(path, local_files_only=False, chat_template="chatml", template_options=()):
    """The tokenizer of a model, with ChatML or its own template: its control, stop and padding tokens are set.

    Args:
        path, local_files_only: as `hub.find_model` returns them.
        chat_template: "chatml", "model" for the template that the tokenizer came with, or the name of a file.
        template_options: arguments of the template, each as `name=value`.

    Returns:
        The tokenizer. Its eos token ends a turn, `model_max_length` is the model's context length. Where tokens were
        added it has more of them than the model has embeddings: `model.load_model` resizes.
    """
    try:
        options = pretrained(path, local_files_only)
        config = AutoConfig.from_pretrained(**options).get_text_config()
        tokenizer = AutoTokenizer.from_pretrained(**options)
    except LOADING_ERRORS as error:
        reason = explain_load_error(path, error)
        raise UserError(f"--model {path}: no usable tokenizer and configuration ({reason})") from error
    if chat_template == "chatml":
        control, end = [START, END], END
        tokenizer.chat_template = CHATML
        if template_options:
            raise UserError(f"--template-option {template_options[0]}: --chat-template chatml has no options")
    else:
        template = read_template(chat_template, tokenizer.chat_template, path)
        with rewrite_errors("--chat-template:", f"--chat-template {chat_template}:"), templates.with_conversation([]):
            tokenizer.chat_template = with_options(template, template_options)
            control, end = [], templates.Template(tokenizer).end_of_turn
        if tokenizer.eos_token not in (None, end):
            tokenizer.chat_template = with_eos(tokenizer.chat_template, tokenizer.eos_token)
    missing = [token for token in control if token not in tokenizer.get_vocab()]
    padding = "<|endoftext|>" if "<|endoftext|>" in tokenizer.get_vocab() else tokenizer.pad_token
    if padding in (None, end):  # code that masks padding by its id would mask every stop
        padding = "<|pad|>"
        missing.append(padding)
    if missing:
        print(f"added to the tokenizer, and new rows to the embeddings: {' '.join(missing)}", file=sys.stderr)
    if control:
        tokenizer.add_special_tokens({"additional_special_tokens": control}, replace_extra_special_tokens=False)
    tokenizer.add_special_tokens({"eos_token": end, "pad_token": padding})
    longest = getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length
    tokenizer.model_max_length = longest if longest > 0 else NO_LIMIT
    for token in control or [end]:
        if token in tokenizer.convert_ids_to_tokens(encode_texts([token], tokenizer)[0]):
            problem = f"its tokenizer reads {token} in a message as a control token; it cannot be used"
            raise UserError(f"--model {path}: {problem}")
    return tokenizer


def read_template(name, of_model, path):
    """The text of a chat template: that of the model at `path`, or that of a file."""
    if name == "model":
        if of_model is None:
            raise UserError(f"--chat-template model: {path} has no chat template; use --chat-template chatml")
        return of_model
    try:
        return Path(name).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        problem = f"{getattr(error, 'strerror', 'not UTF-8')}; write chatml, model, or the name of a .jinja file"
        raise UserError(f"--chat-template {name}: {problem}") from error


def with_eos(template, eos):
    """A chat template in which `eos_token` is the original one, though the tokenizer's becomes the end of a turn."""
    if isinstance(template, dict):
        return {name: with_eos(text, eos) for name, text in template.items()}
    if not re.search(r"\beos_token\b", template):
        return template
    return f"{{%- set eos_token = {json.dumps(eos, ensure_ascii=False)} %}}{{{{- '' }}}}" + template


def with_options(template, options):
    """A chat template, or a dict of them, with other defaults; an option is `name=value`, in JSON or else a string."""
    if isinstance(template, dict):
        return {name: with_options(text, options) for name, text in template.items()}
    for option in options:
        name, equals, value = option.partition("=")
        if not (equals and re.fullmatch(r"[A-Za-z_]\w*", name)):
            raise UserError(f"--template-option {option}: write it as name=value, such as enable_thinking=false")
        if name in ("messages", "tools", "add_generation_prompt") or name not in arguments_of(template):
            raise UserError(f"--template-option {option}: the chat template has no argument {name}")
        with contextlib.suppress(ValueError):  # else a string without quotation marks
            value = json.loads(value)
        literal = "none" if value is None else json.dumps(value)
        start, end = f"{{%- if {name} is not defined %}}{{%- set {name} = ", " %}{%- endif %}{{- '' }}"
        earlier = re.compile(re.escape(start) + ".*?" + re.escape(end))  # from an earlier run, whose model this is
        template = start + literal + end + earlier.sub("", template, count=1)
    return template


def arguments_of(template):
    """The names that a chat template reads and does not set."""
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    plain = re.sub(r"{%[-+]?\s*(end)?generation\s*[-+]?%}", "", template)  # transformers' own tag
    try:
        return jinja2.meta.find_undeclared_variables(environment.parse(plain))
    except jinja2.TemplateSyntaxError as error:
        raise templates.syntax_error(error) from error
