"""Measure what it costs to plan the run of a recipe, or a run with many modules, without the imports of torch and timm.

python benchmarks/plan_scale.py imagenet-vit-b 4 1000
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RECIPE = """
[model]
name = "vit_tiny_patch16_224"
num_classes = 10
[plan]
target_depths = {target}
meta_depths = {meta}
"""


def measure(what: str) -> None:
    """Plan one run in this process, and print its row of the table.

    Args:
        what: Name of a recipe, or number of modules of two blocks.
    """
    import timm  # noqa: F401  the costs of these imports are not counted
    import torch  # noqa: F401

    def peak_mib() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    seconds, mib = time.process_time(), peak_mib()
    from bigincubate.config import load_recipe
    from bigincubate.planning.cost import cost_plan
    from bigincubate.planning.identity import phase_identity
    from bigincubate.planning.phases import make_plan

    name, label = what, what
    with tempfile.TemporaryDirectory() as folder:
        if what.isdecimal():
            modules, label = int(what), f"{int(what):,} modules of two blocks"
            name = f"{folder}/recipe.toml"
            Path(name).write_text(RECIPE.format(target=[2] * modules, meta=[1] * modules))
        recipe = load_recipe(name)
    plan = make_plan(recipe)
    for row in cost_plan(recipe, plan, samples=1_281_167):
        phase_identity(recipe, plan, plan.row(row.phase, row.module), row)
    print(f"| {label} | {time.process_time() - seconds:.1f} | {peak_mib() - mib:.0f} |")


def main() -> None:
    """Print a table with one row per run, each measured in a new process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", default=["imagenet-vit-b", "4", "1000"], metavar="RECIPE|MODULES")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        measure(args.one)
        return
    print("| run | CPU seconds | MiB |\n| --- | ---: | ---: |", flush=True)
    for run in args.runs:
        subprocess.run([sys.executable, __file__, "--one", run], check=True)


if __name__ == "__main__":
    main()
