"""Instructions that a program can check: each with answers that follow it and that do not, the file, the shares."""

import importlib.util
import json
import types
from pathlib import Path

import pytest

from config import UserError
from evaluation import instructions
from evaluation.instructions import CHECKS, OF_A_LANGUAGE, check_answers, count_sentences, follows, read_instructions

OWN = Path(__file__).parents[1] / "examples" / "instructions.jsonl"
AT_LEAST, LESS_THAN = "at least", "less than"
# For each instruction its arguments, answers that follow it, and answers that do not.
CASES = [
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": AT_LEAST},
        ["a BIG and WELL-KNOWN one", "I SAY"],
        ["a BIG one", "Big and Small"],
    ),
    ("change_case:capital_word_frequency", {"capital_frequency": 1, "capital_relation": LESS_THAN}, ["no"], ["NO"]),
    ("combination:repeat_prompt", {"prompt_to_repeat": " Name a fruit. "}, ["name a fruit. Apple"], ["Sure: name"]),
    (
        "combination:two_responses",
        {},
        ["one******two", "******\none ****** two"],
        ["one", "one******one", "a******b******c"],
    ),
    ("combination:two_responses", {}, ["a\n******\nb\n******"], ["a************b", "************a"]),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, ["[a] b [c]"], ["[a]", "(a) (b)"]),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, ["Yes.\nP.S. Well", "p. s. x"], ["PS well"]),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, ["P.P.S. Well"], ["P.S. well"]),
    ("detectable_format:constrained_response", {}, ["My answer is no."], ["My answer is none.", "No."]),
    (
        "detectable_format:json_format",
        {},
        ['{"a": 1}', '```json\n{"a": 1}\n```'],
        ["{a: 1}", 'Here: {"a": 1}', "[" * 99_999],
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Part", "num_sections": 2},
        ["Part 1\na\nPart 2\nb"],
        ["Part 1 and more", "Part one Part two"],
    ),
    (
        "detectable_format:number_bullet_lists",
        {"num_bullets": 2},
        ["* a\n* b", "So:\n  - a\n- b"],
        ["* a", "** a\n** b"],
    ),
    ("detectable_format:number_bullet_lists", {"num_bullets": 1}, ["- a"], ["- a\n- b"]),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        ["*a* b *c*"],
        ["*a*", "*a* * *", "* a\n* b"],
    ),
    ("detectable_format:title", {}, ["<<Rivers>>\nFlow"], ["Rivers", "<< >>", "<<Riv\ners>>"]),
    ("keywords:existence", {"keywords": ["a+b", "sum"]}, ["Sum: A+B"], ["a+b", "sum of aab"]),
    ("keywords:forbidden_words", {"forbidden_words": ["can", "a.b"]}, ["the canyon", "axb"], ["I Can.", "it is a.b"]),
    (
        "keywords:frequency",
        {"keyword": "go", "frequency": 2, "relation": AT_LEAST},
        ["Go, and go again"],
        ["go", "come"],
    ),
    ("keywords:frequency", {"keyword": "go", "frequency": 2, "relation": LESS_THAN}, ["go", "come"], ["go go"]),
    ("keywords:letter_frequency", {"letter": "Z", "let_frequency": 2, "let_relation": AT_LEAST}, ["zaZ"], ["za"]),
    ("keywords:letter_frequency", {"letter": "#", "let_frequency": 2, "let_relation": AT_LEAST}, ["# #"], ["#"]),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 1, "nth_paragraph": 0, "first_word": "a"},
        [],
        ["a"],
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Today"},
        ['A b.\n\n"today," c.', "A.\n\n\n\nToday. B."],
        ["A.\n\nNow b.", "Today a.\n\nB.", "A.\n\nToday b.\n\nC.", "Today", "\n\n"],
    ),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 3}, ["a***b***c"], ["a *** *** b"]),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        ["a\n***\nb", "***a***b***"],
        ["a\n\nb", "a***b***c", "a *** *** b"],
    ),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 3, "relation": LESS_THAN},
        ["One. Two!", "No end"],
        ["One. Two! Three?"],
    ),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 2, "relation": AT_LEAST},
        ['He said "no." She left.'],
        ["Dr. Who met J. Smith at 3.30, e.g. here."],
    ),
    ("length_constraints:number_words", {"num_words": 3, "relation": AT_LEAST}, ["one, two, three"], ["one -- two"]),
    ("length_constraints:number_words", {"num_words": 3, "relation": LESS_THAN}, ["one two"], ["one two three"]),
    ("punctuation:no_comma", {}, ["a; b"], ["a, b"]),
    (
        "startend:end_checker",
        {"end_phrase": "Sleep well."},
        ['a b. "Sleep well."', "sleep WELL. "],
        ["Sleep well. Bye"],
    ),
    ("startend:quotation", {}, [' "a" '], ['a "b"', '"a', '"']),
]


