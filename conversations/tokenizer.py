"""The tokenizer of a model, with ChatML or the model's own chat template."""

import contextlib
import json
import re
import sys
import tempfile

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from config import UserError, read_text, rewrite_errors
from conversations.chatml import CONTROL, END, chatml_template, is_chatml
from conversations.masking import encode_prompt
from conversations.templates import Template, arguments_of, get_template, with_conversation
from storage.adapter import find_base
from storage.hub import LOADING_ERRORS, explain_load_error, pretrained

NO_LIMIT = 2**31 - 1  # tokens, for a model without a context length
PROBE = "Hi\n\n  there,\t12 é🙂 \n"  # a text in which tokenizers differ


def load_tokenizer(path, local_files_only=False, chat_template="chatml", template_options=(), may_add=True):
    """The tokenizer of a model, with ChatML or its own template: its control, stop and padding tokens are set.

    Args:
        path, local_files_only: as `hub.find_model` returns them.
        chat_template: "chatml", "model" for the template that the tokenizer came with, or the name of a file.
        template_options: arguments of the template, each as `name=value`.
        may_add: whether tokens may be added, which need new embeddings.

    Returns:
        The tokenizer. Its eos token ends a turn, `model_max_length` is the model's context length. Where tokens were
        added it has more of them than the model has embeddings: `model.load_model` resizes.
    """
    tokenizer, config, text_config = load_unchanged(path, local_files_only)
    if chat_template == "chatml":
        control, end = CONTROL, END
        if template_options:
            raise UserError(f"--template-option {template_options[0]}: --chat-template chatml has no options")
    else:
        template = read_template(chat_template, tokenizer.chat_template, path)
        with rewrite_errors("--chat-template:", f"--chat-template {chat_template}:"), with_conversation([]):
            tokenizer.chat_template = with_options(template, template_options)
            control, end = [], Template(tokenizer).end_of_turn
        if tokenizer.eos_token not in (None, end):
            tokenizer.chat_template = with_eos(tokenizer.chat_template, tokenizer.eos_token)
    missing = [str(token) for token in control if str(token) not in tokenizer.get_vocab()]
    padding = "<|endoftext|>" if "<|endoftext|>" in tokenizer.get_vocab() else tokenizer.pad_token
    if padding in (None, end):  # code that masks padding by its id would mask every stop
        padding = "<|pad|>" if may_add else next(find_unused(tokenizer, end), "<|pad|>")
        missing += [padding] * (padding not in tokenizer.get_vocab())
    if missing and not may_add:
        why = "with --lora-rank no embedding of it would be trained, and no server takes new ones"
        raise UserError(f"--model {path}: it has no {' '.join(missing)}; {why}; use --chat-template model")
    if missing:
        print(f"added to the tokenizer, and new rows to the embeddings: {' '.join(missing)}", file=sys.stderr)
    if control:
        tokenizer.add_special_tokens({"additional_special_tokens": control}, replace_extra_special_tokens=False)
        tokenizer.chat_template = chatml_template(tokenizer)
    tokenizer.add_special_tokens({"eos_token": end, "pad_token": padding})
    longest = getattr(text_config, "max_position_embeddings", None) or tokenizer.model_max_length
    tokenizer.model_max_length = min(longest, NO_LIMIT) if longest > 0 else NO_LIMIT
    if problem := next(find_problems(tokenizer, list(map(str, control or [end])), config), None):
        raise UserError(f"--model {path}: {problem}; it cannot be used")
    return tokenizer


def find_unused(tokenizer, end):
    """Yield the control tokens of a tokenizer that its template does not write, the last first."""
    for _, token in sorted(tokenizer.added_tokens_decoder.items(), reverse=True):
        name = str(token)
        if token.special and name not in (end, tokenizer.bos_token) and name not in str(tokenizer.chat_template):
            yield name


