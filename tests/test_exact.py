"""Right answers: what counts as equal, batches that change nothing, references that cannot be judged, the command."""

import json
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import eval as eval_command
from config import Config, UserError
from data import load_split
from evaluation import exact
from evaluation.exact import PARSERS, choose_rule, compare_right, count_right, judge, parse_json, parse_last_number
from evaluation.format import format_report
from evaluation.generation import generate_batches
from tests.conftest import a_chat, tiny_llama, write_rows

SUMS = [
    a_chat(f"{one} + {other}?", f"It is {one} + {other} = {one + other}") for one in range(2, 9) for other in (7, 80)
]
CALLS = [
    a_chat(f"Weather in {city}?", json.dumps({"name": "weather", "arguments": {"city": city, "days": len(city)}}))
    for city in ("Oslo", "Rome", "Lima", "Nice", "Bern")
]
TALKS = [a_chat(f"Who is {name}?", f"{name}, a friend of mine.") for name in ("Ada", "Bob", "Cy")]


def is_right(reference, answer):
    parse = PARSERS[choose_rule(reference)]
    return parse(answer) == parse(reference)


# --- what is equal


@pytest.mark.parametrize(
    ("reference", "rule", "equal", "different"),
    [
        (
            "42",
            "number",
            ["42", "It is 42.", "$42.00", "6 * 7 = 42", "x: 42 km", "84/2"],
            ["43", "42 or 43", "-42", "4.2", "x42"],
        ),
        ("48/2 = <<48/2=24>>24\n#### 1,024", "number", ["1024", "#### 1024.0", "1,024 apples"], ["1,0245", "1", "24"]),
        ("The answer is -0.5.", "number", ["-.5", "−1/2", "-$0.50"], ["0.5", "5", "1-0.5", "", "none", "1.0.5"]),
        (r"So \boxed{1/42}", "number", ["1/42"], ["1", "42", "1/420"]),
        (
            "#### 42",
            "number",
            ["答案是42。", "共有42个", "答えは-42足す84で42です", "ทั้งหมด42บาท"],
            ["答案是4.2", "x42", "я42", "版本1.42.0"],
        ),
        ("42。", "number", ["42", "42."], ["4"]),
        ("你好。", "text", ["你好", "你好！"], ["你好吗"]),
        ("नमस्ते।", "text", ["नमस्ते"], ["नमस्"]),
        ("1e3", "number", ["1000"], ["1", "3"]),
        ("Hello,  World!", "text", ["hello, world", "Hello,\nworld ."], ["hello world", "Hello, World! Yes"]),
        ("caf\u00e9", "text", ["cafe\u0301", "CAF\u00c9."], ["cafe"]),
        ("x\u00b2", "text", ["X\u00b2"], ["x2"]),
        ("x = 5", "text", ["X = 5"], ["5", "y = 5"]),
        ("He was born in 1984", "text", ["he was born in 1984."], ["1984", "She was born in 1984"]),
        ("...", "text", ["..."], ["", "!"]),
        (
            '{"a": 1, "b": [true, "x"]}',
            "json",
            ['{"b":[true,"x"],\n "a":1}'],
            ['{"a": 1}', '{"a": 1, "b": [1, "x"]}', "x"],
        ),
        (
            '{"a": 1}',
            "json",
            ['{"\\u0061": 1}'],
            ['{"a": 1.0}', '{"a": "1"}', '{"a": true}', '[["a", 1]]', '{"a": 2, "a": 1}'],
        ),
        (
            '{"a": 1}',
            "json",
            [' {"a":1} '],
            ['{"a": 1} done', '{"a": 1} {"a": 1}', '[{"a": 1}]', '{"a": 1', '{"": [["a", 1]]}'],
        ),
        ("[1, 2]", "json", ["[1,2]"], ["[2, 1]", "1, 2"]),
        (
            '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>',
            "json",
            ['<tool_call>{"arguments":{},"name":"f"}</tool_call>'],
            ['{"name": "f", "arguments": {}}', '<tool_call>{"name": "g", "arguments": {}}</tool_call>', "<tool_call>"],
        ),
    ],
)
def test_the_reference_decides_what_is_equal(reference, rule, equal, different):
    assert choose_rule(reference) == rule
    for answer in [reference, *equal]:
        assert is_right(reference, answer), answer
    for answer in different:
        assert not is_right(reference, answer), answer


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats(-1, 1) | st.text("ab", max_size=2),
    lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text("ab", max_size=2), part, max_size=3),
    max_leaves=6,
)
OBJECTS = st.dictionaries(st.text("ab", max_size=2), JSON, max_size=3) | st.lists(JSON, max_size=3)


