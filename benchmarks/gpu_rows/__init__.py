"""The rows of `benchmarks/gpu.py`, each measured by one function, with the most important first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Line = dict[str, Any]
"""A line of a table: values by column."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of models and measurements: for one large GPU, or toy sizes to test the benchmark itself."""

    toy: bool = False
    steps: int = 10  # per repeat
    repeats: int = 5
    precision: str = "bf16"

    def model(self, letter: str) -> dict[str, Any]:
        """Return the settings of `phase_step` for ViT-B, L or H with four modules."""
        if self.toy:
            tiny = {"model": "vit_tiny_patch16_224", "img_size": 32, "classes": 10, "batch": 4, "depth": 1}
            return {**tiny, "modules": 2, "precision": self.precision}
        name, depth, batch = {
            "B": ("vit_base_patch16_224", 3, 128),
            "L": ("vit_large_patch16_224", 6, 64),
            "H": ("vit_huge_patch14_224", 8, 32),
        }[letter]
        return {"model": name, "depth": depth, "batch": batch, "precision": self.precision}


@dataclass(frozen=True)
class Request:
    """The options for measuring a row.

    Attributes:
        sizes: Sizes of models and measurements.
        out: The folder for results.
        reference: A checkout of the official implementation, or None.
    """

    sizes: Sizes
    out: Path
    reference: Path | None = None


@dataclass(frozen=True)
class BenchmarkRow:
    """A row: a function in a module of this package, and its arguments.

    If ``reference`` is true, the row is measured only with a checkout of the official implementation; if it is false,
    only without one.
    """

    name: str
    table: str
    module: str
    function: str
    arguments: dict[str, Any] = field(default_factory=dict)
    reference: bool | None = None

    def fits(self, reference: Path | None) -> bool:
        """Whether the row is measured where there is, or is not, a checkout of the official implementation."""
        return self.reference in (None, bool(reference))

    def measure(self, request: Request) -> list[Line]:
        import importlib

        function: Callable[..., list[Line]] = getattr(importlib.import_module(f"gpu_rows.{self.module}"), self.function)
        return function(request, **self.arguments)


STEPS, KERNELS = "Training steps", "Kernels"
CHECKPOINTS, DATA, MODULES = "Checkpoints", "Waiting for data", "Modules side by side"


def _step(name: str, **arguments: Any) -> BenchmarkRow:
    return BenchmarkRow(name, STEPS, "steps", "measure_steps", arguments)


def _incubation(module: int, reference: bool) -> BenchmarkRow:
    arguments = {"what": f"ViT-B, module {module}", "phase": "incubate", "module": module}
    names = ["plain", "skipping", "compiled"] + (["reference"] if reference else [])
    return BenchmarkRow(
        f"incubation-b-{module}{'-reference' if reference else ''}",
        STEPS,
        "steps",
        "measure_steps",
        {**arguments, "names": names},
        reference=reference,
    )


END_TO_END = {"phase": "end_to_end", "module": None}
ROWS = [
    _incubation(0, True),
    _incubation(0, False),
    _incubation(3, True),
    _incubation(3, False),
    _step(
        "end-to-end-b-timm",
        what="ViT-B, end to end",
        names=["plain", "any-order", "skipping", "timm"],
        drop_path=0.1,
        clip=1.0,
        **END_TO_END,
    ),
    _step(
        "end-to-end-b-timm-compiled",
        what="ViT-B, end to end",
        names=["compiled", "timm-compiled"],
        drop_path=0.1,
        clip=1.0,
        **END_TO_END,
    ),
    _step(
        "incubation-b-0-any-order",
        what="ViT-B, module 0",
        names=["any-order", "plain"],
        phase="incubate",
        module=0,
    ),
    *(
        _step(
            f"drop-path-{rate}",
            what=f"ViT-B, end to end, drop-path {rate}",
            names=["skipping", "compiled", "plain"],
            drop_path=rate,
            **END_TO_END,
        )
        for rate in (0.5, 0.1, 0.3)
    ),
    BenchmarkRow("kernel-add-branch", KERNELS, "kernels", "measure_add_branch"),
    BenchmarkRow("kernel-fused-loss", KERNELS, "kernels", "measure_fused_loss"),
    BenchmarkRow("kernel-augment", KERNELS, "kernels", "measure_augment"),
    BenchmarkRow("side-by-side-t32", MODULES, "side_by_side", "measure_modules", {"what": "DeiT-T32"}),
    BenchmarkRow("side-by-side-b", MODULES, "side_by_side", "measure_modules", {"what": "ViT-B"}),
    *(
        row
        for letter in "LH"
        for row in (
            _step(
                f"incubation-{letter.lower()}-0",
                what=f"ViT-{letter}, module 0",
                letter=letter,
                names=["compiled", "plain"],
                phase="incubate",
                module=0,
            ),
            _step(
                f"end-to-end-{letter.lower()}",
                what=f"ViT-{letter}, end to end",
                letter=letter,
                names=["compiled", "plain"],
                **END_TO_END,
            ),
            _step(
                f"incubation-{letter.lower()}-3",
                what=f"ViT-{letter}, module 3",
                letter=letter,
                names=["compiled", "plain"],
                phase="incubate",
                module=3,
            ),
        )
    ),
    BenchmarkRow("checkpoint", CHECKPOINTS, "checkpoints", "measure_saves"),
    BenchmarkRow("data-wait", DATA, "data_wait", "measure_workers"),
]
