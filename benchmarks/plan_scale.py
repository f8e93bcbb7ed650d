"""Measure what planning a run with many modules costs, above the imports of torch and timm.

python benchmarks/plan_scale.py --modules 4 1000
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


def measure(modules: int) -> None:
    """Plan one run in this process, and print its row of the table."""
    import timm  # noqa: F401  the costs of these imports are not counted
    import torch  # noqa: F401

    def peak_mib() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    seconds, mib = time.process_time(), peak_mib()
    from bigincubate.config import load_recipe
    from bigincubate.planning.cost import cost_plan
    from bigincubate.planning.identity import phase_identity
    from bigincubate.planning.phases import make_plan

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "recipe.toml")
        file.write_text(RECIPE.format(target=[2] * modules, meta=[1] * modules))
        recipe = load_recipe(file)
    plan = make_plan(recipe)
    for row in cost_plan(recipe, plan, samples=1_281_167):
        phase_identity(recipe, plan, plan.row(row.phase, row.module), row.steps)
    print(f"| {modules:,} | {time.process_time() - seconds:.1f} | {peak_mib() - mib:.0f} |")


def main() -> None:
    """Print a table with one row per number of modules, each measured in a new process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modules", type=int, nargs="+", default=[4, 1000])
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        measure(args.one)
        return
    print("| modules of two blocks | CPU seconds | MiB |\n| ---: | ---: | ---: |", flush=True)
    for modules in args.modules:
        subprocess.run([sys.executable, __file__, "--one", str(modules)], check=True)


if __name__ == "__main__":
    main()
