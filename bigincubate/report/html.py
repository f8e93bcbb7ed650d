"""HTML elements of the pages. Text is escaped unless it is :class:`Markup`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..tasks.metric import Metric
from .units import format_duration, format_metric, format_quantity, format_three_digits


class Markup(str):
    """Text that is already HTML."""


NONE = Markup('<span class="soft">–</span>')


def join_markup(*parts: object) -> Markup:
    """Concatenate parts, and escape those that are not markup."""
    return Markup("".join(part if isinstance(part, Markup) else escape(str(part)) for part in parts))


def tag(name: str, *parts: object, **attributes: str) -> Markup:
    """Return an HTML element with attributes; ``class_`` becomes ``class``."""
    given = "".join(f' {key.rstrip("_")}="{escape(value)}"' for key, value in attributes.items())
    return Markup(f"<{name}{given}>{join_markup(*parts)}</{name}>")


def number(value: float, shown: str) -> Markup:
    """Return a number as formatted text with its full value as an attribute.

    Example: ``<data value="96.94444444444444">96.9</data>``.
    """
    return tag("data", shown, value=repr(value))


def score_number(metric: Metric, result: Mapping[str, Any] | None) -> Markup:
    """Return a metric of a result, or a dash if there is no result."""
    value = metric.value_in(result)
    return NONE if result is None or value is None else number(value, format_metric(metric, value, result["samples"]))


def duration_number(value: float) -> Markup:
    """Return a duration, given in seconds."""
    return number(value, format_duration(value))


def flops_number(value: float) -> Markup:
    """Return a number of FLOPs with a unit."""
    return number(value, format_quantity(value, "FLOP"))


def cost_numbers(cost: Mapping[str, float], flops_factor: float | None = None) -> list[Markup]:
    """Return the table cells of a cost: epochs, samples, FLOPs and time.

    Args:
        cost: The cost, by the keys in ``COSTS``.
        flops_factor: Divisor of the FLOPs, which then have no unit; None to show FLOPs with a unit.
    """
    flops = cost["flops"]
    return [
        number(cost["epochs"], f"{cost['epochs']:.3g}"),
        number(cost["seen"], f"{cost['seen']:,.0f}"),
        number(flops, format_three_digits(flops / flops_factor)) if flops_factor else flops_number(flops),
        duration_number(cost["seconds"]),
    ]


def table(head: Sequence[object], rows: Iterable[Sequence[object]], *, words: bool = False) -> Markup:
    """Return a table.

    Args:
        head: Cells of the header.
        rows: Cells of each row.
        words: Whether the cells are text rather than numbers.
    """
    lines = [tag("tr", *(tag("td", cell) for cell in row)) for row in rows]
    header = tag("thead", tag("tr", *(tag("th", cell) for cell in head)))
    inside = tag("table", header, tag("tbody", *lines), **({"class_": "words"} if words else {}))
    return tag("div", inside, class_="wide")


def definitions(pairs: Mapping[str, object]) -> Markup:
    """Return a description list of names and values."""
    return tag("dl", *(join_markup(tag("dt", name), tag("dd", value)) for name, value in pairs.items()))


def figure(drawing: str, caption: str) -> Markup:
    """Return a figure with a caption, given its SVG elements."""
    labeled = drawing.replace("<svg", f'<svg role="img" aria-label="{escape(caption)}"')
    return tag("figure", Markup(labeled), tag("figcaption", caption))


def html_page(title: str, *parts: object) -> str:
    """Return a complete HTML page that does not load other files.

    Lone surrogates, which Python uses for bytes of file names that are not UTF-8, are written as escape sequences.
    """
    style = (Path(__file__).with_name("page.css")).read_text()
    head = join_markup(
        Markup('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        tag("title", title),
        tag("style", Markup(style)),
    )
    page = f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{tag("main", *parts)}</body></html>\n'
    return page.encode(errors="backslashreplace").decode()
