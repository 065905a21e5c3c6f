"""`examples/follow.py` sends each line of a run once, whatever happens to the run or to it.

Each service is a stand-in with the calls that are made of it; where its package is installed, the real one with a local
store is tried too. Nothing of the project is imported, so this file also runs in an environment of the service:
`pytest --noconftest tests/test_follow.py`.
"""

import contextlib
import importlib.util
import json
import sqlite3
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest

SCRIPT = Path(__file__).parents[1] / "examples" / "follow.py"
SETTINGS = {"lr": 0.0002, "dataset": ["mine.jsonl"], "output_dir": "runs/mine", "chat_template": ""}
spec = importlib.util.spec_from_file_location("follow", SCRIPT)
follow = importlib.util.module_from_spec(spec)
spec.loader.exec_module(follow)


def line(step, kind="train", loss=None):
    return {"step": step, "kind": kind, "loss": 5 - step / 8 if loss is None else loss, "device": "cpu", "lr": 1e-4}


LINES = [
    line(0, "eval"),
    line(0, "test"),
    *(line(step) for step in (1, 2, 3)),
    line(3, "eval"),
    line(4),
    line(2, "test"),
]
POINTS = {(f"{each['kind']}/{name}", each["step"], each[name]) for each in LINES for name in ("loss", "lr")}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run's directory, whose first six lines are logged; the test works beside it."""
    directory = tmp_path / "runs" / "mine one"
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({"config": SETTINGS}))
    (directory / "answers.json").write_text('{"before": []}')
    write(directory, LINES[:6])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(follow, "INTERVAL", 0.01)
    return directory


def write(run, lines, tail=""):
    (run / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines) + tail)


def finish(run):
    (run / "answers.json").write_text('{"before": [], "after": []}')


# --- services, and what they have: functions that return the points (name, step, value) and the settings of a run


def stand_in_trackio(monkeypatch, _):
    points, runs = [], {}

    def init(project, name, *, config, resume, auto_log_gpu, auto_log_cpu):
        assert (project, resume, auto_log_gpu, auto_log_cpu) == ("plain-sft", "allow", False, False)
        runs[name] = config
        return SimpleNamespace(log=log, finish=lambda: None)

    def log(metrics, step):
        points.extend((name, step, value) for name, value in metrics.items())

    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(init=init))
    return lambda: points, lambda: runs["mine-one"]


def stand_in_wandb(monkeypatch, _):
    points, settings = [], {}

    def update(values, allow_val_change):
        assert allow_val_change or settings == {}
        settings.update(values)

    class Run(contextlib.nullcontext):
        config = SimpleNamespace(update=update)

        def define_metric(self, name, step_metric):
            assert (name, step_metric) == ("*", "step")

        def log(self, metrics):
            points.extend((name, metrics["step"], value) for name, value in metrics.items() if name != "step")

        def __enter__(self):
            return self

    def init(*, project, id, name, resume):
        assert (project, id, name, resume) == ("plain-sft", "mine-one", "mine-one", "allow")
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    return lambda: points, lambda: settings


def stand_in_mlflow(monkeypatch, _):
    points, settings, runs = [], {}, []

    def search_runs(*, experiment_names, filter_string, output_format):
        assert (experiment_names, output_format) == (["plain-sft"], "list")
        assert filter_string == "attributes.run_name = 'mine-one'"
        return runs

    def start_run(*, run_id, run_name):
        if run_id is None:
            runs.append(SimpleNamespace(info=SimpleNamespace(run_id="1"), data=SimpleNamespace(params=settings)))
        assert (len(runs), run_name) == (1, "mine-one")
        return contextlib.nullcontext(runs[0])

    def log_params(values):
        assert not values.keys() & settings.keys()  # they cannot be changed
        settings.update(values)

    def log_metrics(metrics, step):
        points.extend((name, step, value) for name, value in metrics.items())

    functions = {"search_runs": search_runs, "start_run": start_run, "log_params": log_params}
    service = SimpleNamespace(set_experiment=lambda _: None, log_metrics=log_metrics, **functions)
    monkeypatch.setitem(sys.modules, "mlflow", service)
    return lambda: points, lambda: settings


