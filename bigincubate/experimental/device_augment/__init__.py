"""Augmentation and mixing of a batch by one operator on the device.

Switched on by ``augment.batch_transform = "bigincubate.experimental.device_augment:DeviceAugment"``.
"""

from .transform import DeviceAugment

__all__ = ["DeviceAugment"]
