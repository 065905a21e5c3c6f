"""Recipes: files of settings are read as flags are, written back exactly, and the published ones run."""

import dataclasses
import json
import math
import re
import tomllib
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, MistralConfig, Olmo3Config, SmolLM3Config, get_scheduler
from transformers.models.auto import AutoModelForCausalLM

import config as config_module
import data as data_command
import eval as eval_command
import train as train_command
from compute import distributed
from config import Config, Parser, UserError, count_updates, flag_name, read_recipe, resolve, with_absolute_paths
from conversations.chatml import MESSAGES as CHATML
from conversations.masking import encode
from conversations.tokenizer import load_tokenizer
from running import report, setup
from storage import hub
from tests.conftest import CONTROL, byte_tokenizer, to_flags
from train import learning_rate

RECIPES = sorted((Path(__file__).parents[1] / "examples" / "recipes").glob("*.toml"))
FIELDS = {each.name: each for each in dataclasses.fields(Config)}


def key_of(name):
    return flag_name(name).removeprefix("--")


def parse(*arguments):
    """The settings that a command line of train.py names."""
    parser = Parser(prog="train.py")
    parser.add_config_flags()
    return parser.parse(list(map(str, arguments)))[0]


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def refusal(action, *arguments):
    """The message of the `UserError` of an action, which is one line."""
    with pytest.raises(UserError) as raised:
        action(*arguments)
    message = str(raised.value)
    assert "\n" not in message
    return message


# --- every setting, as a flag and in a recipe

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(lambda text: text[0] != "~")
NUMBERS = {
    "at least 1": st.integers(1, 2**62 - 1),
    "0 or more": st.integers(0, 2**62 - 1),
    "a whole number, or a fraction below 1": st.integers(0, 2**62 - 1) | st.floats(0, 1, exclude_max=True),
    "above 0": st.integers(1, 99) | st.floats(0, 2.0**61, exclude_min=True),
    "at least 0 and below 1": st.floats(0, 1, exclude_max=True),
    "above 0 and below 1": st.floats(0, 1, exclude_min=True, exclude_max=True),
}


def values_of(each):
    """A strategy of the values that a field of `Config` may have."""
    parsing, rule = each.metadata["parsing"], each.metadata["rule"]
    if "choices" in parsing:
        return st.sampled_from(parsing["choices"])
    if parsing.get("nargs") == "+":
        return st.lists(TEXT, min_size=1, max_size=3).map(tuple)
    if rule and rule[0] == "0 or more" and each.type is not int:
        return st.floats(0, 2.0**61) if each.type is float else st.integers(0, 99) | st.floats(0, 1, exclude_max=True)
    return NUMBERS[rule[0]] if rule else st.booleans() if each.type is bool else TEXT


CONFIGS = st.fixed_dictionaries({}, optional={name: values_of(each) for name, each in FIELDS.items()})


def resolve_named(named):
    """The `Config` of a new run, whatever machine it is."""
    preset = named.get("preset", "auto")
    preset = ("none" if "dataset" in named else "quickstart") if preset == "auto" else preset
    return resolve(with_absolute_paths(named), preset)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(named=CONFIGS)
@example(
    named={
        "model": "a\x00\x1f\x7f\x85\"'\\\n\r\t\u2028\U0001f600",
        "dataset": ("\x7f", "#"),
        "lr": 1e-300,
        "min_lr": 5e-324,
    }
)
def test_a_config_that_is_written_and_read_is_the_same(named, tmp_path):
    try:
        config = resolve_named(named)
    except UserError:  # settings that exclude each other
        return
    recipe = tmp_path / "recipe.toml"
    recipe.unlink(missing_ok=True)
    config_module.write_recipe(config, str(recipe))
    assert resolve_named(parse("--config", recipe)) == config
    written = tomllib.loads(recipe.read_text(encoding="utf-8"))
    unnamed = {name for name, value in vars(config).items() if value in ("", (), None)} | {"preset"} - {config.preset}
    assert written.keys() >= {key_of(name) for name in FIELDS.keys() - unnamed}


SAMPLES = {int: "7", float: "0.25", int | float: "0.25", bool: "true", str: '"some/name"'}


