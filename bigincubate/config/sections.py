"""The tables of a recipe: settings of a phase, and tables that all phases share."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, Field, create_model, model_validator

from .schema import OverridesOf, PathMark, PathText
from .tables import (
    Arguments,
    ConfigTable,
    Count,
    NonNegative,
    Pretrained,
    Unit,
    execution_field,
    one_of_or_object,
)

Phase = Literal["pretrain", "incubate", "finetune", "end_to_end"]
PHASES: tuple[Phase, ...] = get_args(Phase)
TrackerName = Literal["wandb", "mlflow", "csv"]

# timm's options of a RandAugment policy, without those that only other versions of timm know
RAND_AUGMENT = re.compile(
    r"rand(-(m\d{1,2}|n\d{1,2}|p[01]?\.\d+|p[01]|mstd\d+(\.\d+)?|mmax\d{1,2}|inc[01]|tweights|t3aw?))*"
)


def _check_rand_augment(policy: str) -> str:
    """Return the policy. timm ignores options that it does not know, or fails with an assertion."""
    if policy and not RAND_AUGMENT.fullmatch(policy):
        raise ValueError(
            "expected rand with options of timm such as -m9 (magnitude), -n2 (operations), -mstd0.5, -inc1, -p0.5:"
            ' "rand-m9-mstd0.5-inc1"'
        )
    return policy


def _check_profile(steps: list[int]) -> list[int]:
    """Return the first and the last step to profile. Only these two numbers, in this order, are accepted."""
    if len(steps) != 2 or not 1 <= steps[0] <= steps[1]:
        raise ValueError("expected [from, to], the first and the last step to profile, counted from 1, as in [10, 12]")
    return steps


class ModelConfig(ConfigTable):
    """The model and the arguments of its constructor."""

    library: str = "timm"
    """Library that the model comes from: `"timm"`, `"transformers"`, or `package.module:function`, which takes these
    settings and returns a ModelFamily."""
    name: str = "vit_base_patch16_224"
    """Name of the model in its library."""
    args: Arguments = Field(default_factory=dict)
    """timm: arguments of the model's constructor, except depth, image size and number of classes, which have other
    keys. transformers: keys of the model's configuration, including the depth of the target."""
    img_size: int = Field(224, ge=1, le=2**16)
    """Side of the square input images. Unit: pixels."""
    num_classes: Count = 1000
    """Number of classes; must be equal to that of the data."""
    context_length: Count = 1024
    """Number of tokens of a window that a language model reads. Unit: tokens."""


class TaskConfig(ConfigTable):
    """The task to learn."""

    name: Annotated[str, one_of_or_object("image_classification", "causal_lm")] = "image_classification"
    """The task: `image_classification`, `causal_lm`, or `package.module:Class` for a class of your own."""
    args: Arguments = Field(default_factory=dict)
    """Settings of a task that is not in this package."""


class DataConfig(ConfigTable):
    """Location and order of the samples."""

    source: Literal["digits", "digits-dev", "made-up", "stdlib", "made-up-text"] | None = None
    """Built-in data, prepared if it is missing: scikit-learn's handwritten digits (`digits`), their training split
    divided again for tuning (`digits-dev`), generated images (`made-up`); for language models, modules of Python's
    standard library (`stdlib`) or generated text (`made-up-text`)."""
    path: PathText | None = execution_field(None)
    """Folder of the prepared data. None: the folder `data` of the run directory, only for built-in data."""
    remote: Annotated[str, PathMark(unless=r"[A-Za-z][\w+.-]*:.*")] | None = execution_field(None)
    """URL or path of prepared data for the streaming library, which downloads it into `data.path`."""
    local_cache: Annotated[str, PathMark(on_node=True)] | None = execution_field(None)
    """Folder on a local disk of the node to which shards are copied, such as `"$TMPDIR"`."""
    local_cache_gib: NonNegative | None = execution_field(None)
    """Maximum size of the data to copy; larger data is refused. None: the free space. Unit: GiB."""
    workers: int = execution_field(0, ge=0)
    """Number of data loading processes per rank; 0: load in the training process. Unit: processes."""
    train_samples: Count | None = execution_field(None)
    """Expected size of the training split, so that `plan` can run without the data; checked once the data is read.
    Unit: samples."""
    decentralized: bool = False
    """Train module k only on partition k of the data, for the same number of steps as with all data."""
    canonical_nodes: int = Field(1, ge=1, le=2**16)
    """Number of parts into which the streaming library divides the samples when it shuffles (its
    `num_canonical_nodes`). It changes the order of samples and does not depend on the nodes of a job."""
    shuffle: Literal["py1e", "py1s", "py1br", "py2s"] = "py1e"
    """Shuffling algorithm of the streaming library."""
    shuffle_block_size: Count = 1 << 18
    """Size of the blocks within which samples are shuffled. Unit: samples."""


