"""Measure memory, step time and communication of every strategy on one phase of a ViT, and compare with the plan.

    python benchmarks/sharding.py [--nproc 2] [--phase incubate] [--depth 3] [--width 384] [--repeats 3] [--out FILE]

Each strategy trains the same phase on the same random images in new processes, `--repeats` times. The strategies
alternate, so that a machine that slows down affects all of them. Prints a Markdown table: peak bytes of tensors on the
rank that has the most (on a GPU, of the allocator), and the planned upper bound; the increase of peak resident memory
since before the model was built; the median step time, and its ratio to that of ddp in the same repeat; and the payload
per step, measured and planned. Writes FILE as JSON.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bigincubate.config import Phase

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # as a script, from anywhere

STRATEGIES = ["ddp", "oss", "zero1", "zero2", "zero3", "fsdp2"]
PACKAGES = {"oss": "fairscale", "zero1": "deepspeed", "zero2": "deepspeed", "zero3": "deepspeed"}
MIB = 2**20


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("--phase", choices=["pretrain", "incubate", "finetune"], default="finetune")
    parser.add_argument("--module", type=int, default=1, help="module to train, for --phase incubate")
    parser.add_argument("--modules", type=int, default=4)
    parser.add_argument("--depth", type=int, default=3, help="blocks per module; the meta model has one per module")
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--img-size", type=int, default=64)
    parser.add_argument("--patch", type=int, default=8)
    parser.add_argument("--batch", type=int, default=16, help="global batch size")
    parser.add_argument("--micro-batch", type=int, default=None)
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--steps", type=int, default=6, help="timed steps per repeat")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--strategies", nargs="+", default=STRATEGIES)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--worker", default=None, help=argparse.SUPPRESS)
    return parser.parse_args()


RECIPE = """
name = "benchmark"
[model]
name = "vit_tiny_patch16_224"
img_size = {img_size}
num_classes = 100
args = {{ patch_size = {patch}, embed_dim = {width}, num_heads = {heads} }}
[data]
train_samples = 50000
[plan]
target_depths = {target}
meta_depths = {meta}
[train]
batch_size = {batch}
precision = "{precision}"
[optim]
name = "{optimizer}"
[ema]
decay = 0.99
[sharding]
strategy = "{strategy}"
"""


def recipe(args: argparse.Namespace, strategy: str) -> Any:
    from bigincubate.config import load_recipe

    text = RECIPE.format(
        **vars(args) | {"strategy": strategy},
        heads=max(1, args.width // 64),
        target=[args.depth] * args.modules,
        meta=[1] * args.modules,
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "benchmark.toml"
        file.write_text(text)
        return load_recipe(str(file), [f"train.micro_batch={args.micro_batch}"] if args.micro_batch else [])


def place(args: argparse.Namespace) -> tuple[Phase, int | None]:
    return args.phase, args.module if args.phase == "incubate" else None


# ------------------------------------------------------------------------------------------------ a rank


def work(args: argparse.Namespace, strategy: str) -> dict[str, Any]:
    """Run one repeat on one rank."""
    import torch
    from memory_profile import CollectiveCounter, peak_bytes
    from torch.nn import functional as F

    from bigincubate.distributed.process_group import DistributedContext
    from bigincubate.models.partition import Partition
    from bigincubate.optim.ema import Ema
    from bigincubate.optim.optimizer import make_optimizer
    from bigincubate.planning.phases import make_plan, phase_model
    from bigincubate.sharding import make_sharding

    env = DistributedContext.detect()
    if env.world > 1 and strategy in PACKAGES:
        os.environ.setdefault("DS_ACCELERATOR", env.device.type)
        importlib.import_module(PACKAGES[strategy])  # before the first measurement, so that its code does not count
    loaded = recipe(args, strategy)
    plan = make_plan(loaded)
    row = plan.row(*place(args))
    settings = loaded.settings(row.phase)
    share = args.batch // env.world
    count = -(-share // (args.micro_batch or share))
    before = resident()

    torch.manual_seed(0)
    model = phase_model(row, settings, plan.family).to(env.device)
    sharding = make_sharding(settings, env, count)
    units = [block.path for block in Partition(plan.family, row.depths).blocks()]
    wrapped = sharding.prepare(model, units, lambda m: make_optimizer(m, settings))
    ema = Ema(sharding.local_shards(), settings.ema.decay)
    images = torch.randn(share, 3, args.img_size, args.img_size, device=env.device)
    labels = torch.randint(100, (share,), device=env.device)

    def step() -> None:
        for index in range(count):
            last = index == count - 1
            with sharding.gradient_sync(last):
                with torch.autocast(env.device.type, torch.bfloat16, enabled=args.precision == "bf16"):
                    output = wrapped(images[index::count])
                loss = F.cross_entropy(output.float(), labels[index::count]) / count
                sharding.backward(loss)
        sharding.step(settings.train.clip_grad)
        ema.update()

    if args.phase == "finetune":  # fine-tuning starts with an evaluation of the assembled model
        with torch.no_grad():
            model.eval()(images)
        model.train()
    step()
    step()
    with CollectiveCounter() as collectives:
        step()
    peak = peak_bytes(step, env.device)
    seconds = []
    for _ in range(args.steps):
        env.barrier()
        start = time.perf_counter()
        step()
        if env.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    found = {
        "peak": peak,
        "resident": resident() - before,
        "seconds": statistics.median(seconds),
        "collectives": dict(collectives.bytes),
        "device": torch.cuda.get_device_name() if env.device.type == "cuda" else "cpu",
    }
    every = env.gather(found)
    env.close()
    return max(every, key=lambda one: one["peak"]) | {"resident": max(one["resident"] for one in every)}


def resident() -> int:
    """Return the peak resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ------------------------------------------------------------------------------------------------ all of them


