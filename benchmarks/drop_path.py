"""Compare stochastic depth that skips dropped branches with stochastic depth that multiplies them by zero.

    python benchmarks/drop_path.py [--model vit_base_patch16_224] [--blocks 2] [--batch 16] [--repeats 5] [--out FILE]

Times the forward and backward passes of the blocks only, at several rates; every block has the same rate. The two
alternate and use the same masks, new ones for each step. The last column is the speedup that the FLOPs of the dropped
branches would give. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as a script, from anywhere

import torch

from bigincubate.config import ModelConfig
from bigincubate.models.drop_path import apply_masks, draw_masks, find_drop_paths, set_drop_path_rates
from bigincubate.models.library import find_family
from bigincubate.models.partition import Partition


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.1, 0.3, 0.5, 0.7])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # average pooling reads all tokens, so that the models differ only in drop-path
    settings = ModelConfig(name=args.model, args={"global_pool": "avg"}, num_classes=10)
    family, depths = find_family(settings), ((args.blocks,),)
    partition = Partition(family, depths)

    def made(precision: str, *, skip: bool) -> Any:  # a model of timm
        torch.manual_seed(0)
        model = family.build(settings, depths).to(device).train()
        family.choose_attention(model, device, precision)
        set_drop_path_rates(model, partition, "target", 0.5, depths, None)
        if skip:
            family.use_subset_drop_path(model, partition)
        if args.compile:
            for block in partition.blocks():
                model.get_submodule(block.path).compile()
        return model

    rows = []
    print("| precision | rate | all computed, s | skipped, s | times as fast | lowest to highest | by FLOPs alone |")
    print("| --- | ---: | ---: | ---: | ---: | --- | ---: |")
    for precision in args.precisions:
        both = {skip: made(precision, skip=skip) for skip in (False, True)}
        tokens = torch.randn(args.batch, 197, both[False].embed_dim, device=device)
        for rate in args.rates:
            times: dict[bool, list[float]] = {False: [], True: []}
            for step in range(args.repeats + 1):
                for skip, model in both.items():
                    for path in find_drop_paths(model):
                        path.rate, path.active = rate, True
                    apply_masks(model, draw_masks(0, step, len(find_drop_paths(model)), args.batch))
                    x = tokens.clone().requires_grad_()
                    start = time.perf_counter()
                    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                        out = model.blocks(x)
                    out.float().sum().backward()
                    if device.type == "cuda":
                        torch.cuda.synchronize()
                    times[skip].append(time.perf_counter() - start)
            speed = sorted(all_ / less for all_, less in zip(times[False][1:], times[True][1:], strict=True))
            row = {"precision": precision, "rate": rate, "speed": statistics.median(speed)}
            row |= {"all": statistics.median(times[False][1:]), "skipped": statistics.median(times[True][1:])}
            rows.append(row)
            print(
                f"| {precision} | {rate} | {row['all']:.2f} | {row['skipped']:.2f} | **{row['speed']:.2f}** "
                f"| {speed[0]:.2f} to {speed[-1]:.2f} | {1 / (1 - rate):.2f} |",
                flush=True,
            )
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