class TrainConfig(ConfigTable):
    """Length, batch size and precision of a phase."""

    lr: NonNegative = 1e-3
    """Learning rate after warm-up."""
    epochs: NonNegative = 100
    """Length of the phase; may be fractional. Unit: epochs."""
    max_steps: int | None = Field(None, ge=0)
    """Maximum length of the phase; the schedule then spans this number of steps. Unit: optimizer steps."""
    batch_size: Count = 256
    """Global batch size over all ranks and micro-batches; with repeated augmentation, each augmented copy of a
    sample counts. Unit: samples."""
    seed: int = Field(0, ge=0)
    """Seed of all random draws: initial weights, order of samples, augmentation, mixing, drop-path."""
    clip_grad: NonNegative = 1.0
    """Maximum global L2 norm of the gradient; 0: no clipping."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the forward and backward pass: fp32, or automatic mixed precision with bf16."""
    max_nonfinite: int = Field(10, ge=0)
    """Maximum number of steps with a non-finite loss or gradient, which are skipped. If exceeded, the phase rolls back
    to its last checkpoint once, and the next time ends with exit code 5. Unit: optimizer steps."""
    micro_batch: Count | None = execution_field(None)
    """Maximum number of samples in a forward pass of a rank. None: all of the rank's samples. Unit: samples."""
    compile: bool = execution_field(False)
    """Compile each block with torch.compile, and also the loss if `loss.name` is a `package.module:function`."""
    deterministic: bool = execution_field(True)
    """On a GPU, use only deterministic kernels, so that a resumed run computes the same bits."""
    subset_drop_path: bool = execution_field(False)
    """Compute residual branches only for the samples that drop-path keeps."""
    last_block_cls_only: bool = execution_field(False)
    """Compute only the class token in the last block, if the head uses no other token."""
    profile: Annotated[list[int], AfterValidator(_check_profile)] | None = execution_field(None)
    """First and last step to profile, `[from, to]`, counted from 1 as in the log. Each rank writes a trace and, on a
    GPU, a memory snapshot. None: no profile. Unit: optimizer steps."""


class OptimConfig(ConfigTable):
    """The optimizer, any of timm's."""

    name: str = "adamw"
    """Name of an optimizer in timm."""
    weight_decay: NonNegative = 0.05
    """Weight decay; not applied to norms, biases, position embeddings and class tokens."""
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field([0.9, 0.999], min_length=2, max_length=3)
    """Coefficients of the optimizer's running averages; ignored by optimizers without them."""
    eps: float = Field(1e-8, gt=0)
    """Term added to the optimizer's denominator for numerical stability."""
    layer_decay: float | None = Field(None, gt=0, le=1)
    """Factor by which the learning rate decreases from each layer to the previous one. None: equal for all layers."""
    lr_scaling: Annotated[str, one_of_or_object("none", "linear", "sqrt")] = "none"
    """How `train.lr` is scaled with the batch size: `none`, `linear`, `sqrt`, or by a learning-rate hook
    `package.module:attribute`."""
    lr_base_batch: Count = 512
    """Batch size at which the learning rate is `train.lr`, for `linear` and `sqrt`. Unit: samples."""


