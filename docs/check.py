"""Checks a built site: ``python docs/check.py docs/_build/html``.

Every link within the site leads to a page and to a place on it. Every image is there,
and has a text for those who cannot see it. Links to other sites are not followed.
"""

import pathlib
import sys
import urllib.parse
from html.parser import HTMLParser


class Page(HTMLParser):
    """The links, images and places of one page."""

    def __init__(self, path: pathlib.Path):
        super().__init__()
        self.path = path
        self.targets: list[str] = []
        self.places: set[str] = set()
        self.unnamed: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Notes what one element links to, shows, or is called."""
        found = {name: value or "" for name, value in attrs}
        self.places |= {found[key] for key in ("id", "name") if key in found}
        self.targets += [found[key] for key in ("href", "src") if key in found]
        alt = found.get("alt", "")
        if tag == "img" and (not alt or alt.endswith((".png", ".svg"))):
            self.unnamed.append(found.get("src", ""))


def problems(site: pathlib.Path) -> list[str]:
    """One line for each link that leads nowhere, and each image without a text."""
    pages = {path.resolve(): Page(path) for path in site.rglob("*.html")}
    found = []
    for page in pages.values():
        found += [f"{page.path}: no text for {source}" for source in page.unnamed]
        found += [
            f"{page.path}: {target} leads nowhere"
            for target in page.targets
            if not _exists(target, page, pages)
        ]
    return found if pages else [f"{site} has no pages"]


def _exists(target: str, page: Page, pages: dict[pathlib.Path, Page]) -> bool:
    url = urllib.parse.urlsplit(target)
    if url.scheme or url.netloc:
        return True
    path = (page.path.parent / urllib.parse.unquote(url.path)).resolve()
    path = page.path.resolve() if not url.path else path
    if not path.exists():
        return False
    places = pages[path].places if path in pages else {url.fragment}
    return not url.fragment or urllib.parse.unquote(url.fragment) in places


if __name__ == "__main__":
    lines = problems(pathlib.Path(sys.argv[1]))
    print(*lines, sep="\n")
    sys.exit(bool(lines))
