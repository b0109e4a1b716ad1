"""Reads a page: which tags are in it, whether all are closed, its text."""

from __future__ import annotations

from collections import Counter
from html.parser import HTMLParser

_VOID = frozenset(("meta", "input", "br"))


class Page(HTMLParser):
    """`open`: tags that nobody closed. `text`: all of it; `visible`: with single spaces, without styles, scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.count: Counter[str] = Counter()
        self.attributes: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    @property
    def tags(self) -> frozenset[str]:
        return frozenset(self.count)

    @property
    def visible(self) -> str:
        return " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Opens a tag."""
        self.count[tag] += 1
        self.attributes += [name for name, _ in attrs]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """A tag that closes itself."""
        self.count[tag] += 1
        self.attributes += [name for name, _ in attrs]

    def handle_endtag(self, tag: str) -> None:
        """Closes the tag opened last; another one is an error."""
        assert self.open and self.open[-1] == tag, (self.open, tag, self.getpos())
        self.open.pop()

    def handle_data(self, data: str) -> None:
        """Text, but for styles and scripts."""
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text += data
