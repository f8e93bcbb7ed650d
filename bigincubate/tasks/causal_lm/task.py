"""Causal language modeling: predict each token of a text from the tokens before it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...config import DataConfig, ModelConfig, Settings
from ...data.batch import Batch
from ...data.dataset import DatasetInfo
from ...data.text.tokenizers import Tokenizer, load_tokenizer
from ...data.text.windows import TOKENS
from ...distributed.process_group import DistributedContext
from ...errors import ConfigError
from ...models.language.causal_lm import IGNORED
from ..base import EvalBatches, Task, TrainBatches
from ..metric import Metric
from .generate import complete
from .windows import TokenWindows

if TYPE_CHECKING:
    from ...data.partitions import PartitionFunction

# fraction of the built-in documents to hold out; small, so that an evaluation of a small model takes only seconds
BUILT_IN_VALIDATION = 0.02
MEAN_TARGETS = "mean_targets"  # column with the mean number of targets per window in the global batch


class CausalLanguageModeling(Task):
    """Predict the next token.

    The headline metric is the cross entropy of the text in bits per byte, which can be compared between models with
    different vocabularies. Separators are predicted too, but their cross entropy is a separate metric, because they
    have no bytes.
    """

    metrics = (
        Metric("bits_per_byte", "bits/byte", higher_is_better=False, format=".4f"),
        Metric("loss", "loss", higher_is_better=False, format=".4f"),
        Metric("perplexity", "perplexity", higher_is_better=False, in_tables=False),
        Metric("accuracy", "next-token accuracy", "%", in_tables=False),
        Metric("separator_bits", "separators, bits/byte", higher_is_better=False, format=".4f", in_tables=False),
    )
    unit = "tokens"
    record_kind = TOKENS
    unused_keys = (
        *("augment", "mixup", "drop_path", "loss.name", "loss.label_smoothing"),
        *("model.img_size", "model.num_classes"),
    )
    foreign_libraries = ("timm",)
    hub_name = "text-generation"

    def __init__(self, settings: Settings, data: DataConfig) -> None:
        super().__init__(settings, data)
        self.tokenizer: Tokenizer | None = None
        self.equal_windows = False  # whether all training windows have the same number of targets

    @classmethod
    def sample_units(cls, settings: Settings) -> int:
        """Return the number of tokens of a window."""
        return settings.model.context_length

    @classmethod
    def describe_model(cls, model: ModelConfig) -> str:
        """Return the length of the text and the size of the vocabulary."""
        size = model.args.get("vocab_size")
        vocabulary = "" if size is None else f" from a vocabulary of {size:,}"
        return f"It reads up to {model.context_length:,} tokens{vocabulary} and predicts the next token."

    @classmethod
    def approximate_flops(cls, parameters: int, units: int) -> int:
        """Return 6ND for all N parameters and D tokens, without attention (Kaplan et al., 2020, arXiv 2001.08361)."""
        return 6 * parameters * units

    @classmethod
    def smoke_data(cls) -> tuple[str, int]:
        """Return the name of the generated text, and its number of windows of 32 tokens."""
        return "made-up-text", 3648

    def check_dataset(self, info: DatasetInfo) -> None:
        """Check the kind of the data, the length of its windows and the size of its vocabulary."""
        super().check_dataset(info)
        model, metadata = self.settings.model, info.schema.metadata
        if metadata["window"] != model.context_length:
            raise ConfigError(
                f"{info.path} has windows of {metadata['window']} tokens, but model.context_length ="
                f" {model.context_length}: set it to {metadata['window']}, or prepare the data again with"
                f" --window {model.context_length}"
            )
        if (size := int(model.args.get("vocab_size", 0))) < metadata["vocabulary"]:
            raise ConfigError(
                f"{info.path} has a vocabulary of {metadata['vocabulary']} tokens, but model.args.vocab_size = {size}:"
                f" set it to {metadata['vocabulary']} or more"
            )

    def keeps_head(self, records: Mapping[str, Any], info: DatasetInfo) -> bool:
        """Check that the model was trained on tokens of the same tokenizer, if it is known; see `Task.keeps_head`."""
        ours = _identify_tokenizer(info.schema.metadata["tokenizer"])
        if known := records.get("tokenizer"):
            theirs = _identify_tokenizer(known)
            if ours not in (theirs, records.get("exported_tokenizer")):
                raise ConfigError(
                    f"finetune.init was trained on tokens of the tokenizer {theirs[:12]}, but {info.path} has tokens of"
                    f" {ours[:12]}: prepare the data with the model's (data prepare --tokenizer FILE)"
                )
        return True

    # ------------------------------------------------------------------------------------------ data

    def prepare_data(self, source: str, out: Path, divide: PartitionFunction | None) -> None:
        """Prepare built-in text as windows of ``model.context_length`` bytes; see `Task.prepare_data`."""
        from ...data.text.files import EMBEDDED_TEXT
        from ...data.text.prepare import prepare_text

        if source not in EMBEDDED_TEXT:
            super().prepare_data(source, out, divide)
        length = self.settings.model.context_length
        prepare_text(source, out, window=length, val_fraction=BUILT_IN_VALIDATION, partition=divide)

    def train_stream(self, info: DatasetInfo, *, rank: int, world: int) -> TrainBatches:
        """Return windows in random order."""
        from ...data.streams import TrainStream

        train = self.settings.train
        self.equal_windows = bool(info.schema.metadata.get("equal_windows"))
        return TrainStream(
            info,
            self.data,
            self._windows(info, scored=False),
            seed=train.seed,
            batch_size=train.batch_size,
            rank=rank,
            world=world,
        )

    def eval_stream(
        self, info: DatasetInfo, split: str, *, rank: int = 0, world: int = 1, batch_size: int | None = None
    ) -> EvalBatches:
        """Return the windows of a split. They overlap by one token, so that every token after the first is a target."""
        from ...data.streams import EvalStream

        return EvalStream(
            info,
            split,
            self._windows(info, scored=True),
            batch_size=batch_size or max(1, self.settings.train.batch_size // world),
            rank=rank,
            world=world,
            workers=self.data.workers,
            remote=self.data.remote,
        )

    def _windows(self, info: DatasetInfo, *, scored: bool) -> TokenWindows:
        self.tokenizer = load_tokenizer(info, self.data.remote)
        return TokenWindows(
            info.schema.metadata["window"],
            self.tokenizer.vocabulary,
            self.tokenizer.separator,
            mask_documents=self.settings.text.mask_documents,
            byte_lengths=self.tokenizer.byte_lengths() if scored else None,
        )

    # ------------------------------------------------------------------------------------------ loss

    def prepare_batch(self, batch: Batch, env: DistributedContext) -> Batch:
        """Add the mean number of targets per window in the global batch, which `loss` needs for its normalization."""
        count = (batch["targets"] != IGNORED).sum().double()
        if not self.equal_windows:
            count = env.sum_over_ranks(count.to(env.device)).cpu() / env.world
        return batch.with_column(MEAN_TARGETS, (count / len(batch)).expand(len(batch)))

    def loss(self, model: nn.Module, batch: Batch, step: int) -> Tensor:
        """Return the sum of the losses, divided by the expected number of targets in a micro-batch of this size.

        The expected number comes from the mean of the global batch, so the mean of this value over all micro-batches
        and ranks is the mean loss over all targets of the global batch.
        """
        losses = model(batch["inputs"], batch["targets"], batch.columns.get("documents"))
        return losses.sum() / batch[MEAN_TARGETS].sum().float()

    # ------------------------------------------------------------------------------------------ evaluation

    @torch.no_grad()
    def evaluate(
        self, model: nn.Module, batches: EvalBatches, env: DistributedContext, *, pad_batches_across_ranks: bool = False
    ) -> dict[str, float]:
        """Return the metrics over the targets of all ranks, and ``samples``, the number of targets."""
        training = model.training
        model.eval()
        totals = torch.zeros(5, dtype=torch.float64)
        autocast = self.settings.train.precision == "bf16"
        for batch in batches:
            batch = batch.to(env.device)
            targets, lengths = batch["targets"], batch["bytes"]
            with torch.autocast(env.device.type, torch.bfloat16, enabled=autocast):
                losses, hits = model(batch["inputs"], targets, batch.columns.get("documents"), with_hits=True)
            losses = losses.double()
            sums = (losses.sum(), (losses * (lengths > 0)).sum(), hits.sum(), lengths.sum(), (targets != IGNORED).sum())
            totals += torch.stack([value.double().cpu() for value in sums])
        if pad_batches_across_ranks:
            for _ in range(max(env.gather(len(batches))) - len(batches)):
                model(batch["inputs"], batch["targets"], batch.columns.get("documents"), with_hits=True)
        model.train(training)
        if env.world > 1:
            torch.distributed.all_reduce(totals, group=env.control)
        nats, text_nats, hits, size, count = totals.tolist()
        loss = nats / count
        return {
            "bits_per_byte": text_nats / math.log(2) / size,
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),  # the exponential of a larger loss overflows
            "accuracy": 100 * hits / count,
            "separator_bits": (nats - text_nats) / math.log(2) / size,
            "samples": int(count),
        }

    @torch.no_grad()
    def example_output(self, model: nn.Module, env: DistributedContext) -> str | None:
        """Return ``text.prompt`` with the continuation that the model generates."""
        text, train = self.settings.text, self.settings.train
        if self.tokenizer is None or not text.example_tokens:
            return None
        training = model.training
        model.eval()
        with torch.autocast(env.device.type, torch.bfloat16, enabled=train.precision == "bf16"):
            tokens = complete(
                model,
                [self.tokenizer.separator, *self.tokenizer.encode(text.prompt).tolist()],
                text.example_tokens,
                window=self.settings.model.context_length,
                vocabulary=self.tokenizer.vocabulary,
                end=self.tokenizer.separator,
                seed=train.seed,
                env=env,
            )
        model.train(training)
        return self.tokenizer.decode(tokens[1:])

    # ------------------------------------------------------------------------------------------ artifacts

    def artifact_metadata(self) -> dict[str, Any]:
        """Return whether attention is masked between documents."""
        return {"mask_documents": self.settings.text.mask_documents}

    @classmethod
    def artifact_settings(cls, model: Any, metadata: dict[str, Any]) -> Settings:
        """Return settings with the mask of documents that was used in training."""
        return Settings.model_validate({"model": model.model_dump(), "text": metadata})


def _identify_tokenizer(identity: dict[str, Any]) -> str:
    """Return the SHA-256 of the file of a tokenizer, or its name if it has no file."""
    return str(identity.get("sha256") or identity["name"])
