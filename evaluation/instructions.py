"""Does a model do what it is told, where a program can tell: no commas, three paragraphs, at least 200 words?

The 25 instructions and their two readings are IFEval's (Zhou et al. 2023, arXiv 2311.07911), and so is the file of
prompts. The strict reading takes an answer as it is; the loose one also without its first or last line, which may be a
courtesy, and without asterisks.
"""

import importlib.util
import inspect
import json
import re
from pathlib import Path

from config import UserError
from evaluation.comparison import difference

INSTRUCTIONS = Path(__file__).parents[1] / "examples" / "instructions.jsonl"
OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
RELATIONS = ("at least", "less than")
ABBREVIATIONS = "mr mrs ms dr prof st vs etc e.g i.e inc ltd jr sr".split()


# --- each instruction: whether an answer follows it


def compared(count, relation, bound):
    """Whether a count is "at least" or "less than" a bound."""
    return count >= bound if relation == "at least" else count < bound


def has_keywords(answer, keywords):
    return all(keyword.lower() in answer.lower() for keyword in keywords)


def has_no_word_of(answer, forbidden_words):
    return not any(re.search(rf"\b{re.escape(word)}\b", answer, re.IGNORECASE) for word in forbidden_words)


def says_keyword_so_often(answer, keyword, frequency, relation):
    return compared(answer.lower().count(keyword.strip().lower()), relation, frequency)


def uses_letter_so_often(answer, letter, let_frequency, let_relation):
    return compared(answer.lower().count(letter.strip().lower()), let_relation, let_frequency)


def is_in_language(answer, language):
    return language_of(answer) == language


def is_in_capitals(answer):
    return answer.isupper() and language_of(answer) == "en"


def is_in_lowercase(answer):
    return answer.islower() and language_of(answer) == "en"


def has_so_many_capital_words(answer, capital_frequency, capital_relation):
    words = re.findall(r"\w+(?:[-.'’&]\w+)*", answer)
    return compared(sum(word.isupper() for word in words), capital_relation, capital_frequency)


def has_so_many_words(answer, num_words, relation):
    return compared(len(re.findall(r"\w+", answer)), relation, num_words)


def has_so_many_sentences(answer, num_sentences, relation):
    return compared(count_sentences(answer), relation, num_sentences)


def has_paragraphs(answer, num_paragraphs):
    """Paragraphs are divided by `***`."""
    paragraphs = inner_parts(answer.split("***"))
    return all(paragraphs) and len(paragraphs) == num_paragraphs


def has_paragraph_that_starts_with(answer, num_paragraphs, nth_paragraph, first_word):
    """Paragraphs are divided by an empty line."""
    paragraphs = [paragraph.split() for paragraph in answer.split("\n\n") if paragraph.strip()]
    if len(paragraphs) != num_paragraphs or not 1 <= nth_paragraph <= num_paragraphs:
        return False
    word = re.split(r"""[.,?!'"]""", paragraphs[nth_paragraph - 1][0].lstrip("'\""))[0]
    return word.lower() == first_word.lower()


def has_placeholders(answer, num_placeholders):
    return len(re.findall(r"\[.*?\]", answer)) >= num_placeholders


def has_postscript(answer, postscript_marker):
    marker = re.escape(postscript_marker.strip()).replace(r"\.", r"\.\s?")
    return bool(re.search(marker, answer, re.IGNORECASE))


def has_bullets(answer, num_bullets):
    return sum(bool(re.match(r"\s*(\*[^*]|-)", line)) for line in answer.splitlines()) == num_bullets


def is_one_of_the_options(answer):
    return any(option in answer for option in OPTIONS)


def has_highlights(answer, num_highlights):
    once, twice = re.findall(r"\*[^\n*]*\*", answer), re.findall(r"\*\*[^\n*]*\*\*", answer)
    return sum(bool(found.strip("*").strip()) for found in once + twice) >= num_highlights


def has_sections(answer, section_spliter, num_sections):
    return len(re.findall(rf"{re.escape(section_spliter.strip())}\s?\d+", answer)) >= num_sections


def is_json(answer):
    text = re.sub(r"^```(json)?|```$", "", answer.strip(), flags=re.IGNORECASE)
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def has_title(answer):
    return any(title.strip("<> ") for title in re.findall(r"<<[^\n]+>>", answer))


def is_two_responses(answer):
    responses = inner_parts(answer.split("******"))
    return all(responses) and len(responses) == 2 and responses[0] != responses[1]


def repeats_the_prompt(answer, prompt_to_repeat):
    return answer.strip().lower().startswith(prompt_to_repeat.strip().lower())


def ends_with(answer, end_phrase):
    return answer.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def has_no_comma(answer):
    return "," not in answer


