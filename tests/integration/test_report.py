"""A page about a run, and runs beside each other: the numbers are the run's, and the page asks nobody for anything."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from conftest import Command
from forked import run
from records import make_attempt

from bigincubate.errors import Exit
from bigincubate.files import append_json_line, read_json, write_json
from bigincubate.report import figures
from bigincubate.report.compare import compare_json, compare_page, label_routes
from bigincubate.report.console_tables import compare_table, status_table, summary_table
from bigincubate.report.page import render_report
from bigincubate.report.run_data import RunData, read_run
from bigincubate.report.status import run_status
from bigincubate.report.units import format_duration, format_percent, format_quantity
from bigincubate.report.verify import verify_run
from bigincubate.tasks.metric import Metric, planned_metrics

Harnesses = Callable[..., Any]
SETS = ("train.max_steps=6", "log.every_steps=2", "log.eval_every_epochs=1")
VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """Text, tables and numbers of a page, whose elements must be closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.rows: list[list[str]] = []
        self.numbers: dict[tuple[int, int], float] = {}  # (row, cell): in full
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "data" and "td" in self.open:
            self.numbers.setdefault((len(self.rows) - 1, len(self.rows[-1]) - 1), float(dict(attrs)["value"] or ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data
        if {"td", "th"}.intersection(self.open):
            self.rows[-1][-1] += data

    def row(self, title: str) -> dict[str, float | str]:
        """The first line that begins so, by the head of its table: numbers in full where there are any."""
        at = next(index for index, row in enumerate(self.rows) if row[0] == title)
        head = max(i for i in range(at) if self.rows[i][0] in ("phase", "run", "way", "in order of completion"))
        cells = enumerate(zip(self.rows[head], self.rows[at], strict=True))
        return {name: self.numbers.get((at, cell), shown) for cell, (name, shown) in cells}


def test_report_without_matplotlib_is_one_line_with_the_remedy(done: Any, tmp_path: Path, bigincubate: Command) -> None:
    """A comparison as a table needs no figures; what needs them writes nothing."""
    folder = done.run.path
    (tmp_path / "matplotlib.py").write_text("raise ImportError('not here')")
    blocked = {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])}
    for words in (["report", folder, "--out", tmp_path / "r.html"], ["compare", folder, "--out", tmp_path / "out"]):
        refused = bigincubate(*words, env=blocked)
        assert refused.returncode == Exit.ENVIRONMENT
        assert refused.stderr.splitlines() == [
            "bigincubate: figures need matplotlib (not here): pip install 'bigincubate[report]'"
        ]
    assert sorted(file.name for file in tmp_path.iterdir() if file.suffix != ".py") in ([], ["__pycache__"])
    assert bigincubate("compare", folder, env=blocked).returncode == 0


def page_of(folder: Any) -> Page:
    return Page(render_report(read_run(folder), list(verify_run(folder, everything=False))))


@pytest.fixture(scope="module")
def done(harness: Harnesses) -> Any:
    """Everything trained, the baseline too; module 0 was stopped once."""
    made = harness(*SETS)
    made.train("pretrain")
    trainer = made.trainer("incubate", 0)
    made.run.phase("incubate", 0).write_attempt(1, **make_attempt(state="preempted", host="elsewhere", job="17"))
    del trainer
    for phase, module in (("incubate", 0), ("incubate", 1), ("finetune", None), ("end_to_end", None)):
        made.train(phase, module)
    made.run.update_summary()
    return made


def test_numbers_on_the_page_are_those_of_the_summary(done: Any) -> None:
    page, summary = page_of(done.run), read_json(done.run.path / "summary.json")
    assert summary is not None
    wanted = {"meta model": summary["meta"], "assembled": summary["assembled"], "fine-tuning": summary["finetune"]}
    wanted |= {"end to end": summary["end_to_end"]}
    wanted |= {f"module {number}": result for number, result in enumerate(summary["modules"])}
    for title, result in wanted.items():
        row = page.row(title)
        assert (row["top-1 %"], row["loss"]) == (result["metrics"]["top1"], result["metrics"]["loss"]), title
        if title != "assembled":
            flops = next(value for name, value in row.items() if name.endswith("FLOP"))
            assert (row["images"], row["time"], flops) == (result["seen"], result["seconds"], result["flops"]), title
    core_seconds = page.row("meta model")["device time"]
    assert core_seconds == summary["meta"]["seconds"]  # one rank, one thread
    assert "core-s" in page.text


