"""Image classification: the model of a phase, its loss, its evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...config import Recipe
from ...config.objects import load_object
from ...data.dataset import DatasetInfo
from ...data.partitions import seen_by
from ...data.streams import Batch, EvalStream
from ...distributed.process_group import RunEnv
from ...errors import ArtifactError
from ...experimental.device_augment import finish, finish_and_blend
from ...interchange.pretrained import pretrained_meta
from ...models import Partition, assemble, extract, fit_positions, initialise, insert
from ...planning.phases import PhasePlan, Plan, phase_model
from ...seeds import INIT, stable_seed
from ...storage.artifacts import check_module, load_artifact, load_manifest
from ...storage.run_directory import RunDir
from .mixup import TwoHot, blend


@dataclass
class ClassificationTask:
    """One phase of a classification experiment."""

    recipe: Recipe
    plan: Plan
    row: PhasePlan
    data: DatasetInfo

    def __post_init__(self) -> None:
        self.settings = self.recipe.settings(self.row.phase)
        self.partition = Partition(self.plan.family, self.row.depths)
        self.target = Partition(self.plan.family, self.plan.target)
        self.meta = Partition(self.plan.family, self.plan.meta)
        self.named_loss: Callable[..., Tensor] | None = None  # on targets of two classes per row
        if ":" in (name := self.settings.loss.name):
            self.named_loss = load_object(name, key="loss.name")
            if self.settings.train.compile:
                self.named_loss = torch.compile(self.named_loss)

    def build_model(self, run: RunDir, start: Mapping[str, Tensor] | None = None) -> tuple[nn.Module, str | None]:
        """The row's model with the weights it starts from, frozen as the row says, and the digest of the meta model
        it uses (None: it uses none).

        Args:
            start: what the part that trains starts from instead: a module's tensors under the target's names, or all
                of another row's.

        Raises:
            ArtifactError: an earlier phase has not handed on what this one needs; the message has the command.
        """
        torch.manual_seed(stable_seed(self.settings.train.seed, INIT, self.row.key))
        model = phase_model(self.row, self.settings, self.plan.family)
        sources = {slot.source for slot in self.row.slots}
        digest = None
        if "meta" in sources:
            meta, digest = self.meta_model(run)
            meta = fit_positions(meta, model)
            for module, slot in enumerate(self.row.slots):
                if slot.source == "meta":
                    insert(model, self.partition, extract(meta, self.meta, module), self.meta)
            assert self.row.module is not None
            initialise(model, self.partition, self.row.module, meta, self.meta, self.recipe.incubate.init)
        if "module" in sources:
            digest = self.meta_digest(run)
            assembled = assemble(list(self._modules(run, digest)), model.state_dict())
            model.load_state_dict(fit_positions(assembled, model))
        if start is None and self.row.phase == "pretrain" and self.recipe.meta.init is not None:
            start = pretrained_meta(self.recipe.meta, self.settings.model, self.partition, model.state_dict())
        if start is not None:
            names = self.partition if self.row.module is None else self.target
            insert(model, self.partition, fit_positions(start, model), names)
        return model, digest

    def meta_digest(self, run: RunDir) -> str:
        """
        Raises:
            ArtifactError: the meta model is not there; the message has the command.
        """
        try:
            return load_manifest(run.phase("pretrain").artifact).digest
        except ArtifactError:
            raise ArtifactError(
                f"the meta model is missing in {run.path}; make it with:"
                f" bigincubate train {run.recipe_file} --run-dir {run.path} --phase pretrain"
            ) from None

    def meta_model(self, run: RunDir) -> tuple[dict[str, Tensor], str]:
        """Its tensors and its digest.

        Raises:
            ArtifactError: it is not there, or damaged.
        """
        self.meta_digest(run)
        tensors, manifest = load_artifact(run.phase("pretrain").artifact)
        return tensors, manifest.digest

    def _modules(self, run: RunDir, meta: str) -> Iterable[dict[str, Tensor]]:
        folders = [run.phase("incubate", module).artifact for module in range(self.plan.modules)]
        problems: dict[int, str] = {}
        for module, folder in enumerate(folders):
            seen = seen_by(self.recipe, self.data, module)
            if problem := check_module(folder, recipe=self.recipe.digest, meta=meta, data=seen):
                problems[module] = problem
        if problems:
            listed = "; ".join(f"module {module}: {problem}" for module, problem in problems.items())
            first = next(iter(problems))
            raise ArtifactError(
                f"cannot assemble: {listed}. Make it with: bigincubate train {run.recipe_file}"
                f" --run-dir {run.path} --phase incubate --module {first}"
            )
        return (load_artifact(folder)[0] for folder in folders)

    # -------------------------------------------------------------------------------------- what is learned

    def prepare(self, batch: Batch, step: int) -> tuple[Tensor, Tensor | TwoHot]:
        """Return the inputs ``[n, 3, H, W]`` and targets ``[n, classes]`` of a micro-batch, mixed and smoothed.

        Targets are shares that sum to one; with ``loss.name = "bce"`` each class in the image is 1, whatever its
        share, as in DeiT III (arXiv 2204.07118). Smoothing by s moves both kinds to (1 - s) target + s / classes. For
        a loss named ``package.module:function`` they stay two classes and a share, not smoothed.
        """
        loss, classes = self.settings.loss, self.settings.model.num_classes
        images, targets = self._mixed(batch, step)
        if self.named_loss:
            return images, targets
        if loss.name != "bce":
            return images, targets.dense(classes, loss.label_smoothing)
        shown = (targets.dense(classes, 0.0) > 0).float()
        return images, shown * (1 - loss.label_smoothing) + loss.label_smoothing / classes

    def _mixed(self, batch: Batch, step: int) -> tuple[Tensor, TwoHot]:
        mixup, seed = self.settings.mixup, self.settings.train.seed
        if batch.parameters is None:
            return blend(batch.images, batch.labels, mixup=mixup, seed=seed, step=step)
        return finish_and_blend(
            batch.images,
            batch.parameters,
            batch.labels,
            augment=self.settings.augment,
            mixup=mixup,
            seed=seed,
            step=step,
        )

    def shown(self, batch: Batch) -> Tensor:
        """Inputs ``[n, 3, H, W]`` as they are before mixing, for people to look at."""
        if batch.parameters is None:
            return batch.images
        return finish(batch.images, batch.parameters, self.settings.augment)

    def loss(self, model: nn.Module, images: Tensor, targets: Tensor | TwoHot) -> Tensor:
        """Return the mean loss over the batch in fp32; that of ``bce`` is the mean over batch and classes."""
        chosen, logits = self.settings.loss, model(images)
        if isinstance(targets, TwoHot):
            assert self.named_loss is not None
            share = torch.full((len(logits),), targets.share, device=logits.device)
            return self.named_loss(logits, targets.labels, targets.partners, share, chosen.label_smoothing)
        measure = F.binary_cross_entropy_with_logits if chosen.name == "bce" else F.cross_entropy
        return measure(logits.float(), targets)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: EvalStream | Sequence[Batch],
    env: RunEnv,
    precision: str = "fp32",
    *,
    together: bool = False,
) -> dict[str, float]:
    """Top-1 and top-5 accuracy (percent) and mean cross entropy over every sample of every rank, each once.

    Args:
        together: the model needs all ranks in each forward; one that has fewer batches goes along with its last.
    """
    training = model.training
    model.eval()
    totals = torch.zeros(4, dtype=torch.float64)
    for batch in batches:
        batch = batch.to(env.device)
        with torch.autocast(env.device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits = model(batch.images).float()
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices
        hits = best == batch.labels[:, None]
        loss = F.cross_entropy(logits, batch.labels, reduction="none")
        sums = (hits[:, 0].sum(), hits.sum(), loss.double().sum(), torch.tensor(len(hits)))
        totals += torch.stack([value.double().cpu() for value in sums])
    if together:
        for _ in range(max(env.gather(len(batches))) - len(batches)):
            model(batch.images)
    model.train(training)
    if env.world > 1:
        torch.distributed.all_reduce(totals, group=env.control)
    top1, top5, loss, count = totals.tolist()
    return {"top1": 100 * top1 / count, "top5": 100 * top5 / count, "loss": loss / count, "samples": int(count)}
