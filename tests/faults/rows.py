"""What is done to a run, row by row: the trials are in this folder, their figures in ``docs/reliability.md``."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Row:
    """A kind of fault.

    Attributes:
        few: how many trials the ordinary test run does; they are the first of all.
        full: how many ``make test-faults`` does.
        most, total: of what trials note, the figures to show the largest of, and the sum.
        short: why it cannot be met, where it cannot; such a row is told and fails nothing.
    """

    key: str
    title: str
    what: str  # was done
    must: str  # hold
    full: int
    few: int = 0
    seed: int = 0
    most: tuple[str, ...] = ()
    total: tuple[str, ...] = field(default=())
    short: str = ""


ROWS = (
    Row(
        "kill",
        "`kill -9`",
        "A process, one rank of two, both ranks, or their launcher is killed at a seeded random moment of the meta"
        " model, a module or fine-tuning, every other time while a checkpoint is being written; then the same command"
        " again. Every tenth trial's first process is a new interpreter, the others are forked.",
        "weights, optimizer state, log and result bit-identical to the run that nothing happened to; at most one"
        " interval lost, and what was trained while the save that died was under way",
        full=200,
        few=2,
        most=("steps lost",),
        total=("killed inside a save", "cold", "pretrain", "incubate", "finetune", "launchers", "ranks", "processes"),
    ),
    Row(
        "crash",
        "power cut at every moment of a save",
        "Four saves in a row (with what they prune), three artifacts in one place and two results are recorded call by"
        " call: mkdir, create, write, fsync, rename, link, unlink, rmdir. After each call the disk is cut off: what was"
        " not fsynced is lost, empty, zeros or half there, and each name that was not fsynced is there or not, in every"
        " combination (beyond 1,024 combinations: none, all, each alone, all but each, and 200 at random).",
        "the newest checkpoint is N or N−1 whole, N once its save has returned; an artifact or a result is the"
        " old one or the new one",
        full=3,
        few=3,
        total=("moments", "distinct disks"),
    ),
    Row(
        "damage",
        "damage on the disk",
        "1,000 flipped bits, 200 truncations, 200 zeroed pages, each anywhere in any file of a checkpoint of two ranks"
        " or of an artifact; every file missing; every pair of files swapped, between checkpoints and artifacts too.",
        "found before a tensor is read; the checkpoint before is used",
        full=1536,
        few=1536,
        total=("flipped bits", "truncations", "zeroed pages", "missing files", "swapped files"),
    ),
    Row(
        "malice",
        "hostile files",
        "Checkpoints, artifacts, exported models, data sets and recipes that were made to harm, with right hashes.",
        "no code runs, no process starts, nothing outside the folder is opened; one line, with the exit code of its"
        " kind",
        full=91,
        few=91,
    ),
    Row(
        "history",
        "random histories",
        "Saves, power cuts at random moments of a save and of its pruning, restarts, and damage to the newest.",
        "the newest valid checkpoint is never gone",
        full=10_000,
        few=200,
        total=("saves", "power cuts", "damaged"),
    ),
    Row(
        "disk",
        "full disk, quota, I/O error",
        "The disk of a phase is full (a file system of 256 KiB, where one can be mounted), or one call of a save fails"
        " with ENOSPC, EDQUOT or EIO: each call, each error.",
        "the checkpoint before is intact, the message has the path and, of a full disk, the free bytes; the next"
        " save after it works",
        full=1,
        few=1,
        total=("failed calls", "full disks"),
    ),
    Row(
        "signal",
        "stop signals",
        "SIGTERM, SIGINT, SIGUSR1 or SIGUSR2 (one, or several) at a seeded random moment of any phase; then the same"
        " command again.",
        "exit 75, no step lost, bit-identical in the end",
        full=50,
        few=1,
        total=("stopped", "done before"),
    ),
    Row(
        "slurm",
        "a whole run on a Slurm cluster of three nodes",
        "One `submit`. Until the exported model is there: a node crashes and comes back (at once, or after Slurm has"
        " noticed), an array task is requeued, a rank is killed, every other time a gate too, each in a phase drawn at"
        " random, after its first checkpoint.",
        "weights and results of every phase bit-identical to a run without faults, five jobs in all, no dependency that"
        " cannot be fulfilled, an empty queue",
        full=20,
        few=1,
        total=("faults", "attempts", "crashes", "requeues", "kills", "gates killed"),
        most=("seconds",),
    ),
    Row(
        "order",
        "data order",
        "20 seeded cut points and the edges of epochs, with 1, 2 and 4 ranks, 0 and 2 workers.",
        "the same batches, bit by bit, as without a cut",
        full=144,
        few=0,
        total=("batches",),
    ),
    Row(
        "cost",
        "the price of integrity",
        "Saves of 256 MiB with and without hashing, with and without fsync, twelve of each, in turn; medians.",
        "both together at most 10 % of a save",
        full=1,
        short="without fsync a save ends in memory, where a power cut takes it: what it costs is the disk's own time;"
        " SHA-256 is computed by a second thread while the first one writes, and costs where it is slower than the"
        " disk, or where there is no second core. Training waits for neither, but for the copy to the host alone",
        few=0,
        most=(
            "hashing, % of a save",
            "fsync, % of a save",
            "both, % of a save",
            "MiB a second",
            "copy to host, % of a save",
        ),
    ),
    Row(
        "layouts",
        "another world, another strategy",
        "Stopped after 25 steps under each strategy with 2 and 4 ranks and in one process, and taken up by each of"
        " these for 25 more: AdamW, moving average, clipping, mixing, stochastic depth. A trial is a layout that takes"
        " up all.",
        "what was taken up, written again, has the same bits; every loss and gradient norm within 1e-5 of one"
        " process's",
        full=13,
        total=("pairs",),
        most=("relative error of a loss",),
    ),
    Row(
        "stopped-rank",
        "a rank that stands still",
        "SIGSTOP to one of two ranks, of a launcher and as under srun, at a random moment.",
        "found within 30 s, named, all exit",
        full=6,
        most=("seconds",),
    ),
)
BY_KEY = {row.key: row for row in ROWS}
