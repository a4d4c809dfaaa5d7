"""A tag is released only where version, changelog and the siblings' ranges agree."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / ".github/scripts/check_release.py"
CHANGELOG = """# Changelog

## [Unreleased]

- Not yet.

## [0.2.0] - 2026-11-22

### Added

- A thing.

## [0.1.0] - 2026-10-01

- The first.
"""


@pytest.fixture(scope="module")
def check():
    spec = importlib.util.spec_from_file_location("check_release", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def repository(tmp_path):
    """Three packages; repvitok is at 0.2.0."""

    def make(changelog=CHANGELOG, version="0.2.0", needed="repvitok>=0.1,<0.3"):
        for name in ("repvitok", "latent-action", "repwam-core"):
            folder = tmp_path / "packages" / name
            folder.mkdir(parents=True, exist_ok=True)
            needs = "[]" if name == "repvitok" else f'["{needed}"]'
            own = version if name == "repvitok" else "0.1.0"
            (folder / "pyproject.toml").write_text(
                f'[project]\nname = "{name}"\nversion = "{own}"\ndependencies = {needs}\n'
            )
            (folder / "CHANGELOG.md").write_text(changelog)
        return tmp_path

    return make


def test_the_notes_are_the_changelogs_entry(check, repository):
    assert check.release_notes("repvitok-v0.2.0", repository()) == "### Added\n\n- A thing."


@pytest.mark.parametrize(
    ("tag", "changes", "message"),
    [
        ("v0.2.0", {}, "expected a tag such as"),
        ("repvitok-0.2.0", {}, "expected a tag such as"),
        ("repvitok-v0.2", {}, "expected a tag such as"),
        ("metaworld-v0.2.0", {}, "expected a tag such as"),
        ("repvitok-v0.3.0", {}, "has version 0.2.0"),
        ("repvitok-v0.4.0", {"version": "0.4.0", "needed": "repvitok>=0.1,<0.5"}, "has no entry"),
        ("repvitok-v0.2.0", {"needed": "repvitok>=0.1,<0.2"}, "leaves 0.2.0 out"),
        ("repvitok-v0.2.0", {"needed": "repvitok>=0.2.1,<0.3"}, "leaves 0.2.0 out"),
        ("repvitok-v0.2.0", {"changelog": CHANGELOG.replace(" - 2026-11-22", "")}, "needs its date"),
        ("repvitok-v0.2.0", {"changelog": CHANGELOG.replace("- A thing.", "")}, "lists no change"),
    ],
)
def test_what_does_not_agree_is_refused(check, repository, tag, changes, message, capsys):
    assert check.main([tag, "--root", str(repository(**changes))]) == 1
    assert message in capsys.readouterr().err


def test_every_package_has_its_release_workflow(check):
    import yaml

    for package in check.PACKAGES:
        workflow = yaml.safe_load((ROOT / f".github/workflows/release-{package}.yml").read_text())
        assert workflow[True]["push"]["tags"] == [f"{package}-v*.*.*"]  # YAML 1.1 reads `on` as true
        assert "check_release.py" in str(workflow["jobs"]["build"]["steps"])
        assert workflow["jobs"]["publish"]["needs"] == ["build", "install"]
        assert package in check.PACKAGES
        assert (ROOT / "packages" / package / "CHANGELOG.md").is_file()
