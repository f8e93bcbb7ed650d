"""Write causal language models in the format of transformers, and read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..models.language.families import find_transformers_family
from ..storage.artifacts import ModelSpec
from .load_code import Place


def write_transformers_files(model: nn.Module, spec: ModelSpec, folder: Path) -> dict[str, Any]:
    """Write ``model.safetensors`` as transformers does, and return the content of ``config.json``.

    The separator of the data, if known, becomes the token for both the beginning and the end of a text.
    """
    family = find_transformers_family(spec.model.name)
    config = family.configuration(spec.model, sum(stages[0] for stages in spec.depths))
    tensors = {family.exported_name(name): tensor.contiguous() for name, tensor in model.state_dict().items()}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    separator = spec.records.get("separator")
    return {
        **config.to_diff_dict(),
        "architectures": [family.exported_class],
        "dtype": str(next(iter(tensors.values())).dtype).removeprefix("torch."),
        "tie_word_embeddings": False,
        "use_cache": True,
        **({} if separator is None else {"bos_token_id": separator, "eos_token_id": separator}),
    }


def read_transformers_tensors(file: Path, spec: ModelSpec) -> dict[str, Tensor]:
    """Read ``model.safetensors``, and return the tensors with the names of this package."""
    family = find_transformers_family(spec.model.name)
    return {family.own_name(name): tensor for name, tensor in load_file(file).items()}


def transformers_code(spec: ModelSpec, place: Place) -> list[str]:
    """Return the Python code that loads an exported model, and its tokenizer if it has one."""
    code = [
        "from transformers import AutoModelForCausalLM",
        f"model = AutoModelForCausalLM.from_pretrained({place.name!r})",
    ]
    if place.tokenizer:
        code += [
            "from transformers import AutoTokenizer",
            f"tokenizer = AutoTokenizer.from_pretrained({place.name!r})",
        ]
    return code
