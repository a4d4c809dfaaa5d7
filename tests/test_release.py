"""A tag is released only where version, changelog and the siblings' ranges agree."""

import importlib.util
import os
import re
import shutil
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / ".github/scripts"
CHANGELOG = """# Changelog

## [Unreleased]

- Not yet.

## [0.2.0] - 2026-11-22

### Added

- A thing.

## [0.1.0] - 2026-10-01

- The first.
"""


def script(name):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def check():
    return script("check_release")


@pytest.fixture
def repository(tmp_path):
    """Five packages; repvitok is at 0.2.0."""

    def make(changelog=CHANGELOG, version="0.2.0", needed="repvitok>=0.1,<0.3"):
        for name in ("repvitok", "latent-action", "repwam-client", "repwam-core", "repwam-weights"):
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


def test_what_is_published_names_the_repository(tmp_path):
    """On copies of the packages: every link of the READMEs is absolute, its file is there, the metadata hold."""
    for name in os.listdir(ROOT):
        if name != "packages":
            (tmp_path / name).symlink_to(ROOT / name)
    for folder in ROOT.glob("packages/*/"):
        (tmp_path / "packages" / folder.name).mkdir(parents=True)
        for name in ("README.md", "pyproject.toml", "CHANGELOG.md", "docs"):
            if (folder / name).is_dir():
                shutil.copytree(folder / name, tmp_path / "packages" / folder.name / name)
            elif (folder / name).exists():
                shutil.copy(folder / name, tmp_path / "packages" / folder.name / name)
    address = "https://example.org/robots/repwam"
    written = script("name_the_repository").name_repository(tmp_path, address, "repvitok-v0.2.0")
    assert [folder.name for folder in written] == [
        "latent-action",
        "repvitok",
        "repwam-client",
        "repwam-core",
        "repwam-weights",
    ]
    for folder in written:
        links = re.findall(r"\]\(([^)#\s]+)", (folder / "README.md").read_text())
        ours = [link for link in links if link.startswith(address)]
        assert ours
        assert [link for link in links if not link.startswith("https://")] == []
        for link in ours:
            assert (tmp_path / re.sub(rf"{address}/(blob|tree|raw)/repvitok-v0.2.0/", "", link)).exists(), link
        project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
        assert project["urls"]["Repository"] == address
        assert project["name"] == folder.name
    assert (
        f"]({address}/raw/repvitok-v0.2.0/packages/repvitok/docs/reconstructions.png)"
        in (tmp_path / "packages/repvitok/README.md").read_text()
    )


def test_the_docker_image_copies_what_is_there_and_what_may_be_sent():
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    names = {name for line in copied for name in line.split()}
    assert {"pyproject.toml", "uv.lock", "packages"} <= names
    assert all((ROOT / name).exists() for name in names)
    sent = (ROOT / ".dockerignore").read_text().splitlines()
    assert names == {line.removeprefix("!") for line in sent if line.startswith("!")}