def sample_of(each):
    """A value of a field, in TOML and as arguments of its flag."""
    parsing = each.metadata["parsing"]
    if "choices" in parsing:
        return json.dumps(parsing["choices"][-1]), [parsing["choices"][-1]]
    if parsing.get("nargs") == "+":
        return '["a/b", "c=d"]', ["a/b", "c=d"]
    toml = SAMPLES[each.type]
    return toml, [] if each.type is bool else [toml.strip('"')]


@pytest.mark.parametrize("name", FIELDS)
def test_a_setting_in_a_recipe_is_what_its_flag_is(name, tmp_path):
    toml, arguments = sample_of(FIELDS[name])
    recipe = write(tmp_path / "recipe.toml", f"# a comment\n{key_of(name)} = {toml}\n")
    read, named = parse("--config", recipe), parse(flag_name(name), *arguments)
    assert (read, type(read[name])) == (named, type(named[name]))


@pytest.mark.parametrize("name", FIELDS)
def test_a_setting_of_another_type_is_refused_by_name_and_place(name, tmp_path):
    each, fits = FIELDS[name], {int: ["int"], float: ["int", "float"], int | float: ["int", "float"], bool: ["bool"]}
    fits = ["list"] if each.metadata["parsing"].get("nargs") == "+" else fits.get(each.type, ["string"])
    wrong = {
        "int": "1",
        "float": "0.5",
        "bool": "true",
        "string": '"0.5"',
        "list": '["a"]',
        "mixed": '["a", 1]',
        "date": "2026-01-01",
        "empty": '""',
        "nothing": "[]",
        "an empty one": '["a", ""]',
    }
    for kind in wrong.keys() - set(fits):
        recipe = write(tmp_path / "recipe.toml", f"\n\n{key_of(name)} = {wrong[kind]}")
        message = refusal(parse, "--config", recipe)
        said = rf"(argument )?(--)?{key_of(name)}:? (must be .+, not .+|is empty; .+|invalid (int value|choice): .+)"
        assert re.fullmatch(rf"{re.escape(str(recipe))}:3: {said}", message)
    if each.metadata["rule"]:
        recipe = write(tmp_path / "recipe.toml", f"{key_of(name)} = -1")
        assert refusal(parse, "--config", recipe).startswith(f"{recipe}:1: {flag_name(name)} must be ")


NEAREST = {"batch_size": "batch-size", "batchsize": "batch-size", "learning_rate": "lr", "learn-rate": "lr"}
NEAREST |= {"epoch": "epochs", "Epochs": "epochs", "num_train_epochs": "epochs", "warmup_ratio": "warmup-steps"}
NEAREST |= {"max_grad": "max-grad-norm", "beta2": "adam-beta2", "scheduler": "schedule"}
NEAREST |= dict.fromkeys(
    ("resume", "dry-run", "config", "write-config", '""', '"a\\nb"'), ".+"
)  # flags, but no settings


@pytest.mark.parametrize(("key", "nearest"), NEAREST.items())
def test_an_unknown_setting_is_refused_with_the_nearest_name(key, nearest, tmp_path):
    recipe = write(tmp_path / "recipe.toml", f"epochs = 1\n{key} = 1\n")
    message = refusal(parse, "--config", recipe)
    name = re.escape(repr(tomllib.loads(f"{key} = 1").popitem()[0]))
    place = "(:2)?" if '"' in key else ":2"
    assert re.match(
        rf"{re.escape(str(recipe))}{place}: there is no setting {name}; the nearest is {nearest} \(--help", message
    )


NOT_RECIPES = {
    "a table": (b"epochs = 1\n[training]\nlr = 1\n", ":2: 'training' is a table; a recipe has none"),
    "a dotted key": (b"batch.size = 1\n", ":1: 'batch' is a table; a recipe has none"),
    "a syntax error": (b"epochs = 1\nlr 2\n", "line 2"),
    "a key twice": (b"epochs = 1\nepochs = 2\n", "line 2"),
    "no quotation marks": (b"model = mine\n", "line 1"),
    "not UTF-8": (b"model = '\xe9'\n", "not UTF-8 at byte 10"),
    "a long number": (b"epochs = " + 9000 * b"1", "4300 digits"),
    "deep brackets": (b"dataset = " + 20_000 * b"[", "recursion"),
    "yaml": (b"epochs: 2\n", "line 1"),
}


