"""Reports, comparisons, the documentation site and TensorBoard in a real browser: `make test-extras`."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import browser
import pytest
from browser import DESKTOP, PHONE, Browser

pytestmark = pytest.mark.extras
ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("TRAINING_PYTHON") or ROOT / ".venv/bin/python")  # with bigincubate and mkdocs
MISSING = [
    *([] if find_spec("playwright") else ["Playwright: run `make test-extras`"]),
    *([] if browser.PROGRAM else ["Chromium: apt-get install chromium"]),
    *([] if PYTHON.exists() else [f"{PYTHON}: run `make test-extras`"]),
]
SMOKE = ("--smoke", "--jobs", "2")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """The browser, or a skip that says why not; where CI=1, an error."""
    if MISSING:
        reason = f"needs {'; '.join(MISSING)}"
        if os.environ.get("CI") in ("1", "true"):
            pytest.fail(reason)
        pytest.skip(reason)
    with browser.start() as started:
        yield started


def call(*words: object, code: int = 0) -> str:
    """Run a Python module of the environment that trains, and return its output."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NO_MKDOCS_2_WARNING": "1"}
    command = [str(PYTHON), "-m", *map(str, words)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=environment, cwd=ROOT)
    assert ended.returncode == code, ended.stdout + ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def runs(chromium: Browser, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Real runs: one with everything, a language model, one whose modules diverged, and one that was only planned."""
    base = tmp_path_factory.mktemp("runs")
    found = {name: base / name for name in ("done", "language-model", "failed", "planned")}
    call("bigincubate", "run", "digits", *SMOKE, "--baseline", "--run-dir", found["done"])
    call("bigincubate", "run", "stdlib-llama", *SMOKE, "--run-dir", found["language-model"])
    diverging = ("--set", "incubate.train.lr=1e30", "--set", "log.every_steps=1")
    call("bigincubate", "run", "digits", *SMOKE, *diverging, "--run-dir", found["failed"], code=5)
    module = ("--phase", "incubate", "--module", "0", "--run-dir", found["planned"])
    call("bigincubate", "train", found["done"] / "recipe.toml", *module, code=4)  # there is no meta model yet
    return found


def report_of(run: Path) -> str:
    call("bigincubate", "report", run)
    return (run / "report.html").as_uri()


@pytest.mark.parametrize(
    ("name", "drawings", "sentences"),
    [
        ("done", 3, ["There were no interruptions."]),
        ("language-model", 3, ["bits/byte"]),
        ("failed", 2, ["No module has been evaluated together with others yet.", "4 interruptions and faults."]),
        (
            "planned",
            0,
            ["Nothing has been logged yet.", "No module has been evaluated together with others yet."],
        ),
    ],
)
def test_report_is_readable(
    chromium: Browser, runs: dict[str, Path], name: str, drawings: int, sentences: list[str]
) -> None:
    url = report_of(runs[name])
    chromium.requests.clear()
    assert chromium.complaints(url) == {}
    assert set(chromium.requests) == {url}
    for size in (PHONE, DESKTOP):
        with chromium.page(size) as page:
            page.goto(url)
            assert page.locator("figure svg:visible").count() == drawings
            text = page.locator("main").inner_text()
            assert [sentence for sentence in sentences if sentence not in text] == []


@pytest.mark.parametrize(
    ("names", "drawings", "sentences"),
    [
        (["done", "failed"], 3, ["failed"]),
        (["done", "language-model"], 3, ["bits/byte"]),
        (["planned", "failed"], 2, ["No loss of a module logged yet.", "No module and no complete model"]),
        (["planned"], 0, ["Nothing has been logged yet.", "No module and no complete model"]),
    ],
)
def test_comparison_is_readable(
    chromium: Browser, runs: dict[str, Path], tmp_path: Path, names: list[str], drawings: int, sentences: list[str]
) -> None:
    call("bigincubate", "compare", *(runs[name] for name in names), "--out", tmp_path)
    url = (tmp_path / "compare.html").as_uri()
    chromium.requests.clear()
    assert chromium.complaints(url) == {}
    assert set(chromium.requests) == {url}
    with chromium.page(PHONE) as page:
        page.goto(url)
        assert page.locator("figure svg:visible").count() == drawings
        text = page.locator("main").evaluate("main => main.textContent")  # also of drawings
        assert [sentence for sentence in sentences if sentence not in text] == []


# ------------------------------------------------------------------------------------------------ the documentation


@pytest.fixture(scope="module")
def site(chromium: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, list[str]]]:
    """The address of the documentation, and its pages."""
    folder = tmp_path_factory.mktemp("site")
    call("mkdocs", "build", "--strict", "--quiet", "--site-dir", folder)
    pages = sorted(str(file.relative_to(folder)) for file in folder.rglob("*.html") if file.name != "404.html")

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            """Print nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", pages
    finally:
        server.shutdown()
        server.server_close()


def test_documentation_is_readable(chromium: Browser, site: tuple[str, list[str]]) -> None:
    address, pages = site
    assert len(pages) > 20
    # the theme's own colors of code have a contrast of 4.1 to 4.5
    found = {page: chromium.complaints(f"{address}/{page}", contrast=4.0) for page in pages}
    assert {page: complaints for page, complaints in found.items() if complaints} == {}


def test_documentation_is_searched_without_a_network(chromium: Browser, site: tuple[str, list[str]]) -> None:
    chromium.problems.clear()
    with chromium.page(DESKTOP) as page:
        page.goto(f"{site[0]}/index.html", wait_until="networkidle")
        page.get_by_role("textbox", name="Search").press_sequentially("fairscale")
        page.locator(".md-search-result__link").first.wait_for()
        assert page.locator(".md-search-result__link[href*='/sharding/']").count() > 0
    assert chromium.problems == []


# ------------------------------------------------------------------------------------------------ TensorBoard


@contextmanager
def tensorboard(folder: Path) -> Iterator[str]:
    """Yield the address of a TensorBoard that runs until the end."""
    command = [str(PYTHON), "-m", "tensorboard.main", "--logdir", str(folder), "--host", "127.0.0.1", "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        said = ""
        for line in process.stderr or ():
            said += line
            if address := re.search(r"http://127\.0\.0\.1:\d+/", line):
                yield address[0]
                return
        pytest.fail(said)
    finally:
        process.terminate()
        process.communicate(timeout=60)


def test_tensorboard_shows_training_and_validation_first(chromium: Browser, runs: dict[str, Path]) -> None:
    keys = {key for line in (runs["done"] / "meta/metrics.jsonl").open() for key in json.loads(line)}
    assert {"train/lr", "val/top1", "perf/images_per_sec"} <= keys  # the file keeps its short keys
    chromium.problems.clear()
    with tensorboard(runs["done"]) as address, chromium.page(DESKTOP) as page:
        page.goto(address)
        groups = page.locator("metrics-card-groups .card-group .group-title")
        page.get_by_text("val/top-1 (%)").first.wait_for(timeout=120_000)
        assert groups.all_inner_texts() == ["train", "val", "visual inputs", "whole model", "whole run", "work"]
        cards = page.locator("metrics-card-groups tb-truncated-path")
        titles = [
            title.evaluate("e => [e.textContent.trim(), e.scrollWidth <= e.clientWidth]") for title in cards.all()
        ]
        names = ["train/loss", "train/step: gradient norm", "train/step: learning rate", "train/steps skipped"]
        names += ["val/loss", "val/top-1 (%)"]
        assert titles[: len(names)] == [[name, True] for name in names]
        assert page.locator("metrics-card-groups .card-group").first.bounding_box()["y"] < DESKTOP[1] / 2

        page.goto(f"{address}#scalars")
        page.locator("tf-category-paginated-view .heading").nth(4).wait_for(timeout=120_000)
        shown: list[Any] = page.locator("tf-category-paginated-view .heading").all_inner_texts()
        assert [text.split("\n")[0] for text in shown] == ["train", "val", "whole model", "whole run", "work"]
    ours = [problem for problem in chromium.problems if "Three.js" not in problem]  # TensorBoard loads it twice
    assert ours == []
