# SPDX-License-Identifier: MIT OR Apache-2.0
"""What is distributed contains its licences and says where the project is: crate, source distribution and wheel.

The wheel is the one that `tests/run python` builds.
"""

import email
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
LICENCES = {name: (ROOT / name).read_bytes() for name in ("LICENSE-APACHE", "LICENSE-MIT")}
ADDRESSES = ("homepage", "documentation", "repository")


def problems(files, directory=""):
    """What is wrong with the licences of an archive, given as a dictionary of names and contents."""
    found = []
    for name, content in LICENCES.items():
        if (path := f"{directory}{name}") not in files:
            found.append(f"{path} is missing")
        elif files[path] != content:
            found.append(f"{path} differs from {name}")
    return found


@pytest.fixture(scope="module")
def wheel():
    wheels = list((ROOT / "target/test-wheel").glob("*.whl"))
    assert wheels, "there is no wheel: run `tests/run python`"
    with zipfile.ZipFile(wheels[0]) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_wheel_has_its_licences(wheel):
    (metadata,) = (name for name in wheel if name.endswith(".dist-info/METADATA"))
    assert problems(wheel, metadata.removesuffix("METADATA") + "licenses/") == []


def test_the_wheel_has_addresses(wheel):
    (metadata,) = (content for name, content in wheel.items() if name.endswith(".dist-info/METADATA"))
    message = email.message_from_bytes(metadata)
    urls = dict(entry.split(", ") for entry in message.get_all("Project-URL"))
    package = tomllib.loads((ROOT / "Cargo.toml").read_text())["workspace"]["package"]
    assert {name: urls[name.capitalize()] for name in ADDRESSES} == {name: package[name] for name in ADDRESSES}
    assert message["License-Expression"] == "MIT OR Apache-2.0"
    assert sorted(message.get_all("License-File")) == sorted(LICENCES)


def test_the_source_distribution_has_its_licences(tmp_path):
    maturin = Path(sys.executable).with_name("maturin")
    command = [maturin, "sdist", "-m", "ublk-py/Cargo.toml", "-o", tmp_path]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        files = {
            member.name.partition("/")[2]: archive.extractfile(member).read()
            for member in archive.getmembers()
            if member.isfile()
        }
    assert problems(files) == []
    assert problems(files, "ublk-core/") == []


def test_the_crate_has_its_licences():
    command = ["cargo", "package", "--list", "-q", "--locked", "--allow-dirty", "-p", "ublk-core"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    # The crate has links to the files.
    files = {name: (ROOT / "ublk-core" / name).read_bytes() for name in listed if name in LICENCES}
    assert problems(files) == []


def test_crates_that_are_published_have_addresses():
    for manifest in (ROOT / "ublk-core/Cargo.toml", ROOT / "ublk-py/Cargo.toml"):
        package = tomllib.loads(manifest.read_text())["package"]
        for name in ("license", "rust-version", *ADDRESSES):
            assert package[name] == {"workspace": True}, (manifest, name)


def test_a_missing_or_other_licence_is_found():
    assert problems(LICENCES) == []
    assert problems({"LICENSE-MIT": LICENCES["LICENSE-MIT"]}) == ["LICENSE-APACHE is missing"]
    assert problems(LICENCES | {"LICENSE-MIT": b"other"}) == ["LICENSE-MIT differs from LICENSE-MIT"]
