"""A headless Chromium that reaches nothing but this machine, and that records what goes wrong."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHECKS = Path(__file__).with_name("page_checks.js").read_text()
PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PHONE, DESKTOP = (360, 740), (1280, 800)


class Browser:
    """Open pages.

    Attributes:
        requests: URLs that pages asked for.
        problems: Console messages, errors, requests that failed, and those to anything but files and this machine.
    """

    def __init__(self, chromium: Any) -> None:
        self.chromium = chromium
        self.requests: list[str] = []
        self.problems: list[str] = []

    @contextmanager
    def page(self, size: tuple[int, int] = DESKTOP, scheme: str = "light") -> Iterator[Any]:
        """Yield an empty page."""
        context = self.chromium.new_context(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
        context.route("**/*", self._handle_request)
        page = context.new_page()
        page.on("console", self._record_message)
        page.on("pageerror", lambda error: self.problems.append(f"error: {error}"))
        page.on("requestfailed", lambda request: self.problems.append(f"failed: {request.url}: {request.failure}"))
        page.on("response", self._record_response)
        try:
            yield page
        finally:
            context.close()

    def complaints(self, url: str, *, contrast: float = 4.5) -> dict[str, list[str]]:
        """Return what is wrong with a page, by the size of the window and the color scheme; nothing if it is right.

        Args:
            url: The page.
            contrast: The lowest ratio of the luminance of text and background.
        """
        found = {}
        for size in (PHONE, DESKTOP):
            for scheme in ("light", "dark"):
                self.problems.clear()
                with self.page(size, scheme) as page:
                    page.goto(url, wait_until="networkidle")
                    complaints = self.problems + page.evaluate(CHECKS, {"contrast": contrast})
                if complaints:
                    found[f"{size[0]} px, {scheme}"] = complaints
        return found

    def _handle_request(self, route: Any, request: Any) -> None:
        self.requests.append(request.url)
        if request.url.startswith(("file:", "http://127.0.0.1:")):
            route.continue_()
        else:
            self.problems.append(f"request: {request.url}")
            route.abort()

    def _record_message(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.problems.append(f"{message.type}: {message.text}")

    def _record_response(self, response: Any) -> None:
        if response.status >= 400:
            self.problems.append(f"status {response.status}: {response.url}")


@contextmanager
def start() -> Iterator[Browser]:
    """Yield a browser. Names of other machines are not resolved, so its own requests reach nothing either."""
    from playwright.sync_api import sync_playwright

    words = ["--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"]
    words += ["--no-sandbox"] if os.getuid() == 0 else []
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=PROGRAM, args=words)
        yield Browser(chromium)
        chromium.close()