@pytest.mark.parametrize(("name", "arguments", "good", "bad"), CASES)
def test_an_instruction_is_followed_or_not(name, arguments, good, bad):
    assert [follows(answer, name, arguments) for answer in good] == [True] * len(good)
    assert [follows(answer, name, arguments) for answer in [*bad, "", " \n"]] == [False] * (len(bad) + 2)


def test_every_instruction_has_a_case():
    assert {name for name, *_ in CASES} == CHECKS.keys() - set(OF_A_LANGUAGE)
    assert len(CHECKS) == 25


@pytest.fixture
def told_languages(monkeypatch):
    """The optional package, or where it is missing a stand-in that knows two words."""
    if importlib.util.find_spec("langdetect") is None:

        def detect(text):
            if not any(letter.isalpha() for letter in text):
                raise stand_in.LangDetectException
            return "de" if "der" in text.lower().split() else "en"

        stand_in = types.SimpleNamespace(
            detect=detect, DetectorFactory=types.SimpleNamespace(), LangDetectException=type("Failed", (Exception,), {})
        )
        monkeypatch.setitem(__import__("sys").modules, "langdetect", stand_in)
        monkeypatch.setattr(instructions, "can_tell_languages", lambda: True)


@pytest.mark.usefixtures("told_languages")
@pytest.mark.parametrize(
    ("name", "arguments", "good", "bad"),
    [
        (
            "language:response_language",
            {"language": "de"},
            "Das ist der Hund vom Nachbarn.",
            "This is the neighbour's dog.",
        ),
        (
            "change_case:english_capital",
            {},
            "THERE WAS A KING WHO LIVED IN A CASTLE WITH HIS PEOPLE",
            "THERE was a king who lived in a castle with his people",
        ),
        (
            "change_case:english_capital",
            {},
            "THERE WAS A KING WHO LIVED IN A CASTLE WITH HIS PEOPLE",
            "DAS IST DER HUND VOM NACHBARN",
        ),
        ("change_case:english_lowercase", {}, "this is the dog of my neighbour", "This is the dog of my neighbour"),
        ("language:response_language", {"language": "en"}, "This is the dog of my neighbour", "12 + 30 = 42"),
    ],
)
def test_a_language_is_told_from_others_and_from_none(name, arguments, good, bad):
    assert (follows(good, name, arguments), follows(bad, name, arguments)) == (True, False)


def rows(*instructions_of):
    return [
        {"key": key, "prompt": "p", "instruction_id_list": [name for name, _ in given], "kwargs": [k for _, k in given]}
        for key, given in enumerate(instructions_of)
    ]


NO_COMMA, QUOTED, GERMAN = (
    ("punctuation:no_comma", {}),
    ("startend:quotation", {}),
    ("language:response_language", {"language": "de"}),
)


def test_prompts_and_instructions_are_counted_strictly_and_loosely():
    found = check_answers(rows([NO_COMMA, QUOTED], [NO_COMMA], [QUOTED]), ['"a, b"', "Sure, then:\na b", '*"a"*'])
    assert found["strict"] == {"prompts": 0.0, "instructions": 1 / 4}
    assert found["loose"] == {"prompts": 2 / 3, "instructions": 3 / 4}
    assert (found["prompts"], found["instructions"], found["skipped"]) == (3, 4, {})
    assert found["by_kind"] == {"punctuation:no_comma": (0, 2), "startend:quotation": (1, 2)}
    assert found["rows"][0] == {"key": 0, "strict": [False, True], "loose": [False, True]}