def is_quoted(answer):
    text = answer.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


CHECKS = {
    "change_case:capital_word_frequency": has_so_many_capital_words,
    "change_case:english_capital": is_in_capitals,
    "change_case:english_lowercase": is_in_lowercase,
    "combination:repeat_prompt": repeats_the_prompt,
    "combination:two_responses": is_two_responses,
    "detectable_content:number_placeholders": has_placeholders,
    "detectable_content:postscript": has_postscript,
    "detectable_format:constrained_response": is_one_of_the_options,
    "detectable_format:json_format": is_json,
    "detectable_format:multiple_sections": has_sections,
    "detectable_format:number_bullet_lists": has_bullets,
    "detectable_format:number_highlighted_sections": has_highlights,
    "detectable_format:title": has_title,
    "keywords:existence": has_keywords,
    "keywords:forbidden_words": has_no_word_of,
    "keywords:frequency": says_keyword_so_often,
    "keywords:letter_frequency": uses_letter_so_often,
    "language:response_language": is_in_language,
    "length_constraints:nth_paragraph_first_word": has_paragraph_that_starts_with,
    "length_constraints:number_paragraphs": has_paragraphs,
    "length_constraints:number_sentences": has_so_many_sentences,
    "length_constraints:number_words": has_so_many_words,
    "punctuation:no_comma": has_no_comma,
    "startend:end_checker": ends_with,
    "startend:quotation": is_quoted,
}
OF_A_LANGUAGE = ("change_case:english_capital", "change_case:english_lowercase", "language:response_language")
LISTS, RELATION_ARGUMENTS = ("keywords", "forbidden_words"), ("relation", "let_relation", "capital_relation")
NUMBERS = (
    "frequency let_frequency capital_frequency num_words num_sentences num_paragraphs nth_paragraph num_placeholders "
    "num_bullets num_highlights num_sections"
).split()


def inner_parts(parts):
    """Parts of a text without the space around them; an empty one at either end was no part."""
    parts = [part.strip() for part in parts]
    first, last = (0 if parts[0] else 1), (len(parts) if parts[-1] else len(parts) - 1)
    return parts[first:last]


def count_sentences(text):
    """How many sentences a text has; a point after an initial, a number or an abbreviation ends none."""
    ends = list(re.finditer(r"(\S*)[.!?]+[\"'”’)\]]*(?=\s+\S)", text.strip()))
    words = [end[1].lstrip("(\"'“‘[").lower() for end in ends]
    return sum(not (word in ABBREVIATIONS or re.fullmatch(r"[a-z]|\d+", word)) for word in words) + bool(text.strip())


def can_tell_languages():
    """Whether the package that tells languages apart is installed."""
    return importlib.util.find_spec("langdetect") is not None


def language_of(text):
    """The ISO 639-1 code of the language of a text, None where there is nothing to tell it from."""
    from langdetect import DetectorFactory, LangDetectException, detect  # optional, so imported where it is used

    DetectorFactory.seed = 0  # it samples
    try:
        return detect(text)
    except LangDetectException:
        return None


# --- a file of prompts, and the answers to it

READINGS, LEVELS = ("strict", "loose"), ("prompts", "instructions")


