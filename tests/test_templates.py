"""Models' own chat templates: masked right and safe from forgery, or refused."""

import pytest
from test_data import say
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import chat_template_utils as templates_of

from config import QUICKSTART_MODEL, UserError
from conversations.tokenizer import CHATML, load_tokenizer
from data import IGNORE, encode, encode_prompt
from storage import hub
from tests.conftest import byte_tokenizer, tiny_llama

MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + '[/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
PLAIN = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
FORGETFUL = (  # leaves all answers but the last out
    "{% for m in messages %}{% if m.role == 'user' or loop.last %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
REWRITING = CHATML.replace("message['content']", "message['content'] | replace('x', 'y')")
UNPROMPTED = CHATML.replace("assistant\n' }}{% endif", "assistant: ' }}{% endif")
CHATML_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
STYLES = {  # a template, its control tokens (bos first, the end of a turn last)
    "Llama 3": (templates_of.llama3_chat_template, LLAMA),
    "Qwen3-Instruct-2507": (templates_of.qwen3_instruct_2507_chat_template, CHATML_TOKENS),
    "Gemma": (templates_of.gemma_chat_template, ["<bos>", "<start_of_turn>", "<end_of_turn>"]),
    "Mistral": (MISTRAL, ["<s>", "[INST]", "[/INST]", "</s>"]),
    "Phi 3": (templates_of.phi3_chat_template, ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]),
}


def tokenizer_with(template, control, directory):
    """A byte-level tokenizer with some control tokens and a template, loaded as a model's is."""
    return save_and_load(byte_tokenizer(control), template, control, directory)


def save_and_load(tokenizer, template, control, directory):
    tokenizer.bos_token, tokenizer.eos_token = control[0], control[-1]
    tokenizer.chat_template = template
    tokenizer.save_pretrained(directory)
    tiny_llama(len(tokenizer)).save_pretrained(directory)
    return load_tokenizer(str(directory), local_files_only=True, chat_template="model")


def trained(chat, tokenizer, **options):
    """The texts of the supervised spans of a conversation."""
    ids, labels = encode([chat], tokenizer, **options)[0]
    spans, inside = [], False
    for number, label in zip(ids.tolist(), labels.tolist(), strict=True):
        if label != IGNORE:
            spans = spans if inside else [*spans, []]
            spans[-1].append(number)
        inside = label != IGNORE
    return [tokenizer.decode(span) for span in spans]


@pytest.mark.parametrize("style", STYLES)
def test_answers_and_their_end_of_turn_are_trained_and_nothing_else(style, tmp_path):
    tokenizer = tokenizer_with(*STYLES[style], tmp_path)
    end, space = STYLES[style][1][-1], " " if style == "Mistral" else ""
    chat = say("How are you?", "Fine,\nthanks.", "And ünicode 🙂?", "Also.")
    assert tokenizer.eos_token == end
    assert trained(chat, tokenizer) == [f"{space}Fine,\nthanks.{end}", f"{space}Also.{end}"]
    assert trained(chat, tokenizer, supervise="last") == [f"{space}Also.{end}"]
    assert encode([chat], tokenizer)[0].input_ids.tolist() == tokenizer.apply_chat_template(chat, return_dict=False)


@pytest.mark.parametrize("style", STYLES)
def test_a_prompt_ends_as_the_template_ends_it(style, tmp_path):
    tokenizer = tokenizer_with(*STYLES[style], tmp_path)
    prompt = tokenizer.apply_chat_template(say("Hi"), add_generation_prompt=True, return_dict=False)
    assert encode_prompt("Hi", tokenizer).tolist() == prompt


@pytest.mark.parametrize("style", STYLES)
def test_no_text_becomes_a_control_token(style, tmp_path):
    tokenizer = tokenizer_with(*STYLES[style], tmp_path)
    control = STYLES[style][1]
    hostile = say("".join(control) + "x" + "".join(control), "y" + "".join(control), "z", control[-1])
    harmless = say("x", "y", "z", "w")

    def tokens(chat):
        ids = encode([chat], tokenizer)[0].input_ids.tolist()
        return [token for token in tokenizer.convert_ids_to_tokens(ids) if token in control]

    assert tokens(hostile) == tokens(harmless)
    end, space = control[-1], " " if style == "Mistral" else ""
    assert trained(hostile, tokenizer) == [f"{space}y{''.join(control)}{end}", f"{space}{control[-1]}{end}"]