class ScheduleConfig(ConfigTable):
    """The learning-rate schedule of a phase."""

    name: Literal["cosine", "constant", "linear", "wsd"] = "cosine"
    """Shape of the learning rate after warm-up: cosine, constant, linear (a line down to `min_lr`) or wsd
    (warm-up-stable-decay: constant until it decays at the end)."""
    decay: Literal["linear", "sqrt"] = "linear"
    """How wsd decays to `min_lr`: linear (along a line) or sqrt (as 1 - sqrt, arXiv 2405.18392)."""
    decay_share: Unit = 0.2
    """Share of the steps, at the end, in which wsd decays."""
    warmup_epochs: NonNegative = 0
    """Length of the linear warm-up. Unit: epochs."""
    warmup_lr: NonNegative = 1e-6
    """Learning rate at the start of the warm-up."""
    min_lr: NonNegative = 1e-6
    """Learning rate at the end of the decay."""


class AugmentConfig(ConfigTable):
    """Augmentation of training images, named as in timm and the DeiT papers."""

    crop: Literal["random_resized", "simple", "pad", "none"] = "random_resized"
    """How training images are cropped: random_resized (Inception), simple (DeiT III), pad (CIFAR), or none
    (resized to a square)."""
    crop_scale: list[Annotated[float, Field(gt=0, le=1)]] = Field([0.08, 1.0], min_length=2, max_length=2)
    """Minimum and maximum of the crop's share of the image area, for `random_resized`."""
    pad: int = Field(4, ge=0)
    """Padding on each side before cropping, for `simple` and `pad`. Unit: pixels."""
    flip: Unit = 0.5
    """Probability of a horizontal flip."""
    color_jitter: float = Field(0.0, ge=0, le=10)
    """Strength of random changes of brightness, contrast and saturation; 0: off."""
    rand_augment: Annotated[str, AfterValidator(_check_rand_augment)] | None = None
    """RandAugment policy in timm's notation, such as `"rand-m9-mstd0.5-inc1"`."""
    three_augment: bool = False
    """Use DeiT III's 3-Augment: one of grayscale, solarization and Gaussian blur."""
    erase: Unit = 0.0
    """Probability of erasing a random rectangle."""
    repeated_aug: Count = 1
    """Repeated augmentation of DeiT: each sample is used this number of times in a row. The length of an epoch does not
    change, so with 3 it uses about a third of the samples. Unit: views."""
    distinct_epochs: Count | None = None
    """Number of epochs after which the augmentations repeat. None: they never repeat. Unit: epochs."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """Interpolation when images are resized."""
    mean: list[Unit] = Field([0.485, 0.456, 0.406], min_length=3, max_length=3)
    """Mean of each color channel, for normalization, with pixels from 0 to 1."""
    std: list[Annotated[float, Field(ge=0.001, le=1)]] = Field([0.229, 0.224, 0.225], min_length=3, max_length=3)
    """Standard deviation of each color channel, for normalization, with pixels from 0 to 1."""
    eval_crop: float = Field(0.875, ge=0.1, le=1)
    """Side of the center crop at evaluation, as a share of the shorter side of the image."""
    exif: Literal["ignore", "apply"] = "ignore"
    """Whether to turn an image as its EXIF orientation says before it is used, in training and at evaluation: `ignore`
    (as timm and torchvision read files) or `apply`. Prepared data stores image files, so this acts when they are
    decoded."""
    batch_transform: Annotated[str, one_of_or_object()] | None = None
    """Class `package.module:Class` that replaces the training transform: one part on the host, one on the device."""

    @model_validator(mode="after")
    def _consistent(self) -> AugmentConfig:
        if self.crop_scale[0] > self.crop_scale[1]:
            raise ValueError(f"crop_scale = {self.crop_scale}: the minimum is larger than the maximum; swap them")
        if self.rand_augment and self.three_augment:
            raise ValueError("rand_augment and three_augment cannot both be set; remove one")
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
    """Probability of CutMix instead of Mixup if both are on."""

    @property
    def active(self) -> bool:
        """Return whether batches are ever mixed."""
        return self.prob > 0 and (self.mixup > 0 or self.cutmix > 0)


class DropPathConfig(ConfigTable):
    """Stochastic depth, with drop-path rates that increase linearly over the blocks."""

    rate: float = Field(0.0, ge=0, lt=1)
    """Drop-path rate of the last block."""
    ramp_over: Literal["target", "hybrid"] = "target"
    """Model over whose blocks the rates increase linearly: `target` (each block has the rate of its position in the
    target model, and meta blocks have none) or `hybrid` (frozen blocks included, as in the official implementation)."""


class LossConfig(ConfigTable):
    """The loss of a phase.

    ``name`` is ``"cross_entropy"``, ``"bce"`` (binary cross-entropy per class, as in DeiT III), or a function
    ``(logits, first, second, share, label_smoothing) -> scalar`` on targets of two classes per row.
    """

    name: Annotated[str, one_of_or_object("cross_entropy", "bce")] = "cross_entropy"
    """Loss function: `cross_entropy`, `bce` (binary cross-entropy per class, as in DeiT III), or
    `package.module:function`."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of the target that is distributed evenly over all classes."""


