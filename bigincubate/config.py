"""Recipes: one experiment as typed, validated data.

A recipe is a TOML file. Values are taken in the order **defaults < recipe < --set**, and a phase's own sections
(``[incubate.train]``) come over the common ones (``[train]``). Every key is either *identity* (what is computed:
two runs that differ in one are different experiments) or *execution* (where and how it is computed: sharding,
workers, micro-batch, logging). Digests, refusals and lineage look at identity keys only.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import re
import tomllib
from collections.abc import Iterator, Sequence
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .errors import ConfigError

Phase = Literal["pretrain", "incubate", "finetune", "end_to_end"]
PHASES: tuple[Phase, ...] = get_args(Phase)

Unit = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0)]
StageDepths = list[int] | list[list[int]]
LARGEST, DEEPEST = 2**20, 20  # of a recipe: bytes, tables within tables


def execution(default: Any, **constraints: Any) -> Any:
    """A field that says where or how to compute, never what."""
    return Field(default, json_schema_extra={"execution": True}, **constraints)


class Section(BaseModel):
    """A table of the recipe: strict types, unknown keys refused, immutable."""

    # defaults are validated too, so that 0 and 0.0 are one recipe however it was read
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True)


class Model(Section):
    """Which timm model, and the arguments of its constructor."""

    name: str = "vit_base_patch16_224"
    args: dict[str, Any] = Field(default_factory=dict)
    img_size: Count = 224
    num_classes: Count = 1000


class Data(Section):
    """Where the samples are, and the order they come in."""

    source: Literal["digits", "digits-dev"] | None = None  # embedded data, prepared where it is missing
    path: str | None = execution(None)  # a prepared folder; None: RUN_DIR/data, for embedded data only
    remote: str | None = execution(None)  # streamed from here into `path` (any URL that streaming reads)
    stage: str | None = execution(None)  # copied there by the jobs that read it: a disk of the node, "$TMPDIR"
    stage_gib: NonNegative | None = execution(None)  # larger data is not staged; None: what is free
    workers: int = execution(0, ge=0)
    train_samples: Count | None = None  # expected size: checked against the data, and enough for `plan`
    canonical_nodes: Count = 1
    shuffle: Literal["py1e", "py1s", "py1br", "py2s"] = "py1e"
    shuffle_block_size: Count = 1 << 18


class Plan(Section):
    """How the target is cut. Depths: a number a module, or a list over stages a module."""

    modules: Count | None = None
    target_depths: StageDepths | None = None
    meta_depths: StageDepths | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Plan:
        if self.target_depths is None and self.meta_depths is not None:
            raise ValueError("meta_depths needs target_depths beside it")
        if self.modules and self.target_depths and self.modules != len(self.target_depths):
            raise ValueError(f"modules = {self.modules}, but target_depths lists {len(self.target_depths)}")
        if not self.modules and not self.target_depths:
            raise ValueError("give target_depths, or modules for a balanced cut")
        return self


class Train(Section):
    """Length, batch and precision of a phase."""

    lr: NonNegative = 1e-3
    epochs: NonNegative = 100
    max_steps: int | None = Field(None, ge=0)  # cuts `epochs` short; the schedule spans what is left
    batch_size: Count = 256  # global: over all ranks and micro-batches
    seed: int = Field(0, ge=0)
    clip_grad: NonNegative = 1.0  # global L2 norm; 0: no clipping
    precision: Literal["fp32", "bf16"] = "fp32"
    max_nonfinite: int = Field(10, ge=0)  # steps that may be skipped: more, and it goes back once, then exit 5
    micro_batch: Count | None = execution(None)  # samples a rank runs at once; None: its whole share
    compile: bool = execution(False)  # each block with torch.compile


class Optim(Section):
    """Any optimizer that timm can make."""

    name: str = "adamw"
    weight_decay: NonNegative = 0.05
    betas: list[Unit] = Field([0.9, 0.999], min_length=2, max_length=3)
    eps: NonNegative = 1e-8
    layer_decay: float | None = Field(None, gt=0, le=1)
    lr_scaling: Literal["none", "linear", "sqrt", "adascale"] = "none"
    lr_base_batch: Count = 512  # train.lr is for this batch; under adascale for a micro-batch of one rank instead


class Schedule(Section):
    """The learning rate over the steps of a phase."""

    name: Literal["cosine", "constant"] = "cosine"
    warmup_epochs: NonNegative = 0
    warmup_lr: NonNegative = 1e-6
    min_lr: NonNegative = 1e-6


class Augment(Section):
    """What happens to a training image. Names are timm's and the DeiT papers'."""

    crop: Literal["random_resized", "simple", "pad", "none"] = "random_resized"
    crop_scale: list[Unit] = Field([0.08, 1.0], min_length=2, max_length=2)
    pad: int = Field(4, ge=0)  # pixels on each side, for crop = "simple" and "pad"
    flip: Unit = 0.5
    color_jitter: NonNegative = 0.0
    rand_augment: str | None = None  # e.g. "rand-m9-mstd0.5-inc1"
    three_augment: bool = False
    erase: Unit = 0.0
    repeats: Count = 1  # repeated augmentation: this many views of each sample in a batch
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    mean: list[float] = Field([0.485, 0.456, 0.406], min_length=3, max_length=3)
    std: list[float] = Field([0.229, 0.224, 0.225], min_length=3, max_length=3)
    eval_crop: float = Field(0.875, gt=0, le=1)

    @model_validator(mode="after")
    def _one_policy(self) -> Augment:
        if self.rand_augment and self.three_augment:
            raise ValueError("rand_augment and three_augment exclude each other")
        return self


class Mixup(Section):
    """Mixup and CutMix, drawn once for the whole global batch."""

    mixup: NonNegative = 0.0  # alpha of the Beta distribution; 0: off
    cutmix: NonNegative = 0.0
    prob: Unit = 1.0
    switch_prob: Unit = 0.5

    @property
    def active(self) -> bool:
        return self.prob > 0 and (self.mixup > 0 or self.cutmix > 0)


class DropPathSection(Section):
    """Stochastic depth: the last block's rate, and which ramp leads there.

    ``target``: each block has the rate that it will have in the target model, meta blocks none.
    ``hybrid``: a ramp over the hybrid's own depth, frozen blocks included (the reference implementation's).
    """

    rate: float = Field(0.0, ge=0, lt=1)
    rates: Literal["target", "hybrid"] = "target"


class Loss(Section):
    label_smoothing: float = Field(0.0, ge=0, lt=1)


class Ema(Section):
    decay: float = Field(0.0, ge=0, lt=1)  # 0: no moving average


class Fsdp2(Section):
    """Choices of ``strategy = "fsdp2"``."""

    replicas: Count = execution(1)  # cut over world / replicas ranks, the same on every replica (one a node, say)
    reshard_after_forward: bool = execution(True)  # false: gathered weights stay until the backward
    shard_frozen: bool = execution(False)  # true: frozen weights are cut too, and gathered in every forward
    gather_bf16: bool = execution(False)  # true, with train.precision = "bf16": what is gathered is bf16
    cpu_offload: bool = execution(False)  # weights, gradients and optimizer state rest in host memory


class Sharding(Section):
    """How a phase is spread over ranks. Choices of a strategy that is not chosen mean nothing."""

    strategy: Literal["none", "ddp", "fsdp2", "zero1", "zero2", "zero3", "oss"] = execution("ddp")
    fsdp2: Fsdp2 = Fsdp2()
    deepspeed_config: str | None = execution(None)  # zero1 to zero3: a DeepSpeed file, or a shipped one's name
    activation_checkpointing: Literal["none", "every", "selective"] = execution("none")


class Settings(Section):
    """All that one phase computes with."""

    model: Model = Model()
    train: Train = Train()
    optim: Optim = Optim()
    schedule: Schedule = Schedule()
    augment: Augment = Augment()
    mixup: Mixup = Mixup()
    drop_path: DropPathSection = DropPathSection()
    loss: Loss = Loss()
    ema: Ema = Ema()
    sharding: Sharding = Sharding()

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        if self.train.batch_size % self.augment.repeats:
            raise ValueError(
                f"train.batch_size = {self.train.batch_size} is no multiple of augment.repeats = {self.augment.repeats}"
            )
        if self.mixup.active and (self.train.batch_size // self.augment.repeats) % 2:
            raise ValueError("mixup pairs the halves of a batch: train.batch_size / augment.repeats must be even")
        return self


class PhaseSection(Section):
    """A phase's own settings, sparse: what is not given comes from the common sections."""

    model: dict[str, Any] = Field(default_factory=dict)
    train: dict[str, Any] = Field(default_factory=dict)
    optim: dict[str, Any] = Field(default_factory=dict)
    schedule: dict[str, Any] = Field(default_factory=dict)
    augment: dict[str, Any] = Field(default_factory=dict)
    mixup: dict[str, Any] = Field(default_factory=dict)
    drop_path: dict[str, Any] = Field(default_factory=dict)
    loss: dict[str, Any] = Field(default_factory=dict)
    ema: dict[str, Any] = Field(default_factory=dict)
    sharding: dict[str, Any] = Field(default_factory=dict)
    export: Literal["raw", "ema"] = "raw"  # which weights the phase hands on


