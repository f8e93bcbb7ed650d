"""Tables of the evaluation of a finished model, for the console."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from .console_tables import TextTable

if TYPE_CHECKING:
    from ..tasks.evaluation import DatasetEvaluation


def evaluation_table(source: object, evaluations: Sequence[DatasetEvaluation]) -> Table:
    """Return a table with a row for each data set.

    Args:
        source: The model, for the title.
        evaluations: Its evaluations.
    """
    metrics = list({metric.name: metric for each in evaluations for metric in each.metrics}.values())
    bounded = {name for each in evaluations for name in each.result.intervals}
    matched = any(each.result.matching for each in evaluations)
    columns = ["data", evaluations[0].unit]
    for metric in metrics:
        columns += [metric.column, "95% interval"] if metric.name in bounded else [metric.column]
    probe = evaluations[0].request.probe
    title = f"{source}: {f'{probe} probe' if probe else 'evaluation'}"
    table = TextTable(title, [*columns, *(["classes"] if matched else [])])
    for name, each in zip(_short_names(evaluations), evaluations, strict=True):
        cells = [f"{name}{each.split}", f"{each.result.scores['samples']:,}"]
        for metric in metrics:
            cells.append(metric.text(each.result.scores.get(metric.name)))
            if metric.name in bounded:
                cells.append(metric.interval_text(each.result.intervals.get(metric.name)))
        table.add_row(*cells, *([each.result.matching or "-"] if matched else []))
    return table


def class_table(evaluation: DatasetEvaluation) -> Table:
    """Return a table with a row for each class that has samples."""
    headline = evaluation.metrics[0]
    columns = ["class", evaluation.unit, headline.column, "most frequent wrong class", "times"]
    table = TextTable(f"classes of {evaluation.data}{evaluation.split}", columns)
    for each in evaluation.result.per_class or ():
        wrong = [each.wrong, f"{each.wrong_samples:,}"] if each.wrong is not None else ["-", "-"]
        table.add_row(each.name, f"{each.samples:,}", headline.text(each.score), *wrong)
    return table


def _short_names(evaluations: Sequence[DatasetEvaluation]) -> list[str]:
    """Return the last part of each path if these differ, and otherwise the paths."""
    paths = [str(each.data) for each in evaluations]
    names = [os.path.basename(os.path.abspath(path)) for path in paths]
    return names if len(set(names)) == len(set(paths)) else paths
