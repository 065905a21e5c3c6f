"""Small tokenizers of the families that models have, trained here, and the chat templates of well-known models.

The templates are short forms: they write what the models' own do for messages of a system, a user and an assistant.
"""

import functools
import json

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests.conftest import tiny_llama

TEXTS = [
    "user\nWhat is the weather like in Oslo?\nassistant\nIt is grey, 4 degrees.\n\n  - wet\n  - cold\n",
    "system\nYou are a helpful assistant. Be brief.\nuser\nHi! How are you?\n\nassistant\nHello there: I'm fine, so...",
    "### Instruction:\nSay it.\n\n### Response:\nNo.\n\n\n### USER: one two  three   four ASSISTANT: 1 12 123 1234",
    "def f(x):\n    return x\n\tif x:\n\t\tpass\n", "Héllo ünïcode, žluťoučký kůň. 你好，世界。 🙂🙂 שלום",
] * 4  # fmt: skip
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
BYTES = [f"<0x{number:02X}>" for number in range(256)]


def byte_level(add_prefix_space=False, split=None):
    """GPT-2's way; RoBERTa's with a space before each text; Llama 3's with a pattern of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    if split:
        parts = [pre_tokenizers.Split(Regex(split), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet))
    return tokenizer


def sentencepiece(normalizer, pre_tokenizer, strip):
    """A BPE of SentencePiece's, of characters and bytes; `strip` is how many spaces it removes before a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer or pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=400))
    model = json.loads(tokenizer.to_str())["model"]
    # As SentencePiece's, no merge joins a newline to another character: bytes are not merged.
    merges = [tuple(pair) for pair in model["merges"] if not any("\n" in part or "\t" in part for part in pair)]
    words = [token for token in model["vocab"] if "\n" not in token and "\t" not in token]
    vocabulary = {token: number for number, token in enumerate(["<unk>", "<s>", "</s>", *BYTES, *words])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", strip, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    return tokenizer


def unigram():
    """T5's and XLM-R's way: it joins all space, and has no bytes."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.train_from_iterator(
        TEXTS, trainers.UnigramTrainer(vocab_size=200, unk_token="<unk>", special_tokens=["<unk>"])
    )
    return tokenizer


def wordpiece():
    """BERT's way, with case."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    tokenizer.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=400, special_tokens=["<unk>"]))
    return tokenizer


def with_spaces(tokenizer, *spaces, normalized):
    """With runs of space as added tokens that are not special, as Gemma's and Phi 2's have."""
    tokenizer.add_tokens([AddedToken(space, normalized=normalized) for space in spaces])
    return tokenizer


UNDERSCORE = normalizers.Replace(" ", "▁")
LEGACY = normalizers.Sequence([normalizers.Prepend("▁"), UNDERSCORE])
FAMILIES = {
    "GPT-2": byte_level,
    "RoBERTa": lambda: byte_level(add_prefix_space=True),
    "Llama 3": lambda: byte_level(split=LLAMA3_SPLIT),
    "Llama 2": lambda: sentencepiece(LEGACY, None, 1),
    "Llama 2, not legacy": lambda: sentencepiece(
        None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False), 1
    ),
    "Mistral 0.3": lambda: sentencepiece(None, pre_tokenizers.Metaspace(prepend_scheme="always", split=False), 1),
    "Gemma": lambda: with_spaces(sentencepiece(UNDERSCORE, None, 0), "\n\n", "\n\n\n", "  ", normalized=False),
    "Phi 2": lambda: with_spaces(byte_level(), "  ", "    ", "\t\t", normalized=True),
    "T5": unigram,
    "BERT": wordpiece,
}
WITH_BOS = ("Llama 3", "Llama 2", "Llama 2, not legacy", "Mistral 0.3", "Gemma")  # before each text
LLAMA_CLASS = ("Llama 2, not legacy", "Mistral 0.3")  # a class of transformers', which builds the tokenizer anew


@functools.cache
def family(name):
    return FAMILIES[name]().to_str()