@given(OBJECTS, OBJECTS, st.randoms())
def test_json_is_equal_whatever_its_order_and_never_to_another(one, other, random):
    def shuffled(value):
        if isinstance(value, dict):
            keys = random.sample(list(value), len(value))
            return {key: shuffled(value[key]) for key in keys}
        return list(map(shuffled, value)) if isinstance(value, list) else value

    assert parse_json(json.dumps(shuffled(one), indent=random.choice([None, 2]))) == parse_json(json.dumps(one))
    same = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert (parse_json(json.dumps(one)) == parse_json(json.dumps(other))) == same


@given(st.text() | st.text("0123456789.,/-−$e+ =#"))
def test_any_text_has_a_rule_and_is_equal_to_itself(text):
    assert is_right(text, text)
    for parse in PARSERS.values():
        parse(text)


@pytest.mark.parametrize("text", ["{}", "1/{}", "1.{}", "#### {}", "-{}"])
def test_a_number_of_more_digits_than_python_converts_is_judged(text):
    long = text.format(5000 * "9")
    assert is_right(long, long)
    assert not is_right(long, long + "9")
    assert not is_right("5", long)


@given(st.integers(-(10**9), 10**9), st.integers(0, 4))
def test_a_number_is_its_value_however_it_is_written(number, places):
    for text in (
        f"{number}",
        f"{number:,}",
        f"so {number:,}.{places * '0'}" if places else f"{number}.",
        f"= {number}!",
    ):
        assert parse_last_number(text) == Fraction(number)
    assert not is_right(f"#### {number}", str(number + 1))


# --- statistics


def test_the_interval_is_wilsons():
    """Against the roots of its definition: (share - p)² n = z² p (1 - p)."""
    for right, n in ((0, 10), (3, 10), (10, 10), (1, 1), (250, 1000)):
        found = count_right([{"right": number < right} for number in range(n)])
        assert (found["right"], found["conversations"]) == (right, n)
        for p in found["interval"]:
            assert (right / n - p) ** 2 * n == pytest.approx(exact.Z**2 * p * (1 - p), abs=1e-12)
        assert found["interval"][0] <= right / n <= found["interval"][1] + 1e-12
    assert count_right([])["interval"] is None


def verdicts(*right):
    return {"rows": [{"location": str(n), "reference": "x", "right": bool(one)} for n, one in enumerate(right)]}


def test_p_is_that_of_the_binomial_distribution():
    for won, lost in ((0, 0), (1, 0), (5, 0), (0, 6), (3, 9), (7, 7), (400, 700)):
        before, after = verdicts(*[0] * won, *[1] * lost, 1, 0), verdicts(*[1] * won, *[0] * lost, 1, 0)
        found = compare_right(before, after)
        draws = torch.distributions.Binomial(won + lost, torch.tensor(0.5, dtype=torch.float64))
        tail = draws.log_prob(torch.arange(min(won, lost) + 1, dtype=torch.float64)).exp().sum().item()
        assert found == {
            "conversations": won + lost + 2,
            "won": won,
            "lost": lost,
            "p": pytest.approx(min(1, 2 * tail)),
        }
    assert compare_right({"rows": []}, verdicts(1))["conversations"] == 0


# --- generating


