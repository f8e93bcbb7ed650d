"""Train a module on a machine that shares no disk with the others: pack what it needs, and bring the module back.

python examples/separate_machines.py pack RUN MODULE BUNDLE    here: RUN has a finished meta model
python examples/separate_machines.py train BUNDLE              there: BUNDLE was copied
python examples/separate_machines.py collect BUNDLE RUN        here again: BUNDLE or its folder `modules` was copied
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import bigincubate as bi
from bigincubate.data.dataset import DESCRIPTION, describe_dataset
from bigincubate.data.partitions import open_module_partition, partition_path
from bigincubate.errors import ArtifactError, BigincubateError, ConfigError, Exit, format_command, format_os_error
from bigincubate.files import atomic_folder, expand_path, read_json
from bigincubate.planning.lineage import PhaseInput, expected_lineage
from bigincubate.storage.artifacts import check_lineage, verify_artifact
from bigincubate.storage.run_directory import RunDir
from bigincubate.training.kept_state import META, load_last_checkpoint


def pack(source: Path, module: int, bundle: Path) -> None:
    """Write a folder with the recipe, the meta model, and the data that the module may use: a small run directory."""
    run = RunDir(source)
    recipe, meta = run.load_recipe(), run.phase("pretrain")
    if module not in recipe.plan.incubated:
        numbers = ", ".join(map(str, recipe.plan.incubated)) or "none"
        raise ConfigError(f"module {module} is not among the modules that {source} incubates: {numbers}")
    if bundle.exists():
        raise ConfigError(f"{bundle} exists already; remove it, or choose another folder")
    data = run.data_path(recipe)
    if copied := next((folder for folder in (data, meta.path) if bundle.is_relative_to(folder)), None):
        raise ConfigError(f"{bundle} is inside {copied}, which is copied into it; choose another folder")
    if meta.result is None:
        train = format_command("train", run.recipe_file, "--run-dir", source, "--phase", "pretrain")
        raise ArtifactError(f"{source} has no finished meta model; train it with: {train}")
    verify_artifact(meta.artifact)
    # whether the module starts with optimizer state of the meta model
    kept = recipe.incubate.optimizer == "kept" and recipe.incubate.init != "fresh"
    if kept:
        load_last_checkpoint(run, META, "incubate.optimizer")  # fails if it is missing or damaged
    _, part = open_module_partition(recipe, describe_dataset(data), module)

    with atomic_folder(bundle) as folder:  # a bundle is complete or does not exist
        target = RunDir(folder).phase("pretrain")
        shutil.copytree(meta.artifact, target.artifact)
        shutil.copy(meta.path / "DONE", target.path)
        if kept:
            shutil.copytree(meta.checkpoints, target.checkpoints)
        if part.path == data:
            shutil.copytree(data, folder / "data")
        else:  # decentralized data: the description of the whole data set, and the partition of this module
            (folder / "data").mkdir()
            shutil.copy(data / DESCRIPTION, folder / "data")
            shutil.copytree(part.path, Path(partition_path(folder / "data", module)))
        shutil.copy(run.recipe_file, folder)
        (folder / "bundle.json").write_text(json.dumps({"module": module}))


def train(bundle: Path) -> None:
    """Train the module of a bundle; called again after an interruption, resume."""
    module = (read_json(bundle / "bundle.json") or {}).get("module")
    if module is None:
        raise ArtifactError(f"{bundle} is not a bundle (no module in bundle.json); create one with `pack`")
    # the same as: bigincubate train BUNDLE/recipe.toml --run-dir BUNDLE --phase incubate --module K --set data.path=…
    recipe = bi.load_recipe(bundle / "recipe.toml", [f"data.path={json.dumps(str(bundle / 'data'))}"])
    bi.train_phase(recipe, bundle, "incubate", module, report=print)


def collect(bundle: Path, into: Path) -> None:
    """Copy the finished module into the run, after checking that it was trained from the meta model of the run."""
    run = RunDir(into)
    recipe = run.load_recipe()
    modules = [int(path.name) for path in (bundle / "modules").glob("*") if path.name.isdecimal()]
    if len(modules) != 1:
        where = bundle / "modules"
        raise ArtifactError(
            f"{where}: expected one module, found {len(modules)}; copy the `modules` folder of one trained bundle"
        )
    module = modules[0]
    found, target = RunDir(bundle).phase("incubate", module), run.phase("incubate", module)
    if found.result is None:
        raise ArtifactError(f"{found.path} is not finished; train it first")
    if problem := check_lineage(verify_artifact(found.artifact), expected_lineage(run, "incubate", module)):
        raise ArtifactError(f"{found.path} does not fit {into}: {problem}")
    skipped = ["owners", "logs", ".*"]
    if recipe.incubate.optimizer == "kept":  # fine-tuning starts with the optimizer state in the checkpoints
        load_last_checkpoint(run, PhaseInput("incubate", module), "incubate.optimizer", folder=found.checkpoints)
    else:
        skipped.append("checkpoints")
    if target.path.exists():
        raise ConfigError(f"{target.path} already exists; if no process is training it, remove it first")

    with atomic_folder(target.path) as folder:
        shutil.copytree(found.path, folder, ignore=shutil.ignore_patterns(*skipped), dirs_exist_ok=True)
    run.log_event("collected", phase=f"incubate/{module}", source=str(bundle))
    print(f"module {module}: collected from {bundle}")


def parse_arguments(words: list[str]) -> argparse.Namespace:
    """Return the function of a command and its arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for function, names in ((pack, ("RUN", "MODULE", "BUNDLE")), (train, ("BUNDLE",)), (collect, ("BUNDLE", "RUN"))):
        command = commands.add_parser(function.__name__, description=function.__doc__)
        command.set_defaults(function=function, names=names)
        for name in names:
            command.add_argument(name, type=int if name == "MODULE" else expand_path)
    return parser.parse_args(words)


def main(*words: str) -> int:
    """Run one of the three commands, and return its exit code."""
    try:
        arguments = parse_arguments(list(words))
        arguments.function(*(getattr(arguments, name) for name in arguments.names))
    except BigincubateError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    except OSError as error:
        print(f"error: {format_os_error(error)}", file=sys.stderr)
        return Exit.ENVIRONMENT
    except KeyboardInterrupt:
        print("error: interrupted; run the same command again", file=sys.stderr)
        return Exit.INTERRUPTED
    return Exit.DONE


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
