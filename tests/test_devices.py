"""Whatever GPU a machine has, or shows to one of several processes: another default, or one line."""

from types import SimpleNamespace

import pytest
import torch
from torch import distributed

import running.distributed
from compute.distributed import rank
from compute.gradients import GradientAllReduce, load_balance
from config import UserError, explain_machine_errors
from model import choose_device, choose_precision
from tests.conftest import tiny_llama

# --- precision


@pytest.mark.parametrize("native", [True, False], ids=["Ampere", "Turing"])
@pytest.mark.parametrize("dtype", ["auto", "bf16", "fp16", "fp32"])
def test_a_precision_that_a_gpu_does_not_have_is_one_line(monkeypatch, dtype, native):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    if dtype == "bf16" and not native:
        with pytest.raises(UserError, match=r"^--dtype bf16: Tesla T4 has no bf16; use auto or fp16$"):
            choose_precision("cuda", dtype)
        return
    assert choose_precision("cuda", dtype).name == {"auto": "bf16" if native else "fp16"}.get(dtype, dtype)


# --- a GPU for each process


def devices(visible, local_size=2, names=("cuda", "cuda")):
    """The device of this rank, which sees GPUs with the ids `visible[rank]`; or the error."""
    ids = visible[rank()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_WORLD_SIZE", str(local_size))
        patch.setattr(torch.cuda, "device_count", lambda: len(ids))
        patch.setattr(torch.cuda, "set_device", lambda _: None)
        properties = [SimpleNamespace(uuid=each) if each else SimpleNamespace() for each in ids]
        patch.setattr(torch.cuda, "get_device_properties", lambda device: properties[device.index])
        try:
            return str(choose_device(names[rank()]))
        except UserError as error:
            return str(error)


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (("ab", "ab"), ["cuda:0", "cuda:1"]),
        (("a", "b"), ["cuda:0", "cuda:0"]),  # a task of Slurm's sees its own GPU alone
        (("abc", "abc"), ["cuda:0", "cuda:1"]),
        (([None], [None]), ["cuda:0", "cuda:0"]),  # an older torch does not know which one that is
    ],
    ids=str,
)
def test_each_process_takes_a_gpu_of_its_own(worker_pools, visible, expected):
    assert worker_pools(2).call(devices, visible) == expected


def test_two_processes_that_see_one_gpu_are_refused(worker_pools):
    refusals = worker_pools(2).call(devices, ("a", "a"))
    assert refusals == ["--device cuda: processes 0 and 1 take the same GPU; start fewer"] * 2


def test_fewer_gpus_than_processes_are_refused(worker_pools):
    assert (
        worker_pools(2).call(devices, ("abc", "abc"), 4)
        == ["--device cuda: this machine has 3 CUDA devices for 4 processes; start fewer"] * 2
    )


def test_processes_on_different_kinds_of_devices_are_refused(worker_pools):
    refusals = worker_pools(2).call(devices, ("a", "b"), 2, ("cuda", "cpu"))
    assert refusals == ["--device: process 0 has cuda and process 1 has cpu; name one"] * 2


@pytest.mark.parametrize(("gpu", "nccl", "backend"), [(1, 1, "cpu:gloo,cuda:nccl"), (1, 0, "gloo"), (0, 1, "gloo")])
def test_a_torch_without_nccl_joins_by_gloo(monkeypatch, gpu, nccl, backend):
    joined = []
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpu))
    monkeypatch.setattr(distributed, "is_nccl_available", lambda: bool(nccl))
    monkeypatch.setattr(distributed, "rendezvous", lambda *_, **__: iter([(None, 0, 1)]))
    monkeypatch.setattr(distributed, "init_process_group", lambda backend, **_: joined.append(backend))
    running.distributed.join_process_group()
    assert joined == [backend]


@pytest.mark.parametrize("missing", ["LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_what_srun_does_not_set_is_named(monkeypatch, missing):
    variables = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    for name, value in {**variables, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(missing)
    with pytest.raises(UserError, match=rf"^cannot join .*{missing}.*; start them with torchrun, or set RANK, "):
        running.distributed.join_process_group()


# --- a GPU that torch cannot use


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors might be reported",
        "CUDA error: all CUDA-capable devices are busy or unavailable",
        "The NVIDIA driver on your system is too old (found version 11040).",
        "CUDA error: system not yet initialized",
        "CUDA error: CUDA driver version is insufficient for CUDA runtime version",
    ],
)
def test_a_gpu_that_torch_cannot_use_is_one_line(message):
    refusal = r"^--device: .*; use --device cpu, or a torch that supports this GPU$"
    with pytest.raises(UserError, match=refusal) as raised, explain_machine_errors("use less"):
        raise RuntimeError(message)
    assert "\n" not in str(raised.value)


def test_a_bug_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="device-side assert"), explain_machine_errors("use less"):
        raise RuntimeError("CUDA error: device-side assert triggered")


# --- a time that is not known is not logged


def balance(seconds):
    return load_balance([8, 4], seconds)


def synchronized(device_is_gpu):
    """The seconds that a rank waited for the gradients of a small model."""
    gradients = GradientAllReduce(tiny_llama(259), passes=0)
    if device_is_gpu:  # whose waiting only orders streams
        gradients.remaining = [SimpleNamespace(is_cuda=True)]
        gradients.drop_unreached = lambda: None
    gradients.unsent = []
    gradients.__exit__(None)
    return gradients.sync_seconds


def test_the_waiting_time_is_logged_only_where_it_is_known(worker_pools):
    assert all("waiting_seconds" in metrics for metrics in worker_pools(2).call(balance, 0.5))
    assert all(metrics.keys() == {"largest_share", "empty_share"} for metrics in worker_pools(2).call(balance, None))
    assert all(seconds >= 0 for seconds in worker_pools(2).call(synchronized, False))
    assert worker_pools(2).call(synchronized, True) == [None, None]
