"""Triton's kernels without a GPU: its interpreter runs them line by line, if it is told so before the first import."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None
    or not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"),
    reason="needs a GPU, or `pip install triton` and TRITON_INTERPRET=1",
)