def real_trackio(monkeypatch, tmp_path):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "store"))  # read at import
    for name in [name for name in sys.modules if name.split(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, name)
    trackio = pytest.importorskip("trackio")

    def get_points():
        rows = sqlite3.connect(tmp_path / "store" / "plain-sft.db").execute(
            "SELECT step, metrics, run_name FROM metrics"
        )
        rows = [(step, json.loads(metrics)) for step, metrics, name in rows if name == "mine-one"]
        return [(name, step, value) for step, metrics in rows for name, value in metrics.items()]

    return get_points, lambda: trackio.Api().runs("plain-sft")[0].config


def real_mlflow(monkeypatch, tmp_path):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "store").as_uri())

    def get_run():
        (run,) = mlflow.search_runs(experiment_names=["plain-sft"], output_format="list")
        return run

    def get_points():
        client, run = mlflow.MlflowClient(), get_run()
        histories = [client.get_metric_history(run.info.run_id, name) for name in run.data.metrics]
        return [(each.key, each.step, each.value) for history in histories for each in history]

    return get_points, lambda: get_run().data.params


@pytest.fixture(params=[stand_in_trackio, stand_in_wandb, stand_in_mlflow, real_trackio, real_mlflow])
def service(request, monkeypatch, tmp_path):
    """A service's name, and functions that return the points and the settings that it has of the run."""
    return request.param.__name__.split("_")[-1], *request.param(monkeypatch, tmp_path)


# --- what must hold


def send(run, to, *flags):
    follow.main([str(run), "--to", to, *flags])


def test_each_line_is_sent_once_however_often_it_is_started(run, service):
    to, get_points, get_settings = service
    send(run, to, "--once")
    assert len(get_points()) == 12
    write(run, LINES, tail='{"step": 9')  # which is being written
    for _ in range(2):
        send(run, to, "--once")
    assert sorted(get_points()) == sorted(POINTS)
    assert {name: str(value) for name, value in get_settings().items() if name in SETTINGS} == {
        name: str(value) for name, value in SETTINGS.items()
    }


def test_a_run_is_followed_until_it_is_finished(run, service, monkeypatch):
    """Also one that is killed and resumed, which logs again what it logged after its checkpoint."""
    to, get_points, _ = service
    states = [LINES[:3], LINES[:5], LINES[:4], LINES]

    def wait(_):
        write(run, states.pop(0))
        if not states:
            finish(run)

    monkeypatch.setattr(follow.time, "sleep", wait)
    send(run, to)
    assert states == []
    assert sorted(get_points()) == sorted(POINTS)


def test_a_run_that_is_being_prepared_is_waited_for(run, monkeypatch, capsys):
    get_points, get_settings = stand_in_trackio(monkeypatch, run)
    config = (run / "config.json").rename(run.parent / "prepared")
    finish(run)
    monkeypatch.setattr(follow.time, "sleep", lambda _: config.rename(run / "config.json"))
    send(run, "trackio")
    assert capsys.readouterr().out.splitlines() == [f"waiting for {run}/config.json", f"6 lines of {run} are sent"]
    assert len(get_points()) == 12
    assert get_settings() == SETTINGS


def test_ctrl_c_ends_it_and_what_was_sent_is_noted(run, monkeypatch):
    get_points, _ = stand_in_trackio(monkeypatch, run)
    monkeypatch.setattr(follow.time, "sleep", mock.Mock(side_effect=KeyboardInterrupt))
    send(run, "trackio")
    write(run, LINES)
    send(run, "trackio", "--once")
    assert sorted(get_points()) == sorted(POINTS)


def test_a_number_that_changed_is_a_warning(run, monkeypatch, capsys):
    get_points, _ = stand_in_trackio(monkeypatch, run)
    send(run, "trackio", "--once")
    write(run, [*LINES[:4], line(3, loss=1.0), *LINES[5:]])
    send(run, "trackio", "--once")
    assert capsys.readouterr().out.count("warning: train 3 is not what was sent") == 1
    assert sorted(get_points()) == sorted(POINTS)


def test_nothing_is_written_into_the_run(run, monkeypatch):
    stand_in_trackio(monkeypatch, run)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    send(run, "trackio", "--once")
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    assert [path.name for path in run.parent.iterdir() if path != run] == ["mine one.trackio-plain-sft.sent"]


def test_a_mistake_is_one_line(run, monkeypatch):
    def fail(*arguments):
        with pytest.raises(SystemExit) as raised:
            send(*arguments)
        return raised.value.code  # a text is printed on stderr, and the exit status is 1

    monkeypatch.setitem(sys.modules, "mlflow", None)  # as if it were not installed
    assert fail(run, "mlflow") == "error: mlflow is not installed; run: pip install mlflow"
    stand_in_trackio(monkeypatch, run)
    nowhere = run.with_name("nowhere")
    assert fail(nowhere, "trackio") == f"error: {nowhere}: there is no run"
    write(run, LINES, tail="not JSON\n")
    assert fail(run, "trackio", "--once") == f"error: {run}/metrics.jsonl:9: damaged"
    (run / "config.json").unlink()
    assert fail(run, "trackio", "--once") == f"error: {run}: there is no run"