def save_model(name, template, control, eos, directory):
    """Save a model of a family with a template and its control tokens to a directory, as the Hub would hold it."""
    tokenizer = Tokenizer.from_str(family(name))
    tokenizer.add_special_tokens(["<unk>", "<s>", eos])
    tokenizer.add_special_tokens(control)
    bos = next((str(token) for token in control if str(token) in BOS), "<s>")
    if name in WITH_BOS:
        begin = [(bos, tokenizer.token_to_id(bos))]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=begin)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, unk_token="<unk>")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(directory)
    if name in LLAMA_CLASS:
        settings = json.loads((directory / "tokenizer_config.json").read_text())
        settings |= {"tokenizer_class": "LlamaTokenizer", "legacy": name == "Mistral 0.3", "add_bos_token": True}
        (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    tiny_llama(8).config.save_pretrained(directory)


def both(text):
    """A control token that absorbs the space on both sides, as Phi 4's."""
    return AddedToken(text, lstrip=True, rstrip=True, normalized=False, special=True)


def right(text):
    return AddedToken(text, rstrip=True, normalized=False, special=True)


def turns(user, assistant, prompt, system="", begin=""):
    """A template that writes messages by role, `content` of each in the place of `{}`."""
    written = {"system": system, "user": user, "assistant": assistant}
    cases = [f"{{% if m.role == '{role}' %}}{write(text)}{{% endif %}}" for role, text in written.items() if text]
    refused = "" if system else "{% if m.role == 'system' %}{{ raise_exception('no system message') }}{% endif %}"
    loop = f"{{% for m in messages %}}{refused}{''.join(cases)}{{% endfor %}}"
    return f"{write(begin)}{loop}{{% if add_generation_prompt %}}{write(prompt)}{{% endif %}}"


def write(text):
    """A Jinja expression of a text, in which `{}` is the content, `{trimmed}` the content without the space around."""
    names = {"{}": "m.content", "{trimmed}": "m.content | trim", "{bos}": "bos_token", "{eos}": "eos_token"}
    for name, expression in names.items():
        text = text.replace(name, f"\0{expression}\0")
    parts = [part if number % 2 else json.dumps(part) for number, part in enumerate(text.split("\0"))]
    return "".join(f"{{{{ {part} }}}}" for part in parts if part != '""')


def chatml(system=True, begin="", trim=False):
    content = "{trimmed}" if trim else "{}"
    role = {name: f"<|im_start|>{name}\n{content}<|im_end|>\n" for name in ("system", "user", "assistant")}
    return turns(role["user"], role["assistant"], "<|im_start|>assistant\n", role["system"] if system else "", begin)


MERGED_SYSTEM = """{% if messages[0].role == 'system' %}{% set system = messages[0].content %}
{%- set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"""
LLAMA2 = (
    MERGED_SYSTEM
    + """{% for m in rest %}
{%- set text = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + m.content if loop.index0 == 0 and system else m.content %}
{%- if m.role == 'user' %}{{ bos_token + '[INST] ' + text | trim + ' [/INST]' }}
{%- else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"""
)
GEMMA3 = (
    "{{ bos_token }}"
    + MERGED_SYSTEM
    + """{% for m in rest %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}
{{- system + '\n\n' if loop.first and system else '' }}{{ m.content | trim }}{{ '<end_of_turn>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""
)
QWEN3 = """{%- for m in messages %}{% if m.role == 'assistant' %}{% set content = m.content.split('</think>')[-1] %}
{%- if loop.last %}{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' + content.lstrip('\n') + '<|im_end|>\n' }}
{%- else %}{{ '<|im_start|>assistant\n' + content + '<|im_end|>\n' }}{% endif %}
{%- else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
SMOLLM3 = """{% if enable_thinking is not defined %}{% set enable_thinking = true %}{% endif %}
{{- '<|im_start|>system\n## Metadata\n\nReasoning Mode: ' + ('/think' if enable_thinking else '/no_think') }}
{%- if custom_instructions %}{{ '\n\n## Custom Instructions\n\n' + custom_instructions | trim }}{% endif %}
{%- for tool in xml_tools or [] %}{{ '\n' + tool }}{% endfor %}{{ '<|im_end|>\n' }}
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>\n' }}{% endgeneration %}
{%- else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
COHERE = "<|START_OF_TURN_TOKEN|><|%s_TOKEN|>{trimmed}<|END_OF_TURN_TOKEN|>"
IM = ["<|im_start|>", "<|im_end|>"]
BOS = ("<s>", "<bos>", "<|begin_of_text|>", "<｜begin▁of▁sentence｜>", "<BOS_TOKEN>", "<|endoftext|>")
HEADERS = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"]
# Each template, the control tokens that it writes, and the stop token. A model without one is trained in ChatML.
TEMPLATES = {
    "ChatML": (None, [], "</s>"),
    "ChatML, Phi 4's tokens": (None, [both("<|im_start|>"), both("<|im_end|>")], "</s>"),
    "Llama 2": (LLAMA2, [], "</s>"),
    "Llama 3": (
        turns(*(
            f"<|start_header_id|>{role}<|end_header_id|>\n\n{{trimmed}}<|eot_id|>" for role in ("user", "assistant")
        ), "<|start_header_id|>assistant<|end_header_id|>\n\n",
            "<|start_header_id|>system<|end_header_id|>\n\n{trimmed}<|eot_id|>", "{bos}"),
        HEADERS, "<|eot_id|>",
    ),
    "Mistral 0.1": (turns("[INST] {} [/INST]", "{}{eos} ", "", begin="{bos}"), [], "</s>"),
    "Mistral 0.3": (turns("[INST] {}[/INST]", " {trimmed}{eos}", "", begin="{bos}"), ["[INST]", "[/INST]"], "</s>"),
    "Gemma": (
        turns("<start_of_turn>user\n{trimmed}<end_of_turn>\n", "<start_of_turn>model\n{trimmed}<end_of_turn>\n",
              "<start_of_turn>model\n", begin="{bos}"),
        ["<bos>", "<start_of_turn>"], "<end_of_turn>",
    ),
    "Gemma 3": (GEMMA3, ["<bos>", "<start_of_turn>"], "<end_of_turn>"),
    "Phi 3": (
        turns("<|user|>\n{}<|end|>\n", "<|assistant|>\n{}<|end|>\n", "<|assistant|>\n", "<|system|>\n{}<|end|>\n"),
        [right(f"<|{role}|>") for role in ("user", "assistant", "system")], "<|end|>",
    ),
    "Phi 4": (
        turns("<|im_start|>user<|im_sep|>{}<|im_end|>", "<|im_start|>assistant<|im_sep|>{}<|im_end|>",
              "<|im_start|>assistant<|im_sep|>", "<|im_start|>system<|im_sep|>{}<|im_end|>"),
        [both("<|im_start|>"), both("<|im_sep|>"), both("<|im_end|>")], "<|im_end|>",
    ),
    "Zephyr": (  # and TinyLlama's
        turns("<|user|>\n{}{eos}\n", "<|assistant|>\n{}{eos}\n", "<|assistant|>\n", "<|system|>\n{}{eos}\n"),
        [], "</s>",
    ),
    "Qwen 2.5": (chatml(begin="<|im_start|>system\nYou are Qwen.<|im_end|>\n"), IM[:1], IM[1]),
    "Qwen 3": (QWEN3, [IM[0], "<think>", "</think>"], IM[1]),
    "SmolLM3": (SMOLLM3, IM[:1], IM[1]),
    "DeepSeek": (
        turns("<｜User｜>{}", "<｜Assistant｜>{}<｜end▁of▁sentence｜>", "<｜Assistant｜>", "{}", "{bos}"),
        ["<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"], "<｜end▁of▁sentence｜>",
    ),
    "Vicuna": (turns("USER: {} ", "ASSISTANT: {}</s>", "ASSISTANT:", "{} ", "{bos}"), [], "</s>"),
    "Alpaca": (turns("### Instruction:\n{}\n\n", "### Response:\n{}</s>\n\n", "### Response:\n", "{}\n\n"), [], "</s>"),
    "OpenChat": (
        turns("GPT4 Correct User: {}<|end_of_turn|>", "GPT4 Correct Assistant: {}<|end_of_turn|>",
              "GPT4 Correct Assistant:", begin="{bos}"), [], "<|end_of_turn|>",
    ),
    "Command R": (
        turns(COHERE % "USER", COHERE % "CHATBOT", "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>", COHERE % "SYSTEM",
              "{bos}"),
        ["<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>"],
        "<|END_OF_TURN_TOKEN|>",
    ),
    "OLMo 2": (
        turns("<|user|>\n{}\n", "<|assistant|>\n{}{eos}\n", "<|assistant|>\n", "<|system|>\n{}\n", "{bos}"),
        [], "<|endoftext|>",
    ),
    "Granite": (
        turns(*(f"<|start_of_role|>{role}<|end_of_role|>{{}}<|end_of_text|>\n" for role in ("user", "assistant")),
              "<|start_of_role|>assistant<|end_of_role|>", "<|start_of_role|>system<|end_of_role|>{}<|end_of_text|>\n"),
        ["<|start_of_role|>", "<|end_of_role|>"], "<|end_of_text|>",
    ),
    "Yi": (chatml(), ["<|startoftext|>", IM[0]], IM[1]),
}  # fmt: skip
