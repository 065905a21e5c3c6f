"""Models' own chat templates: masked right and safe from forgery, or refused."""

import json
import re

import pytest
from test_data import say
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import chat_template_utils as templates_of

import eval as evaluation
import train
from config import QUICKSTART_MODEL, UserError
from conversations.masking import IGNORE, encode, encode_prompt
from conversations.tokenizer import CHATML, load_tokenizer
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
SILENT = CHATML.replace("{% for message in messages %}", "{% for message in messages if message.role != 'system' %}")
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


def test_a_templates_eos_token_stays_though_the_stop_becomes_another(tmp_path):
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = byte_tokenizer(control)
    tokenizer.eos_token, tokenizer.chat_template = "<|endoftext|>", "{{ eos_token }}" + CHATML
    tokenizer.save_pretrained(tmp_path)
    tiny_llama(len(tokenizer)).save_pretrained(tmp_path)
    for _ in range(2):  # as it was, and as a run saves it
        tokenizer = load_tokenizer(str(tmp_path), local_files_only=True, chat_template="model")
        assert tokenizer.eos_token == "<|im_end|>"
        prompt = tokenizer.decode(encode_prompt(say("Hi?"), tokenizer))
        assert prompt == "<|endoftext|><|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n"
        tokenizer.save_pretrained(tmp_path)


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
    """As SentencePiece does: a text may get a space before it, and so its parts other ids than the full text."""
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
        with pytest.raises(UserError, match="its tokenizer gives the parts other ids than the full text"):
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
        (UNPROMPTED, say("a", "b"), "the rendered answer does not begin with the generation prompt"),
        (CHATML.replace("message['content']", "'?'"), say("a", "b"), "it does not end an answer with a control token"),
        (PLAIN, say("a", "b"), "it does not end an answer with a control token"),
        (SILENT, [{"role": "system", "content": "Brief!"}, *say("a", "b")], "message 1: it leaves out or changes"),
        ("{{ 1 / 0 }}", say("a", "b"), "it does not take them: division by zero"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", say("a", "b"), "it does not take them: Range too big"),
        ("{#\n#}{% if %}", say("a", "b"), "line 2: Expected an expression"),
    ],
)
def test_a_template_that_cannot_be_masked_is_refused(template, chat, why, tmp_path):
    with pytest.raises(UserError, match=f"--chat-template[^:]*: .*{why}"):
        encode([chat], tokenizer_with(template, CHATML_TOKENS, tmp_path))


def test_what_a_template_drops_from_earlier_turns_makes_examples(tmp_path):
    tokenizer = tokenizer_with(FORGETFUL, CHATML_TOKENS, tmp_path)
    texts = [tokenizer.decode(ids) for ids, _ in encode([say("a", "b", "c", "d")], tokenizer)]
    question, answer = "<|im_start|>user\n{}<|im_end|>", "<|im_start|>assistant\n{}<|im_end|>"
    assert texts == [
        question.format("a") + answer.format("b"),
        question.format("a") + question.format("c") + answer.format("d"),
    ]
    assert trained(say("a", "b", "c", "d"), tokenizer) == ["b<|im_end|>"]
    (only,) = encode([say("a", "b", "c", "d")], tokenizer, supervise="last")
    assert tokenizer.decode(only.input_ids) == texts[1]


def test_a_conversation_in_which_nothing_is_supervised_is_an_example_all_the_same(tmp_path):
    tokenizer = tokenizer_with(*STYLES["Llama 3"], tmp_path)
    chat = say("a", "b", "c", "d")
    chat[3]["train"] = False
    (example,) = encode([chat], tokenizer, supervise="last")
    assert not example.supervised.any()


@pytest.mark.parametrize(
    ("option", "literal"),
    [
        ("enable_thinking=false", "False"),
        ("enable_thinking=1.5", "1.5"),
        ("enable_thinking=a b", "a b"),
        ("enable_thinking=null", "None"),
    ],
)
def test_an_option_becomes_part_of_the_template_unless_a_caller_gives_it(option, literal, tmp_path):
    shows = "{{ enable_thinking }}" + CHATML
    tokenizer = tokenizer_with(shows, CHATML_TOKENS, tmp_path)
    path = str(tmp_path)
    loaded = load_tokenizer(path, True, "model", (option,))
    ids = encode([say("a", "b")], loaded)[0].input_ids
    assert tokenizer.decode(ids).startswith(literal + "<|im_start|>")
    given = loaded.apply_chat_template(say("a"), tokenize=False, enable_thinking="other")
    assert given.startswith("other<|im_start|>")
    loaded.save_pretrained(path)  # as a run's best model is
    assert load_tokenizer(path, True, "model", (option,)).chat_template == loaded.chat_template
    other = load_tokenizer(path, True, "model", ("enable_thinking=9",))
    assert tokenizer.decode(encode([say("a", "b")], other)[0].input_ids).startswith("9<|im_start|>")


