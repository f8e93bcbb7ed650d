"""Describe the machines and the software that attempts ran on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import format_count


def describe_devices(attempts: Iterable[Mapping[str, Any]]) -> str:
    """Return the devices of attempts, the most frequent first; empty if there are none."""
    return _list_by_count(map(_describe_device, attempts))


def describe_versions(attempts: Iterable[Mapping[str, Any]]) -> str:
    """Return the versions of libraries of attempts, the most frequent first; empty if there are none."""
    found = (attempt["versions"].items() for attempt in attempts)
    return _list_by_count(", ".join(f"{name} {version}" for name, version in each) for each in found)


def _describe_device(attempt: Mapping[str, Any]) -> str:
    text = f"{attempt['device']}, {format_count(attempt['world'], 'rank')}"
    if attempt["device"].startswith("CPU"):
        text += f" with {format_count(attempt['threads'], 'thread')}"
    return f"{text}, {attempt['sharding']}" if attempt["world"] > 1 else text


def _list_by_count(texts: Iterable[str]) -> str:
    found = Counter(texts).most_common()
    return "; ".join(f"{text} ({format_count(n, 'attempt')})" if len(found) > 1 else text for text, n in found)
