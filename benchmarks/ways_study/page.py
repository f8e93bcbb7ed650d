"""The results of a study as Markdown tables and a plot, written between two markers of a page."""

from __future__ import annotations

import re
import statistics
from pathlib import Path
from typing import Any

from bigincubate.errors import ConfigError
from bigincubate.files import write_text

from .definition import Study, Way
from .log import Entry, ran_on_cpu
from .paired import PairedDifference, compare_paired


class Results:
    """The final results of a study, taken from its log.

    Args:
        study: The study.
        entries: The lines of the log.
    """

    def __init__(self, study: Study, entries: list[Entry]) -> None:
        self.study, self.entries = study, entries
        self.final: dict[tuple[str, float, int], Entry] = {}
        for entry in entries:
            if entry["split"] == "validation" and ("metrics" in entry or entry.get("diverged")):
                self.final.setdefault((entry["way"], entry["budget"], entry["seed"]), entry)

    def trials(self, way: str, budget: float) -> list[Entry]:
        """Return the finished trials of a way at a budget, without those that diverged, by seed."""
        found = [entry for key, entry in self.final.items() if key[:2] == (way, budget) and "metrics" in entry]
        return sorted(found, key=lambda entry: entry["seed"])

    def values(self, way: str, budget: float) -> dict[int, float]:
        """Return the values of the metric of a way at a budget by seed."""
        return {entry["seed"]: entry["metrics"][self.study.metric.name] for entry in self.trials(way, budget)}

    def compare(self, way: str, rival: str, budget: float) -> PairedDifference | None:
        """Compare a way with a rival; None as long as fewer than two seeds are done."""
        return compare_paired(self.values(way, budget), self.values(rival, budget), self.study.primary.margin)

    @property
    def missing(self) -> list[str]:
        """Return how many final trials are missing or diverged, by way and budget."""
        lines = []
        for way in self.study.ways.values():
            for budget in way.budgets:
                seeds = self.study.seeds_of(way, budget)
                found = [self.final.get((way.name, budget, seed)) for seed in seeds]
                diverged = sum(entry is not None and "metrics" not in entry for entry in found)
                if absent := found.count(None):
                    lines.append(f"{way.title} at budget {budget:g}: {absent} of {len(seeds)} seeds not run")
                if diverged:
                    lines.append(f"{way.title} at budget {budget:g}: {diverged} of {len(seeds)} seeds diverged")
        return lines


def spread(values: list[float], digits: int) -> str:
    """Return the mean, the lowest and the highest value."""
    mean, low, high = (f"{value:.{digits}f}" for value in (statistics.mean(values), min(values), max(values)))
    return mean if len(values) == 1 else f"{mean} ({low} to {high})"


def table(header: list[str], rows: list[list[str]], numbers: int) -> str:
    """Return a Markdown table, whose last ``numbers`` columns are aligned to the right."""
    rule = ["---"] * (len(header) - numbers) + ["---:"] * numbers
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, rule, *rows])


def primary_table(results: Results) -> str:
    """Return the table of the primary comparisons."""
    rows, study, score = [], results.study, results.study.metric
    for each in study.primary.comparisons:
        found = results.compare(each.way, each.rival, each.budget)
        way, rival = (study.ways[name].title for name in (each.way, each.rival))
        on_path = study.ways[each.way].measure == "path"
        cells = ["not measured"] + [""] * (3 if study.primary.lead is None else 4)
        if found is not None:
            relative = f"{100 * found.mean / found.rival:+.1f}%"
            mean, low, high = (f"{value:+.{score.digits + 1}f}" for value in (found.mean, found.low, found.high))
            interval = f"{mean} ({low} to {high})"
            wanted = len(study.seeds_of(study.ways[each.way], each.budget))
            partial = "" if found.pairs == wanted else f", {found.pairs} of {wanted} seeds only"
            cells = [interval, relative, str(found.pairs), found.verdict + partial]
            if study.primary.lead is not None:
                cells.append("reached" if reaches_aim(found, study.primary.lead if on_path else None) else "missed")
        rows.append([way, rival, "critical path" if on_path else "FLOPs", f"{each.budget:g}", *cells])
    header = ["way", "rival", "equal", "budget", f"difference of {score.title} (95% interval)", "relative", "seeds"]
    return table([*header, "verdict", *([] if study.primary.lead is None else ["aim"])], rows, 0)


