"""Convert HTML pages to text."""

from __future__ import annotations

import re
from html.parser import HTMLParser

DROPPED = ("script", "style", "template", "noscript")
BLOCKS = (  # elements that start and end a line
    *("address", "article", "aside", "blockquote", "body", "br", "caption", "dd", "details", "div", "dl", "dt"),
    *("fieldset", "figcaption", "figure", "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6", "head", "header", "hr"),
    *("html", "li", "main", "nav", "ol", "p", "pre", "section", "summary", "table", "tbody", "td", "tfoot", "th"),
    *("thead", "title", "tr", "ul"),
)
SPACES = re.compile(r"[ \t\r\n\f]+")


def html_to_text(page: str) -> str:
    """Return the text of a page: a line for each block, without tags, scripts, styles and comments.

    Runs of white space become one space, except in ``<pre>``. Blank lines are left out, except in ``<pre>``.
    """
    parser = _TextParser()
    # To the HTML standard, both "<![" and "<?" begin a comment up to the next ">", but the parser fails on most "<![".
    parser.feed(page.replace("<![", "<?"))
    parser.close()
    return parser.text()


class _TextParser(HTMLParser):
    """Collects lines of text."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._lines: list[str] = []
        self._line: list[str] = []  # pieces of the current line
        self._dropped = self._pre = 0  # number of open elements of these kinds

    def text(self) -> str:
        self._end_line()
        return "".join(f"{line}\n" for line in self._lines)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in BLOCKS:
            self._end_line()
        self._dropped += tag in DROPPED
        self._pre += tag == "pre"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in BLOCKS:
            self._end_line()

    def handle_endtag(self, tag: str) -> None:
        if tag in BLOCKS:
            self._end_line()
        if tag in DROPPED:
            self._dropped = max(0, self._dropped - 1)
        if tag == "pre":
            self._pre = max(0, self._pre - 1)

    def handle_data(self, data: str) -> None:
        if self._dropped:
            return
        if not self._pre:
            self._line.append(data)
            return
        first, *more = data.split("\n")
        self._line.append(first)
        for piece in more:
            self._lines.append("".join(self._line).rstrip())
            self._line = [piece]

    def _end_line(self) -> None:
        line = "".join(self._line)
        line = line.rstrip() if self._pre else SPACES.sub(" ", line).strip(" ")
        if line:
            self._lines.append(line)
        self._line = []
