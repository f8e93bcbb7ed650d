"""Incubate a ViT on a folder of images, one subfolder per class, and use the result in plain timm.

python examples/own_images.py IMAGES WORK [KEY=VALUE ...]
"""

import sys
from pathlib import Path

import timm
import torch
from torch import nn

import bigincubate as bi

RECIPE = Path(__file__).with_suffix(".toml")


def main(images: Path, work: Path, *sets: str) -> nn.Module:
    """Prepare the images, run all phases, and return the exported model as timm loads it."""
    data = bi.prepare_dataset(str(images), work / "data")  # as does: bigincubate data prepare IMAGES --out WORK/data
    classes = data.schema.metadata["classes"]

    settings = [f"data.path={data.path}", f"model.num_classes={len(classes)}", *sets]
    recipe = bi.load_recipe(RECIPE, settings)
    result = bi.run(recipe, work / "run")  # after an interruption, call it again: it resumes
    print(result.results["finetune"]["metrics"])

    model = timm.create_model(f"local-dir:{result.export}", pretrained=True).eval()  # needs no bigincubate
    height, width = model.pretrained_cfg["input_size"][1:]
    with torch.no_grad():
        print(classes[model(torch.zeros(1, 3, height, width)).argmax()])
    return model


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