def reaches_aim(found: PairedDifference, lead: float | None) -> bool:
    """Return whether a way is ahead by a lead on average; without a lead, whether it is not behind."""
    if lead is None:
        return found.verdict in ("ahead", "not behind")
    return found.verdict == "ahead" and found.mean <= -lead


def ways_table(results: Results) -> str:
    """Return the table of all ways and budgets that have a finished trial."""
    rows, score = [], results.study.metric
    for way in results.study.ways.values():
        for budget in way.budgets:
            if not (trials := results.trials(way.name, budget)):
                continue
            metrics = [trial["metrics"] for trial in trials]
            also = [values[score.also] for values in metrics if score.also in values]
            first = trials[0]
            connected = first["connected_path_flops"]
            rows.append(
                [
                    *(way.title, f"{budget:g} ({way.measure})", str(len(trials))),
                    spread([values[score.name] for values in metrics], score.digits),
                    spread(also, score.also_digits) if also else "",
                    *(f"{first[key] / 1e12:.3f}" for key in ("flops", "path_flops")),
                    "" if connected is None else f"{connected / 1e12:.3f}",
                    *(f"{first[key] / 2**20:.1f}" for key in ("memory_before", "memory_last")),
                    "" if connected is None else f"{(first['sent_before'] + first['sent_last']) / 1e9:.2f}",
                    f"{statistics.mean(trial['seconds'] for trial in trials):.0f}",
                ]
            )
    seconds = "core-seconds" if all(map(ran_on_cpu, results.final.values())) else "seconds"
    header = [
        *("way", "budget", "seeds", f"{score.title}, mean (lowest to highest)", score.also_title),
        *("TFLOPs", "path", "path, DP", "MiB before", "MiB last", "GB sent, DP", seconds),
    ]
    return table(header, rows, 7)


def memory_sentence(results: Results) -> str | None:
    """Return a sentence if the ways of the primary comparisons win on memory alone, which the page must say."""
    study, won, lighter = results.study, False, False
    for each in study.primary.comparisons:
        found = results.compare(each.way, each.rival, each.budget)
        own, other = results.trials(each.way, each.budget), results.trials(each.rival, each.budget)
        if found is None:
            return None
        won |= found.verdict == "ahead"
        lighter |= own[0]["memory_before"] < max(other[0]["memory_before"], other[0]["memory_last"])
    if won or not lighter:
        return None
    return "**Incubation is ahead in no primary comparison: it only saves memory before the last phase.**"


def margin_sentence(study: Study) -> str:
    """Return what *not behind* means, and the aim of the study."""
    margin, title = study.primary.margin, study.metric.title
    worse = f"{margin.value:g} {title}" if margin.absolute else f"{100 * margin.value:g}%"
    text = f"*Not behind*: the interval excludes what is {worse} worse."
    if (lead := study.primary.lead) is not None:
        text += (
            f" The *aim*, fixed beforehand: ahead by {lead:g} {title} or more on average at equal critical path,"
            " not behind at equal FLOPs."
        )
    if study.unit == "TFLOP":
        text += " Budgets are in TFLOPs."
    return text


def devices_sentence(results: Results) -> str:
    """Return what the finished trials on the validation split ran on; empty if the log does not say."""
    known = [entry for entry in results.final.values() if entry.get("device") and entry.get("torch")]
    found = {f"{entry['device']} with torch {entry['torch']}" for entry in known}
    return f" Validation trials ran on: {'; '.join(sorted(found))}." if found else ""


