"""Chatting with a model: what it remembers, what stops it, and how it reads prompts from a pipe and a terminal."""

import copy
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import eval as eval_command
from config import UserError, run_command
from evaluation import chat as chat_module
from evaluation.chat import Chat
from evaluation.generation import GREEDY, generate_answers
from tests.faults.harness import CONTEXT
from tests.test_generation import always_generating

ROOT = Path(__file__).parents[1]
LETTER = 70  # the byte tokenizer's id of some letter


@pytest.fixture
def chat(tiny_model, tiny_tokenizer):
    """With a model that generates one letter, over and over."""
    always_generating(LETTER, tiny_model, tiny_tokenizer)
    return Chat(tiny_model, tiny_tokenizer, GREEDY, 5, "Be brief.")


def test_it_gives_the_same_answer_as_to_the_prompt_alone_and_remembers_it(chat, capsys):
    alone = generate_answers(chat.model, chat.tokenizer, ["Hi"], GREEDY, 5, "Be brief.")[0].text
    chat.respond("Hi")
    assert capsys.readouterr().out.strip() == alone
    assert [message["role"] for message in chat.messages] == ["user", "assistant"]
    assert chat.messages[1]["content"] == alone
    chat.respond("And?")
    text = chat.tokenizer.decode(chat.encode())
    assert [message["content"] for message in chat.messages[:3]] == ["Hi", alone, "And?"]
    assert re.search(r"Be brief\..*Hi.*And\?", text, re.DOTALL)


def test_it_streams(chat, capsys, monkeypatch):
    seen, print_part = [], chat_module.Streamer.put
    monkeypatch.setattr(chat_module.Streamer, "put", lambda s, value: (print_part(s, value), seen.append(s.text))[0])
    chat.max_new_tokens = 3
    chat.respond("Hi")
    assert len(seen) == 4  # the prompt and three tokens
    letter = chat.tokenizer.decode([LETTER])
    assert capsys.readouterr().out == 3 * letter + "\n"


def test_ctrl_c_stops_the_answer_and_its_beginning_is_remembered(chat, capsys, monkeypatch):
    put = chat_module.Streamer.put

    def interrupted(streamer, value):
        put(streamer, value)
        if len(streamer.token_cache) == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(chat_module.Streamer, "put", interrupted)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    chat.respond("Hi")
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\nAnd?\n"))
    with pytest.raises(KeyboardInterrupt):  # in a pipe it ends the chat, not one of many answers
        chat_module.run_chat(copy.deepcopy(chat))
    signal.signal(signal.SIGINT, before)
    two = 2 * chat.tokenizer.decode([LETTER])
    assert capsys.readouterr().out == 2 * (two + "\n")
    assert chat.messages[-1] == {"role": "assistant", "content": two}
    assert chat.model.training  # as it was made


def test_its_commands(chat):
    assert chat.run_command("/undo") == "there is nothing to undo"
    chat.respond("Hi")
    first = list(chat.messages)
    chat.respond("And?")
    chat.run_command("/undo")
    assert chat.messages == first
    chat.run_command("/reset")
    assert chat.messages == []
    assert "/undo" in chat.run_command("/help")


def test_an_empty_answer_is_not_remembered(chat, capsys):
    always_generating(chat.tokenizer.eos_token_id, chat.model, chat.tokenizer)
    chat.respond("Hi")
    assert chat.messages == []
    assert capsys.readouterr().err == "(no answer; the prompt is not kept)\n"


def test_the_first_exchanges_are_dropped_beyond_the_context_length(chat, monkeypatch, capsys):
    monkeypatch.setattr(chat.tokenizer, "model_max_length", 120)
    for number in range(4):
        chat.respond(f"Hi {number}")
    assert chat.messages[0]["content"] in ("Hi 1", "Hi 2", "Hi 3")
    assert chat.messages[-2]["content"] == "Hi 3"
    assert "Be brief." in chat.tokenizer.decode(chat.encode())
    chat.respond("far too long " * 20)
    assert "longer than the context length" in capsys.readouterr().err
    assert chat.messages == []


