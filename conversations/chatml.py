"""ChatML, which writes each message as `<|im_start|>{role}\\n{content}<|im_end|>\\n`; encoded without its template.

It begins with what the tokenizer puts before a text by itself, such as the BOS of Llama, Gemma and Mistral.
"""

import itertools
import json
from concurrent.futures import ThreadPoolExecutor

from tokenizers import AddedToken

from conversations.templates import get_template, with_conversation

START, END = "<|im_start|>", "<|im_end|>"
# Without the flags of some models' own, as Phi 4's, which absorb the space beside them.
CONTROL = [AddedToken(token, normalized=False, special=True) for token in (START, END)]
MESSAGES = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def find_opening(tokenizer, known=()):
    """The control tokens that a tokenizer puts before a text by itself, without those that it has anyway."""
    text, ids = (tokenizer("x", add_special_tokens=added)["input_ids"] for added in (False, True))
    before = next((ids[:at] for at in range(len(ids)) if ids[at : at + len(text)] == text), [])
    return [token for token in tokenizer.convert_ids_to_tokens(before) if token not in known]


def chatml_template(tokenizer):
    """The chat template of a tokenizer that has ChatML."""
    opening = find_opening(tokenizer, (START, END))
    names = {token: json.dumps(token, ensure_ascii=False) for token in opening} | {tokenizer.bos_token: "bos_token"}
    return "".join(f"{{{{ {names[token]} }}}}" for token in opening) + MESSAGES


def is_chatml(tokenizer):
    """Whether the chat template of a tokenizer is ChatML."""
    return tokenizer.chat_template == chatml_template(tokenizer)


def encode_chatml(conversations, tokenizer):
    """The ids of conversations in ChatML: an iterator, each as `masking.make_examples` takes them.

    The texts between control tokens are encoded as plain text, in one call, and those tokens are inserted as ids. So no
    text can become a control token. The call begins at once, in a thread, and runs beside Python.
    """
    encoder, thread = get_template(tokenizer).encoder, ThreadPoolExecutor(1)
    opening, (start, end) = map(tokenizer.convert_tokens_to_ids, (find_opening(tokenizer, (START, END)), [START, END]))
    header, newline = encoder.encode_runs(["assistant\n", "\n"])
    texts = [f"{message['role']}\n{message['content']}" for messages in conversations for message in messages]
    runs = itertools.chain.from_iterable(thread.map(encoder.encode_runs, [texts]))  # waited for at the first of them
    thread.shutdown(wait=False)  # it ends by itself, with the call

    def join_runs(messages):
        ids, turns = list(opening), []
        runs_of_messages = list(itertools.islice(runs, len(messages)))  # all, wherever one of them is refused
        with with_conversation(messages):
            for number, (message, run) in enumerate(zip(messages, runs_of_messages, strict=True)):
                if message["train"]:
                    answer = encoder.continue_run(header, run, message["content"], number)
                    turns.append(([*ids, start, *header], [*answer, end, *newline]))
                ids += [start, *run, end, *newline]
        return turns, ids

    return map(join_runs, conversations)
