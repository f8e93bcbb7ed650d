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


SCENARIOS = (
    Scenario(
        "kill",
        "`kill -9`",
        "A process, one of two ranks, both ranks, or their launcher is killed with SIGKILL at a random moment while the"
        " meta model, a module or the assembled model is trained. In every other trial this happens while a checkpoint"
        " is being written. Then the same command is run again. In about every sixth trial the first process is a"
        " new interpreter (`cold`); in the others it is forked.",
        "weights, optimizer state, log and result are bitwise identical to those of an uninterrupted run; at most the"
        " steps of one checkpoint interval are lost, plus the steps during the save that was interrupted",
        full=200,
        few=2,
        most=("steps lost",),
        total=("killed inside a save", "cold", "pretrain", "incubate", "finetune", "launchers", "ranks", "processes"),
    ),
    Scenario(
        "crash",
        "power loss at every moment of a save",
        "The trial records the file system calls (mkdir, create, write, fsync, rename, link, unlink, rmdir) of four"
        " consecutive saves (with pruning of older checkpoints), of writing three artifacts to the same place, and of"
        " writing two results. A power loss is simulated after each call (a moment): data that was not fsynced is"
        " missing, complete, half written, or replaced by zeros, and each directory entry that was not fsynced exists"
        " or does not exist, in all combinations. If there are more than 1,024 combinations, only these are tried: no"
        " entry exists, all exist, exactly one exists, all but one exist, and 200 random combinations. *Disk states*"
        " counts the different contents of the disk that were tried.",
        "the newest checkpoint is complete; it is checkpoint N or N−1 during save N, and N after this save has"
        " returned; an artifact or a result is the complete old one or the complete new one",
        full=3,
        few=3,
        total=("moments", "disk states"),
    ),
    Scenario(
        "damage",
        "damaged files",
        "One change per trial in the files of a checkpoint of two ranks or of an artifact: a flipped bit (1,000"
        " trials), a truncated file (200) or a zeroed page (200) at a random place, each file missing, and each pair of"
        " files swapped, also between checkpoints and artifacts.",
        "the damage is detected before a tensor is read, and the previous checkpoint is used",
        full=1536,
        few=1536,
        total=("flipped bits", "truncations", "zeroed pages", "missing files", "swapped files"),
    ),
    Scenario(
        "untrusted",
        "untrusted files",
        "Malicious checkpoints, artifacts, exported models, data sets and recipes with correct hashes.",
        "no code from the file is executed, no process is started, and no file outside the folder is opened; the error"
        " is one line, with the documented exit code",
        full=91,
        few=91,
    ),
    Scenario(
        "odd-data",
        "odd and damaged images",
        "A random folder of images is prepared: 18 combinations of format and pixel type (1, 8, 16 and 32 bits, CMYK,"
        " palettes, EXIF orientations), four layouts of the splits, and odd entries: empty, truncated and damaged"
        " files, values out of range, broken links, links to themselves, to other files and to folders, hidden and"
        " thumbnail folders, pipes, other files, names that are not UTF-8, image files without a known suffix.",
        "every readable image is in the data exactly once, with its class; all unreadable files are named in one list,"
        " and left out only with `--skip-bad`; nothing else is read; every class has a training image",
        full=500,
        few=15,
        total=("images", "unreadable", "skipped"),
    ),
    Scenario(
        "history",
        "checkpoints under random sequences of faults",
        "Saves, power losses at random moments of a save or of its pruning, restarts, and damage to the newest"
        " checkpoint, in random order.",
        "the newest valid checkpoint is never lost",
        full=10_000,
        few=200,
        total=("saves", "power cuts", "damaged"),
    ),
    Scenario(
        "disk",
        "full disk, quota, I/O error",
        "The disk of a phase is full (a file system of 256 KiB, if the machine allows mounting one), or one call of a"
        " save fails with ENOSPC, EDQUOT or EIO. All calls and all three errors are tried.",
        "the previous checkpoint is intact; the message contains the path and, for a full disk, the number of free"
        " bytes; the next save succeeds",
        full=1,
        few=1,
        total=("failed calls", "full disks"),
    ),
    Scenario(
        "signal",
        "stop signals",
        "SIGTERM, SIGINT, SIGUSR1 or SIGUSR2, once or several times, at a random moment of any phase. Then the same"
        " command is run again. *Stopped* counts the trials that ended with exit code 75, *finished before* those with"
        " exit code 0. In all others, the signal ended the process after it had written the result of the phase.",
        "exit code 75, unless the phase was already finished; no step is lost, and the final weights are bitwise"
        " identical",
        full=50,
        few=1,
        total=("stopped", "finished before"),
    ),
    Scenario(
        "slurm",
        "a whole run on a Slurm cluster of three nodes",
        "The run is submitted once. Before the model is exported, a node crashes and comes back (immediately, or after"
        " Slurm has noticed), an array task is requeued, and a rank is killed; in every other trial a gate (the"
        " job that checks the other jobs) is killed too. Each fault happens in a random phase, after its first"
        " checkpoint.",
        "weights and results of every phase are bitwise identical to those of a run without faults; there are five jobs"
        " in total, no dependency that cannot be satisfied, and an empty queue at the end",
        full=20,
        few=1,
        total=("faults", "attempts", "crashes", "requeues", "kills", "gates killed"),
        most=("seconds",),
    ),
    Scenario(
        "order",
        "data order",
        "Reading is interrupted and resumed at 20 random points and at epoch boundaries, with 1, 2 and 4 ranks and with"
        " 0 and 2 workers.",
        "all batches are bitwise identical to those without interruption",
        full=144,
        few=0,
        total=("batches",),
    ),
    Scenario(
        "layouts",
        "resuming with a different world size or strategy",
        "A phase is stopped after 25 steps under each layout: every strategy with 2 and with 4 ranks, and one process."
        " It is then resumed for 25 steps under each layout. Training uses AdamW, a moving average, clipping, mixup or"
        " CutMix, and stochastic depth. One trial is one layout that resumes the checkpoints of all layouts.",
        "a checkpoint that is loaded and saved again is bitwise identical; every loss and gradient norm differs by at"
        " most 1e-5 from those of one process",
        full=13,
        total=("pairs",),
        most=("relative error of a loss",),
    ),
    Scenario(
        "stopped-rank",
        "a stopped rank",
        "One of two ranks receives SIGSTOP at a random moment, both with this project's launcher and without a"
        " launcher (as on Slurm, where srun starts the ranks).",
        "the rank is detected and named within 30 s, and all ranks exit",
        full=6,
        most=("seconds",),
    ),
)
BY_KEY = {scenario.key: scenario for scenario in SCENARIOS}