@pytest.mark.parametrize("name", NOT_RECIPES)
def test_what_is_not_a_recipe_is_refused_in_one_line(name, tmp_path):
    content, expected = NOT_RECIPES[name]
    recipe = tmp_path / "recipe.toml"
    recipe.write_bytes(content)
    message = refusal(parse, "--config", recipe)
    assert str(recipe) in message
    assert expected in message


def test_a_recipe_that_is_not_there_is_refused(tmp_path):
    missing = tmp_path / "recipe.toml"
    assert refusal(parse, "--config", missing) == f"--config {missing}: No such file or directory"
    assert refusal(parse, "--config", tmp_path) == f"--config {tmp_path}: Is a directory"
    assert refusal(parse, "--config", "") == "--config is empty; leave it out, or name something"


def test_an_integer_is_a_number(tmp_path):
    named = parse("--config", write(tmp_path / "recipe.toml", "lr = 1\nwarmup-steps = 2\n"))
    assert list(map(repr, named.values())) == ["1.0", "2"]  # as the flags' values, which config.json records


def test_an_empty_recipe_names_nothing(tmp_path):
    assert parse("--config", write(tmp_path / "recipe.toml", "\ufeff# nothing\n")) == {}


# --- what comes first


def test_flags_override_a_recipe_and_a_recipe_overrides_the_preset_and_the_defaults(tmp_path):
    text = 'preset = "quickstart"\nbatch-size = 3\ncompile = true\ndataset = ["a", "b"]\nlr = 1\n'
    recipe = write(tmp_path / "recipe.toml", text)
    named = parse("--config", recipe, "--no-compile", "--dataset", "c", "--lr", "0.5")
    assert named == {"preset": "quickstart", "batch_size": 3, "compile": False, "dataset": ["c"], "lr": 0.5}
    only = write(tmp_path / "only.toml", 'preset = "quickstart"\nbatch-size = 3\n')
    expected = dataclasses.replace(resolve({}, "quickstart"), batch_size=3)
    assert resolve(parse("--config", only), "quickstart") == expected


def test_a_recipe_with_a_dataset_has_no_preset(tmp_path):
    named = parse("--config", write(tmp_path / "recipe.toml", 'dataset = ["a"]\n'))
    assert hub.choose_preset(named)[0] == "none"


def test_files_beside_a_recipe_are_found_there_and_other_names_are_those_of_flags(tmp_path, monkeypatch):
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
        (folder / "both.jsonl").touch()
    (here / "here.jsonl").touch()
    (there / "model").mkdir()
    (there / "template.jinja").touch()
    monkeypatch.chdir(here)
    recipe = write(
        there / "recipe.toml",
        'dataset = ["both.jsonl:2", "here.jsonl", "hub/id"]\nmodel = "model"\neval-dataset = ["both.jsonl#3"]\n'
        'chat-template = "template.jinja"\noutput-dir = "run"\n',
    )
    expected = {
        "dataset": [f"{there}/both.jsonl:2", "here.jsonl", "hub/id"],
        "model": f"{there}/model",
        "eval_dataset": [f"{there}/both.jsonl#3"],
        "chat_template": f"{there}/template.jinja",
        "output_dir": "run",
    }
    assert parse("--config", recipe) == parse("--config", "../there/recipe.toml") == expected
    assert parse("--config", recipe, "--chat-template", "chatml")["chat_template"] == "chatml"


# --- in the three commands


@pytest.fixture
def own(tiny_model_dir, chats, tmp_path):
    """A recipe of a small run."""
    settings = {"model": str(tiny_model_dir), "dataset": [str(chats)], "eval-fraction": 0.2, "batch-size": 5}
    settings |= {"warmup-steps": 1, "max-steps": 2, "dtype": "fp32", "micro-batch-tokens": 400, "seed": 3}
    return write(tmp_path / "own.toml", "".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items()))


