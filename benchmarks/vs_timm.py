"""Compare the step of end-to-end training and fine-tuning with a plain timm step: same model, batch and precision.

    python benchmarks/vs_timm.py [--precisions fp32 bf16] [--drop-path 0.1] [--batch 8] [--repeats 5] [--out FILE]

timm's step is that of its training script with `--opt adamw --clip-grad 1 --mixup .8 --cutmix 1`: its model, mixup,
soft-target loss, `dispatch_clip_grad` and optimizer, under autocast for bf16. *timm-compiled* also compiles the whole
model, as `--torchcompile` does. Our variants are *plain*, *skipping* (with `train.subset_drop_path` and
`train.last_block_cls_only`), and *compiled* (also with `train.compile`). They run in separate processes that alternate.
Prints a Markdown table; writes FILE as JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from paired_timing import HEADER, Contestant, serve, table_row, time_in_turns

ROOT = Path(__file__).resolve().parent.parent


def plain_timm(settings: dict[str, Any], *, compiled: bool) -> Contestant:
    import timm
    import torch
    from phase_step import batch
    from timm.data import Mixup
    from timm.loss import SoftTargetCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.utils import dispatch_clip_grad

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    torch.manual_seed(0)
    model = timm.create_model(
        settings["model"],
        img_size=settings["img_size"],
        num_classes=settings["classes"],
        drop_path_rate=settings["drop_path"],
        depth=settings["depth"] * settings["modules"],
    )
    model = model.to(device).train()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=5e-4, weight_decay=0.05)
    called = torch.compile(model) if compiled else model
    mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=settings["classes"])
    soft = SoftTargetCrossEntropy()
    images, labels = batch(settings, device)

    def forward() -> Any:
        samples, targets = mixup(images.clone(), labels)  # mixup modifies it in place
        with torch.autocast(device.type, torch.bfloat16, enabled=settings["precision"] == "bf16"):
            return soft(called(samples), targets)

    def step() -> None:
        optimizer.zero_grad()
        forward().backward()
        if settings["clip"]:
            dispatch_clip_grad(model.parameters(), settings["clip"])
        optimizer.step()

    # hooks on saved tensors would compile the model again, which takes minutes
    return Contestant(step, None if compiled else forward, list(model.parameters()))


def contestant(name: str, settings: dict[str, Any]) -> Contestant:
    sys.path.insert(0, str(ROOT))
    if name.startswith("timm"):
        return plain_timm(settings, compiled=name == "timm-compiled")
    from phase_step import ours

    return ours(settings, "end_to_end", None, skip=name != "plain", compiled=name == "compiled")


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        serve(contestant(sys.argv[2], json.loads(sys.argv[3])))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--ours", nargs="+", default=["plain", "skipping"], choices=["plain", "skipping", "compiled"])
    parser.add_argument("--theirs", default="timm", choices=["timm", "timm-compiled"])
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--depth", type=int, default=3, help="blocks per module, of four modules")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--drop-path", type=float, nargs="+", default=[0.1])
    parser.add_argument("--threads", type=int, default=0, help="0: torch's default")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="timed steps per repeat")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()

    sys.path.insert(0, str(ROOT))
    from phase_step import DEFAULTS

    rows = []
    print(HEADER)
    for precision in args.precisions:
        for rate in args.drop_path:
            settings = {
                **DEFAULTS,
                "model": args.model,
                "depth": args.depth,
                "batch": args.batch,
                "precision": precision,
                "drop_path": rate,
                "clip": 1.0,
                "threads": args.threads,
            }
            names = [*args.ours, args.theirs]
            found = time_in_turns(__file__, names, settings, repeats=args.repeats, steps=args.steps)
            rows.append({"settings": settings, "found": found})
            print("\n".join(table_row(f"drop-path {rate}, {precision}", found, args.theirs)), flush=True)
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