class TextConfig(ConfigTable):
    """How a language model reads and writes text."""

    mask_documents: bool = False
    """Let a token attend only to tokens of its own document, and count positions from the start of the document."""
    prompt: str = execution_field("")
    """Beginning of the example that the trained model completes."""
    example_tokens: int = execution_field(256, ge=0)
    """Length of the example; 0: none. Unit: tokens."""


class EmaConfig(ConfigTable):
    """Exponential moving average of the weights."""

    decay: float = Field(0.0, ge=0, lt=1)
    """Decay per optimizer step of the exponential moving average of the weights; 0: no moving average."""


class Fsdp2Config(ConfigTable):
    """Options of ``strategy = "fsdp2"``."""

    replicas: Count = execution_field(1)
    """Number of replicas, for example one per node; weights are sharded over the ranks of a replica. Unit:
    replicas."""
    reshard_after_forward: bool = execution_field(True)
    """Free gathered weights after the forward pass; false: keep them until the backward pass."""
    shard_frozen: bool = execution_field(False)
    """Shard frozen weights too; they are then gathered in every forward pass."""
    gather_bf16: bool = execution_field(False)
    """Gather weights in bf16 if `train.precision = "bf16"`."""
    cpu_offload: bool = execution_field(False)
    """Keep weights, gradients and optimizer state in host memory."""


class ShardingConfig(ConfigTable):
    """How a phase is distributed over ranks. Options of strategies that are not selected are ignored."""

    strategy: Literal["none", "ddp", "fsdp2", "zero1", "zero2", "zero3", "oss"] = execution_field("ddp")
    """How weights, gradients and optimizer state are distributed over the ranks of a phase."""
    fsdp2: Fsdp2Config = Fsdp2Config()
    """Options of FSDP2."""
    deepspeed_config: Annotated[str, PathMark(unless=r"\w+")] | None = execution_field(None)
    """Path of a DeepSpeed file, or the name of an included one, for zero1 to zero3. None: the included file for the
    strategy."""
    activation_checkpointing: Literal["none", "full", "selective"] = execution_field("none")
    """Recompute activations in the backward pass: none, all of each block, or selected operations of each block."""


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
    text: TextConfig = TextConfig()
    ema: EmaConfig = EmaConfig()
    sharding: ShardingConfig = ShardingConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        if self.mixup.active and self.train.batch_size % 2:
            raise ValueError("mixup pairs the halves of a batch, so train.batch_size must be even")
        if self.augment.crop in ("simple", "pad") and self.augment.pad >= self.model.img_size:
            raise ValueError(
                f"augment.pad = {self.augment.pad}: some crops would contain only padding, because model.img_size ="
                f" {self.model.img_size}; use a smaller pad"
            )
        return self


# a phase may override keys of every table of `Settings`
_OVERRIDES: dict[str, Any] = {
    name: (Annotated[dict[str, Any], OverridesOf(field.annotation)], {})  # type: ignore[arg-type]
    for name, field in Settings.model_fields.items()
}
PhaseTables: type[ConfigTable] = create_model("PhaseTables", __base__=ConfigTable, **_OVERRIDES)


class PhaseConfig(PhaseTables):
    """The settings that a phase overrides; all others are taken from the common tables."""

    export: Literal["raw", "ema"] = "raw"
    """Weights that are saved in the artifact of the phase: the trained weights, or their moving average."""


