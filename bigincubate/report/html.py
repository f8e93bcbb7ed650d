"""The few elements that a page is made of. Text is escaped, unless it is :class:`Markup`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..tasks.metric import Metric
from .units import duration, measured, quantity, three


class Markup(str):
    """Text that is HTML already."""


NONE = Markup('<span class="soft">–</span>')


def text(value: object) -> Markup:
    return value if isinstance(value, Markup) else Markup(escape(str(value)))


def join(*parts: object) -> Markup:
    return Markup("".join(text(part) for part in parts))


def tag(name: str, *parts: object, **attributes: str) -> Markup:
    """An element; ``class_`` is written as ``class``."""
    given = "".join(f' {key.rstrip("_")}="{escape(value)}"' for key, value in attributes.items())
    return Markup(f"<{name}{given}>{join(*parts)}</{name}>")


def data(value: float | None, shown: str) -> Markup:
    """A number as people read it, and in full for programs: ``<data value="96.94444444444444">96.9</data>``."""
    return NONE if value is None else tag("data", shown, value=repr(value))


def score(metric: Metric, result: Mapping[str, Any] | None) -> Markup:
    """A metric of a result."""
    value = metric.value_in(result)
    return NONE if result is None or value is None else data(value, measured(metric, value, result["samples"]))


def seconds(value: float | None) -> Markup:
    return data(value, duration(value)) if value is not None else NONE


def count(value: float) -> Markup:
    return data(value, f"{value:,.0f}")


def flops(value: float) -> Markup:
    return data(value, quantity(value, "FLOP"))


def scaled(value: float, factor: float) -> Markup:
    """In the unit of its column."""
    return data(value, three(value / factor))


def table(
    head: Sequence[object], rows: Iterable[Sequence[object]], *, words: bool = False, total: bool = False
) -> Markup:
    """
    Args:
        words: text rather than numbers.
        total: the last row sums up those above it.
    """
    lines = [Markup("<tr>") + join(*(tag("td", cell) for cell in row)) + "</tr>" for row in rows]
    if total:
        lines[-1] = lines[-1].replace("<tr>", '<tr class="sum">', 1)
    header = tag("thead", tag("tr", *(tag("th", cell) for cell in head)))
    inside = tag("table", header, tag("tbody", Markup("".join(lines))), **({"class_": "words"} if words else {}))
    return tag("div", inside, class_="wide")


def definitions(pairs: Iterable[tuple[str, object]]) -> Markup:
    return tag("dl", *(join(tag("dt", name), tag("dd", value)) for name, value in pairs))


def figure(drawing: str, caption: str) -> Markup:
    return tag("figure", Markup(drawing), tag("figcaption", caption))


def page(title: str, *parts: object) -> str:
    """A whole page that asks nobody for anything: its style is in it."""
    style = (Path(__file__).with_name("page.css")).read_text()
    head = join(
        Markup('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        tag("title", title),
        tag("style", Markup(style)),
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{tag("main", *parts)}</body></html>\n'
