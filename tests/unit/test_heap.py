"""What a step has freed is there for the next one: counted in pages that the kernel had to map."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# steps that make and free tensors of several sizes, as a training step does, and more bytes than glibc keeps by itself;
# prints page faults a step once warm
STEPS = """
import resource
import torch
from bigincubate.distributed.process_group import DistributedContext

DistributedContext.detect()

def step():
    held = [torch.ones(size, 2**18) for size in (1, 7, 15, 30, 30, 30, 30)]  # MiB
    return sum(float(tensor[0, 0]) for tensor in held)

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

for _ in range(20):
    step()
before = faults()
for _ in range(10):
    step()
print((faults() - before) // 10)
"""
PAGES = 143 * 2**20 // os.sysconf("SC_PAGESIZE")


def faults_a_step(**environment: str) -> int:
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    command = [sys.executable, "-c", STEPS]
    out = subprocess.run(command, env=plain | environment, check=True, stdout=subprocess.PIPE, text=True, timeout=120)
    return int(out.stdout)


def test_step_maps_no_page_anew() -> None:
    assert faults_a_step() < PAGES / 10


@pytest.mark.parametrize(
    "chosen", [{"MALLOC_TRIM_THRESHOLD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"}]
)
def test_allocator_that_the_user_has_set_up_is_left_alone(chosen: dict[str, str]) -> None:
    assert faults_a_step(**chosen) > PAGES / 2
