"""Image classification: labelled images, cross entropy, top-1 and top-5 accuracy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...config import AugmentConfig, DataConfig, ModelConfig, Settings
from ...config.objects import load_object
from ...data.batch import Batch
from ...data.dataset import DatasetInfo
from ...data.images import LABELLED_IMAGE, pixel_limit
from ...distributed.process_group import DistributedContext
from ...errors import ConfigError
from ..base import EvalBatches, Task, TrainBatches
from ..evaluation import Evaluation, EvaluationRequest, Evaluator
from ..metric import Metric
from .batch_transform import load_batch_transform
from .mixup import TwoHot, blend
from .outcomes import Outcomes
from .targets import SAME_CLASSES, Targets, find_targets

if TYPE_CHECKING:
    from ...data.partitions import PartitionFunction

LOSS_ARGUMENTS = ("logits", "labels", "partners", "share", "label_smoothing")


class ImageClassification(Task):
    """Classify images."""

    metrics = (
        Metric("top1", "top-1", "%"),
        Metric("top5", "top-5", "%", in_tables=False),
        Metric("loss", "loss", higher_is_better=False, format=".4f"),
    )
    unit = "images"
    record_kind = LABELLED_IMAGE
    unused_keys = ("text", "model.context_length")
    foreign_libraries = ("transformers",)
    hub_name = "image-classification"

    def __init__(self, settings: Settings, data: DataConfig) -> None:
        super().__init__(settings, data)
        if (channels := settings.model.args.get("in_chans", 3)) != 3:
            raise ConfigError(f"model.args.in_chans = {channels}: images have 3 channels; remove it")
        self.transform = load_batch_transform(settings.augment, settings.model.img_size)
        self.named_loss: Callable[..., Tensor] | None = None  # a loss for targets with two classes per row
        if ":" in (name := settings.loss.name):
            self.named_loss = load_object(name, *LOSS_ARGUMENTS, key="loss.name")
            if settings.train.compile:
                self.named_loss = torch.compile(self.named_loss)

    @classmethod
    def describe_model(cls, model: ModelConfig) -> str:
        """Return the size of the images and the number of classes."""
        size, classes = model.img_size, model.num_classes
        return f"It reads RGB images of {size:,} × {size:,} pixels and returns the logits of {classes:,} classes."

    def check_dataset(self, info: DatasetInfo) -> None:
        """Check the kind of the data, and that its number of classes is ``model.num_classes``."""
        super().check_dataset(info)
        if (found := _count_classes(info)) != self.settings.model.num_classes:
            raise ConfigError(
                f"{info.path} has {found} classes, but model.num_classes = {self.settings.model.num_classes}: set it"
                f" to {found}, or use other data"
            )

    def keeps_head(self, records: Mapping[str, Any], info: DatasetInfo) -> bool:
        """Return whether the classes have the same names in the same order, or are unknown; see `Task.keeps_head`."""
        return records.get("classes") in (None, info.schema.metadata["classes"])

    # ------------------------------------------------------------------------------------------ data

    def prepare_data(self, source: str, out: Path, divide: PartitionFunction | None) -> None:
        """Prepare built-in images; see `Task.prepare_data`."""
        from ...data.prepare import prepare_dataset
        from ...data.sources import EMBEDDED

        if source not in EMBEDDED:
            super().prepare_data(source, out, divide)
        prepare_dataset(source, out, partition=divide)

    def train_stream(self, info: DatasetInfo, *, rank: int, world: int) -> TrainBatches:
        """Return augmented images and their labels."""
        from ...data.streams import TrainStream
        from .views import TrainTransform

        augment, img_size, train = self.settings.augment, self.settings.model.img_size, self.settings.train
        transform = TrainTransform(
            augment, img_size, seed=train.seed, classes=_count_classes(info), max_pixels=pixel_limit(info.schema)
        )
        return TrainStream(
            info,
            self.data,
            transform,
            seed=train.seed,
            batch_size=train.batch_size,
            repeats=augment.repeated_aug,
            rank=rank,
            world=world,
        )

    def eval_stream(
        self, info: DatasetInfo, split: str, *, rank: int = 0, world: int = 1, batch_size: int | None = None
    ) -> EvalBatches:
        """Return center crops and their labels."""
        from ...data.streams import EvalStream
        from .views import EvalTransform

        settings, data = self.settings, self.data
        transform = EvalTransform(
            settings.augment,
            settings.model.img_size,
            classes=_count_classes(info),
            max_pixels=pixel_limit(info.schema),
        )
        size = batch_size or min(256, max(1, settings.train.batch_size // world))
        return EvalStream(
            info, split, transform, batch_size=size, rank=rank, world=world, workers=data.workers, remote=data.remote
        )

    def preview(self, batch: Batch) -> Tensor:
        """Return the images of a batch before mixing, without normalization."""
        augment, images = self.settings.augment, batch["images"]
        if self.transform is not None:
            images = self.transform.finish(images, batch["augment_params"])
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (augment.mean, augment.std))
        return (images.float().cpu() * std + mean).clamp(0, 1)

    # ------------------------------------------------------------------------------------------ loss

    def prepare(self, batch: Batch, step: int) -> tuple[Tensor, Tensor | TwoHot]:
        """Return mixed inputs ``[n, 3, H, W]`` and mixed, smoothed targets ``[n, classes]`` of a micro-batch.

        Targets are probabilities that sum to one. With ``loss.name = "bce"``, the target of each class in the image is
        1, as in DeiT III (arXiv 2204.07118). Smoothing by s changes both kinds to (1 - s) target + s / classes. For a
        loss named ``package.module:function``, targets are a `TwoHot` without smoothing.
        """
        loss, classes = self.settings.loss, self.settings.model.num_classes
        images, targets = self._mix(batch, step)
        if self.named_loss:
            return images, targets
        if loss.name != "bce":
            return images, targets.dense(classes, loss.label_smoothing)
        present = (targets.dense(classes, 0.0) > 0).float()
        return images, present * (1 - loss.label_smoothing) + loss.label_smoothing / classes

    def _mix(self, batch: Batch, step: int) -> tuple[Tensor, TwoHot]:
        mixup, seed = self.settings.mixup, self.settings.train.seed
        images, labels = batch["images"], batch["labels"]
        if self.transform is None:
            return blend(images, labels, mixup=mixup, seed=seed, step=step)
        return self.transform.finish_and_mix(images, batch["augment_params"], labels, mixup=mixup, seed=seed, step=step)

    def loss(self, model: nn.Module, batch: Batch, step: int) -> Tensor:
        """Return the mean loss over the batch in fp32, or over batch and classes for ``bce``."""
        images, targets = self.prepare(batch, step)
        logits = model(images)
        chosen = self.settings.loss
        if isinstance(targets, TwoHot):
            assert self.named_loss is not None
            share = torch.full((len(logits),), targets.share, device=logits.device)
            return self.named_loss(logits, targets.labels, targets.partners, share, chosen.label_smoothing)
        measure = F.binary_cross_entropy_with_logits if chosen.name == "bce" else F.cross_entropy
        return measure(logits.float(), targets)

    # ------------------------------------------------------------------------------------------ evaluation

    def evaluate(
        self, model: nn.Module, batches: EvalBatches, env: DistributedContext, *, pad_batches_across_ranks: bool = False
    ) -> dict[str, float]:
        """Return top-1 and top-5 accuracy (percent), mean cross entropy, and the number of samples."""
        return self._evaluate(model, batches, env, SAME_CLASSES, pad=pad_batches_across_ranks)

    @torch.no_grad()
    def _evaluate(
        self,
        model: nn.Module,
        batches: EvalBatches,
        env: DistributedContext,
        targets: Targets,
        *,
        outcomes: Outcomes | None = None,
        pad: bool = False,
    ) -> dict[str, float]:
        training = model.training
        model.eval()
        totals = torch.zeros(4, dtype=torch.float64)
        for batch in batches:
            batch = batch.to(env.device)
            with torch.autocast(env.device.type, torch.bfloat16, enabled=self.settings.train.precision == "bf16"):
                logits = model(batch["images"]).float()
            logits, labels, best, hits = targets.score(logits, batch)
            loss = F.cross_entropy(logits, labels, reduction="none")
            sums = (hits[:, 0].sum(), hits.any(dim=1).sum(), loss.double().sum(), torch.tensor(len(hits)))
            totals += torch.stack([value.double().cpu() for value in sums])
            if outcomes is not None:
                outcomes.add(labels, best, hits)
        if pad:
            for _ in range(max(env.gather(len(batches))) - len(batches)):
                model(batch["images"])
        model.train(training)
        if env.world > 1:
            torch.distributed.all_reduce(totals, group=env.control)
        top1, top5, loss_sum, count = totals.tolist()
        return {"top1": 100 * top1 / count, "top5": 100 * top5 / count, "loss": loss_sum / count, "samples": int(count)}

    def evaluator(self, request: EvaluationRequest) -> Evaluator:
        """Return a function that evaluates a finished model; see `Task.evaluator`."""
        if request.probe:
            return self._probe_evaluator(request)
        info = request.info
        super().check_dataset(info)
        targets = find_targets(info, self.settings.model.num_classes, request.records.get("classes"), request.classes)
        if targets.valid is not None and request.split != "val":
            raise ConfigError(f"--split {request.split}: lists of valid labels are of validation images; leave it out")

        def evaluate(model: nn.Module, env: DistributedContext) -> Evaluation:
            outcomes = Outcomes(sum(info.samples[split] for split in request.splits))
            scores = self._evaluate(model, self.requested_batches(request), env, targets, outcomes=outcomes)
            if targets.valid is not None:
                del scores["loss"]  # it is of one label per image
            per_class = outcomes.per_class(info.schema.metadata["classes"]) if request.per_class else None
            return Evaluation(scores, outcomes.intervals(), per_class, targets.matching)

        return evaluate

    def _probe_evaluator(self, request: EvaluationRequest) -> Evaluator:
        from .probe import probe

        info, kind = request.info, request.probe
        super().check_dataset(info)
        options = {"--classes": request.classes, "--per-class": request.per_class, "--split": request.split != "val"}
        if given := [option for option, value in options.items() if value]:
            raise ConfigError(f"{given[0]} is not for a probe, which learns from the training split; leave it out")

        def evaluate(model: nn.Module, env: DistributedContext) -> Evaluation:
            if not hasattr(model, "forward_head"):
                name = self.settings.model.name
                raise ConfigError(f"probe = {kind!r}: {name} has no features to classify; leave it out")
            train, val = (self.eval_stream(info, split, batch_size=request.batch_size) for split in ("train", "val"))
            return Evaluation(probe(kind, model, train, val, _count_classes(info), env.device))  # type: ignore[arg-type]

        return evaluate

    # ------------------------------------------------------------------------------------------ artifacts

    def artifact_metadata(self) -> dict[str, Any]:
        """Return the normalization, interpolation, crop ratio and EXIF rule of the model's inputs."""
        return self.settings.augment.model_dump(include={"mean", "std", "interpolation", "eval_crop", "exif"})

    @classmethod
    def artifact_settings(cls, model: ModelConfig, metadata: dict[str, Any]) -> Settings:
        """Return settings with the artifact's normalization, interpolation, crop ratio and EXIF rule."""
        return Settings(model=model, augment=AugmentConfig(**metadata))


def _count_classes(info: DatasetInfo) -> int:
    return len(info.schema.metadata["classes"])