def test_data_and_eval_take_their_settings_of_a_recipe_and_leave_the_others(own, tiny_model_dir, chats, capsys):
    flags = ["--model", str(tiny_model_dir), "--dataset", str(chats), "--eval-fraction", "0.2", "--seed", "3"]
    for arguments in (["--config", str(own)], flags):
        assert data_command.main(["--json", "--show", "40", *arguments]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[: len(shown) // 2] == shown[len(shown) // 2 :]
    for arguments in (["--config", str(own)], [*flags[2:], "--dtype", "fp32", "--micro-batch-tokens", "400"]):
        assert eval_command.main([str(tiny_model_dir), "--greedy", "--max-new-tokens", "1", "--json", *arguments]) == 0
    evaluated = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert evaluated[0]["splits"] == evaluated[1]["splits"]


def test_data_and_eval_refuse_an_unknown_setting_too(own):
    own.write_text(own.read_text() + "batches = 3\n")
    for main in (data_command.main, lambda arguments: eval_command.main(["some/model", *arguments])):
        assert "there is no setting 'batches'; the nearest is batch-size" in refusal(main, ["--config", str(own)])


def test_settings_of_a_recipe_are_named_when_a_run_is_resumed(own, tmp_path, capsys):
    run = str(tmp_path / "run")
    assert train_command.main(["--config", str(own), "--output-dir", run]) == 0
    capsys.readouterr()
    again = ["--resume", "auto", "--output-dir", run, "--config", str(own)]
    assert train_command.main(again) == 0
    assert "is finished already" in capsys.readouterr().out
    own.write_text(own.read_text() + "lr = 0.5\n")
    with pytest.raises(UserError, match=r"--lr 0.0002 -> 0.5"):
        train_command.main([*again, "--max-steps", "2"])


def test_write_config_writes_what_a_run_resolves_and_stops(own, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(setup, "load_run", None)  # nothing is loaded
    arguments = ["--config", str(own), "--lr", "0.01", "--write-config", "mine.toml"]
    assert train_command.main(arguments) == 0
    assert capsys.readouterr().out == "written to mine.toml\n"
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "mine.toml"])
    assert setup.choose_config(parse("--config", "mine.toml")) == setup.choose_config(parse(*arguments[:4]))
    content = Path("mine.toml").read_text()
    assert "# peak learning rate\nlr = 0.01\n" in content
    assert refusal(train_command.main, arguments) == (
        "--write-config mine.toml: cannot write it (File exists); name a new file"
    )
    assert Path("mine.toml").read_text() == content
    assert "(No such file or directory)" in refusal(train_command.main, [*arguments[:-1], "nowhere/mine.toml"])


def test_write_config_writes_the_recipe_of_a_run(own, tmp_path):
    run = tmp_path / "run"
    assert train_command.main(["--config", str(own), "--output-dir", str(run)]) == 0
    recipe = tmp_path / "again.toml"
    assert train_command.main(["--resume", str(run), "--seed", "4", "--write-config", str(recipe)]) == 0
    assert read_recipe(str(recipe)).get("output_dir") is None
    recorded = json.loads((run / "config.json").read_text())["config"]
    expected = {**recorded, "output_dir": "", "seed": 4}
    assert json.loads(json.dumps(vars(setup.choose_config(parse("--config", recipe))[0]))) == expected


def test_only_rank_0_writes_a_recipe(own, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "is_rank0", lambda: False)
    monkeypatch.setattr(setup, "choose_config", lambda named: (resolve(named, "none"), ""))
    assert train_command.main(["--config", str(own), "--write-config", str(tmp_path / "mine.toml")]) == 0
    assert not (tmp_path / "mine.toml").exists()


# --- the published rates

SIZES = {"tulu-3-8b": 8.03e9, "olmo-3-7b": 7.3e9, "smollm2-1.7b": 1.71e9, "smollm3-3b": 3.08e9, "zephyr-7b": 7.24e9}
SIZES |= {"ultrachat-smollm2-135m": 134_515_008}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_no_published_recipe_warns_of_its_rate(recipe):
    assert report.warn_of_rate(read_recipe(str(recipe))["lr"], SIZES[recipe.stem]) == []


def test_a_rate_outside_the_published_ones_is_warned_of_with_the_numbers():
    assert report.warn_of_rate(2e-4, 8.03e9) == [
        "--lr 0.0002: published runs of models of 7 to 8 billion parameters used 5e-06 to 8e-05"
    ]
    assert report.warn_of_rate(2e-4, 134_515_008) == []
    previous = 0
    for most, sizes, lowest, highest in report.PUBLISHED_RATES:
        assert previous < most
        assert 0 <= lowest < highest
        previous = most
        for lr in (lowest, highest, math.sqrt(lowest * highest) if highest < math.inf else 1.0):
            assert report.warn_of_rate(lr, most * 1e9) == []
        for lr in (lowest / 1.01, highest * 1.01) if sizes else ():
            (warning,) = report.warn_of_rate(lr, most * 1e9)
            assert f"{sizes} parameters used {lowest:g} to {highest:g}" in warning
    assert report.warn_of_rate(1.0, 1e12) == []  # none was published


def test_the_plan_shows_the_warning(own, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "PUBLISHED_RATES", ((1, "some", 1e-3, 1e-2),))
    for lr, expected in (("0.0002", 1), ("0.002", 0)):
        arguments = ["--config", str(own), "--dry-run", "--lr", lr, "--output-dir", str(tmp_path / "run")]
        assert train_command.main(arguments) == 0
        line = f"\n  warning   --lr {lr}: published runs of models of some parameters used 0.001 to 0.01\n"
        assert capsys.readouterr().out.count(line) == expected


# --- the published recipes

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 0}
FAMILIES = {
    "meta-llama/Llama-3.1-8B": LlamaConfig,
    "HuggingFaceTB/SmolLM2-135M": LlamaConfig,
    "HuggingFaceTB/SmolLM2-1.7B": LlamaConfig,
    "allenai/Olmo-3-7B-Think-SFT": Olmo3Config,
    "HuggingFaceTB/SmolLM3-3B-checkpoints@it-mid-training": SmolLM3Config,
    "mistralai/Mistral-7B-v0.1": MistralConfig,
}
WHAT_A_RECIPE_STATES = """
model dataset split chat_template supervise eval_fraction test_fraction epochs batch_size lr schedule warmup_steps
min_lr weight_decay adam_beta2 max_grad_norm seed eval_every save_every
""".split()


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """A directory with a tiny model of the family of a recipe's."""

    def make(name):
        directory = tmp_path_factory.mktemp("model")
        tokenizer = byte_tokenizer(CONTROL)
        tokenizer.chat_template = CHATML  # for those with the model's own
        tokenizer.save_pretrained(directory)
        torch.manual_seed(0)
        config = FAMILIES[name](vocab_size=len(tokenizer), eos_token_id=0, **SHAPE)
        AutoModelForCausalLM.from_config(config).save_pretrained(directory)
        return directory

    return make


