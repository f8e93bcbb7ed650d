"""Augmentation of a batch on the device."""

from .transform import HalfTransform, finish, finish_and_blend

__all__ = ["HalfTransform", "finish", "finish_and_blend"]
