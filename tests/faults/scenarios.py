"""The kinds of faults that are injected: tests of this folder run them, ``docs/reliability.md`` has their results."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Scenario:
    """A kind of fault.

    Attributes:
        key: names its tests and its results; trials draw their random numbers from it.
        title: heading on the page.
        what: what is done.
        must: what must hold afterwards.
        full: number of trials of ``make test-faults``.
        few: number of trials of the ordinary test run: the first of them.
        seed: seed of the trials.
        most: figures of trials of which the page shows the maximum.
        total: figures of trials of which the page shows the sum.
        short: why the requirement cannot be met, where it cannot; failures are then reported without failing the test.
    """

    key: str
    title: str
    what: str
    must: str
    full: int
    few: int = 0
    seed: int = 0
    most: tuple[str, ...] = ()
    total: tuple[str, ...] = ()
    short: str = ""


SCENARIOS = (
    Scenario(
        "kill",
        "`kill -9`",
        "A process, one rank of two, both ranks, or their launcher is killed at a seeded random moment of the meta"
        " model, a module or fine-tuning, in every second trial while a checkpoint is being written; then the same"
        " command is run again. In every tenth trial the first process is a new interpreter; in the others it is"
        " forked.",
        "weights, optimizer state, log and result are bit-identical to those of an uninterrupted run; at most one"
        " checkpoint interval is lost, and what was trained during the save that was killed",
        full=200,
        few=2,
        most=("steps lost",),
        total=("killed inside a save", "cold", "pretrain", "incubate", "finetune", "launchers", "ranks", "processes"),
    ),
    Scenario(
        "crash",
        "power cut at every moment of a save",
        "Four saves in a row (with the pruning of older checkpoints), three artifacts in the same place and two results"
        " are recorded call by call: mkdir, create, write, fsync, rename, link, unlink, rmdir. After each call the"
        " power is cut: data that was not fsynced is lost, empty, zeros or half written, and each name that was not"
        " fsynced exists or not, in every combination (of more than 1,024: none, all, each one, all but each one, and"
        " 200 at random).",
        "the newest checkpoint is a complete N or N−1, and N once its save has returned; an artifact or a result is the"
        " old one or the new one",
        full=3,
        few=3,
        total=("moments", "distinct disks"),
    ),
    Scenario(
        "damage",
        "damage on the disk",
        "1,000 flipped bits, 200 truncations and 200 zeroed pages, each at a random place in any file of a checkpoint"
        " of two ranks or of an artifact; every file missing; every pair of files swapped, also between checkpoints and"
        " artifacts.",
        "the damage is found before a tensor is read; the previous checkpoint is used",
        full=1536,
        few=1536,
        total=("flipped bits", "truncations", "zeroed pages", "missing files", "swapped files"),
    ),
    Scenario(
        "untrusted",
        "untrusted files",
        "Checkpoints, artifacts, exported models, data sets and recipes that were made to harm, with right hashes.",
        "no code runs, no process starts, nothing outside the folder is opened; the error is one line, with the exit"
        " code of its kind",
        full=91,
        few=91,
    ),
    Scenario(
        "history",
        "checkpoints under random sequences of faults",
        "Saves, power cuts at random moments of a save and of its pruning, restarts, and damage to the newest"
        " checkpoint, in random order.",
        "the newest valid checkpoint is never lost",
        full=10_000,
        few=200,
        total=("saves", "power cuts", "damaged"),
    ),
    Scenario(
        "disk",
        "full disk, quota, I/O error",
        "The disk of a phase is full (a file system of 256 KiB, where one can be mounted), or one call of a save fails"
        " with ENOSPC, EDQUOT or EIO: each call, each error.",
        "the previous checkpoint is intact, the message has the path and, for a full disk, the free bytes; the next"
        " save after it works",
        full=1,
        few=1,
        total=("failed calls", "full disks"),
    ),
    Scenario(
        "signal",
        "stop signals",
        "SIGTERM, SIGINT, SIGUSR1 or SIGUSR2 (one, or several) at a seeded random moment of any phase; then the same"
        " command is run again.",
        "exit code 75, no step lost, bit-identical in the end",
        full=50,
        few=1,
        total=("stopped", "done before"),
    ),
    Scenario(
        "slurm",
        "a whole run on a Slurm cluster of three nodes",
        "One `submit`. Until the model is exported, a node crashes and comes back (at once, or after Slurm noticed),"
        " an array task is requeued, a rank is killed, in every second trial a gate too, each in a phase drawn at"
        " random, after its first checkpoint.",
        "weights and results of every phase are bit-identical to those of a run without faults; five jobs in all, no"
        " dependency that cannot be satisfied, an empty queue",
        full=20,
        few=1,
        total=("faults", "attempts", "crashes", "requeues", "kills", "gates killed"),
        most=("seconds",),
    ),
    Scenario(
        "order",
        "data order",
        "The stream is cut at 20 seeded points and at epoch boundaries, with 1, 2 and 4 ranks, 0 and 2 workers.",
        "the same batches, bit by bit, as without a cut",
        full=144,
        few=0,
        total=("batches",),
    ),
    Scenario(
        "cost",
        "the cost of integrity",
        "Saves of 256 MiB with and without hashing, with and without fsync, twelve of each, alternating; medians.",
        "both together take at most 10 % of a save",
        full=1,
        few=0,
        short="without fsync a save ends in memory, where a power cut loses it: fsync costs the time of the disk;"
        " SHA-256 is computed by a second thread while the first one writes, and costs time where it is slower than the"
        " disk, or where there is no second core. Training waits for neither, only for the copy to the host",
        most=(
            "hashing, % of a save",
            "fsync, % of a save",
            "both, % of a save",
            "MiB a second",
            "copy to host, % of a save",
        ),
    ),
    Scenario(
        "layouts",
        "another world size, another strategy",
        "A phase is stopped after 25 steps under each strategy with 2 and 4 ranks and in one process, and resumed by"
        " each of these for 25 more: AdamW, moving average, clipping, mixing, stochastic depth. A trial is a layout"
        " that resumes all.",
        "a checkpoint that was loaded and saved again has the same bits; every loss and gradient norm is within 1e-5 of"
        " those of one process",
        full=13,
        total=("pairs",),
        most=("relative error of a loss",),
    ),
    Scenario(
        "stopped-rank",
        "a stopped rank",
        "SIGSTOP to one of two ranks, under the launcher and as under srun, at a random moment.",
        "the rank is detected within 30 s and named; all ranks exit",
        full=6,
        most=("seconds",),
    ),
)
BY_KEY = {scenario.key: scenario for scenario in SCENARIOS}
