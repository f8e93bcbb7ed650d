"""The tables of a recipe: the settings of a phase, and the tables that all phases share."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, create_model, model_validator

from .objects import OBJECT_NAME

Phase = Literal["pretrain", "incubate", "finetune", "end_to_end"]
PHASES: tuple[Phase, ...] = get_args(Phase)

Unit = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0)]
StageDepths = list[int] | list[list[int]]


def execution_field(default: Any, **constraints: Any) -> Any:
    """Return a pydantic field that is an execution key: it describes, or says where or how to compute, never what."""
    return Field(default, json_schema_extra={"execution": True}, **constraints)


def one_of_or_object(*names: str) -> AfterValidator:
    """Accept these names, and ``package.module:attribute``, which `load_object` loads where it is used."""

    def check(value: str) -> str:
        if value not in names and not OBJECT_NAME.fullmatch(value):
            raise ValueError(f"expected {' or '.join([*names, 'package.module:attribute'])}")
        return value

    return AfterValidator(check)


class ConfigTable(BaseModel):
    """Base class of the tables: strict types, unknown keys refused, immutable."""

    # defaults are validated too, so that 0 and 0.0 are the same recipe
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True)

    def flat(self) -> dict[str, Any]:
        """Return every key that is not None, dotted, with its value."""
        return dict(_flatten(self.model_dump(exclude_none=True)))


def _flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


class ModelConfig(ConfigTable):
    """The model and the arguments of its constructor."""

    library: str = "timm"  # or "package.module:function", which takes these settings and returns a ModelFamily
    name: str = "vit_base_patch16_224"
    args: dict[str, Any] = Field(default_factory=dict)
    img_size: Count = 224
    num_classes: Count = 1000


class TaskConfig(ConfigTable):
    """What is learned."""

    name: Annotated[str, one_of_or_object("image_classification")] = "image_classification"
    args: dict[str, Any] = Field(default_factory=dict)  # settings of a task from outside this package


class DataConfig(ConfigTable):
    """Where the samples are and in which order they are read."""

    source: Literal["digits", "digits-dev", "made-up"] | None = None  # embedded data, prepared if missing
    path: str | None = execution_field(None)  # a prepared folder; None: RUN_DIR/data, only for embedded data
    remote: str | None = execution_field(None)  # a URL of the streaming library, downloaded into `path`
    local_cache: str | None = execution_field(None)  # shards are copied to this disk of the node: "$TMPDIR"
    local_cache_gib: NonNegative | None = execution_field(None)  # larger data is refused; None: the free space
    workers: int = execution_field(0, ge=0)
    # expected number: lets `plan` run without the data, which is checked against it
    train_samples: Count | None = execution_field(None)
    decentralized: bool = False  # module k trains only on partition k, for as many steps as without
    canonical_nodes: Count = 1
    shuffle: Literal["py1e", "py1s", "py1br", "py2s"] = "py1e"
    shuffle_block_size: Count = 1 << 18


class PlanConfig(ConfigTable):
    """How the target model is cut. Depths: one number per module, or one list over stages per module."""

    modules: Count | None = None
    target_depths: StageDepths | None = None
    meta_depths: StageDepths | None = None

    @property
    def number(self) -> int:
        """Return the number of modules."""
        return self.modules or len(self.target_depths or ())

    @model_validator(mode="after")
    def _consistent(self) -> PlanConfig:
        if self.target_depths is None and self.meta_depths is not None:
            raise ValueError("meta_depths needs target_depths too")
        if self.modules and self.target_depths and self.modules != len(self.target_depths):
            raise ValueError(f"modules = {self.modules}, but target_depths lists {len(self.target_depths)}")
        if not self.modules and not self.target_depths:
            raise ValueError("set target_depths, or modules for a balanced cut")
        return self


class MetaConfig(ConfigTable):
    """The weights that the meta model starts from, instead of fresh ones; the phase ``pretrain`` then trains it."""

    # "timm:NAME", which timm may download, or the path of a run, an export, a .safetensors or .pth file
    init: str | None = None
    # indices of its blocks (one list per stage if there are several); "even" or None: first, last and evenly between
    select: str | list[int] | list[list[int]] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> MetaConfig:
        if self.init in ("", "timm:"):
            raise ValueError('init is a path, or "timm:" with the name of a model')
        if self.select is not None and self.init is None:
            raise ValueError("select chooses blocks of init: set init too")
        if self.select not in (None, "even") and not _in_order(self.select):
            raise ValueError(f'select is "even", or strictly ascending block indices (given: {self.select!r})')
        return self


def _in_order(select: Any) -> bool:
    """Return whether these are strictly ascending block indices, or one list of them per stage."""
    if not isinstance(select, list) or not select:
        return False
    if isinstance(select[0], list):
        return all(map(_in_order, select))
    return select[0] >= 0 and all(before < after for before, after in pairwise(select))


class TrainConfig(ConfigTable):
    """Length, batch and precision of a phase."""

    lr: NonNegative = 1e-3
    epochs: NonNegative = 100
    max_steps: int | None = Field(None, ge=0)  # limits `epochs`; the schedule then spans this number of steps
    batch_size: Count = 256  # global: summed over all ranks and micro-batches
    seed: int = Field(0, ge=0)
    clip_grad: NonNegative = 1.0  # global L2 norm; 0: no clipping
    precision: Literal["fp32", "bf16"] = "fp32"
    max_nonfinite: int = Field(10, ge=0)  # skipped steps allowed; with more, one rollback, then exit 5
    # maximum samples per forward pass of a rank; None: its whole share
    micro_batch: Count | None = execution_field(None)
    compile: bool = execution_field(False)  # torch.compile for each block, and for a loss named package.module:function
    subset_drop_path: bool = execution_field(False)  # drop-path computes branches only for the samples that are kept
    last_block_cls_only: bool = execution_field(False)  # the last block computes only the class token


class OptimConfig(ConfigTable):
    """Any optimizer that timm can make."""

    name: str = "adamw"
    weight_decay: NonNegative = 0.05
    betas: list[Unit] = Field([0.9, 0.999], min_length=2, max_length=3)
    eps: NonNegative = 1e-8
    layer_decay: float | None = Field(None, gt=0, le=1)
    lr_scaling: Annotated[str, one_of_or_object("none", "linear", "sqrt")] = "none"  # or a learning-rate hook
    lr_base_batch: Count = 512  # the batch size that train.lr is for, under "linear" and "sqrt"


class ScheduleConfig(ConfigTable):
    """The learning-rate schedule of a phase."""

    name: Literal["cosine", "constant"] = "cosine"
    warmup_epochs: NonNegative = 0
    warmup_lr: NonNegative = 1e-6
    min_lr: NonNegative = 1e-6


class AugmentConfig(ConfigTable):
    """Augmentation of training images, with the names of timm and of the DeiT papers."""

    crop: Literal["random_resized", "simple", "pad", "none"] = "random_resized"
    crop_scale: list[Unit] = Field([0.08, 1.0], min_length=2, max_length=2)
    pad: int = Field(4, ge=0)  # pixels on each side, for crop = "simple" and "pad"
    flip: Unit = 0.5
    color_jitter: NonNegative = 0.0
    rand_augment: str | None = None  # e.g. "rand-m9-mstd0.5-inc1"
    three_augment: bool = False
    erase: Unit = 0.0
    # repeated augmentation of DeiT: each sample is taken so often in succession, and an epoch keeps its length, so with
    # 3 it shows about a third of the samples
    repeated_aug: Count = 1
    distinct_epochs: Count | None = None  # epochs with different augmentations, then they repeat; None: all differ
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    mean: list[float] = Field([0.485, 0.456, 0.406], min_length=3, max_length=3)
    std: list[float] = Field([0.229, 0.224, 0.225], min_length=3, max_length=3)
    eval_crop: float = Field(0.875, gt=0, le=1)
    # a class, "package.module:Class", whose objects augment per image on the host and finish per batch on the device
    batch_transform: Annotated[str, one_of_or_object()] | None = None

    @model_validator(mode="after")
    def _one_policy(self) -> AugmentConfig:
        if self.rand_augment and self.three_augment:
            raise ValueError("rand_augment and three_augment exclude each other")
        return self


class MixupConfig(ConfigTable):
    """Mixup and CutMix, drawn once per global batch."""

    mixup: NonNegative = 0.0  # alpha of the Beta distribution; 0: off
    cutmix: NonNegative = 0.0
    prob: Unit = 1.0
    switch_prob: Unit = 0.5

    @property
    def active(self) -> bool:
        """Return whether batches are ever mixed."""
        return self.prob > 0 and (self.mixup > 0 or self.cutmix > 0)


class DropPathConfig(ConfigTable):
    """Stochastic depth: the rate of the last block, and the model over whose depth the rates increase linearly.

    ``target``: each block has the rate that it will have in the target model, and meta blocks have none.
    ``hybrid``: the rates increase over the hybrid model, frozen blocks included, as in the official implementation.
    """

    rate: float = Field(0.0, ge=0, lt=1)
    ramp_over: Literal["target", "hybrid"] = "target"


class LossConfig(ConfigTable):
    """The loss of a phase.

    ``name`` is ``"cross_entropy"``, ``"bce"`` (binary cross-entropy per class, as in DeiT III), or a function
    ``(logits, first, second, share, label_smoothing) -> scalar`` on targets of two classes per row.
    """

    name: Annotated[str, one_of_or_object("cross_entropy", "bce")] = "cross_entropy"
    label_smoothing: float = Field(0.0, ge=0, lt=1)  # share of the target that is spread evenly over all classes


class EmaConfig(ConfigTable):
    """Exponential moving average of the weights."""

    decay: float = Field(0.0, ge=0, lt=1)  # 0: no moving average


class Fsdp2Config(ConfigTable):
    """Options of ``strategy = "fsdp2"``."""

    replicas: Count = execution_field(1)  # weights are sharded over world / replicas ranks; for example one per node
    reshard_after_forward: bool = execution_field(True)  # false: gathered weights are kept until the backward pass
    shard_frozen: bool = execution_field(False)  # true: frozen weights are sharded too, and gathered in every forward
    gather_bf16: bool = execution_field(False)  # true, with train.precision = "bf16": weights are gathered as bf16
    cpu_offload: bool = execution_field(False)  # keep weights, gradients and optimizer state in host memory


class ShardingConfig(ConfigTable):
    """How a phase is distributed over ranks. Options of other strategies are ignored."""

    strategy: Literal["none", "ddp", "fsdp2", "zero1", "zero2", "zero3", "oss"] = execution_field("ddp")
    fsdp2: Fsdp2Config = Fsdp2Config()
    deepspeed_config: str | None = execution_field(None)  # zero1 to zero3: path or shipped name of a DeepSpeed file
    activation_checkpointing: Literal["none", "full", "selective"] = execution_field("none")


class Settings(ConfigTable):
    """All settings of one phase."""

    task: TaskConfig = TaskConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    augment: AugmentConfig = AugmentConfig()
    mixup: MixupConfig = MixupConfig()
    drop_path: DropPathConfig = DropPathConfig()
    loss: LossConfig = LossConfig()
    ema: EmaConfig = EmaConfig()
    sharding: ShardingConfig = ShardingConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        if self.mixup.active and self.train.batch_size % 2:
            raise ValueError("mixup pairs the halves of a batch: train.batch_size must be even")
        return self


# a phase may override keys of every table of `Settings`
_OVERRIDES: dict[str, Any] = {table: (dict[str, Any], {}) for table in Settings.model_fields}
PhaseTables: type[ConfigTable] = create_model("PhaseTables", __base__=ConfigTable, **_OVERRIDES)


class PhaseConfig(PhaseTables):
    """The settings that a phase overrides; all others come from the common tables."""

    export: Literal["raw", "ema"] = "raw"  # which weights become the artifact of the phase


class IncubateConfig(PhaseConfig):
    """The incubation of the modules, and what a module's new blocks start from."""

    init: Literal["fresh", "boundary", "grow"] = "fresh"


class EndToEndConfig(PhaseConfig):
    """The end-to-end baseline: with the training FLOPs of the whole incubation, or with a length of its own."""

    budget: Literal["equal_flops", "epochs"] = "equal_flops"


class LogConfig(ConfigTable):
    """Logging and evaluation during a phase."""

    every_steps: Count = execution_field(50)
    eval_every_epochs: int = execution_field(0, ge=0)  # 0: only at the end of the phase
    images: int = execution_field(8, ge=0)  # augmented inputs shown in TensorBoard


class CheckpointConfig(ConfigTable):
    """Resume checkpoints."""

    every_steps: Count = execution_field(500)
    keep: int = execution_field(2, ge=2)