@pytest.mark.parametrize(
    ("option", "why"),
    [
        ("thinking=false", "the chat template has no argument thinking"),
        ("message=1", "the chat template has no argument message"),
        ("assistant=1", "the chat template has no argument assistant"),
        ("tools=[]", "the chat template has no argument tools"),
        ("enable_thinking", "write it as name=value"),
        ("=false", "write it as name=value"),
    ],
)
def test_an_option_that_the_template_does_not_read_is_refused(option, why, tmp_path):
    tokenizer_with("{{ enable_thinking }}" + CHATML, CHATML_TOKENS, tmp_path)
    with pytest.raises(UserError, match=re.escape(f"--template-option {option}: {why}")):
        load_tokenizer(str(tmp_path), True, "model", (option,))
    with pytest.raises(UserError, match="--chat-template chatml has no options"):
        load_tokenizer(str(tmp_path), True, "chatml", (option,))


def test_a_template_may_be_a_file_and_is_saved_with_the_tokenizer(tmp_path):
    byte_tokenizer(CHATML_TOKENS).save_pretrained(tmp_path)
    tiny_llama(300).save_pretrained(tmp_path)
    file = tmp_path / "mine.jinja"
    file.write_text(CHATML.replace("user", "person") + "{# mine #}")
    tokenizer = load_tokenizer(str(tmp_path), True, str(file))
    tokenizer.save_pretrained(tmp_path / "best")
    assert (
        load_tokenizer(str(tmp_path), True, str(tmp_path / "best" / "chat_template.jinja")).chat_template
        == file.read_text()
    )
    for name, why in (("nowhere.jinja", "No such file"), (str(tmp_path), "Is a directory")):
        with pytest.raises(UserError, match=f"^--chat-template {name}: {why}"):
            load_tokenizer(str(tmp_path), True, name)


QWEN3 = templates_of.qwen3_chat_template
QWEN_TOKENS = [*CHATML_TOKENS[:2], "<think>", "</think>", "<tool_call>", "</tool_call>", "<|im_end|>"]


