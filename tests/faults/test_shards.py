"""Large models: all processes write a checkpoint, in files of bounded size; complete or absent."""

import re
import shutil
import signal
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from running.shards import read_tensors
from storage.durable import verify
from tests.conftest import tiny_moe
from tests.faults.harness import Lives, assert_same, lines, some, steps_saved, tensors_in
from tests.faults.inject import full_disk, kill, kill_at_system_call, large_in_small_files, on_call, send


def everywhere(size):
    """What makes the models of so many processes large."""
    return [(rank, large_in_small_files) for rank in range(size)]


def of_two(flags, tmp_path_factory, *faults):
    """A run by two processes that share the weights, with all of its checkpoints."""
    run = tmp_path_factory.mktemp("shared") / "run"
    group = Lives(
        2, [*flags, "--output-dir", run, "--shard", 2, "--save-every", "1", "--keep", "100"], run.parent, faults
    )
    assert group.wait() == [0, 0], group.complained
    return run


@pytest.fixture(scope="session")
def unbroken_large(flags, tmp_path_factory):
    """The run of these flags by two processes that share a large model, that nothing happened to."""
    return of_two(flags, tmp_path_factory, *everywhere(2))


def tensors(directory, stem):
    """The tensors in files of a stem, by name."""
    found = [load_file(path) for path in directory.glob(f"{stem}*.safetensors")]
    return {name: tensor for file in found for name, tensor in file.items()}


def goes_on(lives, run, unbroken):
    again = lives(2, ["--resume", run], *everywhere(2))
    assert again.wait() == [0, 0], again.complained
    assert_same(run, unbroken)


def test_a_large_model_is_saved_as_a_small_one_is_but_in_files_of_bounded_size(flags, unbroken_large, tmp_path_factory):
    small = of_two(flags, tmp_path_factory)
    for step in (4, 7):  # its own model is the best; another is
        ours, theirs = unbroken_large / f"checkpoints/step-{step}", small / f"checkpoints/step-{step}"
        files = tensors_in(ours)
        assert len(files) > 6
        for file in files:
            assert (ours / file).stat().st_size < 25_000 or len(load_file(ours / file)) == 1
        assert set(verify(ours)["files"]) >= files.keys()
        torch.testing.assert_close(tensors(ours, "model"), tensors(theirs, "model"), rtol=0, atol=0)
        moments, expected = tensors(ours, "moments"), torch.load(theirs / "training.pt", weights_only=True)["optimizer"]
        assert len(moments) == 2 * len(expected)
        for kind in ("exp_avg", "exp_avg_sq"):
            written = sorted(
                float(value.double().sum()) for name, value in moments.items() if name.split(".")[0] == kind
            )
            assert written == sorted(float(of[kind].double().sum()) for of in expected.values())
        for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
            assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    models = [AutoModelForCausalLM.from_pretrained(run / "best").state_dict() for run in (unbroken_large, small)]
    torch.testing.assert_close(*models, rtol=0, atol=0)
    assert len(list((unbroken_large / "best").glob("model-*.safetensors"))) > 2
    assert "saving    by all processes, in files of 1.1 GB" in (unbroken_large.parent / "stdout").read_text()


@pytest.mark.slow
def test_a_large_mixture_of_experts_is_read_as_it_was_saved(flags, lives, tiny_model_dir, tmp_path_factory, tmp_path):
    """Its experts are joined in memory; in files they are apart where transformers saves, and joined in ours."""
    directory = shutil.copytree(tiny_model_dir, tmp_path / "model")
    tiny_moe(259).save_pretrained(directory)
    flags = [*flags, "--model", directory]
    unbroken, run = of_two(flags, tmp_path_factory, *everywhere(2)), tmp_path / "run"
    saved = dict(read_tensors(unbroken / "best", "model"))
    model, report = AutoModelForCausalLM.from_pretrained(unbroken / "best", output_loading_info=True)
    assert not any(report.values())
    torch.testing.assert_close(model.state_dict(), saved, rtol=0, atol=0)
    group = lives(
        2, [*flags, "--output-dir", run, "--shard", 2], *everywhere(2), (1, partial(on_call, "train.update", 8, kill))
    )
    assert group.wait() == [1, 137], group.complained
    goes_on(lives, run, unbroken)


