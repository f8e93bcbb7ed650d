"""Run Triton kernels on the CPU, in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch


def run_interpreted(code: str) -> str:
    """Run Python code in a process whose kernels are interpreted, and return what it prints."""
    pytest.importorskip("triton", reason="Triton is not made for this platform")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    if "wrap_triton only works on functions annotated" in ended.stderr:
        pytest.skip(f"torch {torch.__version__} launches no interpreted kernels; 2.13 does")
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.strip()
