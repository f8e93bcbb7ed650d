"""TensorBoard's writer, imported without boto3, which TensorBoard imports to write to S3."""

from __future__ import annotations

from .lean_imports import replaced_modules

with replaced_modules({"botocore": None, "boto3": None}):
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["SummaryWriter"]