def test_piped_it_reads_prompts_line_by_line_and_prints_nothing_but_answers(tiny_model_dir, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n\n/nothing\nAnd?"))
    prompts = []
    monkeypatch.setattr(Chat, "respond", lambda _, prompt: (prompts.append(prompt), print("answer")))
    assert eval_command.main([str(tiny_model_dir), "--chat"]) == 0
    assert prompts == ["Hi", "And?"]
    printed = capsys.readouterr()
    assert printed.out == "answer\nanswer\n"
    assert "/undo" in printed.err


@pytest.mark.parametrize(
    ("typed", "status", "locale"), [("caf\\351", 1, "C"), (None, 0, "C.UTF-8")], ids=["not UTF-8", "closed"]
)
def test_stdin_that_is_not_utf8_is_one_line_and_a_closed_one_is_the_end(tiny_model_dir, typed, status, locale):
    stdin = f"printf '{typed}' |" if typed else "exec <&-;"
    command = f"{stdin} LC_ALL={locale} {sys.executable} {ROOT}/eval.py {tiny_model_dir} --chat"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert done.stderr == ("error: a prompt or the system message is not UTF-8; write it in UTF-8\n" if typed else "")


@pytest.mark.parametrize("flag", ["--prompts", "--system"])
def test_an_argument_that_is_not_utf8_is_refused(tiny_model_dir, chats, flag):
    with pytest.raises(UserError, match="is not UTF-8"):
        eval_command.main([str(tiny_model_dir), "--dataset", str(chats), flag, "caf\udce9"])


def chat_in_terminal(name, argv):
    """`python eval.py` in a terminal, the one that its session then has."""
    os.setsid()
    for number in range(3):
        os.dup2(os.open(name, os.O_RDWR), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    os.environ["TERM"] = "xterm"
    sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.argv = ["eval.py", *argv]
    run_command(eval_command.main)


@pytest.fixture
def terminal():
    """Our end of a terminal, and a function that starts `chat_in_terminal`, which is killed at the end."""
    (ours, theirs), started = pty.openpty(), []

    def start(*argv):
        started.append(CONTEXT.Process(target=chat_in_terminal, args=(os.ttyname(theirs), argv)))
        started[-1].start()
        return started[-1]

    yield ours, start
    for process in started:
        process.kill()
        process.join()
    for descriptor in (ours, theirs):
        os.close(descriptor)


def test_in_a_terminal_ctrl_d_quits_and_lines_can_be_edited(tiny_model_dir, terminal):
    ours, start = terminal
    process, output = start(str(tiny_model_dir), "--chat"), b""

    def until(text):
        nonlocal output
        while text not in output and select.select([ours], [], [], 120)[0]:
            output += os.read(ours, 1000)
        assert text in output
        output = output.split(text, 1)[1]

    until(b"Ctrl-D quits")
    until(b"> ")
    while not select.select([ours], [], [], 1)[0]:  # Python misses a signal between the prompt and the wait for a key
        os.write(ours, b"\x03")  # Ctrl-C while nothing is generated
    until(b"> ")
    os.write(ours, b"/undp\x7fo\n")  # a line with a mistake, corrected
    until(b"there is nothing to undo")
    until(b"> ")
    os.write(ours, b"\x04")
    process.join(120)
    assert process.exitcode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature", "0"], "--temperature must be above 0 (--greedy"),
        (["--temperature", "nan"], "--temperature must be above 0"),
        (["--top-p", "1.5"], "--top-p must be above 0 and at most 1, not 1.5"),
        (["--repetition-penalty", "0"], "--repetition-penalty must be above 0"),
        (["--max-new-tokens", "0"], "--max-new-tokens must be at least 1, not 0"),
        (["--greedy", "--temperature", "2"], "--greedy samples nothing; leave --temperature out"),
        (["--chat", "--json"], "--chat is a conversation; leave --json out"),
        (["--chat", "--against", "x"], "leave --against out"),
    ],
)
def test_invalid_options_are_refused(tiny_model_dir, arguments, message):
    with pytest.raises(UserError) as raised:
        eval_command.main([str(tiny_model_dir), *arguments])
    assert message in str(raised.value)


def test_sampling_options_and_the_system_message_change_answers(tiny_model_dir, chats, capsys):
    def generated(*arguments):
        command = [str(tiny_model_dir), "--dataset", str(chats), "--json", "--prompts", "Hi", "--max-new-tokens", "20"]
        assert eval_command.main([*command, *arguments]) == 0
        return [one["text"] for one in json.loads(capsys.readouterr().out)["answers"]]

    greedy, sampled = generated()
    for arguments in (["--temperature", "50"], ["--top-p", "0.01"], ["--repetition-penalty", "0.01"], ["--seed", "1"]):
        changed = generated(*arguments)
        assert changed[0] == greedy
        assert changed[1] != sampled, arguments
    assert generated("--system", "Be brief.")[1] != sampled
