"""Memory that runs out, anywhere and in whatever words: one line that says what to do."""

import errno

import pytest
import torch
from torch import distributed

import data as data_command
import eval as eval_command
import train as train_command
from compute import memory
from config import UserError, is_out_of_memory
from running import distributed as processes
from tests.conftest import to_flags

TEXTS = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 14.58 GiB of which 1 GiB is free.",
    "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call.",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "NCCL error in: NCCLUtils.cpp:94, unhandled cuda error, NCCL version 2.27.5\nncclUnhandledCudaError: Call to CUDA "
    "function failed.\nLast error:\nCuda failure 2 'out of memory'",
    "Triton Error [CUDA]: out of memory",
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9",
    "DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes.",
    "unable to mmap 538090408 bytes from file <model.safetensors>: Cannot allocate memory (12)",
    "std::bad_alloc",
    "can't start new thread",
)
ERRORS = [
    *map(RuntimeError, TEXTS),
    torch.OutOfMemoryError("CUDA out of memory."),
    MemoryError(),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
]


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_memory_that_ran_out_is_recognized(error, monkeypatch):
    assert is_out_of_memory(error)
    assert memory.is_out_of_memory is is_out_of_memory
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    assert processes.lost_process(error) is None  # NCCL's words are not another process's end


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "out of memory.jsonl"),
    ],
    ids=repr,
)
def test_another_error_is_not_taken_for_it(error):
    assert not is_out_of_memory(error)


@pytest.fixture
def run(tiny_model_dir, chats, tmp_path):
    """The flags of a short run, and its directory."""
    settings = {"model": tiny_model_dir, "dataset": chats, "eval-fraction": 0.2, "test-fraction": 0.05, "batch-size": 9}
    settings |= {"eval-every": 2, "save-every": 2, "max-steps": 2, "dtype": "fp32", "output-dir": tmp_path / "run"}
    return to_flags(settings), tmp_path / "run"


def refuse(monkeypatch, place, error):
    """Have a function of the program run out of memory."""

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(place, fail)


def check(command, argv):
    with pytest.raises(UserError, match=r"out of memory.*(use|free) ") as raised:
        command(argv)
    assert "\n" not in str(raised.value)


IN_TRAINING = (
    "running.setup.choose_precision",
    "running.setup.load_data",
    "running.setup.load_on_ranks",
    "transformers.AutoModelForCausalLM.from_pretrained",
    "torch.nn.Module.to",
    "running.setup.choose_layout",
    "compute.self_check.random_examples",
    "train.make_optimizer",
    "running.report.plan_of_data",
    "running.report.plan_of_model",
    "train.train_step",
    "eval.loss_and_correct",
    "running.validation.answer_prompts",
    "running.checkpoint.gather_state",
    "running.checkpoint.write_checkpoint",
    "running.validation.generate_greedy_and_sampled",
    "running.report.page",
)


@pytest.mark.parametrize(("number", "place"), enumerate(IN_TRAINING), ids=IN_TRAINING)
def test_a_run_that_runs_out_of_memory_says_so_in_a_line(monkeypatch, run, number, place):
    refuse(monkeypatch, place, ERRORS[number % len(ERRORS)])
    check(train_command.main, run[0])


@pytest.mark.parametrize("place", ["running.setup.load_on_ranks", "running.checkpoint.torch.load"])
def test_a_resumed_run_too(monkeypatch, run, place):
    assert train_command.main([*run[0], "--save-every", "1", "--max-steps", "1"]) == 0
    refuse(monkeypatch, place, RuntimeError(TEXTS[1]))
    check(train_command.main, ["--resume", str(run[1]), "--max-steps", "2", "--allow-changes"])


@pytest.mark.parametrize("place", ["eval.load_model", "eval.choose_layout", "eval.evaluate", "eval.generate_answers"])
@pytest.mark.parametrize("error", [ERRORS[2], ERRORS[4]], ids=["cuBLAS", "NCCL"])
def test_an_evaluation_too(monkeypatch, tiny_model_dir, chats, place, error):
    refuse(monkeypatch, place, error)
    check(eval_command.main, [str(tiny_model_dir), "--dataset", str(chats), "--dtype", "fp32", "--greedy"])


@pytest.mark.parametrize("place", ["eval.load_model", "eval.run_chat"])
def test_a_chat_too(monkeypatch, tiny_model_dir, place):
    refuse(monkeypatch, place, ERRORS[1])
    check(eval_command.main, [str(tiny_model_dir), "--chat"])


def test_reading_a_dataset_too(monkeypatch, tiny_model_dir, chats):
    refuse(monkeypatch, "data.load_corpus", MemoryError())
    check(data_command.main, ["--model", str(tiny_model_dir), "--dataset", str(chats)])