def test_the_recipes_are_those_that_the_documentation_lists():
    documented = re.findall(
        r"\(\.\./examples/recipes/([\w.-]+)\.toml\)", (RECIPES[0].parents[2] / "docs" / "recipes.md").read_text()
    )
    assert sorted(documented) == [recipe.stem for recipe in RECIPES] == sorted(SIZES)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_states_its_source_and_every_number(recipe):
    assert re.search(r"^# Source: .*", recipe.read_text(encoding="utf-8"), re.MULTILINE)
    named = read_recipe(str(recipe))
    assert [name for name in WHAT_A_RECIPE_STATES if name not in named] == []
    if named["chat_template"] not in ("chatml", "model"):
        assert Path(named["chat_template"]).is_file()


def test_the_recipe_of_the_experiment_is_the_preset():
    recipe = next(path for path in RECIPES if path.stem.startswith("ultrachat"))
    assert resolve(read_recipe(str(recipe)), "none") == dataclasses.replace(resolve({}, "ultrachat"), preset="none")


MESSAGES = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello."), ("user", "2+2?"), ("assistant", "4")]
RENDERED = {  # as the published templates write the messages; </s> stands for the end-of-text token
    "tulu": "<|system|>\nBe brief.\n<|user|>\nHi\n<|assistant|>\n[Hello.</s>]\n<|user|>\n2+2?\n<|assistant|>\n[4</s>]",
    "zephyr": "<|system|>\nBe brief.</s>\n<|user|>\nHi</s>\n<|assistant|>\n[Hello.</s>]\n"
    "<|user|>\n2+2?</s>\n<|assistant|>\n[4</s>]\n",
    "smollm2": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    "<|im_start|>assistant\n[Hello.<|im_end|>]\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n[4<|im_end|>]\n",
}


