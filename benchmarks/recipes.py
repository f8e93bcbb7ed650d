"""Print the planned cost of every included recipe that says how large its data is: the table of docs/results.md.

    python benchmarks/recipes.py [--tflops 200] [NAME ...]

Parameters and forward GMACs (10^9 multiply-adds for one sample) are those of the fine-tuned model; training FLOPs count
a multiply-add as two. GPU-hours are FLOPs divided by the assumed throughput of one GPU (--tflops). Memory is the peak
of a DDP rank over all phases, without activations, plus the activations of one sample.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as a script, from anywhere

from bigincubate.config import list_shipped_recipes, load_recipe
from bigincubate.planning.cost import cost_plan, plan_json
from bigincubate.planning.phases import make_plan


def format_number(value: float) -> str:
    """Return a number with one decimal place, or with two significant digits if it is small."""
    return f"{value:,.1f}" if value >= 0.95 else f"{value:.2g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", metavar="NAME", nargs="*", default=[])
    parser.add_argument("--tflops", type=float, default=200.0, help="assumed throughput of one GPU")
    args = parser.parse_args()
    print(
        "| recipe | parameters M | forward GMACs | incubation PFLOPs | share of fine-tuning | end to end PFLOPs "
        "| GPU-hours, both | MiB per rank + per sample |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name in args.names or list_shipped_recipes():
        recipe = load_recipe(name)
        plan = make_plan(recipe)
        if recipe.data.train_samples is None:
            print(f"{name} is left out: it has no data.train_samples", file=sys.stderr)
            continue
        rows = cost_plan(recipe, plan, recipe.data.train_samples)
        found = plan_json(recipe, plan, rows)
        fine = next(row for row in rows if row.phase == "finetune").cost
        own, other = found["incubation_flops"], found["end_to_end_flops"]
        hours = [format_number(flops / args.tflops / 1e12 / 3600) for flops in (own, other)]
        memory = max(4 * row.cost.parameters + row.cost.optimizer_bytes for row in rows)
        sample = max(row.cost.activation_bytes for row in rows)
        print(
            f"| `{name}` | {format_number(fine.parameters / 1e6)} | {format_number(fine.forward_flops / 2e9)} "
            f"| {format_number(own / 1e15)} | {found['finetune_share']:.0%} | {format_number(other / 1e15)} "
            f"| {hours[0]}, {hours[1]} "
            f"| {memory / 2**20:,.0f} + {sample / 2**20:,.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