def test_page_says_what_each_way_has_cost(done: Any) -> None:
    page, flops = page_of(done.run), {row.key: row.total_flops for row in done.rows}
    page.rows = page.rows[next(at for at, row in enumerate(page.rows) if row[0] == "way") :]
    page.numbers = {}
    found = {title: page.row(title) for title in ("incubated", "end to end")}
    assert [row["sent last"] for row in found.values()] == ["\u2013", "\u2013"]  # one rank
    assert flops.pop("end_to_end") > 0
    routes = {route.name: route for route in read_run(done.run).routes}
    assert routes["incubated"].spent["flops"] == sum(flops.values())
    assert routes["incubated"].path("flops") == sum(flops.values()) - min(flops["incubate/0"], flops["incubate/1"])
    assert routes["end to end"].path("flops") == routes["end to end"].spent["flops"]
    assert all(route.last.peak_memory > 2**27 for route in routes.values())  # torch alone is larger


def test_gradients_are_sent_only_between_several_ranks(done: Any) -> None:
    phase = read_run(done.run).routes[0].phases[0]
    assert phase.sent_gradients == 0
    two = replace(phase, attempts=[{**attempt, "world": 2} for attempt in phase.attempts])
    assert two.sent_gradients == 6 * phase.planned["cost"]["allreduce_bytes"]


def test_page_is_one_file_that_loads_nothing(done: Any) -> None:
    text = render_report(read_run(done.run), [])
    page = Page(text)
    assert "http" not in text
    assert not {"link", "script", "img", "iframe", "image"} & {tag for tag, _ in page.tags}
    links = [value for _, given in page.tags for key, value in given.items() if key in ("href", "src", "xlink:href")]
    ids = [given["id"] for _, given in page.tags if "id" in given]
    assert links
    assert all(link and link.startswith("#") and link[1:] in ids for link in links)
    assert not re.findall(r"url\((?!#)", text)
    assert [tag for tag, _ in page.tags].count("svg") == 2 * 3  # for wide and for narrow windows
    assert len(ids) == len(set(ids))
    assert "prefers-color-scheme: dark" in text
    assert "#012345" not in text
    assert text == render_report(read_run(done.run), [])  # the same run, the same page


def test_page_says_what_was_trained_where_and_with_what_result(done: Any) -> None:
    page = page_of(done.run)
    assert {"smoke", "vit_tiny_patch16_224", "2+2", "seed", "boundary"} <= set(re.findall(r"[\w+-]+", page.text))
    assert "module 0, attempt 1 on elsewhere (job 17): stopped with a checkpoint" in page.text
    assert re.search(r"module 0, attempt 2 on \S+: resumed and finished", page.text)
    assert re.search(r"bigincubate [\d.]+, python 3[\d.]+, torch \d[\w.+]*, timm [\d.]+", page.text)
    assert "Artifacts and results, verified for this page: 11 good." in page.text
    rows = {title: page.row(title) for title in ("module 0", "module 1")}
    assert [row["attempts"] for row in rows.values()] == ["2", "1"]
    at = [index for index, row in enumerate(page.rows) if row[0] == "module 1"]
    partial = done.run.phase("incubate", 1).partial["metrics"]
    assert page.rows[at[1]][1] == "0, 1"
    assert (page.numbers[at[1], 3], page.numbers[at[1], 4]) == (partial["top1"], partial["loss"])
    assert "times the FLOPs. One seed each." in page.text


def test_unfinished_run_has_a_page_that_says_what_is_missing(harness: Harnesses) -> None:
    made = harness(*SETS)
    empty = page_of(made.run)
    assert "Missing: meta model, module 0, module 1, fine-tuning." in empty.text
    assert "Nothing has been logged yet." in empty.text
    made.train("pretrain")
    made.train("incubate", 1)
    page = page_of(made.run)
    assert "Missing: module 0, fine-tuning." in page.text
    assert page.row("module 0")["state"] == "not started"
    assert page.row("module 1")["top-1 %"] == made.run.phase("incubate", 1).result["metrics"]["top1"]
    assert "unfinished" in page.text


def test_panels_without_data_say_so(harness: Harnesses, done: Any) -> None:
    made = harness(*SETS)
    planned = label_routes([read_run(made.run)])
    page = compare_page(planned)
    assert "<svg" not in page
    for sentence in ("Nothing has been logged yet.", "No module and no complete model has been evaluated yet."):
        assert sentence in page
    append_json_line(made.run.phase("pretrain").metrics, {"step": 2, "train/loss": 2.0, "perf/images_per_sec": 9.0})
    append_json_line(made.run.phase("incubate", 0).metrics, {"step": 2, "train/loss": math.nan})
    routes = label_routes([read_run(made.run)])
    both = [*routes, *label_routes([read_run(done.run)])[:1]]
    for width in (figures.WIDE, figures.NARROW):
        texts = [texts_of_empty_panels(draw(routes, width)) for draw in DRAWINGS]
        assert texts == [["Nothing evaluated yet."] * 4, ["No loss of a module logged yet."], []]
        assert [texts_of_empty_panels(draw(both, width)) for draw in DRAWINGS] == [[], texts[1], []]
        before_after = figures.draw_before_after(both, width).axes[0]
        assert [text.get_text() for text in before_after.texts] == ["Nothing evaluated yet."]
        labels = [axis.get_ylabel() for axis in figures.draw_module_curves(both, width).axes if axis.axison]
        assert labels[0] == "training loss"