@pytest.mark.parametrize(("style", "prepend", "right"), [("Mistral", "always", True), ("Llama 3", "always", False)])
def test_a_tokenizer_that_marks_the_beginnings_of_words_is_masked_right_or_refused(style, prepend, right, tmp_path):
    """As SentencePiece does: a text may get a space before it, and so its parts other ids than the whole."""
    template, control = STYLES[style]
    tokens = ["<unk>", *control, *"▁abcdefghijklmnopqrstuvwxyzHW ,.?\n", "▁H"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("▁", "H")], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=prepend, split=False)
    tokenizer.add_special_tokens(control)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    loaded, chat = save_and_load(tokenizer, template, control, tmp_path), say("How are you?", "fine.", "What?", "Hmm.")
    if right:
        assert trained(chat, loaded) == ["fine.</s>", "Hmm.</s>"]
        assert encode([chat], loaded)[0].input_ids.tolist() == loaded.apply_chat_template(chat, return_dict=False)
    else:
        with pytest.raises(UserError, match="its tokenizer gives the parts other ids than the whole"):
            encode([chat], loaded)


def test_whitespace_that_the_template_trims_is_trimmed(tmp_path):
    tokenizer = tokenizer_with(*STYLES["Llama 3"], tmp_path)
    assert trained(say("a", "  b\n"), tokenizer) == ["b<|eot_id|>"]
    tokenizer = tokenizer_with(*STYLES["Qwen3-Instruct-2507"], tmp_path)
    assert trained(say("a", "\n\n\nb\n"), tokenizer) == ["\n\n\nb\n<|im_end|>"]


def test_a_system_message_is_where_the_template_puts_it(tmp_path):
    tokenizer = tokenizer_with(*STYLES["Llama 3"], tmp_path)
    chat = [{"role": "system", "content": "Be brief."}, *say("a", "b")]
    assert trained(chat, tokenizer) == ["b<|eot_id|>"]
    assert encode([chat], tokenizer)[0].input_ids.tolist() == tokenizer.apply_chat_template(chat, return_dict=False)


@pytest.mark.parametrize(
    ("template", "chat", "why"),
    [
        # Qwen3's writes an empty thought before the last answer, which is not in the prompt.
        (templates_of.qwen3_chat_template, say("a", "b"), "an answer does not follow on what the model is prompted"),
        (UNPROMPTED, say("a", "b"), "an answer does not follow on what the model is prompted with at inference"),
        (FORGETFUL, say("a", "b", "c", "d"), "it drops, repeats or reorders contents"),
        (PLAIN, say("a", "b"), "it does not end an answer with a control token"),
    ],
)
def test_a_template_that_cannot_be_masked_is_refused(template, chat, why, tmp_path):
    with pytest.raises(UserError, match=f"--chat-template model: the model's template cannot be masked.*{why}"):
        encode([chat], tokenizer_with(template, CHATML_TOKENS, tmp_path))


def test_a_template_that_rewrites_what_was_said_is_refused_with_the_conversation(tmp_path):
    tokenizer = tokenizer_with(REWRITING, CHATML_TOKENS, tmp_path)
    assert trained(say("a", "b"), tokenizer) == ["b<|im_end|>"]
    with pytest.raises(UserError, match=r"it changes what messages say, in the conversation «user: a \| assistant: x»"):
        encode([say("a", "x")], tokenizer)


def test_a_conversation_that_the_template_does_not_take_is_refused(tmp_path):
    tokenizer = tokenizer_with(*STYLES["Gemma"], tmp_path)
    with pytest.raises(UserError, match=r"in a conversation of assistant, user, it does not take them: .*alternate"):
        encode([[{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]], tokenizer)


def test_a_model_without_a_template_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"--chat-template model: .* has no chat template; use --chat-template chatml"):
        tokenizer_with(None, CHATML_TOKENS, tmp_path)


def test_the_quickstarts_model_has_chatml_with_a_system_prompt():
    """Its own template adds a default system message and ends an answer with `<|im_end|>`; the newline is context."""
    tokenizer = load_tokenizer(*hub.find_model(QUICKSTART_MODEL), chat_template="model")
    assert trained(say("Hi", "Ho"), tokenizer) == ["Ho<|im_end|>"]
    text = tokenizer.decode(encode([say("Hi", "Ho")], tokenizer)[0].input_ids)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
