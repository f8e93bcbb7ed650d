"""What many tests share: a smoke-size recipe, and its data prepared once."""

from __future__ import annotations

import copy
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# the same examples in every run of CI; elsewhere new ones each time
settings.register_profile("default", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("default")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path[:0] = [str(Path(__file__).parent / folder) for folder in ("faults", "unit", "integration", "distributed")]

SMOKE = """
name = "smoke"
[model]
name = "vit_tiny_patch16_224"
img_size = 8
num_classes = 10
args = { patch_size = 2, embed_dim = 24, num_heads = 3 }
[data]
source = "digits-dev"
[plan]
target_depths = [2, 2]
meta_depths = [1, 1]
[train]
batch_size = 32
epochs = 100
max_steps = 12
lr = 2e-3
[augment]
crop = "pad"
pad = 1
flip = 0.0
eval_crop = 1.0
[mixup]
mixup = 0.2
[drop_path]
rate = 0.1
[ema]
decay = 0.9
[log]
every_steps = 2
[checkpoint]
every_steps = 4
[incubate]
init = "boundary"
"""


@pytest.fixture
def smoke(tmp_path: Path) -> Path:
    """A recipe of two modules and twelve steps a phase."""
    file = tmp_path / "smoke.toml"
    file.write_text(SMOKE)
    return file


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits' training part as MDS shards, prepared once a session."""
    from bigincubate.data.prepare import prepare_dataset

    out = tmp_path_factory.mktemp("digits") / "data"
    prepare_dataset("digits-dev", out)
    return out


Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def bigincubate() -> Command:
    """Run the command line as a user does: ``bigincubate("plan", "digits")``."""

    def run(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "bigincubate", *map(str, arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **options.pop("env", {})}  # type: ignore[dict-item]
        options = {"timeout": 600, **options}
        return subprocess.run(command, capture_output=True, text=True, env=environment, **options)  # type: ignore[call-overload]

    return run


@pytest.fixture(scope="session")
def fast(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smoke recipe with its data in place, for many runs in one session."""
    file = tmp_path_factory.mktemp("recipe") / "smoke.toml"
    file.write_text(SMOKE.replace('source = "digits-dev"', f'path = "{digits}"'))
    return file


class TrainingHarness:
    """A run directory whose phases are trained in this process, by the trainer itself."""

    def __init__(self, recipe: Path, folder: Path, *sets: str) -> None:
        from bigincubate.config import load_recipe
        from bigincubate.planning.context import open_run
        from bigincubate.storage.run_directory import RunDir

        self.recipe = load_recipe(str(recipe), sets)
        self.run = RunDir(folder)
        opened = open_run(self.recipe, self.run)
        self.data, self.plan, self.rows = opened.data, opened.plan, opened.rows

    def context(self, phase: str, module: int | None = None) -> Any:
        """Return what a phase is set up with."""
        from bigincubate.distributed.process_group import DistributedContext
        from bigincubate.planning.context import RunContext

        opened = RunContext(self.recipe, self.run, self.data, self.plan, self.rows)
        return opened.phase(phase, module, DistributedContext.detect())  # type: ignore[arg-type]

    def train(self, phase: str, module: int | None = None) -> dict[str, Any]:
        from bigincubate.training.run_phase import train_phase

        return train_phase(self.context(phase, module))

    def trainer(self, phase: str, module: int | None = None) -> Any:
        from bigincubate.distributed.signals import StopFlag
        from bigincubate.training.trainer import Trainer

        return Trainer.build(self.context(phase, module), StopFlag())

    def weights(self, phase: str, module: int | None = None) -> dict[str, Any]:
        from bigincubate.storage.artifacts import load_artifact

        return load_artifact(self.run.phase(phase, module).artifact)[0]  # type: ignore[arg-type]

    def log(self, phase: str, module: int | None = None) -> list[dict[str, Any]]:
        return self.run.phase(phase, module).read_metrics()  # type: ignore[arg-type]

    def events(self, phase: str, module: int | None = None, *, fleet: bool = False) -> Any:
        """What TensorBoard sees of a phase."""
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        folder = self.run.phase(phase, module).path  # type: ignore[arg-type]
        folder = self.run.path / "fleet" / folder.relative_to(self.run.path) if fleet else folder / "tb"
        return EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0, "images": 0}).Reload()

    def copy(self, folder: Path, phases: list[str] | None = None) -> TrainingHarness:
        """The run as it is now, in another directory; of its phases only those in these folders, if given."""
        trained = {"meta", "modules", "finetune", "assembled"}
        shutil.copytree(
            self.run.path,
            folder,
            ignore=lambda path, names: (
                trained.difference(phases).intersection(names)
                if phases is not None and Path(path) == self.run.path
                else set()
            ),
        )
        other = copy.copy(self)
        other.run = type(self.run)(folder)
        return other

    def command(self, phase: str, module: int | None = None, *more: object) -> list[object]:
        """The words of the command line that trains a phase here."""
        words = ["train", self.run.recipe_file, "--run-dir", self.run.path, "--phase", phase]
        return [*words, *(["--module", module] if module is not None else []), *more]


@pytest.fixture(scope="session")
def counted() -> Iterator[None]:
    """Counting what a phase costs takes a second: once for each shape of model is enough here."""
    from bigincubate.planning import cost as plan

    count, known = plan.count_cost, {}

    def cost(row: Any, settings: Any, cut: Any) -> Any:
        key = (row, settings.model.model_dump_json(), settings.optim.name, cut)
        if key not in known:
            known[key] = count(row, settings, cut)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "count_cost", cost)
        yield


@pytest.fixture(scope="session")
def harness(counted: None, fast: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TrainingHarness]:
    """``harness("train.lr=1", …)``: the smoke recipe with these settings, in a new run directory, or in ``folder``."""
    return lambda *sets, folder=None: TrainingHarness(fast, folder or tmp_path_factory.mktemp("harness") / "run", *sets)


# ------------------------------------------------------------------------------------------------ devices


def pytest_addoption(parser: pytest.Parser) -> None:
    chosen = os.environ.get("BIGINCUBATE_TEST_DEVICE")
    parser.addoption("--device", default=chosen, choices=["cuda", "cpu"], help="where tests of the device run")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device") == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the code under test looks for GPUs by itself


def count_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def gpus_needed(item: pytest.Item) -> int:
    """How many GPUs a test needs: ``gpus(n)``, or one if it is marked ``gpu`` and does not take any ``device``."""
    if (mark := item.get_closest_marker("gpus")) is not None:
        return int(mark.args[0])
    return int(item.get_closest_marker("gpu") is not None and "device" not in getattr(item, "fixturenames", ()))


def pytest_runtest_setup(item: pytest.Item) -> None:
    needed = gpus_needed(item)
    if needed and (found := count_gpus()) < needed:
        pytest.skip(f"needs {needed} CUDA device{'s' * (needed > 1)}, found {found}")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> Any:
    """The device that the code under test chooses: that of ``--device``, or CUDA where there is a GPU."""
    import torch

    found, asked = "cuda" if count_gpus() else "cpu", request.config.getoption("--device")
    if asked not in (None, found):
        pytest.fail(f"--device {asked}, but torch finds no CUDA device")
    return torch.device(found)


# ------------------------------------------------------------------------------------------------ Slurm


@pytest.fixture(scope="session")
def cluster() -> Iterator[object]:
    from cluster import start

    yield from start()


@pytest.fixture
def slurm(cluster: Any) -> Iterator[Any]:
    """A real Slurm; every test leaves its queue empty."""
    yield cluster
    cluster.wait_empty()


# ------------------------------------------------------------------------------------------------ command line


@pytest.fixture(autouse=True)
def reset_package_logger() -> None:
    """Start each test with the package's logger as it is after an import: `train` configures it for the process."""
    logger = logging.getLogger("bigincubate")
    logger.handlers, logger.propagate = [], True
    logger.setLevel(logging.NOTSET)


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """``call("plan", "digits")`` gives exit code, stdout and stderr; a traceback fails the test by itself."""

    def called(*words: object) -> tuple[int, str, str]:
        from bigincubate.cli import main

        monkeypatch.setattr(sys, "argv", ["bigincubate", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        return int(end.value.code or 0), out, err

    return called


@pytest.fixture(scope="module")
def done(harness: Callable[..., Any]) -> Any:
    """A finished run of two steps a phase."""
    made = harness("train.max_steps=2", "log.every_steps=1")
    for phase, module in (("pretrain", None), ("incubate", 0), ("incubate", 1), ("finetune", None)):
        made.train(phase, module)
    made.run.update_summary()
    return made


class Place:
    """What a wrong command may name; made anew for each."""

    def __init__(self, folder: Path, fast: Path, digits: Path, done: Any) -> None:
        self.folder, self.fast, self.digits = folder, fast, digits
        self.run = folder / "run"
        shutil.copytree(done.run.path, self.run)
        self.new = folder / "new"
        self.file = folder / "file"
        self.file.write_text("a file")
        self.empty = folder / "empty"
        self.empty.mkdir()

    def recipe(self, text: str | bytes) -> Path:
        path = self.folder / "mine.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    def spoiled(self, name: str, text: str) -> Path:
        (self.run / name).write_text(text)
        return self.run

    def without(self, *names: str) -> Path:
        for name in names:
            path = self.run / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return self.run

    def train(self, run_dir: Path, phase: str, *more: object) -> list[object]:
        return ["train", self.fast, "--run-dir", run_dir, "--phase", phase, *more, "--set", "train.max_steps=2"]


@pytest.fixture
def place(tmp_path: Path, fast: Path, digits: Path, done: Any) -> Place:
    return Place(tmp_path, fast, digits, done)


# ------------------------------------------------------------------------------------------------ faults/


@pytest.fixture
def trial_log(request: pytest.FixtureRequest) -> object:
    """The trials of the scenario that the test's ``scenario`` mark names."""
    from trial_log import FULL, TrialLog

    made = TrialLog(request.node.get_closest_marker("scenario").args[0])
    if not FULL and not made.scenario.few:
        pytest.skip("run by `make test-faults` only: it takes minutes")
    return made


def pytest_sessionfinish(session: pytest.Session) -> None:
    from trial_log import FULL, publish

    if FULL and not session.config.getoption("collectonly"):
        publish()