def load_unchanged(path, local_files_only):
    """The tokenizer, configuration and text configuration of a model as they came; `UserError` if of no use."""
    try:
        config = AutoConfig.from_pretrained(**pretrained(*find_base(path, local_files_only)))
        text_config = config.get_text_config()
        tokenizer = AutoTokenizer.from_pretrained(**pretrained(path, local_files_only))
    except LOADING_ERRORS as error:
        reason = explain_load_error(path, error)
        raise UserError(f"--model {path}: no usable tokenizer and configuration ({reason})") from error
    if hasattr(tokenizer, "legacy"):
        tokenizer.init_kwargs["legacy"] = tokenizer.legacy  # transformers 5.23 does not save Llama's
    if not tokenizer.is_fast:
        problem = f"its tokenizer, {type(tokenizer).__name__}, is not of the tokenizers library; it cannot be used"
        raise UserError(f"--model {path}: {problem}")
    return tokenizer, config, text_config


def find_problems(tokenizer, control, config):
    """Yield why what is trained would not be what transformers makes of the same messages with this tokenizer."""
    encoded = get_template(tokenizer).encoder.encode_runs(control)
    for token, ids in zip(control, encoded, strict=True):
        if tokenizer.convert_tokens_to_ids(token) in ids:
            yield f"its tokenizer reads {token} in a message as a control token"
    if is_chatml(tokenizer):
        chat = [{"role": role, "content": "\n " + PROBE} for role in ("system", "user", "assistant", "user")]
        theirs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        if theirs != encode_prompt(chat, tokenizer).tolist():
            yield "its tokenizer makes other ids of a conversation in ChatML than of its parts"
    if type(tokenizer) is PreTrainedTokenizerFast:  # other classes build the tokenizer anew from what they saved
        return
    text = PROBE.join(["", *tokenizer.added_tokens_encoder, ""])
    try:
        with tempfile.TemporaryDirectory() as directory:
            config.save_pretrained(directory)
            tokenizer.save_pretrained(directory)
            ids = AutoTokenizer.from_pretrained(directory)(text)["input_ids"]
    except LOADING_ERRORS:
        ids = None
    if ids != tokenizer(text)["input_ids"]:
        yield f"its tokenizer, {type(tokenizer).__name__}, is another one once it is saved and loaded"


def read_template(name, of_model, path):
    """The text of a chat template: that of the model at `path`, or that of a file."""
    if name == "model":
        if of_model is None:
            raise UserError(f"--chat-template model: {path} has no chat template; use --chat-template chatml")
        return of_model
    return read_text("--chat-template", name, "; write chatml, model, or the name of a .jinja file")


def with_eos(template, eos):
    """A chat template in which `eos_token` is the original one, though the tokenizer's becomes the end of a turn."""
    if isinstance(template, dict):
        return {name: with_eos(text, eos) for name, text in template.items()}
    if not re.search(r"\beos_token\b", template):
        return template
    return f"{{%- set eos_token = {json.dumps(eos, ensure_ascii=False)} %}}{{{{- '' }}}}" + template


def with_options(template, options):
    """A chat template, or a dict of them, with other defaults; an option is `name=value`, in JSON or else a string.

    It is without `{% generation %}`, which only transformers knows.
    """
    if isinstance(template, dict):
        return {name: with_options(text, options) for name, text in template.items()}
    template = re.sub(r"({%[-+]?)\s*generation\s*([-+]?%})", r"\1 if true \2", template)  # the same spaces around it
    template = re.sub(r"({%[-+]?)\s*endgeneration\s*([-+]?%})", r"\1 endif \2", template)
    known = arguments_of(template)  # checks its syntax too
    for option in options:
        name, equals, value = option.partition("=")
        if not (equals and re.fullmatch(r"[A-Za-z_]\w*", name)):
            raise UserError(f"--template-option {option}: write it as name=value, such as enable_thinking=false")
        if name not in known:
            raise UserError(f"--template-option {option}: the chat template has no argument {name}")
        with contextlib.suppress(ValueError):  # else a string without quotation marks
            value = json.loads(value)
        literal = "none" if value is None else json.dumps(value)
        start, end = f"{{%- if {name} is not defined %}}{{%- set {name} = ", " %}{%- endif %}{{- '' }}"
        earlier = re.compile(re.escape(start) + ".*?" + re.escape(end))  # from an earlier run, whose model this is
        template = start + literal + end + earlier.sub("", template, count=1)
    return template
