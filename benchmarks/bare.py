"""What lets the benchmarks run where only torch and transformers are installed: import this module first.

Packages that read datasets or write logs stand in as nothing; no benchmark with `--synthetic` calls them.
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
