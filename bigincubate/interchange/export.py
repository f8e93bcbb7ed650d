"""Load the model of an artifact, and export it as a folder that the model's library loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..config import PHASES, Recipe
from ..errors import ArtifactError, ConfigError
from ..files import (
    MISSING_OR_WRONG_TYPE,
    drop_folders,
    name_in_errors,
    raise_os_errors,
    read_json,
    read_small_file,
    regular_file_size,
    unreadable_error,
)
from ..models.library import find_family
from ..models.partition import Partition
from ..storage.artifacts import ModelSpec, check_finite_weights, load_artifact, load_manifest
from ..storage.finished_models import CONFIG_FILE, find_artifact
from ..storage.run_directory import EXPORTED_FILES, RunDir, is_complete_export
from .load_code import Place
from .official_format import write_official
from .timm_format import timm_code, write_timm_files
from .tokenizer_files import TokenizerSource, find_tokenizer, write_tokenizer_files
from .transformers_format import read_transformers_tensors, transformers_code, write_transformers_files

SPEC = "bigincubate"  # key of the ModelSpec in an exported config.json
WEIGHTS_FILE, CARD_FILE = "model.safetensors", "README.md"
CARD_MARK = "<!-- `bigincubate export` replaces this file. Delete this line to keep your changes. -->"
CardWriter = Callable[[nn.Module, ModelSpec, list[str]], str]


class ExportFormat(NamedTuple):
    """The format of exported models of one library.

    Attributes:
        write: Writes ``model.safetensors`` to a new folder and returns the content of ``config.json``.
        read: Reads ``model.safetensors`` with the names of tensors that the model has here.
        code: Returns the lines of Python code that load the model.
    """

    write: Callable[[nn.Module, ModelSpec, Path], dict[str, Any]]
    read: Callable[[Path, ModelSpec], dict[str, Tensor]]
    code: Callable[[ModelSpec, Place], list[str]]


def _write_tensors(model: nn.Module, spec: ModelSpec, folder: Path) -> dict[str, Any]:
    folder.mkdir(parents=True)
    save_file(model.state_dict(), folder / WEIGHTS_FILE)
    return {}


def _read_tensors(file: Path, spec: ModelSpec) -> dict[str, Tensor]:
    return load_file(file)


def _tensors_code(spec: ModelSpec, place: Place) -> list[str]:
    weights = f"tensors = safetensors.torch.load_file({place.file(WEIGHTS_FILE)})"
    return ["import safetensors.torch", *place.imports, weights]


OTHER_FORMAT = ExportFormat(_write_tensors, _read_tensors, _tensors_code)
FORMATS = {
    "timm": ExportFormat(write_timm_files, _read_tensors, timm_code),
    "transformers": ExportFormat(write_transformers_files, read_transformers_tensors, transformers_code),
}


def load_model(path: Path) -> tuple[nn.Module, ModelSpec]:
    """Load the model of a run directory, a phase's directory, an artifact, or an exported folder.

    Raises:
        ArtifactError: There is no complete model.
    """
    if (path / CONFIG_FILE).exists():
        return _load_exported(path)
    recipe = RunDir(path).load_recipe() if (path / "recipe.toml").exists() else None
    path = find_artifact(path)
    tensors, manifest = load_artifact(path)
    if manifest.kind != "model":
        raise ArtifactError(f"{path} is module {manifest.module}, a part of a model; give a run or a full model")
    _check_trusted_code(manifest.model, path, recipe)
    return with_weights(manifest.model, tensors, path), manifest.model


def read_spec(path: Path) -> ModelSpec | None:
    """Return the description of a model, without its weights.

    Args:
        path: As for `load_model`; or a file, or a folder that another program wrote.

    Returns:
        The description; None for a file and for a folder of another program.

    Raises:
        ArtifactError: There is no complete model.
    """
    if (path / CONFIG_FILE).exists():
        return _parse_spec(path) if SPEC in (read_json(path / CONFIG_FILE) or {}) else None
    return load_manifest(find_artifact(path)).model if path.is_dir() else None


def with_weights(spec: ModelSpec, tensors: dict[str, Tensor], source: Path) -> nn.Module:
    """Build a model and load its weights.

    Args:
        spec: Description of the model.
        tensors: The weights.
        source: Path of the weights, for the error message.

    Raises:
        ArtifactError: Names or shapes of the tensors do not match the model.
        NonFiniteError: A weight is not finite.
    """
    check_finite_weights(tensors, str(source))
    family, depths = find_family(spec.model), partition_of(spec).depths
    # compare shapes first, so that a specification that does not fit its weights allocates nothing
    shapes = family.build(spec.model, depths, device="meta").state_dict()
    expected = {name: tensor.shape for name, tensor in shapes.items()}
    if different := sorted(expected.items() ^ {(name, tensor.shape) for name, tensor in tensors.items()}):
        raise ArtifactError(
            f"{source} does not hold the model of its description: tensor {different[0][0]!r} is missing, unexpected or"
            " of another shape"
        )
    model = family.build(spec.model, depths)
    model.load_state_dict(tensors)
    return model


def _parse_spec(path: Path) -> ModelSpec:
    """Return the description in an exported folder."""
    try:
        return ModelSpec.model_validate((read_json(path / CONFIG_FILE) or {})[SPEC])
    except (KeyError, ValidationError):
        raise ArtifactError(f"{path / CONFIG_FILE} was not written by `bigincubate export`") from None


def _load_exported(path: Path) -> tuple[nn.Module, ModelSpec]:
    spec = _parse_spec(path)
    file = path / WEIGHTS_FILE
    _check_trusted_code(spec, file, None)
    try:
        regular_file_size(file)
        with file.open("rb"):  # safetensors would report a file without read permission as missing
            return with_weights(spec, _format_of(spec).read(file, spec), file), spec
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno is not None and error.errno not in MISSING_OR_WRONG_TYPE:
            raise unreadable_error(error, file, ArtifactError) from None
        reason = str(error).splitlines()[0]
        raise ArtifactError(f"{file} does not hold the model of its config.json: {reason}") from None


def export(source: Path, out: Path, *, repository: str | None = None, card: CardWriter | None = None) -> str:
    """Export the model of ``source`` as a folder, which timm or transformers loads if the model is one of theirs.

    Args:
        source: A run directory, a phase's directory, an artifact, or an exported folder.
        out: The folder to write.
        repository: See `write_folder`.
        card: See `write_folder`.

    Returns:
        Python code that loads the model.

    Raises:
        ArtifactError: There is no complete model in ``source``, or the tokenizer of its data is missing.
        ConfigError: ``out`` contains other files.
    """
    model, spec = load_model(source)
    return write_folder(model, spec, out, find_tokenizer(source, spec), repository=repository, card=card)


def export_official(source: Path, out: Path) -> None:
    """Export the model of ``source`` as a checkpoint of the official implementation.

    Raises:
        ArtifactError: There is no complete model in ``source``.
        ConfigError: ``out`` exists, or the official implementation does not support the model.
    """
    model, spec = load_model(source)
    write_official(out, model.state_dict(), partition_of(spec))


def _has_only_exported_files(folder: Path) -> bool:
    return folder.is_dir() and {file.name for file in folder.iterdir()} <= set(EXPORTED_FILES)


def _check_replaceable(out: Path) -> None:
    """Check that an export may write to a folder.

    Raises:
        ConfigError: It contains other files, or a README.md of the user.
    """
    if out.exists() and not is_complete_export(out) and not _has_only_exported_files(out):
        raise ConfigError(f"{out} exists and is not an exported model; choose another --out")
    card = out / CARD_FILE
    try:
        is_ours = not card.exists() or CARD_MARK in read_small_file(card.resolve()).decode(errors="replace")
    except OSError:
        is_ours = False
    if not is_ours:
        raise ConfigError(f"{card} is not the file of an earlier export; move it, or choose another --out")


def write_folder(
    model: nn.Module,
    spec: ModelSpec,
    out: Path,
    tokenizer: TokenizerSource | None = None,
    *,
    repository: str | None = None,
    card: CardWriter | None = None,
) -> str:
    """Write a model as ``model.safetensors`` and ``config.json`` in the format of its library.

    Args:
        model: The model.
        spec: Its description.
        out: The folder.
        tokenizer: The tokenizer of its data, which is written too.
        repository: Name of the repository that the folder will be pushed to; the card then loads the model from there.
        card: Returns the model card, given the model, its description and the code that loads it.

    Returns:
        Python code that loads the model.

    Raises:
        ConfigError: ``out`` contains other files.
        OSError: A file cannot be written. An earlier export is unchanged, unless its files were being replaced.
    """
    out = out.resolve()
    _check_replaceable(out)
    temporary = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(temporary, ignore_errors=True)
    if spec.initial_weights is not None:
        spec = spec.model_copy(update={"initial_weights": drop_folders(spec.initial_weights)})
    try:
        with name_in_errors(temporary), raise_os_errors():
            config = _format_of(spec).write(model, spec, temporary)
            if tokenizer is not None:
                separator, window = spec.records["separator"], spec.model.context_length
                write_tokenizer_files(tokenizer, temporary, separator=separator, window=window)
            if card is not None:
                # the card does not name the folder, so that all exports of a model are equal
                place = Place(repository or ".", on_hub=repository is not None, tokenizer=tokenizer is not None)
                text = card(model, spec, _format_of(spec).code(spec, place))
                _write_card(temporary / CARD_FILE, text)
            (temporary / CONFIG_FILE).write_text(json.dumps({**config, SPEC: spec.model_dump()}, indent=2) + "\n")
        shutil.copymode(temporary / CONFIG_FILE, temporary / WEIGHTS_FILE)  # safetensors ignores the umask
        out.mkdir(exist_ok=True)
        for name in EXPORTED_FILES:
            if (temporary / name).exists():
                (temporary / name).replace(out / name)
            else:
                (out / name).unlink(missing_ok=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return "; ".join(_format_of(spec).code(spec, Place(str(out), tokenizer=tokenizer is not None)))


def _write_card(file: Path, text: str) -> None:
    """Write a model card. Bytes of file names that are not UTF-8 are written as escape sequences."""
    file.write_text(f"{text.rstrip()}\n\n{CARD_MARK}\n", errors="backslashreplace")


def _format_of(spec: ModelSpec) -> ExportFormat:
    return FORMATS.get(spec.model.library, OTHER_FORMAT)


def partition_of(spec: ModelSpec) -> Partition:
    """Return the partition of a described model into modules."""
    return Partition(find_family(spec.model), tuple(tuple(stages) for stages in spec.depths))


def _check_trusted_code(spec: ModelSpec, source: Path, recipe: Recipe | None) -> None:
    """Check that a model file names no code outside this package that the recipe of its run does not name.

    Raises:
        ArtifactError: The file names such code; the message contains the names.
    """
    tasks = {recipe.settings(phase).task.name for phase in PHASES} if recipe else set()
    trusted = {recipe.model.library, *tasks} if recipe else set()
    if foreign := sorted(name for name in {spec.model.library, spec.task.name} - trusted if ":" in name):
        raise ArtifactError(
            f"{source} needs code outside this package ({', '.join(foreign)}), which is loaded only if a recipe names"
            " it; give the run directory instead"
        )
