"""The tokenizer of a model, made to write ChatML or the model's own chat template.

ChatML writes every message as `<|im_start|>{role}\\n{content}<|im_end|>\\n`.
"""

import sys

from transformers import AutoConfig, AutoTokenizer

from config import UserError
from conversations import templates
from conversations.templates import encode_texts
from storage.hub import LOADING_ERRORS, why_not_loaded

START, END = "<|im_start|>", "<|im_end|>"
NO_LIMIT = 2**31 - 1  # tokens, for a model that attends to any number of them
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def load_tokenizer(path, local_files_only=False, chat_template="chatml"):
    """The tokenizer of a model, made to speak ChatML or its own template: control tokens, stop and padding token.

    Args:
        path, local_files_only: as `hub.find_model` returns them.
        chat_template: "chatml", or "model" for the template that the tokenizer came with.

    Returns:
        The tokenizer. What ends a turn is its eos token, `model_max_length` is what the model attends to. Where tokens
        had to be added it has more of them than the model has embeddings: `model.load_model` resizes.

    Raises:
        UserError: there is no tokenizer at `path`, it cannot keep control tokens apart from text, or its own template
            is missing or cannot be masked.
    """
    try:
        options = {"local_files_only": local_files_only, "trust_remote_code": False}
        config = AutoConfig.from_pretrained(path, **options).get_text_config()
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
    except LOADING_ERRORS as error:
        raise UserError(
            f"--model {path}: no usable tokenizer and configuration ({why_not_loaded(path, error)})"
        ) from error
    if chat_template == "chatml":
        control, end = [START, END], END
        tokenizer.chat_template = CHATML
    elif tokenizer.chat_template is None:
        raise UserError(f"--chat-template model: {path} has no chat template; use --chat-template chatml")
    else:
        control, end = [], templates.Template(tokenizer).end_of_turn
    missing = [token for token in control if token not in tokenizer.get_vocab()]
    padding = "<|endoftext|>" if "<|endoftext|>" in tokenizer.get_vocab() else tokenizer.pad_token
    if padding in (None, end):  # whoever masks padding by its id would mask every stop
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
            raise UserError(
                f"--model {path}: its tokenizer reads {token} in a message as a control token; it cannot be used"
            )
    return tokenizer