def load(path, tokenizer, **settings):
    return load_split(Config(preset="none", dataset=(str(path),), **settings), tokenizer).examples


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_answers_are_those_of_one_by_one(tiny_tokenizer, tmp_path, dtype):
    examples = load(write_rows(tmp_path / "rows.jsonl", SUMS + CALLS + TALKS), tiny_tokenizer)
    model = tiny_llama(len(tiny_tokenizer)).to(dtype)
    prompts, _, _, _ = exact.find_references(examples, tiny_tokenizer, 512)
    limits, alone = [3 + 7 * number % 20 for number in range(len(prompts))], {}
    for number, prompt in enumerate(prompts):
        ids = prompt[None]
        while ids.shape[1] < len(prompt) + limits[number] and ids[0, -1] != tiny_tokenizer.eos_token_id:
            with torch.no_grad():
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)  # without a cache
        text = tiny_tokenizer.decode(ids[0, len(prompt) :], skip_special_tokens=True).strip()
        alone[number] = [text, ids[0, -1].item() == tiny_tokenizer.eos_token_id, ids.shape[1] - len(prompt)]
    for budget in (0, 1, 200, 700):
        found = generate_batches(model, tiny_tokenizer, prompts, limits, budget=budget)
        assert {number: rest for batch in found for number, *rest in batch} == alone


def test_a_row_near_the_context_length_shortens_no_other(tiny_tokenizer, monkeypatch):
    model = tiny_llama(len(tiny_tokenizer)).double()
    prompts, limits = [torch.arange(3, 3 + n) for n in (5, 90, 7, 95)], [40, 10, 40, 5]
    monkeypatch.setattr(tiny_tokenizer, "model_max_length", 100)
    batches = generate_batches(model, tiny_tokenizer, prompts, limits)
    together = {number: rest for batch in batches for number, *rest in batch}
    for number in range(4):
        (((_, *alone),),) = generate_batches(model, tiny_tokenizer, [prompts[number]], [limits[number]])
        assert together[number] == alone
        assert alone[2] == limits[number], "the control: an answer that does not stop"


def test_the_prompt_is_all_before_the_last_answer(tiny_tokenizer, tmp_path):
    chat = {"messages": [*a_chat("One?", "1")["messages"], *a_chat("Two?", "It is 2.")["messages"]]}
    prompts, limits, rows, skipped = exact.find_references(
        load(write_rows(tmp_path / "rows.jsonl", [chat]), tiny_tokenizer), tiny_tokenizer, 500
    )
    expected = tiny_tokenizer.apply_chat_template(chat["messages"][:3], tokenize=False, add_generation_prompt=True)
    assert tiny_tokenizer.decode(prompts[0]) == expected
    assert rows == [{"location": f"{tmp_path}/rows.jsonl:1", "rule": "text", "reference": "It is 2."}]
    assert (limits, skipped) == ([2 * len("It is 2.X") + 16], {})


def test_references_that_cannot_be_judged_are_counted_apart(tiny_tokenizer, tmp_path):
    rows = [a_chat("Hi", 30 * "long "), a_chat("Hi", "short"), {"text": "Just a text."}, a_chat(60 * "x", 199 * "y")]
    examples = load(write_rows(tmp_path / "rows.jsonl", rows), tiny_tokenizer, max_length=190)
    prompts, _, found, skipped = exact.find_references(examples, tiny_tokenizer, 50)
    assert [row["reference"] for row in found] == ["short"]
    assert (len(prompts), skipped) == (
        1,
        {"have more than 50 tokens (--max-new-tokens)": 1, "are no answers to anything": 1, "are cut off": 1},
    )


class Recited:
    """In the place of `generate`: the answers of a model that is right or wrong as a test wants it."""

    def __init__(self, tokenizer, answers):
        self.tokenizer, self.answers = tokenizer, answers

    def __call__(self, _model, _tokenizer, prompts, _sampling, most):
        texts = [self.tokenizer.decode(prompt) for prompt in prompts]
        answers = [next(answer for question, answer in self.answers.items() if question in text) for text in texts]
        ids = [[*self.tokenizer.encode(answer), self.tokenizer.eos_token_id] for answer in answers]
        return [torch.tensor(one[:most]) for one in ids]


