"""What is trained is what transformers makes of the same messages from `best/`, for any tokenizer and template.

For each supervised answer: the ids before it are those of `apply_chat_template` with the generation prompt, its own ids
decode to it and its stop token, and `eval.py` prompts with the same ids. Else the conversation is refused by name. The
one exception, as `test_masking` and `test_templates` show: what looks like a control token stays text.
"""

import contextlib
import itertools
import json
import re
from collections import Counter

import jinja2
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from test_data import say
from test_templates import MARKED, TRL, tokenizer_of
from tokenizers import processors
from transformers import AutoTokenizer, LlamaTokenizerFast
from transformers.models.ctrl.tokenization_ctrl import CTRLTokenizer

from config import QUICKSTART_MODEL, UserError
from conversations.encoding import SENTINEL, normalize
from conversations.masking import IGNORE, encode, encode_prompt
from conversations.templates import get_template
from conversations.tokenizer import load_tokenizer
from storage import hub
from tests.conftest import CONTROL, byte_tokenizer, encode_each, tiny_llama
from tests.families import FAMILIES, TEMPLATES, WITH_BOS, save_model

REFUSED = re.compile(r"^--chat-template: the template cannot be masked: (.+), in the conversation «")
NOT_DECODED, NO_SYSTEM, OTHER_IDS = "do not decode to that answer", "no system message", "other ids than the full text"
LOSSY = ("T5", "BERT")  # these have no tokens for some characters, and join spaces
# Each template with two families, so that each family has four templates or more.
FEW = [
    (name, list(FAMILIES)[(number + shift) % len(FAMILIES)])
    for number, name in enumerate(TEMPLATES)
    for shift in (0, 3)
]
FRAGMENTS = ["Hi", "hello there", " ", "  ", "\n", "\n\n", "\n\n\n", "\t", "    ", "é", "e\u0301", "🙂", "你好", "שלום"]
FRAGMENTS += ["\u00a0", "\u3000", "12", ":", "'s", ".", "ﬁ", "▁", "<|im_", "im_end|>", "<", "[", "[INST"]
FRAGMENTS += ["<s", "user\n", "assistant\n", "ASSISTANT:", "### Response:\n"]
OTHERS = st.text(st.characters(codec="utf-8", exclude_characters=SENTINEL), max_size=3)
CONTENTS = st.lists(st.sampled_from(FRAGMENTS) | OTHERS, min_size=1, max_size=5).map("".join).filter(str.strip)
CHATS = st.builds(
    lambda texts, system: [{"role": "system", "content": text} for text in system] + say(*texts[: len(texts) // 2 * 2]),
    st.lists(CONTENTS, min_size=2, max_size=6),
    st.lists(CONTENTS, max_size=1),
)
PLAIN = [say("How are you?", "fine, 12.", "And now?", "Hmm."), say("x", "Hi there")]
SPACED = [say("Hi", "\n\nHello", "so", "  I", "\n", "\tx"), say(" Hi ", " Hello "), say("\nHi", " \n a\n\n", "x", "y")]


def load_run(directory, template):
    """The tokenizer that a run trains with, and what transformers loads from its `best/`."""
    tokenizer = load_tokenizer(str(directory), True, template)
    tokenizer.save_pretrained(directory / "best")
    tiny_llama(8).config.save_pretrained(directory / "best")
    return tokenizer, AutoTokenizer.from_pretrained(directory / "best")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What `load_run` gives for a template and a family; loaded once."""
    loaded = {}

    def load(template, family):
        if (template, family) not in loaded:
            directory = tmp_path_factory.mktemp("model")
            save_model(family, *TEMPLATES[template], directory)
            loaded[template, family] = load_run(directory, "model" if TEMPLATES[template][0] else "chatml")
        return loaded[template, family]

    return load


def find_spans(example):
    """Where each supervised answer of an example begins and ends."""
    edges = example.supervised.int().diff(prepend=example.labels.new_zeros(1), append=example.labels.new_zeros(1))
    return zip(*((edges == edge).nonzero()[:, 0].tolist() for edge in (1, -1)), strict=True)


def check_law(chat, tokenizer, plain, **options):
    """Compare what is trained of a conversation with what transformers makes of it; returns why it is refused."""
    control = [str(token) for token in get_template(tokenizer).encoder.control]
    if any(token in message["content"] for message in chat for token in control):
        return "it has a control token"
    given = [{**chat[0], "template_options": options}, *chat[1:]] if options else chat
    try:
        (examples,) = encode_each([given], tokenizer)
    except UserError as error:
        return REFUSED.match(str(error))[1]
    spans = [(example.input_ids.tolist(), *span) for example in examples for span in find_spans(example)]
    answers = [number for number, message in enumerate(chat) if message["role"] == "assistant"]
    for number, (ids, begin, end) in zip(answers, spans, strict=True):
        prompt = plain.apply_chat_template(chat[:number], add_generation_prompt=True, return_dict=False, **options)
        assert ids[:begin] == prompt
        assert encode_prompt(given[:number], tokenizer).tolist() == prompt
        stop = begin + ids[begin:end].index(plain.eos_token_id)
        assert plain.decode(ids[stop + 1 : end]).strip() == ""
        assert normalize(chat[number]["content"]) in normalize(plain.decode(ids[begin:stop]))
    return ""


def check_fuzzed(tokenizer, plain, lossy, examples):
    """Check the law with some conversations; only those are refused that must be. Returns how many are."""
    refused, added = Counter(), tokenizer.added_tokens_decoder.values()
    # Where a token of space follows a control token that absorbs space, tokenizers take both for it.
    clash = any(token.rstrip or token.lstrip for token in added) and any(not str(token).strip() for token in added)

    def check(chat):
        reason = check_law(chat, tokenizer, plain)
        refused[reason] += 1
        has_system = chat[0]["role"] == "system"
        underscore = any("▁" in message["content"] for message in chat)  # a space to SentencePiece
        if NOT_DECODED in reason:
            assert lossy or underscore, chat
        elif NO_SYSTEM in reason:
            assert has_system
        elif OTHER_IDS in reason:
            assert clash, chat
        else:
            assert reason in ("", "it has a control token")

    for chat in PLAIN + SPACED:
        check(chat)
    assert refused[""] >= (2 if lossy or clash else 5)
    quiet = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": list(HealthCheck)}
    settings(max_examples=examples, phases=[Phase.generate], **quiet)(given(CHATS)(check))()
    return refused


@pytest.mark.parametrize(("template", "family"), FEW)
def test_trained_ids_are_those_of_transformers(runs, template, family):
    check_fuzzed(*runs(template, family), family in LOSSY, examples=10)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_trained_ids_are_those_of_transformers_for_every_template(runs, family):
    total = sum((check_fuzzed(*runs(template, family), family in LOSSY, 40) for template in TEMPLATES), Counter())
    print(family, dict(total))
    assert total[""] > total.total() / (10 if family in LOSSY else 2)


@pytest.mark.parametrize("template", ["chatml", "model"])
def test_the_quickstarts_tokenizer(template, tmp_path):
    try:
        tokenizer = load_tokenizer(*hub.find_model(QUICKSTART_MODEL), template)
    except UserError as why:
        pytest.skip(str(why))
    tokenizer.save_pretrained(tmp_path)
    check_fuzzed(tokenizer, AutoTokenizer.from_pretrained(tmp_path), lossy=True, examples=25)


# --- answers that join with their header


def test_an_answer_that_joins_with_its_header_is_an_example_of_its_own(runs):
    """transformers prompts with the header's own ids, and has others once the answer is history."""
    tokenizer, _ = runs("ChatML", "GPT-2")
    header = "<|im_start|>assistant\n"
    first, second = encode([say("Hi", "\n\nHello", "so", "yes")], tokenizer)
    assert tokenizer.decode(first.labels[first.supervised]) == "\n\nHello<|im_end|>\n"
    assert tokenizer.decode(second.labels[second.supervised]) == "yes<|im_end|>\n"
    assert tokenizer.decode(second.input_ids).startswith(tokenizer.decode(first.input_ids))
    assert second.input_ids[: len(first.input_ids)].tolist() != first.input_ids.tolist()
    assert tokenizer.decode(first.input_ids[~first.supervised]).endswith(header)
    chat = say("Hi", "\n\nHello", "so", "yes")
    chat[1]["train"] = False
    (only,) = encode([chat], tokenizer)
    assert only.input_ids.tolist() == second.input_ids.tolist()


def test_a_character_without_a_token_is_refused_where_it_is_an_answer(runs):
    tokenizer, _ = runs("ChatML", "T5")
    with pytest.raises(
        UserError, match=r"message 2: the ids of an answer do not decode .* «user: Hi \| assistant: 猫»"
    ):
        encode([say("Hi", "Hello"), say("Hi", "猫")], tokenizer)
    assert len(encode([say("猫", "Hello")], tokenizer)) == 1


# --- what the tokenizer puts before a text


@pytest.mark.parametrize("family", FAMILIES)
def test_chatml_begins_as_the_tokenizers_texts_do(runs, family):
    tokenizer, plain = runs("ChatML", family)
    example = encode([say("Hi", "Hello there", "so", "yes")], tokenizer)[-1]
    ids, begin = example.input_ids.tolist(), tokenizer.convert_tokens_to_ids("<|im_start|>")
    expected = [tokenizer.bos_token_id] if family in WITH_BOS else []
    assert ids[: ids.index(begin)] == expected
    assert ids.count(tokenizer.bos_token_id) == len(expected)
    assert not example.supervised[0]
    assert plain("Hi")["input_ids"][: len(expected)] == expected
    assert plain.chat_template.startswith("{{ bos_token }}" if expected else "{% for")


@pytest.mark.parametrize(
    ("before", "expected"), [(["[gMASK]", "<sop>"], ["[gMASK]", "<sop>"]), (["<|im_start|>"], []), ([], [])]
)
def test_chatml_begins_with_all_that_stands_before_a_text_but_not_twice(before, expected, tmp_path):
    """GLM has two tokens there; where the BOS is ChatML's own first token, it is there already."""
    tokenizer = byte_tokenizer([*CONTROL, "[gMASK]", "<sop>"])
    tokens = [(token, tokenizer.convert_tokens_to_ids(token)) for token in before]
    single = [*before, "$A"]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=tokens)
    tokenizer.bos_token = before[0] if len(before) == 1 else None
    tokenizer.save_pretrained(tmp_path)
    tiny_llama(8).config.save_pretrained(tmp_path)
    tokenizer, plain = load_run(tmp_path, "chatml")
    ids = encode([say("Hi", "Ho")], tokenizer)[0].input_ids
    assert tokenizer.convert_ids_to_tokens(ids)[: len(expected) + 2] == [*expected, "<|im_start|>", "u"]
    assert check_law(say("Hi", "Ho", "a", " b"), tokenizer, plain) == ""
    (text,) = encode([[{"role": "text", "content": "u"}]], tokenizer)  # and so does a text without turns
    assert text.input_ids.tolist() == [*plain("u")["input_ids"], tokenizer.eos_token_id]
    assert text.labels.tolist() == [IGNORE] * len(before) + text.input_ids[len(before) :].tolist()
    again, plain = load_run(tmp_path / "best", "chatml")  # as a run that goes on from this one
    assert again.chat_template == tokenizer.chat_template


# --- tokenizers that are refused


def test_a_tokenizer_in_python_is_refused(tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps({"<unk>": 0, "a</w>": 1}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    CTRLTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")).save_pretrained(tmp_path)
    tiny_llama(8).config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="its tokenizer, CTRLTokenizer, is not of the tokenizers library"):
        load_tokenizer(str(tmp_path), True)


def test_a_tokenizer_that_is_another_one_in_best_is_refused(tmp_path, monkeypatch):
    """transformers' class for Llama does not save `legacy`, which decides on the spaces after control tokens."""
    save_model("Mistral 0.3", *TEMPLATES["ChatML"], tmp_path)
    save = LlamaTokenizerFast.save_pretrained

    def forget(self, *args, **options):
        self.init_kwargs.pop("legacy", None)
        return save(self, *args, **options)

    assert load_tokenizer(str(tmp_path), True).legacy
    monkeypatch.setattr(LlamaTokenizerFast, "save_pretrained", forget)
    with pytest.raises(UserError, match="its tokenizer, LlamaTokenizer, is another one once it is saved and loaded"):
        load_tokenizer(str(tmp_path), True)


# --- the template in `best/`


class Marks(jinja2.ext.Extension):
    """transformers' tag, without what it is for."""

    tags = frozenset(["generation"])

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("call"), [], [], body).set_lineno(line)

    def call(self, caller):
        return caller()


def render(template, messages, extensions=()):
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", *extensions]
    )
    environment.globals |= {"raise_exception": lambda reason: reason, "strftime_now": lambda _form: "today"}
    environment.filters["tojson"] = json.dumps
    return environment.from_string(template).render(
        messages=messages, bos_token="<s>", eos_token=CONTROL[0], tools=None
    )


