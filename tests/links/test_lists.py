# SPDX-License-Identifier: MIT OR Apache-2.0
"""Lists in the documentation are complete."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
# Comments and literals, in which `unsafe` is a word. The first branch keeps a lifetime from looking like a character.
NOT_CODE = re.compile(r"'[a-z_]+\b(?!')|//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\])*\"|'(?:\\.|[^'\\])'", re.DOTALL | re.ASCII)
CODE = re.compile(r"`([^`]+)`")
# Commands of the enumeration in cli/mod.rs, with what precedes each one.
COMMAND = re.compile(r"((?:^    (?:///|#\[).*\n)*)^    ([A-Z][a-z]+)\(", re.MULTILINE)


def has_unsafe_code(source):
    """Whether Rust code has an `unsafe` block, function, implementation or attribute."""
    return re.search(r"\bunsafe\b", NOT_CODE.sub(" ", source)) is not None


def unlisted(page, files):
    """The files that a page does not name, nor a directory that they are in (of the repository or the crate)."""
    named = CODE.findall(page)
    directories = tuple(root + name for name in named if name.endswith("/") for root in ("", "ublk-core/src/"))
    return [file for file in files if file not in named and not file.startswith(directories)]


def undescribed(page, source):
    """The commands without a section in a page that shows their help."""
    commands = ["run"]  # of the Python package
    enumeration = re.search(r"^enum Command \{\n(.*?)^\}", source, re.MULTILINE | re.DOTALL).group(1)
    commands += [name.lower() for before, name in COMMAND.findall(enumeration) if "hide = true" not in before]
    return [name for name in commands if f"\n## ublk {name}\n\n```{{ublk-help}} {name}\n" not in page]


def test_the_page_on_unsafe_code_names_every_file():
    directories = ["ublk-core/src", "ublk-py/src", "vm"]
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *directories]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    files = [name for name in listed if name.endswith(".rs") and (ROOT / name).exists()]
    files = [name for name in files if has_unsafe_code((ROOT / name).read_text())]
    assert len(files) > 20
    assert unlisted((ROOT / "docs/design/unsafe-code.md").read_text(), files) == []


def test_the_page_of_the_command_has_every_command():
    source = (ROOT / "ublk-core/src/cli/mod.rs").read_text()
    assert undescribed((ROOT / "docs/reference/command.md").read_text(), source) == []


def test_unsafe_code_that_is_not_named_is_found():
    assert has_unsafe_code("fn f<'a>(c: &'a u8) {\n    unsafe { g(c) } // SAFETY: none\n}")
    assert has_unsafe_code("let quote = '\"'; unsafe impl Send for T {}")
    assert not has_unsafe_code(
        '//! `unsafe` here\n#![forbid(unsafe_code)]\nlet text = "cache=unsafe"; // an unsafe way\n'
    )
    page = "`src/one.rs`, `src/two/`, and `three.rs`"
    assert unlisted(page, ["src/one.rs", "src/two/a.rs", "src/three.rs", "src/two.rs"]) == [
        "src/three.rs",
        "src/two.rs",
    ]


def test_a_command_that_is_not_described_is_found():
    source = "enum Command {\n    /// Add\n    Add(x),\n    #[command(hide = true)]\n    Own(x),\n    Del(x),\n}\n"
    page = "\n## ublk run\n\n```{ublk-help} run\n```\n\n## ublk add\n\n```{ublk-help} add\n```\n"
    assert undescribed(page, source) == ["del"]
    assert undescribed("", source) == ["run", "add", "del"]
