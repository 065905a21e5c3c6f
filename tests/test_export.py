"""A model written for servers: cast once, judged after the cast, with what each server must be told."""

import errno
import json
import os
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import eval as eval_command
import train as train_command
from config import UserError
from conversations.chatml import chatml_template
from conversations.tokenizer import NO_LIMIT, load_tokenizer
from evaluation.export import describe_serving, make_modelfile
from storage.records import read_metrics
from tests.conftest import CONTROL, a_chat, byte_tokenizer, tiny_llama, to_flags, write_chats


@pytest.fixture(scope="module")
def run(tiny_model_dir, tmp_path_factory):
    here = tmp_path_factory.mktemp("export")
    flags = {"model": tiny_model_dir, "dataset": write_chats(here), "max-steps": 2, "dtype": "fp32", "lr": 1e-2}
    assert train_command.main(to_flags({**flags, "output-dir": here / "run"})) == 0
    return here / "run"


def export(run, directory, *flags):
    return eval_command.main([str(run), "--export", str(directory), *flags])


@pytest.mark.parametrize(
    ("flags", "dtype"), [((), "bfloat16"), (("--dtype", "fp32"), "float32"), (("--dtype", "fp16"), "float16")]
)
def test_weights_are_cast_once_and_the_loss_is_of_what_was_written(run, tmp_path, capsys, flags, dtype):
    target = tmp_path / "served"
    assert export(run, target, *flags) == 0
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith(f"written to {target}; eval loss: ")
    trained, read_back, stored = (float(found) for found in re.findall(r"(\d\.\d{4}) ", line.split("eval loss")[1]))
    assert (
        trained
        == read_back
        == round(min(each["loss"] for each in read_metrics(run) if each["kind"] == "eval" and each["step"]), 4)
    )

    best, written = (load_file(directory / "model.safetensors") for directory in (run / "best", target))
    assert best.keys() == written.keys()
    for name, weights in best.items():
        assert torch.equal(written[name], weights.to(getattr(torch, dtype))), name
    assert AutoModelForCausalLM.from_pretrained(target).dtype == getattr(torch, dtype)

    tokenizer = load_tokenizer(str(target), True)
    assert AutoTokenizer.from_pretrained(target).chat_template == chatml_template(tokenizer)
    record = eval_command.find_candidate(str(run), {})
    split = eval_command.load_data(record.config, tokenizer).eval
    precision = eval_command.choose_precision("cpu", "fp32")
    arguments = eval_command.load_for_evaluation(str(target), True, tokenizer, precision, record.config, split.longest)
    assert stored == round(eval_command.evaluate(arguments[0], split.examples, arguments[1], precision).loss, 4)
    assert (stored == trained) == (dtype == "float32") or abs(stored - trained) < 0.01


def test_a_model_that_is_no_run_is_exported_too(tiny_model_dir, tmp_path, capsys):
    tokenizer = load_tokenizer(str(tiny_model_dir), True)
    source = tmp_path / "source"
    tiny_llama(len(tokenizer)).save_pretrained(source)
    tokenizer.save_pretrained(source)
    assert export(source, tmp_path / "served") == 0
    assert "eval loss: not known, without a run and its eval split" in capsys.readouterr().out


