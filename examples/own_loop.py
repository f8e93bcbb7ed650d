"""Deep Incubation in a plain PyTorch loop: a ViT of 12 blocks on handwritten digits, in a minute on a CPU.

python examples/own_loop.py
"""

from collections.abc import Iterator

import timm
import torch
from sklearn.datasets import load_digits
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import bigincubate as bi

Batches = Iterator[tuple[Tensor, Tensor]]


def vit(depth: int) -> nn.Module:
    """Build a narrow ViT for images of 8 x 8 gray pixels."""
    size = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 48, "num_heads": 3, "weight_init": "jax"}
    return timm.create_model("vit_tiny_patch16_224", depth=depth, num_classes=10, **size)


def shuffled(images: Tensor, labels: Tensor, size: int = 64) -> Batches:
    """Yield batches forever, in a new order each time."""
    while True:
        for rows in torch.randperm(len(images)).split(size):
            yield images[rows], labels[rows]


def train(model: nn.Module, batches: Batches, steps: int, lr: float = 2e-3) -> list[float]:
    """Train the parameters that require a gradient, and return the loss of each step."""
    optimizer = create_optimizer_v2(model, "adamw", lr=lr, weight_decay=0.05, fused=True)
    schedule = CosineLRScheduler(optimizer, t_initial=steps, lr_min=1e-6, t_in_epochs=False)
    losses = []
    for step in range(steps):
        schedule.step_update(step)
        images, labels = next(batches)
        loss = cross_entropy(model(images), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main(steps: int = 200) -> float:
    """Pre-train the meta model, train each module, assemble, fine-tune; return the held-out accuracy in percent."""
    torch.manual_seed(0)
    pixels, classes = load_digits(return_X_y=True)
    images, labels = torch.from_numpy(pixels).float().view(-1, 1, 8, 8), torch.from_numpy(classes)
    images = (images - images.mean()) / images.std()
    batches = shuffled(images[360:], labels[360:])

    meta, target = vit(depth=4), vit(depth=12)
    train(meta, batches, 2 * steps)
    bi.grow(target, meta)  # optional: the target starts as the meta model, with blocks that do nothing yet
    modules = []
    for module in range(4):  # these do not depend on each other: they may be four jobs
        hybrid = bi.build_hybrid(target, meta, module)
        losses = train(hybrid, batches, steps)
        print(f"module {module}: loss {losses[0]:.3f} -> {losses[-1]:.3f}")
        modules.append(bi.extract_module(hybrid))
    target.load_state_dict(bi.assemble(modules, target))
    train(target, batches, steps, lr=1e-3)
    accuracy = 100 * (target.eval()(images[:360]).argmax(1) == labels[:360]).float().mean().item()
    print(f"top-1 {accuracy:.2f}% on the held-out fifth")
    return accuracy


if __name__ == "__main__":
    main()
