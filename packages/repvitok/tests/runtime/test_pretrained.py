"""Models as folders: bit-equal round trips, digests that name contents, and one clear error per damage."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import repvitok
import repvitok.runtime.pretrained as pretrained
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from hypothesis import given
from hypothesis import strategies as st
from repvitok import PretrainedModel, RepViTok
from repvitok.cli import main
from repvitok.model import load_tokenizer
from repvitok.runtime.errors import UserError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


class OtherConfig:
    """A config without fields."""

    def to_dict(self) -> dict[str, Any]:
        return {}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> OtherConfig:
        return cls()


class OtherModel(PretrainedModel):
    """Another kind of model, with one weight."""

    format = "other"
    config_class = OtherConfig

    def __init__(self, config: OtherConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.zeros(3))


@pytest.fixture
def folder(tok: RepViTok, tmp_path: Path) -> Path:
    """A saved tiny tokenizer."""
    return tok.save_pretrained(tmp_path / "tokenizer")


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text())
    edit(values)
    path.write_text(json.dumps(values))


def test_round_trip_is_bit_equal(tok: RepViTok, folder: Path, make_video: Callable[..., Tensor]) -> None:
    loaded = RepViTok.from_pretrained(folder)
    assert loaded.config == tok.config
    assert loaded.digest() == tok.digest()
    assert torch.equal(loaded.encode(make_video(5)), tok.encode(make_video(5)))
    assert not loaded.training
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert [path.name for path in folder.parent.iterdir()] == ["tokenizer"]


def test_a_model_saved_again_is_the_same_bytes(tok: RepViTok, tmp_path: Path) -> None:
    for number in range(8):  # safetensors orders its metadata by chance
        tok.save_pretrained(tmp_path / str(number))
    for name in pretrained.MODEL_FILES[:2]:
        assert len({(tmp_path / str(number) / name).read_bytes() for number in range(8)}) == 1, name


@given(st.dictionaries(st.text(), st.text(), max_size=5))
def test_any_metadata_can_be_read_again(metadata: dict[str, str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file.safetensors"
        pretrained.save_tensors({"x": torch.arange(3.0)}, path, metadata)
        with safe_open(path, framework="pt") as file:
            assert (file.metadata() or {}) == metadata
            assert file.get_tensor("x").tolist() == [0, 1, 2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_another_precision_are_converted_and_said(tok: RepViTok, tmp_path: Path, caplog, dtype) -> None:
    folder = tok.to(dtype).save_pretrained(tmp_path / "other")
    loaded = RepViTok.from_pretrained(folder)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    said = f"{len(tok.state_dict())} tensors converted to torch.float32" in caplog.text
    assert said == (dtype == torch.float64), "of a narrower type every number is kept"
    assert torch.equal(loaded.decoder.norm.weight, tok.decoder.norm.weight.float())


def test_weights_that_are_no_floating_point_numbers_are_refused(tok: RepViTok, tmp_path: Path) -> None:
    folder = tok.save_pretrained(tmp_path / "whole")
    stored = {name: value.int() if name == "decoder.norm.bias" else value for name, value in tok.state_dict().items()}
    save_file(stored, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"decoder\.norm\.bias is of torch\.int32, expected torch\.float32"):
        RepViTok.from_pretrained(folder)


def test_a_weight_that_is_no_number_is_neither_saved_nor_loaded(tok: RepViTok, tmp_path: Path) -> None:
    folder = tok.save_pretrained(tmp_path / "good")
    before = (folder / "model.safetensors").read_bytes()
    with torch.no_grad():
        tok.decoder.norm.bias[3] = torch.inf
    with pytest.raises(UserError, match=r"weight decoder\.norm\.bias is not finite"):
        tok.save_pretrained(folder)
    assert (folder / "model.safetensors").read_bytes() == before
    save_file(tok.state_dict(), folder / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors: weight decoder\.norm\.bias is not finite"):
        RepViTok.from_pretrained(folder)


def test_saving_again_replaces_the_model_and_keeps_other_files(tok: RepViTok, folder: Path) -> None:
    (folder / "README.md").write_text("a model card")
    with torch.no_grad():
        tok.decoder.norm.bias += 1
    tok.save_pretrained(str(folder))
    assert RepViTok.from_pretrained(str(folder)).digest() == tok.digest()
    assert (folder / "README.md").read_text() == "a model card"


def test_a_folder_of_anything_else_is_left_alone(tok: RepViTok, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="tokenizer holds a repvitok model; name another folder"):
        OtherModel(OtherConfig()).save_pretrained(folder)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds no repvitok model but a repvitok model \(notes\.txt\)"):
        tok.save_pretrained(folder)
    (tmp_path / "data" / "meta").mkdir(parents=True)
    (tmp_path / "data" / "meta" / "info.json").touch()
    with pytest.raises(UserError, match="holds no repvitok model but a LeRobot data set"):
        tok.save_pretrained(tmp_path / "data")
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "config.json").write_text("[1]")
    with pytest.raises(UserError, match=r"strange holds a config\.json of something else"):
        tok.save_pretrained(tmp_path / "strange")
    assert RepViTok.from_pretrained(folder).digest() == tok.digest()


def test_a_failed_save_leaves_the_last_good_model(tok: RepViTok, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = tok.digest()

    def full_disk(tensors: object, path: Path, **kwargs: object) -> None:
        Path(path).write_bytes(b"half a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pretrained, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        tok.save_pretrained(folder)
    assert RepViTok.from_pretrained(folder).digest() == digest
    assert [path.name for path in folder.parent.iterdir()] == ["tokenizer"]


def test_the_digest_names_weights_and_config(tok: RepViTok) -> None:
    digest = tok.digest()
    assert len(digest) == 64
    assert tok.digest() == digest
    with torch.no_grad():
        tok.decoder.norm.bias[0] += 1e-7
    changed = tok.digest()
    assert changed != digest
    tok.config = type(tok.config).from_dict(tok.config.to_dict() | {"episode_window": 4})
    assert tok.digest() not in (digest, changed)


def test_the_digest_written_out() -> None:
    """Stored latents carry it for years: it must not depend on the process, the machine or this code's version."""
    config = b'{"config": {}, "format": "other", "format_version": 1}'
    contents = hashlib.sha256(config).hexdigest().encode() + b"weight torch.float32 (3,)" + bytes(12)
    assert OtherModel(OtherConfig()).digest() == hashlib.sha256(contents).hexdigest()