DRAWINGS = (figures.draw_progress, figures.draw_module_curves, figures.draw_before_after)


def texts_of_empty_panels(figure: Any) -> list[str]:
    """The sentences in the panels that have no axes; all others must have a finite value or a visible sentence."""
    for axis in figure.axes:
        values = [value for line in axis.get_lines() for value in line.get_ydata()]
        assert not axis.axison or any(map(math.isfinite, values)) or not axis.xaxis.get_visible()
    return [axis.texts[0].get_text() for axis in figure.axes if not axis.axison]


def test_run_that_is_only_end_to_end_has_no_modules_on_its_page(harness: Harnesses, done: Any) -> None:
    made = harness(*SETS, "end_to_end.budget=epochs", "end_to_end.init=scaled")
    made.train("end_to_end")
    page = page_of(made.run)
    assert page.row("end to end")["top-1 %"] == made.run.phase("end_to_end").result["metrics"]["top1"]
    assert "Missing: " not in page.text
    assert "initialized: scaled" in page.text
    assert not {"meta model", "module 0", "fine-tuning"} & {row[0] for row in page.rows}
    routes = label_routes([read_run(done.run), read_run(made.run)])
    assert [row["route"] for row in compare_json(routes)] == ["incubated", "end to end", "end to end"]


def test_page_names_damaged_files(done: Any, tmp_path: Path) -> None:
    mine = done.copy(tmp_path / "run")
    weights = mine.run.phase("incubate", 1).artifact / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    page = page_of(mine.run)
    assert "1 damaged" in page.text
    assert [row for row in page.rows if row[0] == "incubate/1" and "damaged: " in row[1]]


def test_text_from_files_is_escaped(done: Any, tmp_path: Path) -> None:
    mine = done.copy(tmp_path / "<b>run")
    append_json_line(mine.run.path / "events.jsonl", {"time": time.time(), "event": "cancelled", "jobs": ["<script>"]})
    page = page_of(mine.run)
    assert "canceled: job <script>" in page.text
    assert not {"script", "b>run"} & {tag for tag, _ in page.tags}


