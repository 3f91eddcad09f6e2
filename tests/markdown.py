"""The parts of a Markdown page that the tests check: fenced blocks, headings, links and inline code."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))

_FENCE = re.compile(r"^(`{3,})([^\n`]*)\n(.*?)^\1[ \t]*$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^()\s]+(?:\([^()]*\)[^()\s]*)?)\)")
_INLINE_CODE = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)")
_HEADING = re.compile(r"^(#{1,6}) +(.+?) *#*$", re.MULTILINE)
_REDIRECTIONS = {">", ">>", "<", "2>"}


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the line of the page on which its text begins."""

    language: str
    text: str
    line: int


def fenced_blocks(page: str, *languages: str) -> list[Block]:
    """The fenced blocks of a page in order; with `languages` only those."""
    blocks = [
        Block(match[2].strip(), match[3], page.count("\n", 0, match.start(3)) + 1) for match in _FENCE.finditer(page)
    ]
    return [block for block in blocks if not languages or block.language in languages]


def without_blocks(page: str) -> str:
    """The page without its fenced blocks."""
    return _FENCE.sub("", page)


def links(page: str) -> list[str]:
    """The targets of links and pictures, outside of code."""
    return _LINK.findall(_INLINE_CODE.sub("", without_blocks(page)))


def inline_code(page: str) -> list[str]:
    """The texts between backticks, outside of fenced blocks."""
    return [match[2] for match in _INLINE_CODE.finditer(without_blocks(page))]


def anchors(page: str) -> set[str]:
    """The anchors of a page's headings, as Git hosts make them of the heading's text."""
    found: set[str] = set()
    for match in _HEADING.finditer(without_blocks(page)):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", match[2]).replace("`", "").lower()
        slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        count = sum(1 for other in found if re.fullmatch(re.escape(slug) + r"(-\d+)?", other))
        found.add(f"{slug}-{count}" if count else slug)
    return found


def _split_pipeline(words: list[str]) -> Iterator[list[str]]:
    """The commands of a line, cut at `|`, `&&`, `||`, `;` and `&`."""
    command: list[str] = []
    for word in words:
        if word in {"|", "&&", "||", ";", "&"}:
            yield command
            command = []
        else:
            command.append(word)
    yield command


def commands(block: Block) -> list[list[str]]:
    """The words of each command in a `sh` block: comments, redirections and assignments before it are left out."""
    found = []
    for line in block.text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
        lexer.whitespace_split = True
        for words in _split_pipeline(list(lexer)):
            kept = list(words)
            for index in range(len(kept) - 1, -1, -1):
                if kept[index] in _REDIRECTIONS:
                    del kept[index : index + 2]
            while kept and re.fullmatch(r"\w+=.*", kept[0]):
                del kept[0]
            if kept:
                found.append(kept)
    return found