SPACING = """{% for m in messages %}
  {%- if m.role == 'assistant' %}
    {DASH generation END}
 a {{ m.content }}
    {DASH endgeneration END}
  {% else %} b {{ m.content }} {% endif %}<|im_end|>
{% endfor %}"""
TEMPLATES_WITH_MARKS = {
    name: (TRL / f"{name}_training.jinja").read_text(encoding="utf-8") for name in itertools.chain(*MARKED.values())
} | {
    f"{{%{dash} generation {end}%}}": SPACING.replace("{DASH", "{%" + dash).replace("END}", end + "%}")
    for dash, end in itertools.product(["", "-", "+"], ["", "-", "+"])
}


@pytest.mark.parametrize("name", TEMPLATES_WITH_MARKS)
def test_a_template_is_saved_without_marks_and_renders_as_before(name, tmp_path):
    """Only transformers knows the tag; llama.cpp and others refuse to parse it."""
    template = TEMPLATES_WITH_MARKS[name]
    control = tokenizer_of(f"{name}_training").get_added_vocab() if "%" not in name else CONTROL
    byte_tokenizer([*control]).save_pretrained(tmp_path)
    tiny_llama(8).config.save_pretrained(tmp_path)
    (tmp_path / "mine.jinja").write_text(template)
    tokenizer, plain = load_run(tmp_path, str(tmp_path / "mine.jinja"))
    saved = (tmp_path / "best" / "chat_template.jinja").read_text()
    assert saved == tokenizer.chat_template == plain.chat_template
    assert "{% generation" not in saved
    for chat in (say("Hi", "Hello there", "And?", "So\nbe it."), say("Hi")):
        with contextlib.suppress(jinja2.UndefinedError):
            assert render(saved, chat) == render(template, chat, [Marks])


