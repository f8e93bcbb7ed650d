"""Run one trial with the command line, in a folder of its own. A trial that was stopped is resumed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from bigincubate import __version__
from bigincubate.config import PHASES, Phase, Recipe, load_recipe
from bigincubate.config.sections import PhaseConfig
from bigincubate.distributed.parent_death import PARENT_VARIABLE, adopt_orphans
from bigincubate.errors import Exit
from bigincubate.files import write_text
from bigincubate.launchers.fork_server import COMMAND, ForkServers, can_fork
from bigincubate.launchers.rank_group import RankProcess, start_process
from bigincubate.planning.cost import cost_plan
from bigincubate.planning.identity import phase_identity
from bigincubate.planning.phases import make_plan
from bigincubate.storage.artifacts import load_artifact, save_artifact
from bigincubate.storage.run_directory import PhaseDir, RunDir

from .definition import Study
from .lengths import Costs, describe_cost, length_sets, training_samples
from .log import Entry, Trial

ROOT = Path(__file__).resolve().parents[2]
# a command that ended with one of these did not fail; the same trial is resumed later
STOPPED = {Exit.PREEMPTED, Exit.INTERRUPTED, Exit.LOCKED}
POLL_SECONDS = 0.05  # between two looks at a command


class Stopped(Exception):
    """The trial was stopped, and is resumed by the next call."""


class TrialFailed(Exception):
    """A command failed; the message is its last line, and ``diverged`` whether a loss or gradient was not finite."""

    def __init__(self, message: str, *, diverged: bool) -> None:
        super().__init__(message)
        self.diverged = diverged


class Commands:
    """Runs commands of bigincubate on one core each, and stops them all together. May be used by several threads.

    Commands are forked from a process that has already imported torch. They must therefore run within a context:
    ``with Commands() as commands``.

    Args:
        modules: Modules that the commands import besides those that every phase needs.
    """

    def __init__(self, modules: Sequence[str] = ()) -> None:
        self._servers, self._orphans = ForkServers(modules), adopt_orphans()
        self._environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            PARENT_VARIABLE: str(os.getpid()),  # a phase stops if this process is killed
        }
        self._running: set[RankProcess] = set()
        self._lock, self._stopped = threading.RLock(), False  # `stop` may interrupt itself

    def __enter__(self) -> Commands:
        self._orphans.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._servers.kill()
        self._orphans.__exit__(None, None, None)

    def run(self, log: Path, *words: object) -> None:
        """Run a command, with its output in a file.

        Raises:
            Stopped: `stop` was called, or another process trains the same phase.
            TrialFailed: The command failed.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        log.unlink(missing_ok=True)
        with self._lock:
            if self._stopped:
                raise Stopped
            process = self._start([*COMMAND, *map(str, words)], log)
            self._running.add(process)
        while (code := self._poll(process)) is None:
            time.sleep(POLL_SECONDS)
        with self._lock:
            self._running.discard(process)
            self._servers.reap_orphans()
        if code in STOPPED or code < 0 or (code and self._stopped):
            raise Stopped
        if code:
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            raise TrialFailed(lines[-1] if lines else f"exit code {code}", diverged=code == Exit.NON_FINITE)

    def _poll(self, process: RankProcess) -> int | None:
        with self._lock:  # `reap_orphans` polls the processes of all threads
            return process.poll()

    def _start(self, command: list[str], log: Path) -> RankProcess:
        starter = start_process
        if can_fork(1, []):
            with suppress(OSError):  # without a server, commands start as usual
                starter = self._servers.find(self._environment).start_process
        return starter(command, self._environment, log)

    def stop(self) -> None:
        """Ask all commands to write a checkpoint and to end, and start no others."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.send_signal(signal.SIGTERM)


class Runner:
    """Runs trials.

    Args:
        costs: Counted costs.
        out: Folder for data and runs.
        commands: Runs the commands.
        keep: Whether to keep the folders of finished trials.
    """

    def __init__(self, costs: Costs, out: Path, commands: Commands, *, keep: bool = False) -> None:
        self.costs, self.out, self.commands, self.keep = costs, out.resolve(), commands, keep
        self.study: Study = costs.study
        self._locks: dict[Any, threading.Lock] = defaultdict(threading.Lock)  # of data and of shared meta models
        self._counting = threading.Lock()

    def run(self, trial: Trial) -> Entry:
        """Run or resume a trial, and return its line for the log, also if it fails.

        Raises:
            Stopped: It was stopped.
        """
        with self._counting:
            cost = describe_cost(self.costs, trial.way, trial.plan)
        entry: Entry = {
            "split": trial.split,
            "way": trial.way.name,
            "budget": trial.budget,
            "seed": trial.seed,
            "index": trial.index,
            "settings": trial.settings,
            "sets_digest": trial.digest,
            "version": program_version(),
            **cost,
        }
        try:
            entry |= self._train(trial, self._folder(trial))
        except TrialFailed as failure:
            hidden = str(failure).replace(str(self.out), "OUT")
            return {**entry, "error": hidden, "diverged": failure.diverged}
        return entry

    def clean_up(self, trial: Trial) -> None:
        """Remove the folder of a trial whose result has been logged, unless folders are kept."""
        if not self.keep:
            shutil.rmtree(self._folder(trial), ignore_errors=True)

    def _folder(self, trial: Trial) -> Path:
        return self.out / "trials" / f"{trial.name}-{trial.digest}"

    def _train(self, trial: Trial, folder: Path) -> dict[str, Any]:
        """Train all stages of a trial, and return the metrics of the last one and what was measured before it."""
        sets, kind = self._sets(trial), trial.way.kind
        if kind in ("end_to_end", "meta_alone"):
            phase: Phase = "end_to_end" if kind == "end_to_end" else "pretrain"
            result = self._train_phase(folder / "run", phase, sets, folder)
            return _results([result], RunDir(folder / "run").phase(phase))
        meta = self._train_meta(trial, sets)
        if kind in ("incubate", "expand"):
            run = RunDir(folder / "run")
            self._fork(meta, run.path, sets, folder)
            for module in make_plan(load_recipe(self.study.recipe, sets)).incubated:
                self._train_phase(run.path, "incubate", sets, folder, module)
            self._train_phase(run.path, "finetune", sets, folder)
            found = run.update_summary()
            before = {"meta": found["meta"]["metrics"]}
            if kind == "incubate":
                before["assembled"] = found["assembled"]["metrics"]
                before["hybrids"] = [module["metrics"] for module in found["modules"]]
            phases = [found["meta"], *found["modules"], found["finetune"]]
            return {**_results(phases, run.phase("finetune")), "before": before}
        return self._train_workers(trial, folder, meta, sets)

    def _train_workers(self, trial: Trial, folder: Path, meta: RunDir, sets: list[str]) -> dict[str, Any]:
        """Train K workers from the expanded meta model; then average and fine-tune them, or choose the best of them.

        A model that starts from given weights is trained as the pretrain phase of a recipe whose meta model is as deep
        as the target. All workers thus start from the same weights, also where these are random.
        """
        grown = RunDir(folder / "grown")
        self._fork(meta, grown.path, [*sets, "finetune.train.max_steps=0"], folder)
        self._train_phase(grown.path, "finetune", [*sets, "finetune.train.max_steps=0"], folder)
        start = grown.phase("finetune").artifact
        workers = next(stage for stage in trial.plan.stages if stage.name == "workers")
        runs = [RunDir(folder / f"worker-{number}") for number in range(self.study.workers)]
        results = [
            self._train_from(start, run.path, sets, workers.steps, seed=1000 * (trial.seed + 1) + number)
            for number, run in enumerate(runs)
        ]
        name = self.study.metric.name
        values = [result["metrics"][name] for result in results]
        spent = [_phase(meta, "pretrain"), *results]
        if trial.way.kind == "expand_average":
            average = folder / "average"
            average_weights([run.phase("pretrain").artifact for run in runs], average)
            last, steps = [], trial.plan.stages[-1].steps
            if (rate := trial.settings.get("last.lr")) is not None:
                last = [f"finetune.train.lr={rate}"]
            averaged = self._train_from(average, folder / "averaged", sets, 0)
            final = self._train_from(average, folder / "last", [*sets, *last], steps)
            before = {"workers": values, "averaged": averaged["metrics"][name]}
            return {**_results([*spent, final], RunDir(folder / "last").phase("pretrain")), "before": before}
        best = values.index(min(values))  # on the held-out part of the training split
        chosen = self._train_from(
            runs[best].phase("pretrain").artifact, folder / "best", self._sets(trial, validation=True), 0
        )
        last_phase = RunDir(folder / "best").phase("pretrain")
        return {**_results([*spent, chosen], last_phase), "before": {"workers": values, "best": best}}

    def _sets(self, trial: Trial, *, validation: bool = False) -> list[str]:
        """Return all recipe changes of a trial; those of the split on which it is trained, or of the validation split.

        Built-in data is prepared once for all trials.
        """
        split = "validation" if validation else trial.plan.split
        recipe = self.study.load_recipe(split)
        data = [] if recipe.data.path else [f"data.path={self.out / 'data' / split}"]
        return [*self.study.split_sets(split), *data, *trial.plan.sets, f"train.seed={trial.seed}"]

    def _train_meta(self, trial: Trial, sets: list[str]) -> RunDir:
        """Train the meta model of a trial, or return the run of another trial that has the same."""
        recipe = load_recipe(self.study.recipe, sets)
        plan = make_plan(recipe)
        with self._counting:
            counted = {key: cost for each in PHASES for key, cost in self.costs.costs(recipe, each).items()}
        planned = cost_plan(recipe, plan, training_samples(recipe), counted)[0]
        identity = [trial.plan.split, phase_identity(recipe, plan, plan.row("pretrain"), planned)]
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
        run = RunDir(self.out / "meta" / digest)
        with self._locks[digest]:
            self._train_phase(run.path, "pretrain", sets, self.out / "logs")
        return run

    def _train_phase(
        self, run: Path, phase: Phase, sets: list[str], logs: Path, module: int | None = None
    ) -> dict[str, Any]:
        """Train a phase unless it is done, and return its result."""
        if RunDir(run).phase(phase, module).result is None:
            name, number = (phase, ()) if module is None else (f"{phase}-{module}", ("--module", module))
            words = ("train", self.study.recipe, "--run-dir", run, "--phase", phase, *number, *_options(sets))
            self.commands.run(logs / f"{run.name}-{name}.log", *words)
        return _phase(RunDir(run), phase, module)

    def _fork(self, meta: RunDir, run: Path, sets: list[str], logs: Path) -> None:
        """Make a run that has the meta model of another run, unless it exists."""
        if not RunDir(run).recipe_file.exists():
            self.commands.run(logs / "fork.log", "fork", meta.path, run, self.study.recipe, *_options(sets))

    def _train_from(
        self, weights: Path, run: Path, sets: list[str], steps: int, seed: int | None = None
    ) -> dict[str, Any]:
        """Train the target from given weights with the settings of fine-tuning, and return the result."""
        if (done := RunDir(run).phase("pretrain").result) is not None:
            return done
        recipe = load_recipe(self.study.recipe, [*sets, *([] if seed is None else [f"train.seed={seed}"])])
        changed = recipe_from_weights(recipe, weights)
        file = run.with_suffix(".toml")
        write_text(file, changed.toml())
        lengths = length_sets(self.study, recipe, "finetune", steps)
        options = _options([item.replace("finetune.", "pretrain.", 1) for item in lengths])
        log = run.with_suffix(".log")
        self.commands.run(log, "train", file, "--run-dir", run, "--phase", "pretrain", *options)
        return _phase(RunDir(run), "pretrain")


def recipe_from_weights(recipe: Recipe, weights: Path) -> Recipe:
    """Return a recipe whose pretrain phase trains the target from given weights with the settings of fine-tuning.

    Its meta model is as deep as the target of ``recipe``. What only the fine-tuning of a recipe has, such as its
    budget, is left out.
    """
    settings = recipe.finetune.model_dump(include=set(PhaseConfig.model_fields), exclude_none=True)
    tables = recipe.model_dump(exclude_none=True)
    tables["pretrain"], tables["meta"] = settings, {"init": str(weights)}
    tables["plan"]["target_depths"] = tables["plan"]["meta_depths"] = [
        depths[0] if len(depths) == 1 else list(depths) for depths in make_plan(recipe).target
    ]
    return Recipe.model_validate(tables)


def average_weights(artifacts: list[Path], out: Path) -> None:
    """Write the mean of the weights of several models as an artifact, which every family of models reads."""
    models, manifests = zip(*map(load_artifact, artifacts), strict=True)
    mean = {name: sum(model[name] for model in models) / len(models) for name in models[0]}
    save_artifact(out, mean, manifests[0])


def program_version() -> str:
    """Return the version of bigincubate, with the commit of the checkout."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return f"{__version__}+{done.stdout.strip()}" if done.returncode == 0 else __version__


def _options(sets: list[str]) -> list[str]:
    return [word for item in sets for word in ("--set", item)]


def _phase(run: RunDir, phase: Phase, module: int | None = None) -> dict[str, Any]:
    result = PhaseDir(run.phase(phase, module).path).result
    assert result is not None  # the command that trains it ended without an error
    return result


def _results(phases: list[dict[str, Any]], last: PhaseDir) -> dict[str, Any]:
    """Return the metrics of the last phase, the sums over all phases, and what the last phase ran on, if known."""
    attempt: dict[str, Any] = next(reversed(last.read_attempts()), {})
    return {
        "device": attempt.get("device"),
        "torch": attempt.get("versions", {}).get("torch"),
        "metrics": phases[-1]["metrics"],
        "trained_flops": sum(phase["flops"] for phase in phases),
        "seconds": round(sum(phase["seconds"] for phase in phases), 1),
    }
