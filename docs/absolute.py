"""Makes the README's links absolute, as the package index has none of our files.

    python docs/absolute.py https://github.com/OWNER/NAME TAG

rewrites README.md in place, before ``python -m build``.
"""

import pathlib
import re
import sys

README = pathlib.Path(__file__).parent.parent / "README.md"
LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?![a-z]+:|#)(?P<path>[^)]+)\)")


def absolute(text: str, repository: str, tag: str) -> str:
    """The text, with its relative links leading to a tag of a repository on GitHub."""

    def to_repository(link: re.Match[str]) -> str:
        kind = "raw" if link["image"] else "blob"
        url = f"{repository}/{kind}/{tag}/{link['path']}"
        return f"{link['image']}[{link['text']}]({url})"

    return LINK.sub(to_repository, text)


if __name__ == "__main__":
    README.write_text(absolute(README.read_text(), *sys.argv[1:]))
