"""Augment and mix a batch with one operator on the device.

Enabled by ``augment.batch_transform = "bigincubate.experimental.device_augment:DeviceAugment"``.
"""

from .transform import DeviceAugment

__all__ = ["DeviceAugment"]