class Incubate(PhaseSection):
    init: Literal["fresh", "boundary", "grow"] = "fresh"


class EndToEnd(PhaseSection):
    """``equal_flops`` gives the baseline the training FLOPs of the whole incubation; ``epochs`` its own length."""

    budget: Literal["equal_flops", "epochs"] = "equal_flops"


class Log(Section):
    every_steps: Count = execution(50)
    eval_every_epochs: int = execution(0, ge=0)  # 0: at the end of the phase only
    images: int = execution(8, ge=0)  # augmented inputs shown in TensorBoard


class SlurmJob(Section):
    """What a job asks of Slurm; what is None is left to the site's defaults."""

    nodes: Count = execution(1)
    ranks: Count = execution(1)  # on each node; one a GPU
    gpus: int = execution(0, ge=0)  # on each node
    cpus: Count | None = execution(None)  # for each rank
    memory: str | None = execution(None)  # of each node: "64G"
    time: str | None = execution(None)  # "2-00:00:00"; what is not done by then is requeued
    partition: str | None = execution(None)
    account: str | None = execution(None)
    qos: str | None = execution(None)
    constraint: str | None = execution(None)
    extra: list[str] = execution([])  # further options of sbatch: ["--exclusive"]


class Slurm(SlurmJob):
    """How ``submit`` makes jobs. ``[slurm.incubate]`` and the like come over the common keys."""

    pretrain: dict[str, Any] = execution({})
    incubate: dict[str, Any] = execution({})
    finetune: dict[str, Any] = execution({})
    end_to_end: dict[str, Any] = execution({})
    gate: dict[str, Any] = execution({})
    concurrency: Count | None = execution(None)  # array tasks that run at the same time
    prelude: str | None = execution(None)  # a file that jobs source first: modules, conda, proxies
    python: str | None = execution(None)  # None: the interpreter that submits
    container: str | None = execution(None)  # put before python: "apptainer exec --nv image.sif"
    umask: str | None = execution(None, pattern="^0?[0-7]{3}$")  # "007": a run that a group shares
    self_submit: bool = execution(True)  # whether jobs may call sbatch; false: the gate says what to type
    rounds: Count = execution(3)  # times that a phase is submitted before a person must look
    restarts: int = execution(20, ge=0)  # times that a job requeues itself

    @model_validator(mode="after")
    def _jobs(self) -> Slurm:
        for kind in ("pretrain", "incubate", "finetune", "end_to_end", "gate"):
            self.job(kind)
        return self

    def job(self, kind: str) -> SlurmJob:
        """The common keys with those of a kind of job over them."""
        common = {key: getattr(self, key) for key in SlurmJob.model_fields}
        alone: dict[str, Any] = (
            {"nodes": 1, "ranks": 1, "gpus": 0, "memory": None, "extra": []} if kind == "gate" else {}
        )
        try:
            return SlurmJob.model_validate({**common, **alone, **getattr(self, kind)})
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            raise ValueError(f"slurm.{kind}.{key}: {first['msg']}") from None


