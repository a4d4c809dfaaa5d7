"""Whether a tag may be released: its package's version and changelog say the same, and so do the siblings' ranges.

    python .github/scripts/check_release.py repvitok-v0.2.0 [--root REPOSITORY]

Prints the release notes, which are the changelog's entry. Exit code 1 with one line where something is amiss. Needs the
standard library only.
"""

from __future__ import annotations

import argparse
import re
import sys
import tomllib
from pathlib import Path

PACKAGES = ("repvitok", "latent-action", "repwam-client", "repwam-core", "repwam-weights")
TAG = re.compile(r"(?P<package>[a-z-]+)-v(?P<version>\d+\.\d+\.\d+)")
ENTRY = re.compile(r"^## \[(?P<version>[^\]]+)\](?: - (?P<date>\S+))?$", re.MULTILINE)


class ReleaseError(Exception):
    """What keeps a tag from being released."""


def main(argv: list[str] | None = None) -> int:
    """Check a tag and print its notes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tag")
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[2])
    options = parser.parse_args(argv)
    try:
        print(release_notes(options.tag, options.root))
    except ReleaseError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def release_notes(tag: str, root: Path) -> str:
    """The changelog's entry of the tag's version.

    Raises:
        ReleaseError: for a tag of another form, a version that is not the package's, an absent, undated or empty
            changelog entry, or a sibling whose range leaves the version out.
    """
    found = TAG.fullmatch(tag)
    if not found or found["package"] not in PACKAGES:
        raise ReleaseError(f"expected a tag such as repvitok-v0.2.0, of one of {', '.join(PACKAGES)}, got {tag!r}")
    package, version = found["package"], found["version"]
    declared = _project(root, package)["version"]
    if declared != version:
        raise ReleaseError(f"{tag}: packages/{package}/pyproject.toml has version {declared}")
    for sibling in PACKAGES:
        _check_range(_project(root, sibling), package, version)
    return _entry((root / "packages" / package / "CHANGELOG.md").read_text(encoding="utf-8"), tag, version)


def _project(root: Path, package: str) -> dict:
    return tomllib.loads((root / "packages" / package / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def _check_range(project: dict, package: str, version: str) -> None:
    """A sibling that depends on the package must accept the version: ranges are >=A.B[.C],<D.E."""
    for requirement in project["dependencies"]:
        found = re.fullmatch(rf"{package}>=([\d.]+),<([\d.]+)", requirement)
        if found and not _numbers(found[1]) <= _numbers(version) < _numbers(found[2]):
            raise ReleaseError(f"{project['name']} depends on {requirement}, which leaves {version} out")


def _entry(changelog: str, tag: str, version: str) -> str:
    headings = list(ENTRY.finditer(changelog))
    for heading, following in zip(headings, [*headings[1:], None], strict=True):
        if heading["version"] != version:
            continue
        if not re.fullmatch(r"\d{4}-\d{2}-\d{2}", heading["date"] or ""):
            raise ReleaseError(f"{tag}: the changelog's entry needs its date: ## [{version}] - YYYY-MM-DD")
        notes = changelog[heading.end() : following.start() if following else len(changelog)].strip()
        if not re.search(r"^- ", notes, re.MULTILINE):
            raise ReleaseError(f"{tag}: the changelog's entry lists no change")
        return notes
    raise ReleaseError(f"{tag}: CHANGELOG.md has no entry ## [{version}] - YYYY-MM-DD")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in (version + ".0.0").split(".")[:3])


if __name__ == "__main__":
    sys.exit(main())
