"""Compare ways to train the same model: incubation, depth expansion, end-to-end training, the meta model alone.

    python benchmarks/ways.py digits --plan                # trials, FLOPs and core-hours, before anything runs
    python benchmarks/ways.py digits --tune --jobs 2       # random search on the development split
    python benchmarks/ways.py digits --choose              # write the settings file; commit it
    python benchmarks/ways.py digits --final --jobs 2      # each trial on the validation split, once
    python benchmarks/ways.py digits --write               # tables and plot in docs/results.md

The study is a TOML file in benchmarks/ways_study/, which describes the protocol. Its log (trials-NAME.jsonl) and the
chosen settings (settings-NAME.toml) are in the same folder, and are committed. Finished trials are not repeated;
interrupted trials resume if --out is the same. Each trial uses one core, and the GPU if there is one.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as a script, from anywhere

from ways_study.definition import Study, load_study
from ways_study.lengths import Costs
from ways_study.log import (
    Entry,
    Trial,
    TrialLog,
    check_once,
    check_protocol,
    choose_settings,
    final_trials,
    ran_on_cpu,
    read_chosen,
    tuning_trials,
    write_chosen,
)
from ways_study.page import Results, draw_frontier, markdown, write_between_markers
from ways_study.trial import Commands, Runner, Stopped

from bigincubate.errors import BigincubateError, ConfigError, Exit, format_os_error
from bigincubate.storage.lease import acquire_lease
from bigincubate.tasks.names import modules_to_preload

PAGE = Path(__file__).resolve().parent.parent / "docs" / "results.md"


def measured_rates(study: Study, entries: Iterable[Entry]) -> dict[str, float]:
    """Return the FLOP/s of one core by kind of way, for the kinds that have a finished trial in the log.

    It is that of the fastest trial on a CPU, because others may have shared their core with other programs.
    """
    rates: dict[str, float] = defaultdict(float)
    for entry in entries:
        if "metrics" in entry and entry["way"] in study.ways and entry["seconds"] and ran_on_cpu(entry):
            kind = study.ways[entry["way"]].kind
            rates[kind] = max(rates[kind], entry["flops"] / entry["seconds"])
    return dict(rates)


def describe_plan(costs: Costs, log: TrialLog, rate: float | None) -> str:
    """Return the number of trials, those left, and the FLOPs and core-hours of those left, by part and way."""
    study, results = costs.study, log.results()
    rates = {} if rate else measured_rates(study, log.read())
    chosen, digest = None, "not chosen yet: lengths of point 0"
    if found := read_chosen(study):
        chosen, digest = found
    if study.unit == "TFLOP":
        lines = [f"{study.name}: budgets are in TFLOPs, in total or on the critical path with {study.workers} workers"]
    else:
        lines = [f"{study.name}: budget 1 is {costs.reference['flops'] / 1e12:.3f} TFLOPs of an incubation in total"]
        lines[0] += f" and {costs.reference['path'] / 1e12:.3f} on its critical path with {study.workers} workers"
    for title, trials in (
        ("tuning", tuning_trials(costs)),
        (f"final, settings {digest}", final_trials(costs, chosen)),
    ):
        lines.append(f"\n{title}\n{'way':<20}{'trials':>8}{'left':>8}{'TFLOPs left':>14}{'core-hours left':>18}")
        sums = [0.0] * 4
        for way in dict.fromkeys(trial.way.name for trial in trials):
            mine = [trial for trial in trials if trial.way.name == way]
            left = [trial for trial in mine if trial.key not in results]
            flops = sum(trial.plan.flops for trial in left)
            hours = flops / (rate or rates.get(mine[0].way.kind, study.rate)) / 3600
            row = [len(mine), len(left), flops / 1e12, hours]
            sums = [total + value for total, value in zip(sums, row, strict=True)]
            lines.append(_plan_row(way, row))
        lines.append(_plan_row("all", sums))
    source = f"--rate {rate:g}" if rate else "the log" if rates else "the definition"
    return "\n".join([*lines, f"\nFLOP/s of a core: from {source}. Shared meta models are counted in each trial."])


def _plan_row(name: str, row: list[float]) -> str:
    trials, left, tera, hours = row
    return f"{name:<20}{trials:>8.0f}{left:>8.0f}{tera:>14.1f}{hours:>18.2f}"


def run_trials(trials: list[Trial], runner: Runner, log: TrialLog, jobs: int, digest: str | None = None) -> bool:
    """Run the trials that the log does not have, and return whether all of them have a result now.

    SIGINT and SIGTERM stop all commands after they have written a checkpoint.

    Args:
        trials: The trials.
        runner: Runs a trial.
        log: The log.
        jobs: Number of trials in parallel.
        digest: The digest of the chosen settings, for trials on the validation split.
    """
    results = log.results()
    left = [trial for trial in trials if trial.key not in results]
    print(f"{len(trials)} trials, {len(left)} left", flush=True)
    complete = True
    commands = runner.commands
    before = {number: signal.signal(number, lambda *_: commands.stop()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with ThreadPoolExecutor(jobs) as pool:
            running = {pool.submit(runner.run, trial): trial for trial in left}
            for done in as_completed(running):
                trial = running[done]
                try:
                    entry = done.result()
                    log.append({**entry, **({} if digest is None else {"settings_digest": digest})})
                except Stopped:
                    complete = False
                    continue
                except BaseException:  # also if the log cannot be written: the trials that are left would be lost too
                    commands.stop()
                    raise
                if "metrics" in entry:
                    runner.clean_up(trial)
                complete &= "metrics" in entry or bool(entry.get("diverged"))
                scores = ", ".join(f"{key} {value:.4g}" for key, value in entry.get("metrics", {}).items())
                print(f"{trial.name}: {scores or entry['error']}", flush=True)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return complete


def write_page(study: Study, log: TrialLog, page: Path) -> None:
    """Write the tables and the plot of a study."""
    results = Results(study, log.read())
    plot = page.with_name(f"ways_{study.name.replace('-', '_')}.png")
    drawn = draw_frontier(results, plot)
    write_between_markers(page, study.name, markdown(results, plot.name if drawn else None))
    print(page)


def _positive(kind: type[int | float]) -> Callable[[str], float]:
    """Return a function that reads a number above 0 from the command line."""

    kinds = {int: "integer", float: "number"}

    def read(text: str) -> float:
        with suppress(ValueError):
            if 0 < (value := kind(text)) < math.inf:
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive {kinds[kind]}")

    return read


def parse_arguments() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", help="a definition in benchmarks/ways_study/, or a .toml file")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--plan", action="store_true", help="print the trials and what they cost")
    action.add_argument("--tune", action="store_true", help="run the random search")
    action.add_argument("--choose", action="store_true", help="write the best settings, to be committed")
    action.add_argument("--final", action="store_true", help="run the trials on the validation split")
    action.add_argument("--write", action="store_true", help="write the tables and the plot")
    parser.add_argument("--ways", nargs="+", metavar="WAY", default=None, help="only these ways (default: all)")
    parser.add_argument("--budgets", nargs="+", type=float, default=None, help="only these budgets (default: all)")
    parser.add_argument("--out", type=Path, default=None, help="folder of data and runs (default: runs/ways/STUDY)")
    parser.add_argument("--jobs", type=_positive(int), default=os.cpu_count() or 1, help="number of trials in parallel")
    parser.add_argument("--keep", action="store_true", help="keep the run directories of finished trials")
    parser.add_argument(
        "--rate", type=_positive(float), default=None, help="FLOP/s of a core for --plan (default: from the log)"
    )
    parser.add_argument("--page", type=Path, default=PAGE, help="the page for --write")
    return parser.parse_args()


def main() -> None:
    """Run the program, and exit with its code."""
    args = parse_arguments()
    try:
        raise SystemExit(run_action(args))
    except BigincubateError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.code) from None
    except OSError as error:
        print(f"error: {format_os_error(error)}", file=sys.stderr)
        raise SystemExit(Exit.ENVIRONMENT) from None
    except KeyboardInterrupt:
        raise SystemExit(Exit.INTERRUPTED) from None


def _check_known(option: str, given: Iterable[object] | None, known: Iterable[object]) -> None:
    """Check that there are trials with every value of an option.

    Raises:
        ConfigError: There are none with one of them.
    """
    if unknown := set(given or ()).difference(known):
        expected = ", ".join(sorted(map(str, known)))
        raise ConfigError(f"{option}: no trial has {', '.join(sorted(map(str, unknown)))}; expected one of {expected}")


def run_action(args: argparse.Namespace) -> int:
    """Do what the arguments ask for, and return the exit code."""
    study = load_study(args.study)
    found = read_chosen(study)
    study = study.with_best(found and found[0])
    costs, log = Costs(study), TrialLog(study.log_file)
    if args.plan:
        print(describe_plan(costs, log, args.rate))
    elif args.choose:
        write_chosen(study, choose_settings(costs, log.results()), log.read())
        print(f"{study.settings_file}: commit it before --final")
    elif args.write:
        write_page(study, log, args.page)
    else:
        chosen, digest = (args.final and read_chosen(study)) or (None, None)
        if args.final:
            check_protocol(study, digest, log.read())
        trials = final_trials(costs, chosen) if args.final else tuning_trials(costs)
        if args.final:
            check_once(trials, log.results())
        _check_known("--ways", args.ways, {trial.way.name for trial in trials})
        _check_known("--budgets", args.budgets, {trial.budget for trial in trials})
        wanted = [
            trial
            for trial in trials
            if (not args.ways or trial.way.name in args.ways) and (not args.budgets or trial.budget in args.budgets)
        ]
        task = study.load_recipe("validation").task.name
        # no other process may run the same trials
        with acquire_lease(study.lease_folder), Commands(modules_to_preload(task)) as commands:
            runner = Runner(costs, args.out or Path("runs/ways") / study.name, commands, keep=args.keep)
            complete = run_trials(wanted, runner, log, args.jobs, digest)
        if not complete:
            print("not all trials have a result; run the same command again to resume")
            return int(Exit.PREEMPTED)
    return int(Exit.DONE)


if __name__ == "__main__":
    main()
