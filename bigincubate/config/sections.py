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
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        validate_default=True,
        use_attribute_docstrings=True,
    )

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

    library: str = "timm"
    """Library that the model comes from: `"timm"`, or `package.module:function`, which takes these settings and
    returns a ModelFamily."""
    name: str = "vit_base_patch16_224"
    """Name of the model in its library."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the model's constructor; depth, image size and number of classes have keys of their own."""
    img_size: Count = 224
    """Side of the square input images. Unit: pixels."""
    num_classes: Count = 1000
    """Number of classes, which must be that of the data."""


class TaskConfig(ConfigTable):
    """What is learned."""

    name: Annotated[str, one_of_or_object("image_classification")] = "image_classification"
    """What is learned: `image_classification`, or a class `package.module:Class` of your own."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Settings of a task from outside this package."""


class DataConfig(ConfigTable):
    """Where the samples are and in which order they are read."""

    source: Literal["digits", "digits-dev", "made-up"] | None = None
    """Data made by this package, prepared if it is missing: the handwritten digits of scikit-learn, their training
    part split again (to choose settings), or made-up images."""
    path: str | None = execution_field(None)
    """Folder of the prepared data. None: the folder `data` of the run directory, for embedded data only."""
    remote: str | None = execution_field(None)
    """URL of prepared data for the streaming library, which downloads it into `data.path`."""
    local_cache: str | None = execution_field(None)
    """Folder on a disk of the node to which shards are copied before training, such as `"$TMPDIR"`."""
    local_cache_gib: NonNegative | None = execution_field(None)
    """Largest amount of data that may be copied; larger data is refused. None: the free space. Unit: GiB."""
    workers: int = execution_field(0, ge=0)
    """Data loading processes per rank; 0 loads in the rank's own process. Unit: processes."""
    train_samples: Count | None = execution_field(None)
    """Expected size of the training split: lets `plan` run without the data, which is checked against it. Unit:
    samples."""
    decentralized: bool = False
    """Train module k on partition k of the data only, for as many steps as with all data."""
    canonical_nodes: Count = 1
    """Number of parts into which the order of samples is divided, whatever the number of real nodes (streaming's
    `num_canonical_nodes`)."""
    shuffle: Literal["py1e", "py1s", "py1br", "py2s"] = "py1e"
    """Shuffling algorithm of the streaming library."""
    shuffle_block_size: Count = 1 << 18
    """Size of the blocks within which samples are shuffled. Unit: samples."""


class PlanConfig(ConfigTable):
    """How the target model is cut. Depths: one number per module, or one list over stages per module."""

    modules: Count | None = None
    """Number of modules K. Without target depths the model is cut where the FLOPs of the modules are balanced."""
    target_depths: StageDepths | None = None
    """Blocks of each module of the target model: one number per module, or one list over stages per module. Unit:
    blocks."""
    meta_depths: StageDepths | None = None
    """Blocks of each module of the meta model, in the same form. None: the fewest that fit the target. Unit: blocks."""

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

    init: str | None = None
    """Weights to start the meta model from: `"timm:NAME"`, which timm may download, or the path of a run, an export,
    a .safetensors file or a .pth file. None: fresh weights."""
    select: str | list[int] | list[list[int]] | None = None
    """Indices of the blocks to take from `meta.init` (one list per stage if there are several). `"even"` or None:
    first, last and evenly between."""

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
    """Learning rate after warm-up."""
    epochs: NonNegative = 100
    """Length of the phase, which need not be whole. Unit: epochs."""
    max_steps: int | None = Field(None, ge=0)
    """Upper limit of the length; the schedule then spans this number of steps. Unit: optimizer steps."""
    batch_size: Count = 256
    """Global batch size, summed over all ranks and micro-batches; views of a sample count. Unit: samples."""
    seed: int = Field(0, ge=0)
    """Seed of everything random: initial weights, order of samples, augmentation, mixing, drop-path."""
    clip_grad: NonNegative = 1.0
    """Largest global L2 norm of the gradient; 0: no clipping."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the forward and backward pass: fp32, or automatic mixed precision with bf16."""
    max_nonfinite: int = Field(10, ge=0)
    """Optimizer steps with a loss or gradient that is not finite, which are skipped; with more of them the phase
    rolls back once to its last checkpoint, and the second time ends with exit code 5. Unit: optimizer steps."""
    micro_batch: Count | None = execution_field(None)
    """Maximum number of samples in a forward pass of a rank. None: the rank's whole share of the batch. Unit:
    samples."""
    compile: bool = execution_field(False)
    """Compile each block with torch.compile, and a loss that is named package.module:function."""
    deterministic: bool = execution_field(True)
    """On a GPU, use kernels whose results are the same in every run, so that a resumed run has the same bits."""
    subset_drop_path: bool = execution_field(False)
    """Compute residual branches only for the samples that drop-path keeps."""
    last_block_cls_only: bool = execution_field(False)
    """Compute only the class token in the last block, where the head uses no other token."""