def test_thoughts_and_calls_inside_contents_are_those_beside_them(tmp_path):
    """Hermes' way of writing them, and OpenAI's."""
    tokenizer = tokenizer_with(QWEN3, QWEN_TOKENS, tmp_path)
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    hermes = say(
        "q", '<think>\nHm.\n</think>\n\nWait.\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    )
    hermes += [
        {"role": "tool", "content": "<tool_response>\n7\n</tool_response>"},
        {"role": "assistant", "content": "It is 7."},
    ]
    openai = [*say("q"), {"role": "assistant", "content": "Wait.", "thinking": "Hm.", "tool_calls": [call]}]
    openai += [{"role": "tool", "content": "7"}, {"role": "assistant", "content": "It is 7."}]
    rows = [[example.input_ids.tolist() for example in encode([chat], tokenizer)] for chat in (hermes, openai)]
    assert rows[0] == rows[1]
    assert '"arguments": {"a": 1}' in tokenizer.decode(rows[0][0])
    broken = say("q", "<tool_call>{'name': 'f'}</tool_call>")
    with pytest.raises(UserError, match="message 2: what stands in <tool_call> is not"):
        encode([broken], tokenizer)


def test_a_result_that_looks_like_several_is_one_where_the_call_is_not_written_so(tmp_path):
    """What a tool says cannot become the results of other calls."""
    tokenizer, said = tokenizer_with(QWEN3, QWEN_TOKENS, tmp_path), "<tool_response>7</tool_response>" * 2
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    written = {"role": "assistant", "content": '<tool_call>{"name": "f", "arguments": {}}</tool_call>'}
    beside = {"role": "assistant", "content": "", "tool_calls": [call]}
    for made in (written, beside):  # two results do not answer one call
        chat = [*say("q"), made, {"role": "tool", "content": said}, {"role": "assistant", "content": "It is 7."}]
        assert said in tokenizer.decode(encode([chat], tokenizer)[-1].input_ids)


def test_a_think_that_somebody_types_is_text(tmp_path):
    """It is one where an answer begins with it; in a question, or further on in an answer, it is not."""
    tokenizer = tokenizer_with(QWEN3, QWEN_TOKENS, tmp_path)
    ids = encode([say("<think>x</think>", "y</think>z<think>")], tokenizer)[0].input_ids.tolist()
    assert ids.count(2) == ids.count(3) == 1  # the template's own
    assert trained(say("a", "y</think>z<think>"), tokenizer) == ["<think>\n\n</think>\n\ny</think>z<think><|im_end|>"]


def test_a_thought_that_the_prompt_closes_is_refused(tmp_path):
    tokenizer_with(QWEN3, QWEN_TOKENS, tmp_path)
    tokenizer = load_tokenizer(str(tmp_path), True, "model", ("enable_thinking=false",))
    assert trained(say("a", "b"), tokenizer) == ["b<|im_end|>"]
    with pytest.raises(UserError, match=r"message 2: the rendered answer does not begin .* ends with '.*</think>"):
        encode([say("a", "<think>Hm.</think>b")], tokenizer)


def test_a_template_that_rewrites_what_was_said_is_refused_with_the_conversation(tmp_path):
    tokenizer = tokenizer_with(REWRITING, CHATML_TOKENS, tmp_path)
    assert trained(say("a", "b"), tokenizer) == ["b<|im_end|>"]
    with pytest.raises(UserError, match=r"it changes what messages say, in the conversation «user: a \| assistant: x»"):
        encode([say("a", "x")], tokenizer)


def test_a_conversation_that_the_template_does_not_take_is_refused(tmp_path):
    tokenizer = tokenizer_with(*STYLES["Gemma"], tmp_path)
    with pytest.raises(UserError, match=r"in a conversation of user, user, it does not take them: .*alternate"):
        encode([[*say("a"), *say("b", "c")]], tokenizer)


def test_a_model_without_a_template_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"--chat-template model: .* has no chat template; use --chat-template chatml"):
        tokenizer_with(None, CHATML_TOKENS, tmp_path)


def test_the_quickstarts_model_has_chatml_with_a_system_prompt():
    """Its own template adds a default system message and ends an answer with `<|im_end|>`; the newline is context."""
    tokenizer = load_tokenizer(*hub.find_model(QUICKSTART_MODEL), chat_template="model")
    assert trained(say("Hi", "Ho"), tokenizer) == ["Ho<|im_end|>"]
    text = tokenizer.decode(encode([say("Hi", "Ho")], tokenizer)[0].input_ids)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")


def test_a_run_keeps_the_template_of_a_file_and_needs_the_file_no_more(tmp_path, chats, capsys):
    """Its options too: in the best model, in the prompts of `eval.py`, and when it is resumed."""
    byte_tokenizer(CHATML_TOKENS).save_pretrained(tmp_path / "model")
    tiny_llama(259).save_pretrained(tmp_path / "model")
    file, run = tmp_path / "mine.jinja", str(tmp_path / "run")
    file.write_text("{{ greeting }}" + CHATML)
    settings = f"--model {tmp_path}/model --dataset {chats} --test-fraction 0 --batch-size 8 --device cpu --dtype fp32"
    settings += f" --chat-template {file} --template-option greeting=Hey --max-steps 2 --warmup-steps 0 --save-every 1"
    assert train.main([*settings.split(), "--output-dir", run]) == 0
    file.unlink()
    best = load_tokenizer(f"{run}/best", True, "model")
    assert best.decode(encode_prompt("Hi", best)) == "Hey<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    capsys.readouterr()
    assert evaluation.main([run, "--json", "--max-new-tokens", "3", "--device", "cpu", "--dtype", "fp32"]) == 0
    losses = json.loads(capsys.readouterr().out)["splits"]["eval"]
    lines = list(map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()))
    assert losses["loss"] in [line["loss"] for line in lines if line["kind"] == "eval"]
    assert train.main(["--resume", run, "--max-steps", "3", "--allow-changes"]) == 0
