"""Parser for the HTML pages that tests check."""

from __future__ import annotations

import re
from html.parser import HTMLParser


class Page(HTMLParser):
    """An HTML page: its sections in order, unclosed tags, and all references."""

    VOID = frozenset({"meta", "br", "circle", "line", "rect", "path", "link", "img"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.sections: list[str] = []
        self.references: list[str] = []
        self.scripts = 0
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.scripts += tag == "script"
        if tag == "section":
            self.sections.append(attributes.get("id") or "")
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        self.references += re.findall(r"url\(([^)]*)\)", attributes.get("style") or "")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