class OptimConfig(ConfigTable):
    """Any optimizer that timm can make."""

    name: str = "adamw"
    """Name of an optimizer in timm."""
    weight_decay: NonNegative = 0.05
    """Weight decay; not applied to norms, biases, position embeddings and class tokens."""
    betas: list[Unit] = Field([0.9, 0.999], min_length=2, max_length=3)
    """Coefficients of the optimizer's running averages; ignored by optimizers without them."""
    eps: NonNegative = 1e-8
    """Term added to the optimizer's denominator for numerical stability."""
    layer_decay: float | None = Field(None, gt=0, le=1)
    """Factor by which the learning rate decreases from each layer to the one before it. None: the same for all."""
    lr_scaling: Annotated[str, one_of_or_object("none", "linear", "sqrt")] = "none"
    """How `train.lr` is scaled with the batch size: `none`, `linear`, `sqrt`, or by a learning-rate hook
    `package.module:attribute`."""
    lr_base_batch: Count = 512
    """Batch size that `train.lr` is meant for, under `linear` and `sqrt`. Unit: samples."""


class ScheduleConfig(ConfigTable):
    """The learning-rate schedule of a phase."""

    name: Literal["cosine", "constant"] = "cosine"
    """Shape of the learning rate after warm-up."""
    warmup_epochs: NonNegative = 0
    """Length of the linear warm-up. Unit: epochs."""
    warmup_lr: NonNegative = 1e-6
    """Learning rate at the start of the warm-up."""
    min_lr: NonNegative = 1e-6
    """Learning rate at the end of the cosine."""


class AugmentConfig(ConfigTable):
    """Augmentation of training images, with the names of timm and of the DeiT papers."""

    crop: Literal["random_resized", "simple", "pad", "none"] = "random_resized"
    """How training images get their size: random_resized (Inception), simple (DeiT III), pad (CIFAR), or none
    (resized to a square)."""
    crop_scale: list[Unit] = Field([0.08, 1.0], min_length=2, max_length=2)
    """Smallest and largest share of the image's area, for `random_resized`."""
    pad: int = Field(4, ge=0)
    """Border on each side before cropping, for `simple` and `pad`. Unit: pixels."""
    flip: Unit = 0.5
    """Probability of a horizontal flip."""
    color_jitter: NonNegative = 0.0
    """Strength of random changes of brightness, contrast and saturation; 0: off."""
    rand_augment: str | None = None
    """RandAugment policy in timm's notation, such as `"rand-m9-mstd0.5-inc1"`."""
    three_augment: bool = False
    """Use DeiT III's 3-Augment: one of grayscale, solarization and Gaussian blur."""
    erase: Unit = 0.0
    """Probability of erasing a random rectangle."""
    repeated_aug: Count = 1
    """Repeated augmentation of DeiT: each sample is taken this number of times in succession. An epoch keeps its
    length, so with 3 it shows about a third of the samples. Unit: views."""
    distinct_epochs: Count | None = None
    """Epochs with different augmentations, after which they repeat. None: all differ. Unit: epochs."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """Interpolation when images are resized."""
    mean: list[float] = Field([0.485, 0.456, 0.406], min_length=3, max_length=3)
    """Mean of each color channel, for normalization, with pixels from 0 to 1."""
    std: list[float] = Field([0.229, 0.224, 0.225], min_length=3, max_length=3)
    """Standard deviation of each color channel, for normalization, with pixels from 0 to 1."""
    eval_crop: float = Field(0.875, gt=0, le=1)
    """Side of the center crop at evaluation, as a share of the shorter side of the image."""
    batch_transform: Annotated[str, one_of_or_object()] | None = None
    """Class `package.module:Class` whose objects augment each image on the host and finish each batch on the device."""

    @model_validator(mode="after")
    def _one_policy(self) -> AugmentConfig:
        if self.rand_augment and self.three_augment:
            raise ValueError("rand_augment and three_augment exclude each other")
        return self


class MixupConfig(ConfigTable):
    """Mixup and CutMix, drawn once per global batch."""

    mixup: NonNegative = 0.0
    """Alpha of Mixup's Beta distribution; 0: off."""
    cutmix: NonNegative = 0.0
    """Alpha of CutMix's Beta distribution; 0: off."""
    prob: Unit = 1.0
    """Probability that a batch is mixed."""
    switch_prob: Unit = 0.5
    """Probability of CutMix where both are on."""

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
    """Drop-path rate of the last block."""
    ramp_over: Literal["target", "hybrid"] = "target"
    """Model over whose depth the rates increase linearly: `target` (each block has its rate in the target model, and
    meta blocks have none) or `hybrid` (frozen blocks included, as in the official implementation)."""


