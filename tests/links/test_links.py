# SPDX-License-Identifier: MIT OR Apache-2.0
"""Links between Markdown files lead to files and headings that exist.

Links to other places are not checked here; for those of the site there is
``python -m sphinx -b linkcheck docs target/linkcheck``.
"""

import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
FENCE = re.compile(r"^(`{3,}|~{3,}).*?^\1`*\s*$", re.MULTILINE | re.DOTALL)
INLINE_CODE = re.compile(r"(`+)[^`].*?\1", re.DOTALL)
NO_TEXT = re.compile(r"(?<![!\\])\[\s*\]\([^)]*\)")
LINK = re.compile(r"(?<!\\)\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)")
REFERENCE = re.compile(r"^\[[^\]]+\]:\s*(\S+)", re.MULTILINE)
INCLUDE = re.compile(r"^```\{include\} (\S+)", re.MULTILINE)
HEADING = re.compile(r"^#{1,6} +(.+?) *#*$", re.MULTILINE)


def pages():
    """The Markdown files of the repository. Those of Rust's documentation are checked by rustdoc."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    return [name for name in listed if not name.startswith("ublk-core/src/") and (ROOT / name).exists()]


def anchors(page):
    """The anchors of a page's headings, as GitHub and the site make them."""
    text = page.read_text()
    for name in INCLUDE.findall(text):
        text += (page.parent / name).read_text()
    found = set()
    seen = Counter()
    for heading in HEADING.findall(FENCE.sub("", text)):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


def broken(page):
    """The links of a page that lead nowhere, or that a reader of the plain page cannot see."""
    text = INLINE_CODE.sub("code", FENCE.sub("", page.read_text()))
    # The site puts the title of the page there, other renderers show nothing.
    found = [f"{link}: no text" for link in NO_TEXT.findall(text)]
    for target in LINK.findall(text) + REFERENCE.findall(text):
        if re.match(r"[a-z][a-z+.-]*:", target):
            continue
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        if not path.exists():
            found.append(f"{target}: no such file")
        elif anchor and path.suffix == ".md" and anchor not in anchors(path):
            found.append(f"{target}: no such heading")
    return found


@pytest.mark.parametrize("name", pages())
def test_links_of_a_page_lead_somewhere(name):
    assert broken(ROOT / name) == []


def test_broken_links_are_found(tmp_path):
    (tmp_path / "other.md").write_text("# One `two` three\n\n```sh\n# not a heading\n```\n\n## Again\n\n## Again\n")
    page = tmp_path / "page.md"
    page.write_text(
        "# Page\n[1](other.md) [2](other.md#one-two-three) [3](#page) [4](https://example.org/x) `[5](code.md)`\n"
        "[6](other.md#again-1)\n```\n[7](fenced.md)\n```\n"
    )
    assert broken(page) == []
    page.write_text("[1](gone.md) [2](other.md#not-a-heading) [3](#gone)\n![4](gone.svg)\n\n[5]: gone/\n[](other.md)\n")
    assert broken(page) == [
        "[](other.md): no text",
        "gone.md: no such file",
        "other.md#not-a-heading: no such heading",
        "#gone: no such heading",
        "gone.svg: no such file",
        "gone/: no such file",
    ]
