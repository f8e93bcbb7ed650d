"""List the runs whose losses, weights and scores are recorded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

RECIPES = Path(__file__).with_name("recipes")


@dataclass(frozen=True)
class Case:
    """Describe one recorded run: every phase of a recipe.

    Attributes:
        recipe: Name of a shipped recipe, or of a file, relative to ``recipes/`` and without its suffix.
        sets: Arguments of ``--set``.
        phases: Arguments of ``--phase``; ``incubate`` stands for all modules.
        precision: Selects the tolerance; passed on as ``train.precision``.
    """

    name: str
    recipe: str
    sets: tuple[str, ...] = ()
    phases: tuple[str, ...] = ("pretrain", "incubate", "finetune", "end_to_end")
    modules: int = 2
    ranks: int = 1
    precision: str = "fp32"

    def commands(self, run_dir: Path) -> list[list[str]]:
        """Return the arguments of ``bigincubate`` for every phase, in the order of their dependence."""
        file = RECIPES / f"{self.recipe}.toml"
        sets = [f"train.precision={self.precision}", *self.sets]
        shared = [word for value in sets for word in ("--set", value)]
        commands = []
        for phase in self.phases:
            modules = range(self.modules) if phase == "incubate" else [None]
            for module in modules:
                chosen = [] if module is None else ["--module", str(module)]
                recipe = str(file) if file.exists() else self.recipe
                commands.append(["train", recipe, "--run-dir", str(run_dir), "--phase", phase, *chosen, *shared])
        return commands


DIGITS = ("train.max_steps=10", "schedule.warmup_epochs=0.1", "log.every_steps=1", "checkpoint.every_steps=1000")
UNTIL_FINETUNE = ("pretrain", "incubate", "finetune")
MICRO = "train.micro_batch=8"

CASES = [
    Case("digits", "../../../benchmarks/digits-deep", DIGITS, modules=4),
    Case("swin", "swin"),
    Case("convnext", "convnext"),
    Case("init-fresh", "vit", ("incubate.init=fresh",), UNTIL_FINETUNE),
    Case("init-boundary", "vit", ("incubate.init=boundary",)),
    Case("init-grow", "vit", ("incubate.init=grow",), UNTIL_FINETUNE),
    Case("bf16", "vit", precision="bf16"),
    Case("micro-batches", "vit", (MICRO,)),
    *(
        Case(f"ranks-{strategy}", "vit", (f"sharding.strategy={strategy}", MICRO), ranks=2)
        for strategy in ("ddp", "fsdp2", "zero2", "oss")
    ),
]
