"""Names on the Hub, through the real libraries: what loads, what the cache serves, and how the rest is refused.

The libraries decide what is asked of the Hub, what is kept and what is raised, and change all of that between versions:
nothing of theirs is replaced here. A small server on the loopback plays the Hub. The libraries read its address and
their cache's at import, so every scenario is a function of this file (`online`, `offline`, …) that runs in a process of
its own and prints, as JSON, what its calls gave.
"""

import contextlib
import hashlib
import itertools
import json
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryFile
from unittest import mock
from urllib.parse import parse_qs, unquote, urlsplit

import datasets
import pytest
import torch
from huggingface_hub import ModelCard, hf_hub_download
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from config import PRESETS, Config, UserError
from conversations.formats import read_conversations
from conversations.sources import check_sources, parse_source, pin_commits
from conversations.tokenizer import load_tokenizer
from model import load_model
from storage import hub

PROJECT = Path(__file__).parents[1]
COMMIT, OLDER = "c0ffee" + "0" * 34, "01d" + "0" * 37
PROMISED_SECONDS = 10  # within which a name that cannot be had is refused


def chat(text):
    return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text.upper()}]}


CHATS = {"train": [chat(f"train {n}") for n in range(6)], "test_sft": [chat(f"test {n}") for n in range(4)]}


# --- the Hub

REQUESTS = []  # of all that were answered: path and user agent


class QuietHandler(BaseHTTPRequestHandler):
    """Does not log requests."""

    def log_message(self, *_):
        """Print nothing."""