def test_a_missing_folder_or_file_is_named(tok: RepViTok, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist; expected a folder with config.json and"):
        RepViTok.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="is a file; expected a folder"):
        RepViTok.from_pretrained(folder / "config.json")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no model\.safetensors"):
        RepViTok.from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        RepViTok.from_pretrained(folder)


def test_another_kind_of_model_is_named(folder: Path, tmp_path: Path) -> None:
    other = OtherModel(OtherConfig()).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match='expected a "repvitok" folder, this one holds a "other" model'):
        RepViTok.from_pretrained(other)
    with pytest.raises(ValueError, match='expected a "other" folder, this one holds a "repvitok" model'):
        OtherModel.from_pretrained(folder)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c["config"].update(colour=1), r"config.json: .*unknown fields \['colour'\]"),
        (lambda c: c["config"].pop("depth"), r"missing fields \['depth'\]"),
        (lambda c: c["config"].update(depth=0), r"config.json: .*field 'depth': expected int >= 1 \(0\)"),
        (lambda c: c["config"].update(depth=1), "0 tensors missing .none., 22 unexpected .*transformer.blocks.1"),
        (lambda c: c["config"].update(depth=3), "tensors missing .*transformer.blocks.2.*, 0 unexpected"),
        (lambda c: c["config"].update(latent_dim=8), r"through.bias is \(6,\), not \(8,\)"),
        (lambda c: c["config"].update(rope_base=50.0), "was saved with another config.json"),
        (lambda c: c.update(format_version=2), "reads repvitok format version 1, the file has 2"),
        (lambda c: c.pop("format"), "names no format"),
        (lambda c: c.update(author="me"), 'expected the keys "format", "format_version", "config"'),
    ],
)
def test_a_wrong_config_is_refused(folder: Path, edit: Callable[[dict[str, Any]], None], message: str) -> None:
    edit_config(folder, edit)
    with pytest.raises(ValueError, match=message):
        RepViTok.from_pretrained(folder)


def test_a_config_that_is_no_json_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json: not a whole JSON document"):
        RepViTok.from_pretrained(folder)