class Checkpoint(Section):
    every_steps: Count = execution(500)
    keep: int = execution(2, ge=2)


class Recipe(Settings):
    """One experiment. :meth:`settings` gives what a phase computes with."""

    name: str = Field("experiment", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: str = execution("")
    data: Data = Data()
    plan: Plan
    pretrain: PhaseSection = PhaseSection()
    incubate: Incubate = Incubate()
    finetune: PhaseSection = PhaseSection()
    end_to_end: EndToEnd = EndToEnd()
    log: Log = Log()
    checkpoint: Checkpoint = Checkpoint()
    slurm: Slurm = Slurm()

    def section(self, phase: Phase) -> PhaseSection:
        section: PhaseSection = getattr(self, phase)
        return section

    def settings(self, phase: Phase) -> Settings:
        """The common sections with the phase's own over them."""
        own = self.section(phase)
        return Settings(
            **{
                key: type(getattr(self, key)).model_validate(merge(getattr(self, key).model_dump(), getattr(own, key)))
                for key in Settings.model_fields
            }
        )

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The identity keys, flat: ``{"train.lr": 0.001, "incubate.train.epochs": 26, …}``."""
        return {key: value for key, value in self.flat().items() if not is_execution(key)}

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the identity keys (hexadecimal)."""
        text = json.dumps(self.identity, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def flat(self) -> dict[str, Any]:
        """Every key that is set, dotted."""
        return dict(_flatten(self.model_dump(exclude_none=True)))

    def toml(self) -> str:
        """The resolved recipe, defaults included."""
        import tomli_w

        return tomli_w.dumps(self.model_dump(exclude_none=True))


# ------------------------------------------------------------------------------------------------ keys


def _flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """``over`` laid on ``base``, table by table. Neither is changed."""
    out = copy.deepcopy(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = merge(out[key], value) if both else copy.deepcopy(value)
    return out


def is_execution(key: str) -> bool:
    """Whether a dotted key says only where or how to compute."""
    first, *rest = key.split(".")
    if first in PHASES and rest and rest[0] in Settings.model_fields:
        first, *rest = rest  # a phase's own section follows the common one
    section: type[BaseModel] = Recipe
    for part in (first, *rest):
        field = section.model_fields.get(part)
        if field is None:
            return False
        if isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("execution"):
            return True
        if not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            return False
        section = field.annotation
    return False


def differences(old: Recipe, new: Recipe, *, execution_keys: bool = False) -> list[str]:
    """One line a key whose value differs: ``train.lr: 0.001 -> 0.002``."""
    before, after = old.flat(), new.flat()
    return [
        f"{key}: {json.dumps(before.get(key))} -> {json.dumps(after.get(key))}"
        for key in sorted(before.keys() | after.keys())
        if is_execution(key) == execution_keys and before.get(key) != after.get(key)
    ]


# ------------------------------------------------------------------------------------------------ reading


def shipped() -> dict[str, Path]:
    """Name -> file of the recipes that come with the package."""
    folder = Path(str(resources.files("bigincubate") / "recipes"))
    return {file.stem: file for file in sorted(folder.glob("*.toml"))}


def load_recipe(name_or_path: str, sets: Sequence[str] = ()) -> Recipe:
    """Read a shipped recipe by name, or a file by path, and lay ``--set`` values over it.

    Raises:
        ConfigError: naming the file and the key, with the nearest right name for an unknown one.
    """
    file = _find(name_or_path)
    try:
        if file.stat().st_size > LARGEST:
            raise ConfigError(f"{file}: larger than any recipe ({LARGEST} bytes)")
        raw = tomllib.loads(file.read_text())
    except (ValueError, RecursionError) as error:  # of Python's own limits besides those of TOML
        raise ConfigError(f"{file}: not valid TOML: {str(error).splitlines()[0]}") from None
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from None
    if _depth(raw) > DEEPEST:
        raise ConfigError(f"{file}: tables or lists nested more than {DEEPEST} deep")
    where = str(file)
    if sets:
        where += " with --set"
        for item in sets:
            raw = merge(raw, _parse_set(item))
    raw.setdefault("name", file.stem)
    recipe: Recipe = _validate(Recipe, raw, "", where)
    for phase in PHASES:
        own = recipe.section(phase)
        merged = {}
        for key in Settings.model_fields:
            common, over = getattr(recipe, key), getattr(own, key)
            merged[key] = _validate(type(common), merge(common.model_dump(), over), f"{phase}.{key}", where)
            # as validated, so that 26 and 26.0 are the same recipe
            over.update({name: getattr(merged[key], name) for name in over if name != "args"})
        settings: Settings = _validate(Settings, merged, phase, where)
        if own.export == "ema" and not settings.ema.decay:
            raise ConfigError(f'{where}: {phase}.export = "ema" needs {phase}.ema.decay (or ema.decay) above 0')
    return recipe


def _depth(value: Any) -> int:
    """How deep tables and lists are nested. Without recursion: that is what it protects from."""
    depth, level = 0, [value]
    while level := [
        inner
        for each in level
        if isinstance(each, dict | list)
        for inner in (each.values() if isinstance(each, dict) else each)
    ]:
        depth += 1
    return depth


def _find(name_or_path: str) -> Path:
    known = shipped()
    if name_or_path in known:
        return known[name_or_path]
    path = Path(name_or_path)
    if path.suffix == ".toml" and path.is_file():
        return path
    if path.suffix == ".toml":
        raise ConfigError(f"{path}: no such recipe file")
    near = difflib.get_close_matches(name_or_path, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
    raise ConfigError(f"no recipe {name_or_path!r}; {hint} (a path must end in .toml)")


def _parse_set(item: str) -> dict[str, Any]:
    key, equals, text = item.partition("=")
    key = key.strip()
    if not equals or not re.fullmatch(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*", key):
        raise ConfigError(f"--set {item}: expected KEY=VALUE, such as --set train.lr=1e-3")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()  # a bare word is a string
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _validate(section: type[Any], raw: Any, prefix: str, where: str) -> Any:
    try:
        return section.model_validate(raw)
    except ValidationError as error:
        problems = error.errors()
        first = problems[0]
        # pydantic adds the branch of a union to the path; only names of the recipe help the reader
        names = [str(part) for part in first["loc"] if isinstance(part, int) or re.fullmatch(r"\w+", str(part))]
        key = ".".join([prefix, *names] if prefix else names)
        if first["type"] == "extra_forbidden":
            message = f"unknown key {key!r}{_nearest(section, names)}"
        elif first["type"] == "missing":
            message = f"the table [{key}] is missing"
        else:
            text = first["msg"].removeprefix("Value error, ")
            given = "" if isinstance(first["input"], dict | BaseModel) else f" (given: {first['input']!r})"
            message = f"{key}: {text}{given}" if key else text
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ConfigError(f"{where}: {message}{more}") from None


def _nearest(section: type[BaseModel], names: list[str]) -> str:
    for part in names[:-1]:
        annotation = section.model_fields[part].annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            section = annotation
    near = difflib.get_close_matches(names[-1], section.model_fields, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; known here: {', '.join(section.model_fields)}"