def test_the_loose_reading_takes_a_line_from_either_end():
    for answer in ("a,\nb", "b\na,", "a,\nb\na,", "b"):
        assert check_answers(rows([NO_COMMA]), [answer])["loose"]["prompts"] == 1
    assert check_answers(rows([NO_COMMA]), ["a\nb,\nc"])["loose"]["prompts"] == 0


def test_what_cannot_be_checked_is_counted_and_neither_followed_nor_not(monkeypatch):
    monkeypatch.setattr(instructions, "can_tell_languages", lambda: False)
    found = check_answers(rows([NO_COMMA, GERMAN], [NO_COMMA]), ["a", "b,"])
    assert found["skipped"] == {"language:response_language": 1}
    assert (found["prompts"], found["instructions"]) == (1, 2)
    assert found["strict"] == {"prompts": 0.0, "instructions": 1 / 2}
    nothing = check_answers(rows([GERMAN]), ["a"])
    assert (nothing["strict"], nothing["prompts"]) == ({"prompts": None, "instructions": None}, 0)


def test_sentences_are_counted():
    assert count_sentences("") == 0
    assert count_sentences("Hi there") == 1
    assert count_sentences("1. One thing. 2. Another (of two.) And more...") == 3
    assert count_sentences("Mr. Smith said no. He came") == 2


def test_the_prompts_in_the_repository_are_valid_and_need_no_package():
    read = read_instructions(OWN)
    names = {name for row in read for name in row["instruction_id_list"]}
    assert names == CHECKS.keys() - set(OF_A_LANGUAGE)
    assert len(read) == 24


GOOD = {"key": 1, "prompt": "p", "instruction_id_list": ["keywords:existence"], "kwargs": [{"keywords": ["a"]}]}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kwargs": []}, "not a line of the form"),
        ({"kwargs": None}, "not a line of the form"),
        ({"prompt": " "}, "an empty prompt, or no instructions"),
        ({"instruction_id_list": [], "kwargs": []}, "an empty prompt, or no instructions"),
        ({"instruction_id_list": ["keywords:none"]}, "unknown instruction 'keywords:none'; known are change_case:"),
        ({"kwargs": [{}]}, "keywords:existence takes the arguments ['keywords'], not []"),
        ({"kwargs": [{"keywords": ["a"], "b": 1}]}, "takes the arguments ['keywords'], not ['b', 'keywords']"),
        ({"kwargs": [{"keywords": "a"}]}, "keywords of keywords:existence must be a list of words, not 'a'"),
        ({"kwargs": [{"keywords": []}]}, "must be a list of words, not []"),
        (
            {
                "instruction_id_list": ["length_constraints:number_words"],
                "kwargs": [{"num_words": 1, "relation": "at most"}],
            },
            "relation of length_constraints:number_words must be at least or less than, not 'at most'",
        ),
        (
            {"instruction_id_list": ["length_constraints:number_paragraphs"], "kwargs": [{"num_paragraphs": "2"}]},
            "must be a whole number, not '2'",
        ),
        ({"instruction_id_list": ["startend:end_checker"], "kwargs": [{"end_phrase": 2}]}, "must be a text, not 2"),
    ],
)
def test_a_line_that_is_no_instruction_is_refused_by_its_number(tmp_path, changes, said):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps(GOOD) + "\n\n" + json.dumps(GOOD | changes) + "\n")
    with pytest.raises(UserError) as raised:
        read_instructions(path)
    assert str(raised.value).startswith(f"--instructions {path}:3: ")
    assert said in str(raised.value)


def test_null_arguments_are_none(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps(GOOD | {"kwargs": [{"keywords": ["a"], "num_words": None}]}))
    assert read_instructions(path)[0]["kwargs"] == [{"keywords": ["a"]}]


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "there is no such file"), (b"\n", "no prompts in it"), (b"\xff", "not UTF-8"), (b"{", ":1")],
)
def test_a_file_without_instructions_is_refused(tmp_path, content, said):
    path = tmp_path / "prompts.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=said):
        read_instructions(path)