def test_report_and_compare_commands(done: Any, tmp_path: Path) -> None:
    mine = done.copy(tmp_path / "one")
    other = tmp_path / "other"
    shutil.copytree(mine.run.path, other)
    shutil.rmtree(other / "finetune")
    (tmp_path / "empty").mkdir()
    made = run("report", mine.run.path)
    seen = run("compare", mine.run.path, other, "--out", tmp_path / "drawn")
    as_json = run("compare", mine.run.path, other, "--json")
    wrong = [run(command, tmp_path / "empty") for command in ("report", "compare")]
    assert made.wait() == 0, made.err
    Page((mine.run.path / "report.html").read_text())
    assert seen.wait() == 0, seen.err
    line = next(line for line in seen.out.splitlines() if line.startswith("one, end to end"))
    assert f"{done.run.phase('end_to_end').result['metrics']['top1']:.2f}" in line
    page = Page((tmp_path / "drawn" / "compare.html").read_text())
    assert page.row("one")["assembled"] == done.run.assembled.result["metrics"]["top1"]
    assert "other (missing: fine-tuning)" in page.text
    for name in ("progress", "before-after", "modules"):
        assert (tmp_path / "drawn" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert as_json.wait() == 0
    rows = json.loads(as_json.out)
    assert [(row["run"], row["missing"]) for row in rows][2] == ("other", ["fine-tuning"])
    summary = mine.run.update_summary()
    phases = [summary["meta"], *summary["modules"], summary["finetune"]]
    assert rows[0]["flops"] == sum(phase["flops"] for phase in phases)
    assert rows[0]["seconds"] == pytest.approx(sum(phase["seconds"] for phase in phases))
    assert rows[0]["hybrids"] == [module["metrics"] for module in summary["modules"]]
    assert (rows[1]["metrics"], rows[1]["headline"]) == (summary["end_to_end"]["metrics"], "top1")
    for refused in wrong:
        assert refused.wait() == 4
        assert refused.err.strip() == f"bigincubate: {tmp_path / 'empty'} is not a run directory (no recipe.toml in it)"


def test_curves_are_over_what_each_step_cost(done: Any) -> None:
    run_data: RunData = read_run(done.run)
    meta = run_data.routes[0].phases[0]
    result, last = done.run.phase("pretrain").result, meta.points[-1]
    assert (last.step, last.cost["seen"], last.cost["flops"]) == (6, result["seen"], result["flops"])
    assert (last.cost["seconds"], last.metrics) == (pytest.approx(result["seconds"]), result["metrics"])
    assert last.cost["epochs"] == pytest.approx(meta.planned["epochs"])
    seconds = [point.cost["seconds"] for point in meta.points]
    assert seconds == sorted(seconds)
    assert seconds[0] > 0


def test_metrics_and_units_are_shown_as_their_task_describes_them(harness: Harnesses) -> None:
    """A task where less is better, samples are tokens, and the first phase measures something else."""
    made = harness(*SETS)
    perplexity = Metric("ppl", "perplexity", higher_is_better=False, format=".1f")
    loss = Metric("loss", "loss", higher_is_better=False, format=".3f")
    plan = read_json(made.run.path / "plan.json") or {}
    for row in plan["rows"]:
        row |= {"metrics": [asdict(loss if row["phase"] == "pretrain" else perplexity)], "unit": "tokens"}
    write_json(made.run.path / "plan.json", plan)
    scores = {"pretrain": 3.0, "incubate/0": 9.0, "incubate/1": 12.0, "finetune": 7.0, "end_to_end": 8.0}
    for row in plan["rows"]:
        metric = planned_metrics(row)[0]
        result = {"metrics": {metric.name: scores[row["key"]]}, "headline": metric.name, "samples": 9, "unit": "tokens"}
        folder = made.run.phase(row["phase"], row["module"])
        append_json_line(folder.metrics, {"step": 6, "train/loss": 2.0, "perf/tokens_per_sec": 5.0})
        folder.write_result({**result, "steps": 6, "seen": row["seen"], "flops": 10, "seconds": 1.0})
    run_data, rows = read_run(made.run), run_status(made.run)
    assert (rows[1]["metrics"], rows[1]["headline"], rows[1]["samples_per_sec"]) == ({"ppl": 9.0}, "ppl", 5.0)
    routes = label_routes([run_data])
    status, compared = status_table("run", rows, plan), compare_table(routes)
    planned = [
        replace(row, metrics=planned_metrics(stored)) for row, stored in zip(made.rows, plan["rows"], strict=True)
    ]
    summary = summary_table("run", made.run.update_summary(), planned)
    cells = {
        str(table.title): {str(column.header): list(map(str, column.cells)) for column in table.columns}
        for table in (status, compared, summary)
    }
    assert cells["run: status"]["perplexity"] == ["-", "9.0", "12.0", "7.0", "8.0"]
    assert cells["run: status"]["tokens/s"] == ["5"] * 5
    assert cells["comparison of runs"]["hybrids"] == ["12.0 to 9.0", "-"]
    assert cells["comparison of runs"]["meta"] == ["3.000", "-"]
    assert cells["run: results"]["loss"] == ["3.000", "-", "-", "-", "-"]
    page = page_of(made.run)
    assert (page.row("meta model")["loss"], page.row("end to end")["perplexity"]) == (3.0, 8.0)
    assert "Incubated 7.0, end to end 8.0: 1.0 less" in page.text
    assert "top-1" not in page.text.lower()
    assert "perplexity" in compare_page(routes)


def test_numbers_have_units_and_no_digit_too_many() -> None:
    assert [format_percent(96.944444, samples) for samples in (360, 50_000)] == ["96.9", "96.94"]
    assert [format_quantity(value, "FLOP") for value in (1856389201920, 36.6e9, 985e15, 999.96e9, 12)] == [
        *("1.86 TFLOP", "36.6 GFLOP", "985 PFLOP", "1.00 TFLOP", "12.0 FLOP")
    ]
    assert [format_duration(s) for s in (0, 58.93, 59.97, 273, 3599.9, 11100, 200_000)] == [
        *("0.0 s", "58.9 s", "1 min 00 s", "4 min 33 s", "1 h 00 min", "3 h 05 min", "2 d 08 h")
    ]


def test_report_of_a_directory_that_cannot_be_written_names_the_option(
    harness: Harnesses, call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(file: Path, text: str) -> None:
        if file.name == "report.html":
            raise OSError(30, "Read-only file system", str(file.with_name(".report.html.1")))
        file.write_text(text)

    made = harness("train.max_steps=2")
    monkeypatch.setattr("bigincubate.files.write_text", refuse)
    code, _, err = call("report", made.run.path)
    expected = (
        f"bigincubate: {made.run.path / 'report.html'}: Read-only file system; write it to another place with --out"
    )
    assert (code, err) == (3, f"{expected} FILE\n")
    assert call("report", made.run.path, "--out", tmp_path / "mine.html")[0] == 0