def markdown(results: Results, plot: str | None) -> str:
    """Return what is written between the markers."""
    study = results.study
    tuning = [entry for entry in results.entries if entry["split"] == "development"]
    failed = sum("error" in entry for entry in results.entries)
    counts = (
        f"{len(tuning)} trials on the development split and {len(results.final)} on the validation split are in the"
        f" log, {failed} of them failed."
    )
    if not results.final:
        return f"Not measured yet. {counts}\n"
    versions = ", ".join(sorted({entry["version"] for entry in results.final.values()}))
    parts = [f"{counts} Versions: {versions}.{devices_sentence(results)}"]
    exploratory = "All rows are exploratory."
    if study.primary.comparisons:
        parts += [
            f"Primary comparisons, fixed beforehand ({study.metric.title} on the validation split, paired by seed,"
            f" {len(study.primary.seeds)} seeds):",
            primary_table(results),
            margin_sentence(study),
        ]
        exploratory = (
            f"Rows that are not in a primary comparison have {len(study.final.seeds)} seeds and are exploratory."
        )
    if sentence := memory_sentence(results):
        parts.append(sentence)
    parts += [
        f"All ways and budgets. {exploratory} *path*: FLOPs on the critical path of separate workers; *DP*: the workers"
        " are connected and share all batches outside of the modules (data parallelism); memory is of one separate"
        " worker, before and in the last phase.",
        ways_table(results),
    ]
    if plot:
        parts.append(
            f"![{study.metric.title.capitalize()} against training FLOPs and FLOPs on the critical path]({plot})"
        )
    missing = results.missing
    parts.append("Missing: " + ("; ".join(missing) + "." if missing else "nothing."))
    return "\n\n".join(parts) + "\n"


def draw_frontier(results: Results, out: Path) -> bool:
    """Plot the metric against FLOPs and against FLOPs on the critical path, and return whether there was anything."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot, ticker

    if not any("metrics" in entry for entry in results.final.values()):
        return False
    figure, axes = pyplot.subplots(1, 2, figsize=(13, 4.2), sharey=True, layout="constrained")
    labels = ("training TFLOPs", f"TFLOPs on the critical path, {results.study.workers} separate workers")
    for axis, key, label in zip(axes, ("flops", "path_flops"), labels, strict=True):
        for color, way in enumerate(results.study.ways.values()):
            _draw_way(axis, results, way, key, f"C{color}")
        axis.set(xscale="log", yscale="log", xlabel=label)
        for scale in (axis.xaxis, axis.yaxis):
            scale.set_major_formatter("{x:g}")  # plain numbers, not powers of ten
            scale.set_minor_formatter("{x:g}")
            low, high = scale.get_view_interval()
            if high > 10 * low:  # labels of all minor ticks would overlap
                scale.set_minor_locator(ticker.LogLocator(subs=(2, 3, 5)))
        axis.grid(which="both", alpha=0.3)
    axes[0].set_ylabel(f"{results.study.metric.title}, validation")
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.suptitle(results.study.name)
    figure.savefig(out, dpi=150, metadata={"Software": None})
    pyplot.close(figure)
    return True


def _draw_way(axis: Any, results: Results, way: Way, key: str, color: str) -> None:
    groups = [trials for budget in sorted(way.budgets) if (trials := results.trials(way.name, budget))]
    if not groups:
        return
    mean = [[statistics.mean(trial[key] for trial in trials) / 1e12 for trials in groups]]
    name = results.study.metric.name
    mean.append([statistics.mean(trial["metrics"][name] for trial in trials) for trials in groups])
    axis.plot(*mean, color=color, marker="o", label=way.title, linestyle="--" if way.measure == "path" else "-")
    points = [(trial[key] / 1e12, trial["metrics"][name]) for trials in groups for trial in trials]
    axis.scatter(*zip(*points, strict=True), color=color, s=12, alpha=0.5)


def write_between_markers(page: Path, name: str, text: str) -> None:
    """Replace the text between the two markers of a study in a page.

    Raises:
        ConfigError: The page does not have the markers.
    """
    begin, end = f"<!-- ways {name}: written by benchmarks/ways.py -->", f"<!-- ways {name}: end -->"
    old = page.read_text()
    new, count = re.subn(
        f"{re.escape(begin)}.*{re.escape(end)}", lambda _: f"{begin}\n\n{text}\n{end}", old, count=1, flags=re.DOTALL
    )
    if not count:
        raise ConfigError(f"{page} has no markers of the study {name}; add two lines: {begin} and {end}")
    write_text(page, new)