def test_what_is_right_by_which_rule(tiny_tokenizer, tmp_path, monkeypatch, capsys):
    answers = {
        "2 + 7?": "Well: 9",
        "3 + 7?": "11",
        "in Oslo?": '{"arguments": {"days": 4, "city": "Oslo"}, "name": "weather"}',
    }
    answers |= {
        "in Rome?": '{"name": "weather"}',
        "Ada?": "ada, a friend of mine",
        "Bob?": 99 * "Bob, a friend of mine.",
    }
    rows = [row for row in SUMS + CALLS + TALKS if any(key in row["messages"][0]["content"] for key in answers)]
    examples = load(write_rows(tmp_path / "rows.jsonl", rows), tiny_tokenizer)
    monkeypatch.setattr("evaluation.generation.generate", Recited(tiny_tokenizer, answers))
    monkeypatch.setattr(exact, "INTERVAL", -1)
    found = judge(None, tiny_tokenizer, examples, 100)
    assert [row["right"] for row in found["rows"]] == [True, False, True, False, True, False]
    assert {rule: (each["right"], each["conversations"]) for rule, each in found["by_rule"].items()} == {
        "json": (1, 2),
        "number": (1, 2),
        "text": (1, 2),
    }
    assert (found["right"], found["conversations"], found["unfinished"], found["not_judged"]) == (3, 6, 1, {})
    assert found["tokens"] == sum(min(len(row["answer"]) + 1, 62) if row["finished"] else 62 for row in found["rows"])
    assert capsys.readouterr().err.splitlines()[-1] == "  0 more answers to generate"


def test_an_answer_without_an_end_is_wrong(tiny_tokenizer, tmp_path, monkeypatch):
    examples = load(write_rows(tmp_path / "rows.jsonl", SUMS[:1]), tiny_tokenizer)
    monkeypatch.setattr("evaluation.generation.generate", lambda *_: [torch.tensor(tiny_tokenizer.encode("9"))])
    found = judge(None, tiny_tokenizer, examples, 100)
    assert (found["right"], found["unfinished"], found["rows"][0]["answer"]) == (0, 1, "9")


# --- the command


def test_the_command_counts_and_compares(tiny_model_dir, tmp_path, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", SUMS[:3] + CALLS[:2])
    arguments = [
        str(tiny_model_dir),
        "--dataset",
        str(rows),
        "--exact",
        "--against",
        str(tiny_model_dir),
        "--prompts",
        "Hi",
    ]
    assert eval_command.main([*arguments, "--json", "--max-new-tokens", "80", "--greedy"]) == 0
    printed = capsys.readouterr().out
    report = json.loads(printed)
    found = report["exact"]["all"]
    assert found.pop("against") == {"conversations": 5, "won": 0, "lost": 0, "p": 1.0}
    theirs = report["against"]["exact"]["all"]
    assert {**found, "seconds": 0} == {**theirs, "seconds": 0}
    assert (found["conversations"], found["right"], found["interval"][0]) == (5, 0, 0.0)
    shown = format_report(json.loads(printed))
    assert (
        "\n  all: 0 of 5 answers are right: 0.0%, 95 % interval [0.0%, 43.4%] (json 0 of 2, number 0 of 3)\n" in shown
    )
    assert "\n    only this one right 0, only the other 0, p = 1: no difference beyond chance\n" in shown
    assert shown.count("wrong, by number: rows.jsonl:1\n") == 2


def test_what_contradicts_it_is_refused(tiny_model_dir, tmp_path):
    with pytest.raises(UserError, match="--chat is a conversation; leave --exact out"):
        eval_command.main([str(tiny_model_dir), "--exact", "--chat"])
    with pytest.raises(UserError, match="--max-new-tokens must be at least 1, not 0"):
        eval_command.main([str(tiny_model_dir), "--exact", "--max-new-tokens", "0"])
    with pytest.raises(UserError, match="nowhere"):  # not only a warning, as without it
        eval_command.main(
            [str(tiny_model_dir), "--exact", "--prompts", "Hi", "--dataset", str(tmp_path / "nowhere.jsonl")]
        )