class PretrainConfig(PhaseConfig):
    """The training of the meta model."""

    handover: Literal["end", "before_decay"] = "end"
    """When the meta model is handed on to the next phases: at the end, or before the decay of its schedule, which must
    be wsd; its training then ends there. A fork of the run takes over the steps before the decay in both cases."""


class IncubateConfig(PhaseConfig):
    """The incubation of the modules, and their initial weights."""

    init: Literal["fresh", "boundary", "grow", "stack"] = "fresh"
    """Initial weights of a module: fresh (random, as in the paper), boundary (stem, down-sampling, norm and head of the
    meta model), grow (also the blocks of the meta model; new blocks start as the identity) or stack (each block of the
    meta model several times in a row)."""
    boundary: Literal["own", "meta"] = "own"
    """Where the layers before the first and after the last block (embeddings; final norm and head) come from: own (the
    first and the last module train them) or meta (those of the meta model, frozen in every hybrid)."""
    optimizer: Literal["fresh", "kept"] = "fresh"
    """Optimizer state with which a module starts, and with which fine-tuning starts with it: fresh (none) or kept (each
    tensor that is copied from the meta model has the state of the last checkpoint there, and in fine-tuning each tensor
    of the module that of the module's last checkpoint). `"kept"` is refused as for `expand.optimizer`."""


Budget = Literal["equal_flops", "epochs"]
ModelInit = Literal["plain", "scaled", "mimetic"]


class FinetuneConfig(PhaseConfig):
    """The fine-tuning of the assembled model, or of a finished one."""

    init: Pretrained | None = None
    """A finished model to fine-tune on other data: the path of a run or an export, or any value that `meta.init`
    accepts. There is then no meta model and no module. It must have the architecture of the target; its head is
    replaced if the classes differ. None: fine-tune the assembled model."""

    budget: Budget = "equal_flops"
    """Length of fine-tuning if `plan.incubate` omits modules: as many steps as give the run the training FLOPs of an
    incubation of all modules, or `finetune.train.epochs`. If all modules are incubated, both are the same."""


class EndToEndConfig(PhaseConfig):
    """The end-to-end baseline."""

    budget: Budget = "equal_flops"
    """Length of the end-to-end baseline: the training FLOPs of an incubation of all modules (whichever
    `plan.incubate` lists), or `end_to_end.train.epochs`."""
    init: ModelInit = "plain"
    """Initial weights of the baseline: plain (the library's), scaled (the last layer of each residual branch divided by
    the square root of the number of branches, as in GPT-2) or mimetic (attention that resembles that of pretrained
    ViTs, and sinusoidal position embeddings, arXiv 2305.09828; only for ViT and DeiT)."""


class LogConfig(ConfigTable):
    """Logging and evaluation during a phase."""

    every_steps: Count = execution_field(50)
    """Interval of logged training metrics. Unit: optimizer steps."""
    eval_every_epochs: int = execution_field(0, ge=0)
    """Interval of evaluation; 0: only at the end of the phase. Unit: epochs."""
    images: int = execution_field(8, ge=0)
    """Number of augmented inputs in TensorBoard. Unit: images."""
    straggler_share: NonNegative = execution_field(0.5)
    """A rank is reported as slow if its own work in a step (waiting for data, forward passes) takes longer than the
    median of all ranks by more than this share of the median, and by more than a tenth of the step; 0: ranks are not
    compared."""
    trackers: list[TrackerName] = execution_field([])
    """Trackers that a phase is sent to while it trains, by a process of its own ([trackers](trackers.md)): `"wandb"`
    (offline, unless the variable `WANDB_MODE` says otherwise), `"mlflow"` (to the server in the variable
    `MLFLOW_TRACKING_URI`) or `"csv"`."""


class CheckpointConfig(ConfigTable):
    """Resume checkpoints."""

    every_steps: Count = execution_field(500)
    """Interval of resume checkpoints. Unit: optimizer steps."""
    keep: int = execution_field(2, ge=2)
    """Number of checkpoints to keep; older ones are removed. Unit: checkpoints."""