@contextlib.contextmanager
def serve(handler, **attributes):
    """A server on the loopback, with some attributes, which is up within the `with`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    vars(server).update(attributes)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()  # from here on the port refuses


class Hub(QuietHandler):
    """The requests of the libraries that look up and download a repository.

    `server.repositories` maps ("models" or "datasets", id) to a directory, that of its main branch; `server.revisions`
    maps (kind, id, revision) to a commit and its directory. Whoever lists the files of those with the id
    `server.severed` is cut off.
    """

    ADDRESS = re.compile(
        r"(?P<api>/api)?/((?P<kind>models|datasets)/)?(?P<name>[^/]+/[^/]+)"
        r"(/(?P<what>tree|resolve|revision)/(?P<revision>[^/]+)(/(?P<path>.+))?)?"
    )

    def do_GET(self):
        url = urlsplit(self.path)
        asked = self.ADDRESS.fullmatch(unquote(url.path))
        repository = asked and (asked["kind"] or "models", asked["name"])
        root, self.commit = self.server.repositories.get(repository), COMMIT
        moved = self.server.revisions.get((*(repository or ()), "main"))
        if moved and asked["revision"] in (None, "main"):
            self.commit, root = moved
        if root is None:
            return self.answer(404, error="RepoNotFound")
        elif asked["revision"] not in (None, "main", COMMIT):
            self.commit, root = self.server.revisions.get((*repository, asked["revision"]), (COMMIT, None))
            if root is None:
                return self.answer(404, error="RevisionNotFound")
        path = root / (asked["path"] or "")
        if asked["what"] == "tree" and asked["name"] == self.server.severed:
            self.close_connection = True
        elif asked["what"] == "tree" and path.is_dir():
            pattern = "**/*" if parse_qs(url.query).get("recursive") == ["true"] else "*"
            self.answer(200, json.dumps([entry(root, found) for found in path.glob(pattern)]).encode())
        elif asked["what"] == "resolve" and path.is_file():
            self.answer(200, path.read_bytes())
        elif asked["api"] and asked["what"] in (None, "revision"):
            self.answer(200, json.dumps({"id": asked["name"], "sha": self.commit}).encode())
        else:
            self.answer(404, error="EntryNotFound")

    do_HEAD = do_GET

    def answer(self, status, body=b"", error=None):
        REQUESTS.append((self.path, self.headers.get("User-Agent", "")))
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", getattr(self, "commit", COMMIT))
        self.send_header("X-Error-Code" if error else "ETag", error or f'"{checksum(body)}"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def checksum(content):
    return hashlib.sha1(content).hexdigest()


def entry(root, path):
    """A file or directory as the Hub lists it."""
    named = {"path": path.relative_to(root).as_posix()}
    if path.is_dir():
        return named | {"type": "directory", "oid": COMMIT, "size": 0}
    return named | {"type": "file", "oid": checksum(path.read_bytes()), "size": path.stat().st_size}


@contextlib.contextmanager
def serve_hub(repositories, revisions):
    """The address of a Hub with these repositories."""
    with serve(Hub, repositories=repositories, revisions=revisions, severed="acme/severed") as server:
        yield f"http://127.0.0.1:{server.server_port}"


# --- the scenarios, each in a process of its own

CONTACTED = []


def keep_to_the_loopback(event, arguments):
    """An audit hook: note every address this process looks up or connects to, and let none be outside this machine."""
    if event == "socket.getaddrinfo":
        host = arguments[0]
    elif event == "socket.connect" and isinstance(arguments[1], tuple):
        host = arguments[1][0]
    else:
        return
    CONTACTED.append(str(host))
    if host != "127.0.0.1":
        raise OSError(f"{host} is outside this test")


def attempt(call, *arguments):
    """What a call returns, or what it raises, as a text; a refusal must come within the promised time."""
    begun = time.monotonic()
    try:
        return call(*arguments)
    except UserError as error:
        assert time.monotonic() - begun < PROMISED_SECONDS
        return f"refused: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def load(name):
    """A model all the way: where it is, how its tokenizer fared with a text, the first row of its embeddings."""
    path, local_files_only = hub.find_model(name)
    tokenizer = load_tokenizer(path, local_files_only)
    model = load_model(path, tokenizer, torch.device("cpu"), local_files_only)
    text = tokenizer.decode(tokenizer("Hi there")["input_ids"])
    return [path, local_files_only, text, model.get_input_embeddings().weight[0].tolist()]


def rows(name, split, configuration=None, revision=None):
    return hub.load_hub_dataset(name, configuration, split, revision).to_list()


def texts(*sources):
    """The questions of all rows of some sources, as they are named on the command line."""
    found = read_conversations([parse_source(text) for text in sources])
    return [messages[0]["content"] for _, _, messages in found]


def commits(name, *datasets):
    """The commits of a model and of some datasets, as a run records them, and its settings with them."""
    config = Config(model=name, dataset=datasets)
    found = {"model": hub.find_model_commit(name), "dataset": check_sources(config)}
    pinned = pin_commits(vars(config), found)
    return [found, pinned["model"], *pinned["dataset"]]


SOURCES = ["acme/moved@train[:2]+test_sft[1:2]", "acme/moved~v1@test_sft", f"acme/moved~{OLDER}@train[-1:]"]


def by_revision():
    """What is named with a revision and a split, in the order that leaves the newest commit in the cache first."""
    gave = {"texts": attempt(texts, *SOURCES), "commits": attempt(commits, "acme/moved@v1", *SOURCES)}
    for name in ("acme/moved@v1", "acme/moved", f"acme/moved@{OLDER}"):
        gave[name] = attempt(load, name)
    gave["no such model"] = attempt(hub.find_model, "acme/moved@v2")
    gave["no such dataset"] = attempt(texts, "acme/moved~v2:default@train")
    return gave


def preset(gpu, model=PRESETS["ultrachat"]["model"], dataset=PRESETS["ultrachat"]["dataset"][0]):
    """What `auto` means, where the experiment with a GPU needs this model and this dataset."""
    needed = {"ultrachat": {"model": model, "dataset": (dataset,)}}
    with mock.patch("torch.cuda.is_available", return_value=gpu), mock.patch.object(hub, "PRESETS", needed):
        return hub.choose_preset({})[0]


def online():
    """The Hub answers; the cache is empty at first."""
    gave = {"preset without a GPU": attempt(preset, False), "contacted for it": list(CONTACTED)}
    gave["preset with a GPU"] = attempt(preset, True)
    gave["unknown model"] = attempt(hub.find_model, "acme/unknown")
    gave["unknown dataset"] = attempt(rows, "acme/unknown", "train")
    gave["model"] = attempt(load, "acme/tiny")
    gave["model of pickled weights"] = attempt(load, "acme/pickled")
    gave["rows"] = attempt(rows, "acme/chats", "test_sft")
    gave["scripted"] = attempt(rows, "acme/scripted", "train")
    with mock.patch("time.sleep"):  # the libraries wait 23 s in all between their attempts
        gave["severed dataset"] = attempt(rows, "acme/severed", "train")
        gave["severed model"] = attempt(load, "acme/severed")

    # A download of a model in several files that ended after the first of them.
    hf_hub_download("acme/sharded", "config.json")
    index = json.loads(Path(hf_hub_download("acme/sharded", "model.safetensors.index.json")).read_text())
    hf_hub_download("acme/sharded", min(index["weight_map"].values()))
    gave["half a model"] = attempt(hub.find_model, "acme/sharded")

    # What a process that is killed while it prepares a dataset leaves behind.
    prepared = Path(datasets.config.HF_DATASETS_CACHE) / "acme___killed" / "default" / "0.0.0"
    (prepared / f"{COMMIT}.incomplete").mkdir(parents=True)
    gave["half a dataset"] = attempt(rows, "acme/killed", "train")

    # Another program has used one file of a dataset, or another of its configurations.
    datasets.load_dataset("acme/partly", data_files="data/train*")
    gave["part of a dataset"] = attempt(rows, "acme/partly", "test_sft")
    datasets.load_dataset("acme/configured", "other")
    gave["another configuration"] = attempt(rows, "acme/configured", "train")
    gave["named configuration"] = attempt(rows, "acme/configured", "train", "other")
    gave["unknown configuration"] = attempt(rows, "acme/configured", "train", "third")
    gave["contacted"] = list(CONTACTED)
    return gave | by_revision()


def run_program(*argv):
    """The exit status of a program, and what it prints."""
    sys.argv = [*argv]
    with TemporaryFile("w+") as stdout, TemporaryFile("w+") as stderr:
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr), pytest.raises(SystemExit) as end:
            runpy.run_path(str(PROJECT / argv[0]), run_name="__main__")
        for stream in (stdout, stderr):
            stream.seek(0)
        return [end.value.code, stdout.read(), stderr.read()]


def offline():
    """The same cache after `online`, and a Hub that refuses connections."""
    gave = {"model": attempt(load, "acme/tiny"), "rows": attempt(rows, "acme/chats", "test_sft")}
    gave["unknown split"] = attempt(rows, "acme/chats", "test_gen")
    gave["preset with a GPU, cached"] = attempt(preset, True, "acme/tiny", "acme/chats")
    gave["contacted for it"] = list(CONTACTED)
    gave["preset with a GPU"] = attempt(preset, True)
    gave["other model"] = attempt(hub.find_model, "acme/other")
    gave["half a model"] = attempt(hub.find_model, "acme/sharded")
    gave["other dataset"] = attempt(rows, "acme/other", "train")
    gave["named configuration"] = attempt(rows, "acme/configured", "train", "other")
    gave["unknown configuration"] = attempt(rows, "acme/configured", "train", "third")
    gave["program"] = run_program("data.py", "--model", "acme/tiny", "--dataset", "acme/other")
    return gave | by_revision()


def silent():
    """A Hub that accepts connections and never answers, and then a name server that does not."""
    gave = {"silent": attempt(hub.find_model, "acme/tiny"), "preset with a GPU": attempt(preset, True)}
    hub.find_commit.cache_clear()
    hub.connection_error.cache_clear()
    with mock.patch("socket.getaddrinfo", side_effect=lambda *_, **__: time.sleep(60)) as look_up:
        gave["lost"] = attempt(hub.find_model, "acme/tiny")
    return gave | {"looked up": look_up.called}


def start(command, home, endpoint):
    """Start a Python process whose libraries know this Hub only, and keep what they cache under `home`."""
    settings = ("HF_", "HUGGING", "TRANSFORMERS_")
    inherited = {key: value for key, value in os.environ.items() if not key.upper().startswith(settings)}
    inherited = {key: value for key, value in inherited.items() if not key.upper().endswith("_PROXY")}
    variables = {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "PYTHONPATH": str(PROJECT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *map(str, command)], env=inherited | variables, cwd=home.parent, **pipes)


def finish(process):
    """What a scenario's calls gave, in a dict."""
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    return json.loads(stdout.splitlines()[-1])


