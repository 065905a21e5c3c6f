"""Mocks of the packages that a bare GPU machine lacks; import this module before the benchmarks.

With torch, transformers and pytest alone, a benchmark with `--synthetic` runs: it reads no dataset and writes no log.
"""

import importlib
import sys
from unittest import mock

import torch._dynamo  # noqa: F401
import transformers.trainer  # noqa: F401  all of them look for packages when they are imported

PACKAGES = ("datasets", "pyarrow", "pyarrow.parquet", "filelock", "torch.utils.tensorboard")

for package in PACKAGES:
    try:
        importlib.import_module(package)
    except ImportError:
        sys.modules[package] = mock.MagicMock()
