"""Train a module on a machine that shares no disk with the others: pack what it needs, and bring the module back.

python examples/separate_machines.py pack RUN MODULE BUNDLE    here: RUN has a finished meta model
python examples/separate_machines.py train BUNDLE              there: BUNDLE was copied
python examples/separate_machines.py collect BUNDLE RUN        here again: BUNDLE or its folder `modules` was copied
"""

import json
import shutil
import sys
from pathlib import Path

import bigincubate as bi
from bigincubate.data.dataset import DESCRIPTION, describe_dataset
from bigincubate.data.partitions import open_module_partition, partition_path
from bigincubate.distributed.process_group import DistributedContext
from bigincubate.planning.lineage import expected_lineage
from bigincubate.storage.artifacts import check_lineage, verify_artifact
from bigincubate.storage.lease import acquire_lease
from bigincubate.storage.run_directory import RunDir


def pack(source: Path, module: int, bundle: Path) -> None:
    """Write a folder with the recipe, the meta model, and the data that the module may use: a small run directory."""
    run, target = RunDir(source), RunDir(bundle)
    recipe = run.load_recipe()
    meta = run.phase("pretrain")
    verify_artifact(meta.artifact)
    bundle.mkdir(parents=True)  # fails if it exists
    shutil.copytree(meta.artifact, target.phase("pretrain").artifact)
    shutil.copy(meta.path / "DONE", target.phase("pretrain").path)
    if recipe.incubate.optimizer == "kept":  # the module starts with optimizer state of the meta model
        shutil.copytree(meta.checkpoints, target.phase("pretrain").checkpoints)

    data = run.data_path(recipe)
    _, part = open_module_partition(recipe, describe_dataset(data), module)
    if part.path == data:
        shutil.copytree(data, bundle / "data")
    else:  # decentralized data: the description of the whole data set, and the partition of this module
        (bundle / "data").mkdir()
        shutil.copy(data / DESCRIPTION, bundle / "data")
        shutil.copytree(part.path, Path(partition_path(bundle / "data", module)))
    shutil.copy(run.recipe_file, bundle)
    (bundle / "bundle.json").write_text(json.dumps({"module": module}))


def train(bundle: Path) -> None:
    """Train the module of a bundle; called again after an interruption, resume."""
    module = json.loads((bundle / "bundle.json").read_text())["module"]
    # the same as: bigincubate train BUNDLE/recipe.toml --run-dir BUNDLE --phase incubate --module K --set data.path=…
    recipe = bi.load_recipe(bundle / "recipe.toml", [f"data.path={json.dumps(str(bundle / 'data'))}"])
    bi.train_phase(recipe, bundle, "incubate", module, report=print)


def collect(bundle: Path, into: Path) -> None:
    """Copy the finished module into the run, after checking that it was trained from the meta model of the run."""
    run = RunDir(into)
    skipped = ["DONE", "owners", "logs"]
    if run.load_recipe().incubate.optimizer == "fresh":
        skipped.append("checkpoints")  # otherwise fine-tuning starts with the optimizer state in them
    for folder in sorted((bundle / "modules").glob("[0-9]*")):
        module = int(folder.name)
        found, target = RunDir(bundle).phase("incubate", module), run.phase("incubate", module)
        if found.result is None:
            raise bi.errors.ArtifactError(f"{folder} is not finished; train it first")
        if problem := check_lineage(verify_artifact(found.artifact), expected_lineage(run, "incubate", module)):
            raise bi.errors.ArtifactError(f"{folder} does not fit {into}: {problem}")
        if target.begun:
            raise bi.errors.ConfigError(f"{target.path} has begun already; remove it first")
        with acquire_lease(target.path, DistributedContext()):
            # the result marks the module as done, so it is written last
            shutil.copytree(folder, target.path, ignore=shutil.ignore_patterns(*skipped), dirs_exist_ok=True)
            target.write_result(found.result)
        run.log_event("collected", phase=f"incubate/{module}", source=str(bundle))
        print(f"module {module}: collected from {bundle}")


def main(command: str, *words: str) -> None:
    """Run one of the three commands."""
    if command == "pack":
        pack(Path(words[0]), int(words[1]), Path(words[2]))
    elif command == "train":
        train(Path(words[0]))
    else:
        collect(Path(words[0]), Path(words[1]))


if __name__ == "__main__":
    main(*sys.argv[1:])
