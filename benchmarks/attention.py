"""Compare torch's fused attention with two matrix products and a softmax, forward and backward.

    python benchmarks/attention.py [--batch 8] [--heads 12] [--tokens 197] [--width 64] [--repeats 5]

The two alternate. Prints the median milliseconds of each for fp32 and bf16 on this machine's device.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import Tensor
from torch.nn import functional as F


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1) @ v


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"batch": 8, "heads": 12, "tokens": 197, "width": 64, "repeats": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print("| precision | fused ms | plain ms | times as fast |\n| --- | ---: | ---: | ---: |")
    for dtype in (torch.float32, torch.bfloat16):
        shape = (args.batch, args.tokens, 3, args.heads, args.width)
        qkv = torch.randn(shape, dtype=dtype, device=device, requires_grad=True)
        times: dict[str, list[float]] = {"fused": [], "plain": []}
        for _ in range(args.repeats + 1):
            for act in (fused, plain):
                start = time.perf_counter()
                for _ in range(3):
                    act(*qkv.permute(2, 0, 3, 1, 4).unbind(0)).transpose(1, 2).flatten(2).sum().backward()
                if device == "cuda":
                    torch.cuda.synchronize()
                times[act.__name__].append((time.perf_counter() - start) / 3 * 1e3)
        both = {name: statistics.median(found[1:]) for name, found in times.items()}  # the first is a warm-up
        name = str(dtype).removeprefix("torch.")
        print(f"| {name} | {both['fused']:.1f} | {both['plain']:.1f} | {both['fused'] / both['plain']:.2f} |")


if __name__ == "__main__":
    main()