# How many processes, how many of them share a copy of the weights, and whether that is large, in each of three lives.
CHANGES = [
    ((2, 2, True), (1, 1, False), (3, 3, True)),
    ((2, 2, False), (3, 3, True), (2, 1, False)),
    ((3, 3, True), (3, 1, False), (2, 2, True)),
    ((4, 2, True), (2, 2, False), (1, 1, False)),
    ((1, 1, False), (4, 2, True), (3, 3, True)),
]


@pytest.mark.parametrize("changes", some([(change,) for change in CHANGES], fast=1), ids=str)
def test_a_large_run_goes_on_under_another_number_of_processes(flags, lives, live, unbroken, tmp_path, changes):
    run = tmp_path / "run"
    for life, (size, count, large) in enumerate(changes):
        argv = [*(["--resume", run] if life else [*flags, "--output-dir", run]), "--shard", count]
        faults = [] if life == 2 else [partial(on_call, "train.update", 4, partial(send, signal.SIGTERM))]
        if size == 1:
            assert live(argv, *faults).wait() == (0 if life == 2 else 143)
        else:
            group = lives(size, argv, *(everywhere(size) if large else []), *((size - 1, fault) for fault in faults))
            assert group.wait() == [0 if life == 2 else 143] * size, group.complained
        newest = run / f"checkpoints/step-{steps_saved(run)[-1]}"
        assert bool(list(newest.glob("moments*"))) == large
    ours, alone = lines(run), lines(unbroken)
    assert [(line["kind"], line["step"]) for line in ours] == [(line["kind"], line["step"]) for line in alone]
    for line, line_alone in zip(ours, alone, strict=True):
        assert line["loss"] == pytest.approx(line_alone["loss"], rel=1e-5)
        assert line.get("grad_norm", 0) == pytest.approx(line_alone.get("grad_norm", 0), rel=1e-4)


@pytest.mark.parametrize(("call", "rank"), some([(3, 1), (4, 0), (12, 0), (12, 1)], fast=1))
def test_one_that_cannot_write_its_part_ends_all_and_nothing_unfinished_is_left(
    flags, lives, unbroken_large, tmp_path, call, rank
):
    run = tmp_path / "run"
    fault = partial(on_call, "running.shards.save_file", call, full_disk)
    group = lives(2, [*flags, "--output-dir", run, "--shard", 2], *everywhere(2), (rank, fault))
    assert group.wait() == [1, 1]
    assert re.fullmatch(
        rf"error: {run}, after update \d: No space left on device; "
        rf"(--resume {run} continues after update \d|there is no checkpoint yet)\n",
        group.complained,
    )
    steps_saved(run)  # nothing unfinished lies beside them
    goes_on(lives, run, unbroken_large)


@pytest.mark.parametrize("rank", some([1, 0], fast=1))
def test_one_is_killed_as_it_writes_its_part(flags, lives, unbroken_large, tmp_path, rank):
    run = tmp_path / "run"
    fault = partial(on_call, "running.shards.save_file", 5, kill)
    group = lives(2, [*flags, "--output-dir", run, "--shard", 2], *everywhere(2), (rank, fault))
    assert group.wait() == [137 if each == rank else 1 for each in (0, 1)]
    assert f"process {rank} of 2" in group.complained
    goes_on(lives, run, unbroken_large)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_one_is_killed_at_every_change_that_saving_a_large_model_makes(flags, lives, unbroken_large, tmp_path, rank):
    saving, counted = [*flags, "--shard", 2, "--save-every", "1", "--keep", "1"], tmp_path / "count"
    group = lives(
        2, [*saving, "--output-dir", tmp_path / "all"], *everywhere(2), (rank, partial(kill_at_system_call, 0, counted))
    )
    assert group.wait() == [0, 0]
    count = int(counted.read_text())
    assert count > (60 if rank == 0 else 10)
    for number in range(1, count + 1):
        run = tmp_path / str(number)
        fault = rank, partial(kill_at_system_call, number)
        group = lives(2, [*saving, "--output-dir", run], *everywhere(2), fault)
        assert group.wait() == [137 if each == rank else 1 for each in (0, 1)]
        goes_on(lives, run, unbroken_large)
