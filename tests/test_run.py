"""Whole runs of a tiny model: the files they leave, the best checkpoint, resuming, stopping."""

import contextlib
import importlib.metadata
import io
import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer, GraniteMoeConfig, GraniteMoeForCausalLM

import eval as eval_command
import train as train_command
from compute import self_check
from config import Config, UserError
from data import Data, Split
from eval import Evaluation
from model import Precision
from running import checkpoint, setup, validation
from running.run import Run
from storage.records import read_record
from tests.conftest import a_chat, to_flags, write_chats

TIMINGS = {"tokens_per_second", "seconds", "seconds_data", "peak_memory"}
STEPS = 12  # 30 training conversations, windows of 5, two epochs


@pytest.fixture(scope="module")
def flags(tiny_model_dir, tmp_path_factory):
    """The command line of a small run, but for its directory."""
    chats = write_chats(tmp_path_factory.mktemp("run"))
    settings = {"model": tiny_model_dir, "dataset": chats, "eval-fraction": 0.2, "test-fraction": 0.05, "batch-size": 5}
    settings |= {"warmup-steps": 2, "eval-every": 4, "save-every": 3, "dtype": "fp32", "lr": 1e-2, "seed": 3}
    return to_flags({**settings, "micro-batch-tokens": 200})


def lines(run, kind=None):
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in metrics if kind in (None, line["kind"])]


def untimed(run):
    return [{name: value for name, value in line.items() if name not in TIMINGS} for line in lines(run)]


def forget_the_end(run):
    """Make a finished run one that died before its last answers."""
    answers = json.loads((run / "answers.json").read_text())
    (run / "answers.json").write_text(json.dumps({"before": answers["before"]}))


@pytest.fixture(scope="module")
def finished(flags, tmp_path_factory):
    """A run to the end, which no test changes: its directory and what it printed."""
    run = tmp_path_factory.mktemp("finished") / "run"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert train_command.main([*flags, "--output-dir", str(run)]) == 0
    return run, printed.getvalue()


def test_a_run_leaves_what_the_readme_promises(finished):
    run, printed = finished
    assert printed.splitlines()[0].startswith("no preset (your own --dataset): ")
    assert "6 an epoch, 12 in all" in printed
    assert [line["step"] for line in lines(run, "train")] == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines(run, "eval")] == [0, 4, 8, 12]
    best = min(lines(run, "eval")[1:], key=lambda line: line["loss"])["step"]
    assert [line["step"] for line in lines(run, "test")] == [0, best]
    expected = {"step", "kind", "loss", "grad_norm", "lr", "tokens", "supervised_tokens", "epoch", *TIMINGS}
    assert all(set(line) == expected for line in lines(run, "train"))
    assert lines(run, "train")[0]["lr"] == 0.0
    assert lines(run, "train")[-1]["epoch"] == 2.0
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "step-12",
        "step-8",
        "step-9",
    ]  # 9's best is 8
    assert sorted(path.name for path in run.rglob(".*")) == [".lock", ".owner"]
    described = json.loads((run / "config.json").read_text())
    assert described["config"]["lr"] == 1e-2
    assert described["data"]["train"] == 30
    assert len(described["data"]["fingerprint"]) == 64
    assert described["versions"]["torch"] == importlib.metadata.version("torch")
    assert f"best, update {best}" in printed
    assert f"tensorboard --logdir {run.parent}\n" in printed + "\n"


def test_tensorboard_gets_the_same_numbers_and_the_answers(finished):
    run, _ = finished
    events = EventAccumulator(str(run))
    events.Reload()
    curves = {f"{line['kind']}/{name}" for kind in ("train", "eval") for line in lines(run, kind) for name in line}
    curves -= {f"{kind}/{name}" for kind in ("train", "eval") for name in ("step", "kind")}
    final = {f"final/{name}" for name in ("eval_loss", "eval_accuracy", "test_loss", "test_accuracy")}
    final |= {"final/tokens_per_second"}
    assert set(events.Tags()["scalars"]) == curves | {"time/checkpoint"} | final
    for tag in curves:
        kind, name = tag.split("/")
        drawn = {event.step: event.value for event in events.Scalars(tag)}
        assert drawn == pytest.approx({line["step"]: line[name] for line in lines(run, kind) if name in line}, rel=1e-6)
    said = events.Tensors("answers/Who are you?/text_summary")
    assert [text.step for text in said] == [4, 8, 12]
    assert "greedy, 4 tokens" in said[0].tensor_proto.string_val[0].decode()
    assert "answers of the best model/Who are you?/text_summary" in events.Tags()["tensors"]
    assert "custom_scalars__config__" in events.Tags()["tensors"]
    assert "_hparams_/session_start_info" in events.PluginTagToContent("hparams")