def test_an_export_that_fails_leaves_nothing(run, tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("there", "link"):
        with pytest.raises(UserError, match=f"--export {tmp_path / name}: it exists already; name a new directory"):
            export(run, tmp_path / name)

    def full_disk(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = sorted(tmp_path.iterdir())
    for place in ("save_model", "make_modelfile", "load_for_evaluation"):
        with monkeypatch.context() as patch:
            patch.setattr(eval_command, place, full_disk)
            with pytest.raises(OSError, match="No space left"):
                export(run, tmp_path / "new")
        assert sorted(tmp_path.iterdir()) == before


def test_a_run_without_its_data_is_exported_and_changed_data_are_named(run, tmp_path, capsys):
    copy, chats = shutil.copytree(run, tmp_path / "run", symlinks=True), tmp_path / "chats.jsonl"
    shutil.copy(run.parent / "chats.jsonl", chats)
    record = json.loads((copy / "config.json").read_text())
    record["config"]["dataset"] = [str(tmp_path / "gone.jsonl")]
    (copy / "config.json").write_text(json.dumps(record))

    def losses(name, *flags):
        assert export(copy, tmp_path / name, "--dtype", "fp32", *flags) == 0
        found = capsys.readouterr()
        return re.findall(r"(\d\.\d{4}) ", found.out.splitlines()[0].split("eval loss")[1]), found.err

    known, warned = losses("first")
    assert len(known) == 1
    assert f"warning: no losses, as the model's dataset is missing: --dataset {tmp_path}/gone.jsonl" in warned
    found, warned = losses("second", "--dataset", str(chats))
    assert (found, warned) == (3 * known, "")  # it has moved
    chats.write_text("".join(chats.read_text().splitlines(keepends=True)[3:]))
    found, warned = losses("third", "--dataset", str(chats))
    assert len(found) == 3
    assert "warning: the dataset has changed" in warned
    with pytest.raises(UserError, match=r"nowhere.jsonl: there is no such file"):
        losses("fourth", "--dataset", str(tmp_path / "nowhere.jsonl"))


def test_weights_of_a_model_beyond_fp16_are_one_line(tiny_model_dir, tmp_path):
    tokenizer = load_tokenizer(str(tiny_model_dir), True)
    tokenizer.save_pretrained(tmp_path / "model")
    model = tiny_llama(len(tokenizer))
    model.model.norm.weight.data *= 1e6
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=r"in fp16 weight model.norm.weight contains NaN or Inf; use another --dtype"):
        export(tmp_path / "model", tmp_path / "served", "--dtype", "fp16")
    assert not (tmp_path / "served").exists()


def test_weights_beyond_fp16_are_one_line(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run", symlinks=True)
    model = AutoModelForCausalLM.from_pretrained(copy / "best")
    model.model.norm.weight.data *= 1e6
    best = (copy / "best").resolve()
    shutil.copytree(best, tmp_path / "source")
    model.save_pretrained(tmp_path / "source")
    (copy / "best").unlink() if (copy / "best").is_symlink() else shutil.rmtree(copy / "best")
    shutil.copytree(tmp_path / "source", copy / "best")
    with pytest.raises(UserError, match="contains NaN or Inf"):
        export(copy, tmp_path / "served", "--dtype", "fp16")
    assert not (tmp_path / "served").exists()


@pytest.mark.parametrize(
    "flags",
    [["--chat"], ["--served", "http://x"], ["--push-to-hub", "a/b"], ["--json"], ["--greedy"], ["--system", "x"]],
)
def test_what_it_cannot_be_combined_with_is_refused(run, tmp_path, flags):
    with pytest.raises(UserError, match="leave --"):
        export(run, tmp_path / "new", *flags)
    with pytest.raises(UserError, match="unrecognized arguments: --merge"):
        eval_command.main([str(run), "--merge", str(tmp_path / "new")])


# --- what servers are told


def render(modelfile, messages):
    """The prompt that Ollama makes of messages by the template in a Modelfile, of the form that is written here."""
    (template,) = re.findall(r'^TEMPLATE """(.*)"""$', modelfile, re.M | re.S)
    turn, generation = re.fullmatch(r"\{\{ range \.Messages \}\}(.*)\{\{ end \}\}(.*)", template, re.S).groups()
    assert "{{" not in generation
    turns = [turn.replace("{{ .Role }}", each["role"]).replace("{{ .Content }}", each["content"]) for each in messages]
    return "".join(turns) + generation


def test_ollamas_template_is_the_models():
    tokenizer = byte_tokenizer(CONTROL)
    tokenizer.chat_template = chatml_template(tokenizer)
    tokenizer.model_max_length = 512
    text = make_modelfile(tokenizer, ["<|im_end|>", "<|endoftext|>"])
    chat = [
        {"role": "system", "content": "Be\n brief. "},
        *a_chat(" Hi\n")["messages"],
        {"role": "user", "content": "{{ So }}"},
    ]
    for messages in (chat, chat[1:2], chat[1:]):
        expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert render(text, messages) == expected
    lines = text.splitlines()
    assert lines[0] == "FROM ."
    assert lines[-3:] == ['PARAMETER stop "<|im_end|>"', 'PARAMETER stop "<|endoftext|>"', "PARAMETER num_ctx 512"]


def test_only_what_is_certain_is_written():
    tokenizer = byte_tokenizer([*CONTROL, "<s>"])
    tokenizer.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    tokenizer.model_max_length = NO_LIMIT
    text = make_modelfile(tokenizer, ["]"])
    assert not re.search(r"^(TEMPLATE|PARAMETER num_ctx)", text, re.M)
    assert "# The model's chat template is not ChatML." in text
    assert all(re.match("#|FROM |PARAMETER ", line) for line in text.splitlines())
    commands = describe_serving(tokenizer_path := eval_command.Path("My model"), tokenizer, ["]"], "fp32")
    assert "--max-model-len" not in commands
    assert " -c " not in commands
    assert f"vllm serve '{tokenizer_path}' --dtype float32" in commands


def test_a_first_token_is_named_and_not_written(monkeypatch):
    tokenizer = byte_tokenizer([*CONTROL, "<s>"])
    monkeypatch.setattr("conversations.chatml.find_opening", lambda *_: ["<s>"])
    monkeypatch.setattr("evaluation.export.find_opening", lambda *_: ["<s>"])
    tokenizer.chat_template = chatml_template(tokenizer)
    text = make_modelfile(tokenizer, ["<|im_end|>"])
    assert text.startswith("# A prompt begins with <s>, which Ollama should add by itself")
    assert "<s>" not in text.split("TEMPLATE")[1]


@pytest.mark.parametrize(("stored", "vllm", "gguf"), [("bf16", "bfloat16", "bf16"), ("fp16", "float16", "f16")])
def test_the_commands_name_directory_precision_and_context(tmp_path, stored, vllm, gguf):
    tokenizer = byte_tokenizer(CONTROL)
    tokenizer.model_max_length = 512
    text = describe_serving(tmp_path / "Mine", tokenizer, ["<|im_end|>"], stored)
    for expected in (
        "stops at   <|im_end|>\n",
        f"vllm serve {tmp_path}/Mine --dtype {vllm} --max-model-len 512\n",
        f"convert_hf_to_gguf.py {tmp_path}/Mine --outtype {gguf} --outfile {tmp_path}/Mine.gguf\n",
        f"llama-server -m {tmp_path}/Mine.gguf --jinja -c 512\n",
        f"ollama create mine -f {tmp_path}/Mine/Modelfile\n",
    ):
        assert expected in text
