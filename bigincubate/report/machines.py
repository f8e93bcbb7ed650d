"""Describe the machines and the software that attempts ran on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any


def describe_devices(attempts: Iterable[Mapping[str, Any]]) -> str:
    """Return the devices of attempts, the most frequent first; empty if they were not recorded."""
    return _list_by_count(_describe_device(attempt) for attempt in attempts if "device" in attempt)


def describe_versions(attempts: Iterable[Mapping[str, Any]]) -> str:
    """Return the versions of libraries of attempts, the most frequent first; empty if they were not recorded."""
    found = (attempt["versions"].items() for attempt in attempts if "versions" in attempt)
    return _list_by_count(", ".join(f"{name} {version}" for name, version in each) for each in found)


def _describe_device(attempt: Mapping[str, Any]) -> str:
    text = f"{attempt['device']}, {attempt['world']} rank{'s' if attempt['world'] > 1 else ''}"
    if attempt["device"].startswith("CPU"):
        text += f" with {attempt['threads']} thread{'s' if attempt['threads'] > 1 else ''}"
    return f"{text}, {attempt['sharding']}" if attempt["world"] > 1 else text


def _list_by_count(texts: Iterable[str]) -> str:
    found = Counter(texts).most_common()
    return "; ".join(f"{text} ({n} attempts)" if len(found) > 1 else text for text, n in found)