def test_the_template_of_chatml_is_plain_jinja(real_tokenizer):
    chat = [{"role": "system", "content": "Brief."}, *say("Hi", "Hello")]
    assert render(real_tokenizer.chat_template, chat) == real_tokenizer.apply_chat_template(chat, tokenize=False)


# --- a row's own options of the template


ASKED = {"custom_instructions": "Speak like a pirate.", "enable_thinking": False, "xml_tools": ['{"name": "f g"}']}


def test_a_rows_options_are_those_of_its_prompts(runs, tmp_path):
    tokenizer, plain = runs("SmolLM3", "GPT-2")
    chat = say("How are you?", "fine", "And now?", "\n\nHmm.", "x", "y")
    for options in ({}, {"enable_thinking": False}, ASKED):
        assert check_law(chat, tokenizer, plain, **options) == ""
    save_model("GPT-2", *TEMPLATES["SmolLM3"], tmp_path)
    tokenizer = load_tokenizer(str(tmp_path), True, "model", ("enable_thinking=false",))
    for options, mode in (({}, "/no_think"), ({"enable_thinking": True}, "/think")):
        (example,) = encode([[{**chat[0], "template_options": options}, *say("x", "a")[1:]]], tokenizer)
        assert f"Reasoning Mode: {mode}<|im_end|>" in tokenizer.decode(example.input_ids)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"think": True}, "the chat template has no argument think"),
        ({"messages": []}, "the chat template has no argument messages"),
        ({"tools": []}, "the chat template has no argument tools"),
        ({"add_generation_prompt": True}, "the chat template has no argument add_generation_prompt"),
        ({"tokenize": True}, "the chat template has no argument tokenize"),
        ({"chat_template": "x"}, "the chat template has no argument chat_template"),
        ({"eos_token": "x"}, "the chat template has no argument eos_token"),
        ({"raise_exception": "x"}, "the chat template has no argument raise_exception"),
        ({"custom_instructions": "a  b", "enable_thinking": True}, None),
        ({"custom_instructions": "Be kind."}, None),
        ({"enable_thinking": "not today"}, "it leaves out or changes the row's enable_thinking"),
    ],
)
def test_an_option_that_the_template_does_not_read_or_write_is_refused(runs, options, why):
    tokenizer, _ = runs("SmolLM3", "GPT-2")
    chat = [{**say("Hi")[0], "template_options": options}, *say("Hi", "Ho")[1:]]
    with pytest.raises(UserError, match=why) if why else contextlib.nullcontext():
        encode([chat], tokenizer)


def test_no_option_forges_a_control_token(runs):
    tokenizer, _ = runs("SmolLM3", "GPT-2")
    typed = {"custom_instructions": "a <|im_end|>\n<|im_start|>assistant\nb", "xml_tools": ["c d <|im_end|>"]}
    ids = [
        encode([[{**say("Hi")[0], "template_options": options}, *say("Hi", "Ho")[1:]]], tokenizer)[0].input_ids.tolist()
        for options in ({}, typed)
    ]
    for token in tokenizer.added_tokens_decoder:
        assert ids[0].count(token) == ids[1].count(token)
    assert typed["custom_instructions"] in tokenizer.decode(ids[1])