class LossConfig(ConfigTable):
    """The loss of a phase.

    ``name`` is ``"cross_entropy"``, ``"bce"`` (binary cross-entropy per class, as in DeiT III), or a function
    ``(logits, first, second, share, label_smoothing) -> scalar`` on targets of two classes per row.
    """

    name: Annotated[str, one_of_or_object("cross_entropy", "bce")] = "cross_entropy"
    """`cross_entropy`, `bce` (binary cross-entropy per class, as in DeiT III), or a function
    `package.module:function`."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of the target that is spread evenly over all classes."""


class EmaConfig(ConfigTable):
    """Exponential moving average of the weights."""

    decay: float = Field(0.0, ge=0, lt=1)
    """Decay per optimizer step of the exponential moving average of the weights; 0: no moving average."""


class Fsdp2Config(ConfigTable):
    """Options of ``strategy = "fsdp2"``."""

    replicas: Count = execution_field(1)
    """Number of replicas: weights are sharded over world / replicas ranks, for example one replica per node. Unit:
    replicas."""
    reshard_after_forward: bool = execution_field(True)
    """Free gathered weights after the forward pass; false keeps them until the backward pass."""
    shard_frozen: bool = execution_field(False)
    """Shard frozen weights too, which are then gathered in every forward pass."""
    gather_bf16: bool = execution_field(False)
    """Gather weights as bf16, with `train.precision = "bf16"`."""
    cpu_offload: bool = execution_field(False)
    """Keep weights, gradients and optimizer state in host memory."""


class ShardingConfig(ConfigTable):
    """How a phase is distributed over ranks. Options of other strategies are ignored."""

    strategy: Literal["none", "ddp", "fsdp2", "zero1", "zero2", "zero3", "oss"] = execution_field("ddp")
    """How weights, gradients and optimizer state are distributed over the ranks of a phase."""
    fsdp2: Fsdp2Config = Fsdp2Config()
    """Options of FSDP2."""
    deepspeed_config: str | None = execution_field(None)
    """Path or shipped name of a DeepSpeed file, for zero1 to zero3. None: the shipped file of the strategy."""
    activation_checkpointing: Literal["none", "full", "selective"] = execution_field("none")
    """Recompute activations in the backward pass: of no block, of every block, or selectively."""


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

    export: Literal["raw", "ema"] = "raw"
    """Weights that become the artifact of the phase: the trained ones, or their moving average."""


class IncubateConfig(PhaseConfig):
    """The incubation of the modules, and what a module's new blocks start from."""

    init: Literal["fresh", "boundary", "grow"] = "fresh"
    """What a module starts from: fresh weights (as in the paper), boundary (stem, down-sampling, norm and head of
    the meta model) or grow (its blocks too, with the other blocks as the identity)."""


class EndToEndConfig(PhaseConfig):
    """The end-to-end baseline: with the training FLOPs of the whole incubation, or with a length of its own."""

    budget: Literal["equal_flops", "epochs"] = "equal_flops"
    """Length of the end-to-end baseline: the training FLOPs of the whole incubation, or its own `train.epochs`."""


class LogConfig(ConfigTable):
    """Logging and evaluation during a phase."""

    every_steps: Count = execution_field(50)
    """Interval of logged training values. Unit: optimizer steps."""
    eval_every_epochs: int = execution_field(0, ge=0)
    """Interval of evaluation; 0: only at the end of the phase. Unit: epochs."""
    images: int = execution_field(8, ge=0)
    """Augmented inputs shown in TensorBoard. Unit: images."""


class CheckpointConfig(ConfigTable):
    """Resume checkpoints."""

    every_steps: Count = execution_field(500)
    """Interval of resume checkpoints. Unit: optimizer steps."""
    keep: int = execution_field(2, ge=2)
    """Checkpoints to keep; older ones are removed. Unit: checkpoints."""