def scenario(function):
    return [Path(__file__), function.__name__]


# --- what must hold


@pytest.fixture(scope="module")
def repositories(tmp_path_factory, tiny_model_dir):
    """What the Hub has: one tiny model, whole and in several files, and one dataset in a few shapes."""
    root = tmp_path_factory.mktemp("repositories")
    shutil.copytree(tiny_model_dir, root / "sharded")
    (root / "sharded" / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(tiny_model_dir).save_pretrained(root / "sharded", max_shard_size="50KB")
    shutil.copytree(root / "sharded", root / "pickled", ignore=shutil.ignore_patterns("model*"))
    torch.save(AutoModelForCausalLM.from_pretrained(tiny_model_dir).state_dict(), root / "pickled/pytorch_model.bin")
    data = root / "chats" / "data"
    data.mkdir(parents=True)
    for split, conversations in CHATS.items():
        datasets.Dataset.from_list(conversations).to_parquet(data / f"{split}-00000-of-00001.parquet")
    shutil.copytree(root / "chats", root / "scripted")
    (root / "scripted" / "scripted.py").write_text("# how datasets were read before scripts were given up\n")
    shutil.copytree(root / "chats", root / "configured")
    (root / "configured" / "README.md").write_text(
        "---\nconfigs:\n"
        '- {config_name: default, data_files: [{split: train, path: "data/train-*"}]}\n'
        '- {config_name: other, data_files: [{split: train, path: "data/test_sft-*"}]}\n---\n'
    )
    models = dict.fromkeys(("acme/moved", "acme/tiny", "acme/severed"), tiny_model_dir)
    models |= {"acme/sharded": root / "sharded", "acme/pickled": root / "pickled"}
    chats = dict.fromkeys(("chats", "killed", "moved", "partly", "severed"), root / "chats")
    others = {name: root / name for name in ("scripted", "configured")}
    return {
        **{("models", name): directory for name, directory in models.items()},
        **{("datasets", f"acme/{name}"): directory for name, directory in (chats | others).items()},
        ("models", PRESETS["ultrachat"]["model"]): tiny_model_dir,
        ("datasets", PRESETS["ultrachat"]["dataset"][0]): root / "chats",
    }


@pytest.fixture(scope="module")
def revisions(tmp_path_factory, tiny_model_dir):
    """The earlier commit of "acme/moved", which the tag v1 names: another model, and other rows."""
    root = tmp_path_factory.mktemp("revisions")
    shutil.copytree(tiny_model_dir, root / "tiny")
    weights = load_file(root / "tiny" / "model.safetensors")
    save_file({name: 2 * one for name, one in weights.items()}, root / "tiny" / "model.safetensors", {"format": "pt"})
    (root / "chats" / "data").mkdir(parents=True)
    for split, conversations in CHATS.items():
        older = [chat(f"older {row['messages'][0]['content']}") for row in conversations]
        datasets.Dataset.from_list(older).to_parquet(root / "chats" / "data" / f"{split}-00000-of-00001.parquet")
    directories = {"models": root / "tiny", "datasets": root / "chats"}
    return {
        (kind, "acme/moved", name): (OLDER, directory)
        for kind, directory in directories.items()
        for name in ("v1", OLDER)
    }


@pytest.fixture(scope="module")
def unanswered(tmp_path_factory):
    """The process of `silent`."""
    home = tmp_path_factory.mktemp("silent") / "cache"
    with socket.create_server(("127.0.0.1", 0)) as server:  # connections are made, but nobody ever reads from them
        yield start(scenario(silent), home, f"http://127.0.0.1:{server.getsockname()[1]}")


@pytest.fixture(scope="module")
def answered(repositories, revisions, tmp_path_factory, unanswered):  # noqa: ARG001 (it waits meanwhile)
    """What `online` gave, with its cache and its Hub, which is gone."""
    home = tmp_path_factory.mktemp("answered") / "cache"
    with serve_hub(repositories, revisions) as endpoint:
        gave = finish(start(scenario(online), home, endpoint))
    return gave, home, endpoint


@pytest.fixture(scope="module")
def with_hub(answered):
    return answered[0]


@pytest.fixture(scope="module")
def without_hub(answered):
    """What `offline` gave."""
    _, home, endpoint = answered
    return finish(start(scenario(offline), home, endpoint))


@pytest.fixture(scope="module")
def without_answer(unanswered):
    """What `silent` gave."""
    return finish(unanswered)


def first_embedding(directory):
    return load_file(directory / "model.safetensors")["model.embed_tokens.weight"][0].tolist()


def test_the_hub_gives_models_and_datasets(with_hub, tiny_model_dir):
    assert with_hub["model"] == ["acme/tiny", False, "Hi there", first_embedding(tiny_model_dir)]
    assert with_hub["rows"] == CHATS["test_sft"]


def test_the_hub_is_asked_for_what_was_named_and_told_nothing_else(with_hub, tiny_model_dir):
    """By themselves the libraries count downloads, describe the process, and have pickled weights converted."""
    assert with_hub["model of pickled weights"] == ["acme/pickled", False, "Hi there", first_embedding(tiny_model_dir)]
    asked = [urlsplit(path).path for path, _ in REQUESTS]
    assert [path for path in asked if path != "/" and not Hub.ADDRESS.fullmatch(path)] == []
    assert {*with_hub["contacted"]} <= {"127.0.0.1", "datasets-server.127.0.0.1"}  # the Hub's list of Parquet files
    about_the_run = "agent/|file_type|from_auto_class|is_ci"
    assert [agent for _, agent in REQUESTS if re.search(about_the_run, agent)] == []


def test_the_cache_serves_them_after_one_request(without_hub, tiny_model_dir):
    assert without_hub["model"] == ["acme/tiny", True, "Hi there", first_embedding(tiny_model_dir)]
    assert without_hub["rows"] == CHATS["test_sft"]
    contacted = without_hub["contacted for it"]
    assert {*contacted} == {"127.0.0.1"}
    assert len(contacted) <= 4  # the name looked up, and one connection; the oldest libraries ask twice


def test_an_unknown_name_is_refused(with_hub):
    for kind in ("model", "dataset"):
        refusal = with_hub[f"unknown {kind}"]
        assert refusal.startswith(f"refused: --{kind} acme/unknown: neither on this disk nor on the Hub")


def test_an_unknown_split_is_refused_with_those_there_are(without_hub):
    refusal = without_hub["unknown split"]
    assert refusal.startswith("refused: --dataset acme/chats --split test_gen: ")
    assert "'train', 'test_sft'" in refusal


def test_a_hub_that_cannot_be_reached_is_named_as_the_reason(without_hub):
    for kind in ("model", "dataset"):
        refusal = without_hub[f"other {kind}"]
        assert refusal.startswith(f"refused: --{kind} acme/other: not on this disk, and the Hub does not answer (")
        assert "Connection refused" in refusal


@pytest.mark.parametrize("how", ["silent", "lost"])
def test_a_hub_that_never_answers_is_given_up_in_time(without_answer, how):
    assert without_answer[how].startswith("refused: --model acme/tiny: not on this disk, and the Hub does not")
    assert without_answer["looked up"]


def test_the_program_reports_it_in_one_line(without_hub):
    status, stdout, stderr = without_hub["program"]
    assert (status, stdout) == (1, "")
    assert re.fullmatch(r"error: --dataset acme/other: [^\n]+\n", stderr)


def test_the_auto_preset_depends_on_gpu_hub_and_cache(with_hub, without_hub, without_answer):
    assert with_hub["preset with a GPU"] == "ultrachat"
    assert without_hub["preset with a GPU, cached"] == "ultrachat"
    assert without_hub["preset with a GPU"] == "quickstart"
    assert without_answer["preset with a GPU"] == "quickstart"
    assert with_hub["preset without a GPU"] == "quickstart"
    assert with_hub["contacted for it"] == []


def test_a_model_that_is_half_downloaded_is_not_taken_from_the_cache(with_hub, without_hub):
    assert with_hub["half a model"] == ["acme/sharded", False]
    assert without_hub["half a model"].startswith("refused: --model acme/sharded: not on this disk, and the Hub does")


def test_what_another_program_cached_is_not_taken_for_the_dataset(with_hub):
    assert with_hub["half a dataset"] == CHATS["train"]
    assert with_hub["part of a dataset"] == CHATS["test_sft"]
    assert with_hub["another configuration"] == CHATS["train"]


def test_a_dataset_that_is_a_script_is_refused(with_hub):
    assert with_hub["scripted"].startswith("refused: --dataset acme/scripted --split train: ")


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_a_connection_that_drops_after_the_first_answer_is_a_refusal(with_hub, kind):
    assert with_hub[f"severed {kind}"].startswith(f"refused: --{kind} acme/severed")


def test_a_configuration_can_be_named(with_hub, without_hub):
    for gave in (with_hub, without_hub):
        assert gave["named configuration"] == CHATS["test_sft"]
        assert gave["unknown configuration"].startswith("refused: --dataset acme/configured")


def test_a_revision_and_a_split_can_be_named_in_a_source(with_hub, without_hub):
    for gave in (with_hub, without_hub):
        older = [f"older test {n}" for n in range(4)] + ["older train 5"]
        assert gave["texts"] == ["train 0", "train 1", "test 1", *older]


def test_a_model_has_the_weights_of_its_revision(with_hub, without_hub, tiny_model_dir):
    newest = first_embedding(tiny_model_dir)
    for gave, local in ((with_hub, False), (without_hub, True)):
        assert gave["acme/moved"] == ["acme/moved", local, "Hi there", newest]
        for name in ("acme/moved@v1", f"acme/moved@{OLDER}"):
            assert gave[name] == [name, local, "Hi there", [2 * weight for weight in newest]]


def test_the_commits_of_revisions_are_found_and_pin_the_settings(with_hub, without_hub):
    for gave in (with_hub, without_hub):
        found, model, *sources = gave["commits"]
        assert found["model"] == {"acme/moved@v1": OLDER}
        assert found["dataset"] == {"acme/moved": COMMIT, "acme/moved~v1": OLDER, f"acme/moved~{OLDER}": OLDER}
        assert model == f"acme/moved@{OLDER}"
        assert sources == [
            f"acme/moved~{COMMIT}@train[:2]+test_sft[1:2]",
            f"acme/moved~{OLDER}@test_sft",
            f"acme/moved~{OLDER}@train[-1:]",
        ]


def test_a_revision_that_is_not_there_is_refused(with_hub, without_hub):
    for kind in ("model", "dataset"):
        refusal = f"refused: --{kind} acme/moved"
        assert with_hub[f"no such {kind}"] == f"{refusal}: it has no revision v2 on the Hub"
        assert without_hub[f"no such {kind}"].startswith(f"{refusal} at v2: not on this disk, and the Hub does not")


@pytest.mark.slow
def test_a_resumed_run_keeps_the_commits_it_began_with(repositories, revisions, tmp_path):
    run = tmp_path / "run"
    flags = ["--model", "acme/moved", "--dataset", "acme/moved", "--eval-dataset", "acme/moved@test_sft"]
    flags += ["--dtype", "fp32", "--max-steps", "1", "--batch-size", "2", "--output-dir", run]
    moved = {**revisions, ("models", "acme/moved", "main"): revisions["models", "acme/moved", OLDER]}
    moved["datasets", "acme/moved", "main"] = revisions["datasets", "acme/moved", OLDER]

    def command(endpoint, program, *arguments):
        process = start([PROJECT / program, *arguments], tmp_path / "cache", endpoint)
        stdout, stderr = process.communicate(timeout=120)
        assert process.returncode == 0, stderr
        return stdout

    with serve_hub(repositories, revisions) as endpoint:
        command(endpoint, "train.py", *flags)
    record = json.loads((run / "config.json").read_text())
    commits = {"model": {"acme/moved": COMMIT}, "dataset": {"acme/moved": COMMIT}}
    assert record["commits"] == commits
    for file in ("best/README.md", "report.html"):
        assert (run / file).read_text().count(COMMIT) == 2
    card = ModelCard.load(run / "best" / "README.md").data
    assert (card.base_model, card.datasets) == ("acme/moved", ["acme/moved"])
    with serve_hub(repositories, moved) as endpoint:
        command(endpoint, "train.py", "--resume", run, "--max-steps", "2", "--allow-changes")
        resumed = json.loads((run / "config.json").read_text())
        assert (resumed["commits"], resumed["data"]) == (commits, record["data"])
        assert "--max-steps 1 -> 2" in str(resumed["changes"])
        assert "fingerprint" not in str(resumed["changes"])
        again = command(endpoint, "eval.py", run, "--json", "--max-new-tokens", "1", "--greedy")
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        best = min(line["loss"] for line in lines if line["kind"] == "eval" and line["step"])
        assert json.loads(again)["splits"]["eval"]["loss"] == pytest.approx(best)


@pytest.mark.slow
def test_adapters_find_their_base_model_on_the_hub_again(repositories, revisions, tmp_path):
    """By its commit, in an empty cache, too; other weights there are noticed."""
    run, number = tmp_path / "run", itertools.count()
    flags = ["--model", "acme/moved", "--dataset", "acme/moved", "--dtype", "fp32", "--max-steps", "2"]
    flags += ["--batch-size", "2", "--lora-rank", "4", "--output-dir", run]

    def command(endpoint, *arguments):
        process = start([PROJECT / arguments[0], *arguments[1:]], tmp_path / f"cache-{next(number)}", endpoint)
        stdout, stderr = process.communicate(timeout=120)
        return process.returncode, stdout, stderr

    with serve_hub(repositories, revisions) as endpoint:
        status, _, stderr = command(endpoint, "train.py", *flags)
        assert status == 0, stderr
    config = json.loads((run / "best" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("acme/moved", COMMIT)
    card = ModelCard.load(run / "best" / "README.md").data
    assert (card.library_name, card.base_model) == ("peft", "acme/moved")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    best = min(line["loss"] for line in lines if line["kind"] == "eval" and line["step"])
    moved = revisions | {("models", "acme/moved", "main"): revisions["models", "acme/moved", OLDER]}
    moved["models", "acme/moved", COMMIT] = (COMMIT, repositories["models", "acme/moved"])
    asked = ("eval.py", run, "--json", "--max-new-tokens", "1", "--greedy")
    with serve_hub(repositories, moved) as endpoint:
        status, stdout, stderr = command(endpoint, *asked)
        assert status == 0, stderr
        assert json.loads(stdout)["splits"]["eval"]["loss"] == pytest.approx(best)
    others = {**repositories, ("models", "acme/moved"): revisions["models", "acme/moved", OLDER][1]}
    with serve_hub(others, revisions) as endpoint:
        status, _, stderr = command(endpoint, *asked)
    assert status == 1, stderr
    assert f"its base model acme/moved@{COMMIT} has changed, model.safetensors is not what the adapters" in stderr
    assert "Traceback" not in stderr


if __name__ == "__main__":
    hub.quiet_libraries()
    sys.addaudithook(keep_to_the_loopback)
    print(json.dumps(globals()[sys.argv[1]]()))