@pytest.mark.parametrize("name", RENDERED)
def test_a_template_writes_and_supervises_what_the_published_one_does(name, tiny_model_dir):
    tokenizer = load_tokenizer(str(tiny_model_dir), True, str(RECIPES[0].with_name(f"{name}.jinja")))
    messages = [{"role": role, "content": content, "train": True} for role, content in MESSAGES]
    (example,) = encode([messages], tokenizer)
    shown, inside = "", False
    for token, label in zip(example.input_ids.tolist(), example.labels.tolist(), strict=True):
        if (label != -100) != inside:
            shown, inside = shown + "]["[not inside], not inside
        shown += tokenizer.decode([token])
    shown = (shown + "]" * inside).replace("<|endoftext|>", "</s>")
    expected = RENDERED[name]
    assert shown in (expected, expected.rstrip("\n"))  # what follows the last answer's end is cut off
    alone = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    system = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    start = {"tulu": "<|user|>\nHi\n", "zephyr": "<|user|>\nHi<|endoftext|>\n"}
    start = start.get(name, f"{system}<|im_start|>user\nHi<|im_end|>\n")
    assert alone == start + ("<|im_start|>assistant\n" if name == "smollm2" else "<|assistant|>\n")


def rates_of_transformers(config, total):
    """The learning rates of transformers' scheduler of a recipe, update by update."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=config.lr)
    name = "cosine_with_min_lr" if config.schedule == "cosine" and config.min_lr else config.schedule
    more = {"min_lr_rate": config.min_lr} if name == "cosine_with_min_lr" else {}
    scheduler = get_scheduler(name, optimizer, count_updates(config.warmup_steps, total), total, more)
    for _ in range(total):
        yield scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("total", [1, 57, 3447])
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_schedule_of_a_recipe_is_that_of_transformers(recipe, total):
    config = resolve(read_recipe(str(recipe)), "none")
    warmup_steps, decay_steps = (count_updates(each, total) for each in (config.warmup_steps, config.decay_fraction))
    schedule = (warmup_steps, total, config.schedule, config.min_lr, decay_steps)
    found = [learning_rate(step, config.lr, *schedule) for step in range(total)]
    assert found == pytest.approx(list(rates_of_transformers(config, total)), rel=1e-14, abs=0)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_planned_and_run_on_a_tiny_model_of_its_family(recipe, family, chats, tmp_path, capsys):
    config = resolve(read_recipe(str(recipe)), "none")
    run = tmp_path / "run"
    overrides = {"model": family(config.model), "dataset": chats, "max-steps": 3, "max-length": 256, "batch-size": 8}
    overrides |= {"eval-fraction": 0.1, "max-examples": 0, "dtype": "fp32", "output-dir": run}
    assert train_command.main(["--config", str(recipe), *to_flags(overrides)]) == 0
    expected = list(rates_of_transformers(config, 3))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = {line["step"]: line["lr"] for line in lines if line["kind"] == "train"}
    assert [logged[step] for step in logged] == pytest.approx([expected[step - 1] for step in logged], rel=1e-14, abs=0)
    assert all(math.isfinite(line["loss"]) for line in lines)
    recorded = json.loads((run / "config.json").read_text())["config"]
    changed = {name.replace("-", "_") for name in overrides} | {"compile"}  # as the run has decided
    assert {name: value for name, value in recorded.items() if name not in changed} == json.loads(
        json.dumps({name: value for name, value in vars(config).items() if name not in changed})
    )
    schedule = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("  schedule"))
    assert f"learning rate of {config.lr:g}" in schedule
    assert {"cosine": "cosine", "linear": "linearly"}[config.schedule] in schedule