@pytest.mark.parametrize("kept", [0, 5, 200, -1])
def test_truncated_weights_are_refused(folder: Path, kept: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model.safetensors is no complete safetensors file"):
        RepViTok.from_pretrained(folder)


def test_a_changed_bit_of_the_weights_is_refused(tok: RepViTok, folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    for place in (-1, -7, len(content) // 2):
        damaged = bytearray(content)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="is damaged: its weights are not those that were saved"):
            RepViTok.from_pretrained(folder)
    path.write_bytes(content)
    assert RepViTok.from_pretrained(folder).digest() == tok.digest()


def test_weights_of_another_shape_are_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    bias = tensors["decoder.norm.bias"]
    save_file(tensors | {"decoder.norm.bias": bias[:5]}, path)
    with pytest.raises(ValueError, match=r"1 tensors of another shape \(decoder.norm.bias is \(5,\), not \(32,\)\)"):
        RepViTok.from_pretrained(folder)
    save_file({name: tensor for name, tensor in tensors.items() if name != "decoder.norm.bias"}, path)
    with pytest.raises(ValueError, match=r"1 tensors missing \(decoder.norm.bias\), 0 unexpected"):
        RepViTok.from_pretrained(folder)
    save_file(tensors | {"surprise": bias.clone()}, path)
    with pytest.raises(ValueError, match=r"0 tensors missing \(none\), 1 unexpected \(surprise\)"):
        RepViTok.from_pretrained(folder)


def test_weights_from_elsewhere_need_no_hash(tok: RepViTok, folder: Path) -> None:
    """A file written by another tool, without our metadata, is held to names and shapes only."""
    path = folder / "model.safetensors"
    save_file(load_file(path), path)
    assert RepViTok.from_pretrained(folder).digest() == tok.digest()


def test_the_hub_is_asked_for_names_and_its_failure_is_clear(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path / "tokenizer")
    asked = []

    def snapshot(name: str, **kwargs: Any) -> str:
        asked.append((name, kwargs))
        if name == "someone/offline":
            raise LocalEntryNotFoundError("cannot reach the hub\nand more lines")
        return str(folder)

    monkeypatch.setattr(pretrained, "snapshot_download", snapshot)
    assert RepViTok.from_pretrained("hf://someone/tokenizer", revision="v1").config.width == 32
    files = {"allow_patterns": ["config.json", "model.safetensors"], "local_files_only": False}
    assert asked == [("someone/tokenizer", {"revision": "v1", **files})]
    with pytest.raises(FileNotFoundError, match=r"gave no model someone/offline \(cannot reach the hub\)"):
        RepViTok.from_pretrained("hf://someone/offline")
    asked.clear()
    assert RepViTok.from_pretrained("hf://someone/tokenizer", local_files_only=True).config.width == 32
    assert asked.pop()[1]["local_files_only"]
    assert RepViTok.from_pretrained("someone/tokenizer").config.width == 32
    with pytest.raises(FileNotFoundError, match=r"^someone/offline does not exist; .* hf://someone/offline asks"):
        RepViTok.from_pretrained("someone/offline")
    assert [(name, options.get("local_files_only")) for name, options in asked] == [
        ("someone/tokenizer", True), ("someone/offline", True),
    ]  # fmt: skip
    asked.clear()
    for local in ("missing", "./some/where", "/some/where", Path("some/where")):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            RepViTok.from_pretrained(local)
    assert asked == []


@pytest.fixture
def installed(tok: RepViTok, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A distribution with weights, as pip leaves it: a package with a model's folder, and its entry points."""
    site = tmp_path / "site"
    tok.save_pretrained(site / "some_weights" / "tok-small")
    (site / "some_weights" / "__init__.py").write_text("raise RuntimeError('no code of a weights package is run')\n")
    info = site / "some_weights-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: some-weights\nVersion: 1.0\n")
    points = "tok-small = some_weights\ntok-lost = some_weights\ntok-gone = no_such_package\n"
    (info / "entry_points.txt").write_text(f"[repvitok.weights]\n{points}")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.chdir(tmp_path)
    return site / "some_weights" / "tok-small"


def test_an_installed_model_is_found_by_its_name_without_the_hub(
    tok: RepViTok, installed: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(pretrained, "snapshot_download", lambda *_, **__: pytest.fail("the hub was asked"))
    assert RepViTok.from_pretrained("tok-small").digest() == tok.digest()
    assert load_tokenizer("tok-small").digest() == tok.digest()
    with pytest.raises(FileNotFoundError, match="does not exist"):
        RepViTok.from_pretrained(Path("tok-small"))  # a path is a path
    with pytest.raises(
        FileNotFoundError, match=r"tok-smal does not exist; .*installed one: .*tok-gone, tok-lost, tok-sm"
    ):
        RepViTok.from_pretrained("tok-smal")
    for name in ("tok-lost", "tok-gone"):
        with pytest.raises(UserError, match=f"is to carry the model {name} and does not; install it again"):
            RepViTok.from_pretrained(name)
    with pytest.raises(UserError, match="revision 'v1' is of a model of the hub"):
        RepViTok.from_pretrained("tok-small", revision="v1")
    (tmp_path / "tok-small").mkdir()  # what lies here comes first
    with pytest.raises(FileNotFoundError, match=r"tok-small holds no config.json"):
        RepViTok.from_pretrained("tok-small")


def test_weights_are_converted_where_that_is_asked_for(tok: RepViTok, folder: Path) -> None:
    assert RepViTok.from_pretrained(folder, dtype=torch.float32).digest() == tok.digest()
    half = RepViTok.from_pretrained(folder, dtype=torch.bfloat16)
    assert {value.dtype for value in half.state_dict().values()} == {torch.bfloat16}
    assert half.digest() != tok.digest()
    with pytest.raises(UserError, match="dtype: expected a floating type"):
        RepViTok.from_pretrained(folder, dtype=torch.int8)


class Hub:
    """Stands in for the hub: notes what it is asked for."""

    asked: ClassVar[list[tuple[str, Any]]] = []
    refuses: ClassVar[bool] = False

    def create_repo(self, name: str, **options: Any) -> None:
        if self.refuses:
            raise OSError("401: nobody is logged in\nmore")
        self.asked.append(("create_repo", (name, options)))

    def create_branch(self, name: str, **options: Any) -> None:
        self.asked.append(("create_branch", (name, options)))

    def upload_folder(self, **options: Any) -> str:
        self.asked.append(("upload_folder", options))
        return "https://hub/somebody/tok"


def test_an_exported_folder_goes_to_the_hub(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pretrained, "HfApi", Hub)
    monkeypatch.setattr(Hub, "asked", [])
    push = ["push", "--folder", str(folder), "--to", "hf://somebody/tok"]
    assert main(push) == 2
    assert "expected an exported folder with its model card, README.md" in capsys.readouterr().err
    (folder / "README.md").write_text("# A card\n")
    (folder / "last.ckpt").write_text("stays here")
    assert main([*push, "--private", "--revision", "v1"]) == 0
    assert capsys.readouterr().out == "https://hub/somebody/tok\n"
    names = [name for name, _ in Hub.asked]
    assert names == ["create_repo", "create_branch", "upload_folder"]
    assert Hub.asked[0][1] == ("somebody/tok", {"private": True, "exist_ok": True})
    sent = Hub.asked[2][1]
    assert sent["allow_patterns"] == ["config.json", "model.safetensors", "README.md"]
    assert (sent["folder_path"], sent["revision"]) == (folder, "v1")
    assert main(["push", "--folder", str(folder.parent), "--to", "somebody/tok"]) == 2
    assert main(["push", "--folder", str(folder), "--to", "tok"]) == 2
    assert "expected owner/name, got 'tok'" in capsys.readouterr().err
    monkeypatch.setattr(Hub, "refuses", True)
    assert main(push) == 2
    assert "did not take" in (told := capsys.readouterr().err)
    assert "(401: nobody is logged in); log in with `hf auth login`" in told


def test_importing_the_package_imports_no_torch() -> None:
    code = (
        "import sys, repvitok, repvitok.config, repvitok.runtime.errors, repvitok.runtime.progress; "
        "assert 'torch' not in sys.modules; assert set(repvitok.__all__) <= set(dir(repvitok))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_is_there() -> None:
    assert all(getattr(repvitok, name) is not None for name in repvitok.__all__)
    with pytest.raises(AttributeError, match="repvitok attribute nothing"):
        _ = repvitok.nothing


def test_a_tokenizer_is_loaded_by_nothing_that_trains(tok: RepViTok, tmp_path: Path) -> None:
    tok.save_pretrained(tmp_path / "tokenizer")
    code = (
        "import sys; from repvitok.model import RepViTok, load_tokenizer; folder = sys.argv[1]; "
        "assert load_tokenizer(folder).digest() == RepViTok.from_pretrained(folder).digest(); "
        "print(*(name for name in sys.modules if name.partition('.')[0] in ('lightning', 'torchmetrics', 'diffusers') "
        "or name == 'repvitok.runtime.training' or name.startswith('repvitok.training')))"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "tokenizer"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "\n"), done.stderr or done.stdout