def launch(args: argparse.Namespace, strategy: str, nproc: int) -> dict[str, Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(nproc), "--nnodes", "1"]
        command += ["--master-addr", "127.0.0.1", "--local-addr", "127.0.0.1", "--master-port", str(port), __file__]
        command += [*sys.argv[1:], "--worker", strategy, "--out", str(out)]
        environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // nproc)), **os.environ}
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if ended.returncode:
            raise SystemExit(f"{strategy} on {nproc} ranks failed:\n{ended.stderr[-3000:]}")
        found: dict[str, Any] = json.loads(out.read_text())
    return found


def planned(args: argparse.Namespace) -> dict[tuple[str, int], Any]:
    """Return the planned footprints by strategy and number of ranks."""
    from bigincubate.planning.cost import cost_plan
    from bigincubate.planning.memory import estimate_footprints
    from bigincubate.planning.phases import make_plan

    loaded = recipe(args, "ddp")
    plan = make_plan(loaded)
    rows = [row for row in cost_plan(loaded, plan, 50_000) if (row.phase, row.module) == place(args)]
    every = estimate_footprints(loaded, plan, rows, sorted({1, args.nproc}))
    return {(each.strategy, each.world): each for each in every[rows[0].key]}


def compare(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield one row for a single process, and one for each strategy."""
    runs = [("one process", "ddp", 1), *((name, name, args.nproc) for name in args.strategies)]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name, _, _ in runs}
    for repeat in range(args.repeats):
        for name, strategy, nproc in runs:
            found[name].append(launch(args, strategy, nproc))
            print(f"repeat {repeat + 1} of {args.repeats}: {name}", file=sys.stderr, flush=True)
    plans = planned(args)
    for name, strategy, nproc in runs:
        pairs = zip(found[name], found.get("ddp", found[name]), strict=True)
        plan = plans[strategy, nproc]
        yield {
            "strategy": name,
            "peak": max(one["peak"] for one in found[name]),
            "planned": plan.total,
            "buckets": plan.buckets,
            "resident": max(one["resident"] for one in found[name]),
            "seconds": statistics.median(one["seconds"] for one in found[name]),
            "over_ddp": statistics.median(one["seconds"] / ddp["seconds"] for one, ddp in pairs),
            "sent": sum(found[name][0]["collectives"].values()),
            "planned_sent": plan.sent,
            "device": found[name][0]["device"],
        }


def main() -> None:
    args = options()
    if args.worker:
        found = work(args, args.worker)
        if int(os.environ["RANK"]) == 0:
            args.out.write_text(json.dumps(found))
        return
    columns = [
        "strategy",
        "peak MiB",
        "planned MiB",
        "of it fixed buckets",
        "resident MiB",
        "s per step",
        "relative to ddp",
    ]
    columns += ["sent MiB", "planned MiB"]
    print(f"| {' | '.join(columns)} |\n| --- |{' ---: |' * (len(columns) - 1)}")
    rows = list(compare(args))
    for row in rows:
        sizes = [f"{row[key] / MIB:,.0f}" for key in ("peak", "planned", "buckets", "resident")]
        times = [f"{row['seconds']:.2f}", f"{row['over_ddp']:.2f}"]
        sent = [f"{row[key] / MIB:,.1f}" for key in ("sent", "planned_sent")]
        print(f"| {' | '.join([row['strategy'], *sizes, *times, *sent])} |")
    if args.out:
        settings = {key: value for key, value in vars(args).items() if key not in ("out", "worker")}
        args.out.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
