"""Compare the incubation step with the official implementation: the same hybrid, batch and precision.

    git clone https://github.com/LeapLabTHU/Deep-Incubation reference
    python benchmarks/vs_reference.py --reference reference [--modules 0 3] [--precisions fp32 bf16] [--batch 8]
        [--repeats 5] [--out FILE]

Both train ViT-B/16 (three blocks in the module, one in each other module) with mixup, AdamW and the official
settings, in separate processes that alternate. The official step is the unchanged `engine.train_one_epoch` with the
timm of that repository; without a GPU, its `torch.cuda.synchronize` does nothing, and bf16 is an autocast around it.
Our variants are *plain*, *skipping* (with `train.subset_drop_path` and `train.last_block_cls_only`), and *compiled*
(also with `train.compile`). Prints a Markdown table; writes FILE as JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import types
from pathlib import Path
from typing import Any

from paired_timing import HEADER, Contestant, serve, table_row, time_in_turns

ROOT = Path(__file__).resolve().parent.parent


def reference(settings: dict[str, Any]) -> Contestant:
    """Return a contestant that runs the official training loop on the official hybrid, with one batch."""
    sys.path.insert(0, settings["reference"])
    import torch

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    if not on_gpu:
        torch.cuda.synchronize = lambda *_: None
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    shim = types.ModuleType("torch._six")  # removed in torch 2.0
    shim.inf = math.inf  # type: ignore[attr-defined]
    sys.modules["torch._six"] = shim
    import engine  # type: ignore[import-not-found]
    import timm
    from main import get_args_parser  # type: ignore[import-not-found]
    from timm.data import Mixup
    from timm.loss import SoftTargetCrossEntropy
    from timm.optim import create_optimizer

    assert Path(timm.__file__).is_relative_to(settings["reference"]), "the official repository must use its own timm"
    args = get_args_parser().parse_args(["--drop-path", str(settings["drop_path"])])
    torch.manual_seed(0)
    index, size = settings["module"], settings["img_size"]
    depths = [settings["depth"] if k == index else 1 for k in range(settings["modules"])]
    model = timm.create_model(
        settings["model"],
        pretrained=False,
        num_classes=settings["classes"],
        drop_rate=args.drop,
        drop_path_rate=args.drop_path,
        drop_block_rate=None,
        divided_depths=depths,
    ).to(device)
    for before in model.stages[:index]:  # as in main.py, only the meta modules before the target module
        for parameter in before.parameters():
            parameter.requires_grad = False
    args.lr = args.lr * settings["batch"] / 512
    optimizer = create_optimizer(args, model.stages[index])
    mixup = Mixup(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=settings["classes"],
    )
    soft = SoftTargetCrossEntropy()
    generator = torch.Generator().manual_seed(0)
    # on the device, like the batches of the other contestants, so that the step does not include copying
    images = torch.randn(settings["batch"], 3, size, size, generator=generator).to(device)
    labels = torch.randint(settings["classes"], (settings["batch"],), generator=generator).to(device)

    def criterion(_: Any, outputs: Any, targets: Any) -> Any:
        return soft(outputs, targets)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=settings["precision"] == "bf16"):
            engine.train_one_epoch(
                model,
                criterion,
                [(images.clone(), labels)],  # mixup modifies it in place
                optimizer,
                device,
                0,
                None,
                mixup_fn=mixup,
                num_training_steps_per_epoch=1,
                use_amp=False,
            )

    def forward() -> Any:
        samples, targets = mixup(images.clone(), labels, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=settings["precision"] == "bf16"):
            return criterion(samples, model(samples), targets)

    return Contestant(step, forward, list(model.parameters()))


def contestant(name: str, settings: dict[str, Any]) -> Contestant:
    if name == "reference":
        return reference(settings)
    sys.path.insert(0, str(ROOT))
    from phase_step import ours

    return ours(settings, "incubate", settings["module"], skip=name != "plain", compiled=name == "compiled")


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        serve(contestant(sys.argv[2], json.loads(sys.argv[3])))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, required=True, help="a checkout of the official code")
    parser.add_argument("--modules", type=int, nargs="+", default=[0, 3])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--ours", nargs="+", default=["plain", "skipping"], choices=["plain", "skipping", "compiled"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--drop-path", type=float, default=0.0)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's default")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="timed steps per repeat")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    if not (args.reference / "engine.py").is_file():
        parser.error(
            f"{args.reference} is not a checkout of github.com/LeapLabTHU/Deep-Incubation: it has no engine.py"
        )

    sys.path.insert(0, str(ROOT))
    from phase_step import DEFAULTS

    rows = []
    print(HEADER)
    for precision in args.precisions:
        for module in args.modules:
            settings = {
                **DEFAULTS,
                "batch": args.batch,
                "precision": precision,
                "drop_path": args.drop_path,
                "threads": args.threads,
                "module": module,
                "reference": str(args.reference.resolve()),
            }
            names = [*args.ours, "reference"]
            found = time_in_turns(__file__, names, settings, repeats=args.repeats, steps=args.steps)
            rows.append({"settings": settings, "found": found})
            print("\n".join(table_row(f"module {module}, {precision}", found, "reference")), flush=True)
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