def test_the_best_model_is_an_ordinary_one_with_the_recorded_loss(finished, tiny_tokenizer, capsys):
    run, _ = finished
    model, tokenizer = AutoModelForCausalLM.from_pretrained(run / "best"), AutoTokenizer.from_pretrained(run / "best")
    chat = [{"role": "user", "content": "Count to 3"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    said = model.generate(**prompt, max_new_tokens=30, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == tiny_tokenizer.eos_token_id
    assert len(said) <= 30

    assert eval_command.main([str(run), "--json", "--prompts", "Hi", "--max-new-tokens", "1"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["splits"]["eval"]["loss"] == min(line["loss"] for line in lines(run, "eval")[1:])
    assert report["splits"]["test"]["loss"] == lines(run, "test")[-1]["loss"]


@pytest.fixture
def mixture_dir(tiny_model_dir, tmp_path):
    """A mixture that scales its logits, and asks for its router's loss."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "num_local_experts": 4, "vocab_size": 259, "logits_scaling": 4.0}
    directory = tmp_path / "mixture"
    shutil.copytree(tiny_model_dir, directory)
    torch.manual_seed(0)
    config = GraniteMoeConfig(**shape, output_router_logits=True, max_position_embeddings=512, pad_token_id=0)
    GraniteMoeForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_model_that_changes_its_logits_and_asks_for_another_loss(flags, mixture_dir, tmp_path, capsys, dtype):
    """The logged loss is `eval.py`'s; the plan names the loss that is left out."""
    run = tmp_path / "run"
    changes = ["--model", str(mixture_dir), "--dtype", dtype, "--output-dir", str(run)]
    assert train_command.main([*flags, *changes]) == 0
    plan = capsys.readouterr().out
    assert "all logits made by the model itself" in plan
    assert "cross-entropy alone: output_router_logits, which the model's configuration asks for, depends on " in plan
    record = json.loads((run / "config.json").read_text())
    assert record["losses_left_out"] == ["output_router_logits"]
    assert record["layout"]["own_logits"]
    assert json.loads((run / "best" / "config.json").read_text())["output_router_logits"] is True
    best = min(lines(run, "eval")[1:], key=lambda line: line["loss"])["loss"]
    assert eval_command.main([str(run), "--json", "--prompts", "Hi", "--max-new-tokens", "1"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["splits"]["eval"]["loss"] == pytest.approx(best, rel=1e-6)


def test_the_best_model_has_a_card_and_loads_in_a_pipeline(finished):
    run, _ = finished
    card = (run / "best" / "README.md").read_text()
    best = min(lines(run, "eval")[1:], key=lambda line: line["loss"])
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: text-generation\n")
    assert f"| eval loss | {lines(run, 'eval')[0]['loss']:.4f} | {best['loss']:.4f} |" in card
    assert f"after {best['step']} updates" in card
    assert "30 conversations of chats.jsonl" in card
    assert str(run.parent) not in card  # paths are nobody's business
    code = card.split("```python\n")[1].split("```")[0].replace("PATH_OR_ID_OF_THIS_DIRECTORY", str(run / "best"))
    assert code.count(str(run / "best")) == 1
    said = {}
    exec(code.replace("print(", "said = ("), said)
    assert isinstance(said["said"], str)


def test_best_follows_the_lowest_eval_loss_not_the_last(flags, tmp_path, monkeypatch):
    losses = iter([9.0, 9.0, 5.0, 4.0, 4.0, 6.0, 1.0])  # eval and test before; updates 3, 6, 9, 12; test after
    monkeypatch.setattr(validation, "evaluate", lambda *_: Evaluation(next(losses), 1, 0))
    run = tmp_path / "run"
    train_command.main([*flags, "--eval-every", "3", "--save-every", "6", "--output-dir", str(run)])
    best = AutoModelForCausalLM.from_pretrained(run / "best").state_dict()
    sixth = AutoModelForCausalLM.from_pretrained(run / "checkpoints" / "step-6" / "model").state_dict()
    assert all(torch.equal(best[name], weights) for name, weights in sixth.items())
    assert [line["step"] for line in lines(run, "test")] == [0, 6]


def test_a_resumed_run_remembers_its_best(flags, tmp_path, monkeypatch):
    run, real_step = tmp_path / "run", train_command.train_step
    steps = iter(range(9))
    monkeypatch.setattr(train_command, "train_step", lambda *a, **o: (next(steps), real_step(*a, **o))[1])
    with pytest.raises(RuntimeError):  # a generator's words for StopIteration
        train_command.main([*flags, "--output-dir", str(run)])
    best = (run / "best" / "model.safetensors").read_bytes()  # of update 8
    monkeypatch.setattr(train_command, "train_step", real_step)
    monkeypatch.setattr(validation, "evaluate", lambda *_: Evaluation(1e6, 1, 0))
    assert train_command.main(["--resume", str(run)]) == 0
    assert (run / "best" / "model.safetensors").read_bytes() == best
    assert lines(run, "test")[-1]["step"] == 8


def test_a_resumed_run_takes_the_budget_it_was_begun_with(flags, tmp_path, monkeypatch):
    at = flags.index("--micro-batch-tokens")
    flags, run, cut = flags[:at] + flags[at + 2 :], tmp_path / "run", []
    monkeypatch.setattr(self_check, "CPU_TOKENS", 123)
    train_command.main([*flags, "--max-steps", "2", "--output-dir", str(run)])
    assert json.loads((run / "config.json").read_text())["micro_batch_tokens"] == 123
    monkeypatch.setattr(self_check, "CPU_TOKENS", 321)  # as what a GPU measures differs a little every time
    for more, expected in (([], 123), (["--gradient-checkpointing"], 321), (["--micro-batch-tokens", "99"], 99)):
        forget_the_end(run)
        monkeypatch.setattr(train_command, "train", lambda run, *_, **__: cut.append(run.layout.tokens))
        train_command.main(["--resume", str(run), *more])
        assert cut.pop() == expected


def test_updates_are_deterministic_where_asked_for_and_answers_need_not_be(flags, tmp_path, monkeypatch):
    """On a GPU, what samples an answer has no deterministic algorithm and would be an error."""
    seen, real_step = {"update": [], "answer": []}, train_command.train_step
    real_answer = train_command.answer_prompts

    def spy(name, function):
        def called(*arguments, **options):
            seen[name].append(torch.are_deterministic_algorithms_enabled())
            return function(*arguments, **options)

        return called

    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(train_command, "train_step", spy("update", real_step))
    monkeypatch.setattr(train_command, "answer_prompts", spy("answer", real_answer))
    for more in ([], ["--deterministic"]):
        train_command.main([*flags, *more, "--max-steps", "2", "--output-dir", str(tmp_path / f"run{len(more)}")])
    assert os.environ.pop("CUBLAS_WORKSPACE_CONFIG") == ":4096:8"
    assert seen == {"update": [False, False, True, True], "answer": [False] * 2}


def test_a_finished_run_with_nothing_left_to_train_stays_as_it_is(finished, capsys):
    run, _ = finished
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for flags, said in (
        (["--lr", "0.02"], "--lr 0.01 -> 0.02"),
        (["--max-steps", "5", "--seed", "4"], "--max-steps 0 -> 5, --seed 3 -> 4"),
    ):
        with pytest.raises(UserError) as raised:
            train_command.main(["--resume", str(run), *flags, "--allow-changes"])
        told = f"{run} is finished; nothing is left to train with {said}; raise --epochs or --max-steps"
        assert str(raised.value) == told
    capsys.readouterr()
    assert train_command.main(["--resume", str(run), "--keep", "1", "--dry-run"]) == 0
    assert capsys.readouterr().out == f"{run} is finished already\n"
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_other_splits_than_the_runs_are_warned_of(finished, capsys):
    run, _ = finished
    assert not eval_command.main([str(run), *"--seed 7 --eval-fraction 0.2 --max-examples 30 --prompts Hi".split()])
    err = capsys.readouterr().err
    for flag in ("--seed 7", "--max-examples 30"):
        assert f"warning: {flag} gives other splits than the run's" in err
    assert "--eval-fraction" not in err  # as the run's
    assert not eval_command.main([str(run), "--prompts", "Hi"])
    assert "warning" not in capsys.readouterr().err
    chats = Path(read_record(run)["config"]["dataset"][0])
    rows = chats.read_text()
    try:
        chats.write_text(rows + json.dumps(a_chat("One more")) + "\n")
        assert not eval_command.main([str(run), "--prompts", "Hi"])
    finally:  # other tests have the same run
        chats.write_text(rows)
    assert "warning: the dataset has changed; the run may have learned these splits" in capsys.readouterr().err


def test_without_an_eval_split_the_last_model_is_the_best(flags, tmp_path, capsys):
    run = tmp_path / "run"
    flags = [*flags, "--eval-fraction", "0", "--save-every", "5", "--output-dir", str(run)]
    real, kill = train_command.train_step, [None] * 7
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_command, "train_step", lambda *a, **o: (kill.pop(), real(*a, **o))[1])
        with pytest.raises(IndexError):
            train_command.main(flags)
    assert (run / "best").resolve() == run / "checkpoints" / "step-5" / "model"  # so far
    assert train_command.main(["--resume", str(run)]) == 0
    assert "a checkpoint every 5 updates; no evaluation: the last model is the best" in capsys.readouterr().out
    assert (run / "best").resolve() == run / "checkpoints" / "step-16" / "model"
    assert lines(run, "eval") == []
    assert [line["step"] for line in lines(run, "test")] == [0, 16]
    assert "and not evaluated" in (run / "best" / "README.md").read_text()
    assert "the last one" in (run / "report.html").read_text()


def test_a_run_that_is_stopped_at_its_end_has_saved_all_updates(flags, tmp_path, monkeypatch):
    """Also where its last model is not its best, and no checkpoint was due."""
    evaluate_and_log = train_command.evaluate_and_log

    def is_fourth(run, signals):
        evaluate_and_log(run, signals)
        run.best_step = 4
        return run.step == 4

    def stop(_run, signals):
        signal.raise_signal(signal.SIGTERM)
        signals.check()

    monkeypatch.setattr(train_command, "evaluate_and_log", is_fourth)
    monkeypatch.setattr(train_command, "evaluate_best", stop)
    run = tmp_path / "run"
    assert train_command.main([*flags, "--save-every", "100", "--output-dir", str(run)]) == 128 + signal.SIGTERM
    assert list(checkpoint.list_checkpoints(run)) == [4, STEPS]
    assert (run / "best").resolve().parent.name == "step-4"


def test_cadences_below_one_are_shares_of_the_run(flags, tmp_path):
    run = tmp_path / "run"
    flags = [*flags, "--eval-every", "0.25", "--save-every", "0.3", "--keep", "9", "--output-dir", str(run)]
    assert train_command.main(flags) == 0
    assert [line["step"] for line in lines(run, "eval")] == [0, 3, 6, 9, 12]
    assert {4, 8, 12} <= checkpoint.list_checkpoints(run).keys()
    assert train_command.main([*flags, "--resume", "auto"]) == 0  # as torchrun starts it again: the same run


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("evaluated", [10, 500, 100_000])
@pytest.mark.parametrize(("rows", "row_tokens"), [(40, 1000), (20_000, 60), (300_000, 800)])
def test_by_default_evaluations_and_checkpoints_take_a_tenth_of_the_time(device, evaluated, rows, row_tokens):
    train = Split([None] * rows, tokens=rows * row_tokens)
    splits = Data(train, Split([None] * evaluated, tokens=evaluated * row_tokens), Split([]))
    run = Run(Config(), Precision("fp32", torch.device(device)), None, None, splits, None)
    eval_every, save_every = setup.choose_cadence(run)
    update = 3 * row_tokens * min(32, rows / run.steps_per_epoch)
    assert evaluated * row_tokens <= eval_every * update / 20
    assert setup.CHECKPOINT_TOKENS[device] <= save_every * update / 20
    # A best model that is saved at an evaluation takes no more, but where a short run would have no evaluations.
    assert eval_every >= min(save_every, run.total_steps / 5)
    again = Run(Config(), run.precision, None, None, splits, None)
    start = SimpleNamespace(described={"config": vars(Config()), "eval_every": 7, "save_every": 8})
    assert setup.choose_cadence(again, start) == (7, 8)


def test_a_due_checkpoint_waits_while_one_is_being_written():
    saver = SimpleNamespace(started=0, writing=None)
    run = SimpleNamespace(step=9, save_every=10, saver=saver)
    due = []
    for run.step in range(1, 45):
        saver.writing = "busy" if 0 < run.step - saver.started < 14 and saver.started else None
        if checkpoint.is_due(run):
            due.append(run.step)
            saver.started = run.step
    assert due == [10, 24, 38]


@pytest.mark.parametrize("last", [2, 3, STEPS])
def test_a_signal_at_any_update_is_saved_there_once(flags, tmp_path, monkeypatch, last):
    """Where nothing else would be saved, where a checkpoint is due anyway, at the last one."""
    step, save, saved, steps = train_command.train_step, checkpoint.save, [], []

    def interrupted(*arguments, **options):
        steps.append(step(*arguments, **options))
        if len(steps) == last:
            signal.raise_signal(signal.SIGTERM)
        return steps[-1]

    monkeypatch.setattr(train_command, "train_step", interrupted)
    monkeypatch.setattr(checkpoint, "save", lambda run: (saved.append(run.step), save(run)))
    assert train_command.main([*flags, "--output-dir", str(tmp_path / "run")]) == 143
    assert saved == sorted({*range(3, last + 1, 3), *range(4, last, 4), last})