def read_instructions(path):
    """The rows of a .jsonl file of prompts with instructions, in IFEval's form, as dicts.

    Each has "key", "prompt", "instruction_id_list" and "kwargs": for each of its instructions the arguments.

    Raises:
        UserError: there is no such file, or a line of it is no such row.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = [(number, line) for number, line in enumerate(file, 1) if line.strip()]
    except FileNotFoundError as error:
        raise UserError(f"--instructions {path}: there is no such file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--instructions {path}: not UTF-8; save it as UTF-8") from error
    if not lines:
        raise UserError(f"--instructions {path}: there are no prompts in it")
    return [checked_row(line, f"--instructions {path}:{number}") for number, line in lines]


def checked_row(line, place):
    """A line of such a file as a dict, without the arguments that are null."""
    try:
        row = json.loads(line)
        prompt, names, arguments = row["prompt"], row["instruction_id_list"], row["kwargs"]
        pairs = list(zip(names, arguments, strict=True))
        kwargs = [{name: value for name, value in given.items() if value is not None} for _, given in pairs]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        form = '{"key", "prompt", "instruction_id_list": [id, …], "kwargs": [{…}, …]}, with as many kwargs as ids'
        raise UserError(f"{place}: not a line of the form {form}") from error
    if not (isinstance(prompt, str) and prompt.strip()) or not names:
        raise UserError(f"{place}: an empty prompt, or no instructions")
    for name, given in zip(names, kwargs, strict=True):
        refuse_unknown(name, given, place)
    return {"key": row.get("key"), "prompt": prompt, "instruction_id_list": names, "kwargs": kwargs}


def refuse_unknown(name, arguments, place):
    """Raise `UserError` for an instruction that is not in the table, or whose arguments are not its own."""
    if name not in CHECKS:
        raise UserError(f"{place}: unknown instruction {name!r}; known are {', '.join(sorted(CHECKS))}")
    wanted = list(inspect.signature(CHECKS[name]).parameters)[1:]
    if set(wanted) != arguments.keys():
        raise UserError(f"{place}: {name} takes the arguments {wanted}, not {sorted(arguments)}")
    for argument, value in arguments.items():
        if argument in LISTS:
            valid = isinstance(value, list) and value and all(isinstance(word, str) and word for word in value)
            rule = "a list of words"
        elif argument in RELATION_ARGUMENTS:
            valid, rule = value in RELATIONS, " or ".join(RELATIONS)
        elif argument in NUMBERS:
            valid, rule = type(value) is int and value >= 0, "a whole number"
        else:
            valid, rule = isinstance(value, str) and value.strip(), "a text"
        if not valid:
            raise UserError(f"{place}: {argument} of {name} must be {rule}, not {value!r}")


def follows(answer, name, arguments):
    """Whether an answer follows an instruction; an empty one follows none."""
    return bool(answer.strip()) and CHECKS[name](answer, **arguments)


def loose_variants(answer):
    """IFEval's eight: an answer without its first line, its last, both or neither; each also without asterisks."""
    lines = answer.split("\n")
    cut = [answer, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return [*cut, *(text.replace("*", "") for text in cut)]


def check_answers(rows, answers):
    """Which instructions the answers follow, as a dict.

    Args:
        rows: as `read_instructions` gives them.
        answers: texts, one for each.

    Returns:
        "strict" and "loose", each the share of "prompts" of which all instructions are followed and the share of
        "instructions"; "prompts" and "instructions", how many these are; "skipped", how many instructions of each kind
        could not be checked, which count nowhere, and neither do their prompts; "by_kind", of each (followed, all),
        strictly; "rows", for each prompt its "key" and lists of "strict" and "loose" verdicts, None where skipped.
    """
    unable = () if can_tell_languages() else OF_A_LANGUAGE
    judged, skipped, by_kind = [], {}, {}
    for row, answer in zip(rows, answers, strict=True):
        verdicts = {"key": row["key"], "strict": [], "loose": []}
        for name, arguments in zip(row["instruction_id_list"], row["kwargs"], strict=True):
            if name in unable:
                skipped[name] = skipped.get(name, 0) + 1
                strict = loose = None
            else:
                strict = follows(answer, name, arguments)
                loose = any(follows(variant, name, arguments) for variant in loose_variants(answer))
                followed, total = by_kind.get(name, (0, 0))
                by_kind[name] = (followed + strict, total + 1)
            verdicts["strict"].append(strict)
            verdicts["loose"].append(loose)
        judged.append(verdicts)
    return {
        **{reading: {level: share(*counts(judged, reading, level)) for level in LEVELS} for reading in READINGS},
        **{level: sum(counts(judged, "strict", level)[1]) for level in LEVELS},
        "skipped": skipped,
        "by_kind": dict(sorted(by_kind.items())),
        "rows": judged,
    }


def counts(judged, reading, level):
    """For each prompt how much was followed, and of how much: of itself, or of its instructions. Two lists."""
    pairs = []
    for verdicts in (row[reading] for row in judged):
        known = [verdict for verdict in verdicts if verdict is not None]
        if level == "instructions":
            pairs.append((sum(known), len(known)))
        else:
            whole = len(known) == len(verdicts)
            pairs.append((int(whole and all(known)), int(whole)))
    return tuple(map(list, zip(*pairs, strict=True)))


def following(before, after):
    """The `difference` of two models' shares, over prompts: `[reading][level]`; above 0 where it got better.

    Args:
        before, after: the "rows" of what `check_answers` found of each.
    """
    found = {reading: {} for reading in READINGS}
    for reading in READINGS:
        for level in LEVELS:
            (old, total), (new, _) = (counts(rows, reading, level) for rows in (before, after))
            if sum(total):
                kept = [row for row, of in enumerate(total) if of]
                columns = [[values[row] for row in kept] for values in (old, new, total)]
                found[reading][level] = difference(*columns)
                found[reading][level]["prompts"] = found[reading][level].pop("conversations")
    return found


def share(followed, total):
    """A part of a whole; None where there is nothing."""
    return sum(followed) / sum(total) if sum(total) else None
