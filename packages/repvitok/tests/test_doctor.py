"""`repvitok doctor`: what a recipe needs is named, looked for and tried, and what lacks ends in exit code 1."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from repvitok.cli import main
from repvitok.doctor import needs, read_recipe
from safetensors.torch import save_file

PE = "vit_pe_core_tiny_patch16_384"


def recipe(folder: Path, **sections: object) -> str:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(sections))
    return str(path)


def teacher(**arguments: object) -> dict[str, object]:
    return {"class_path": "repvitok.training.teacher.TimmTeacher", "init_args": {"name": PE, **arguments}}


@pytest.fixture
def nothing_cached(monkeypatch):
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: None)


def test_a_recipe_that_lacks_nothing_ends_well(tmp_path, capsys):
    assert main(["doctor", "-c", recipe(tmp_path, model={"teacher": {"class_path": "x.HOGTeacher"}})]) == 0
    assert "0 needed beside data, 0 missing or wrong" in capsys.readouterr().out
    assert main(["doctor", "-c", recipe(tmp_path, data={"text_encoder": "minilm"})]) in (0, 1)


def test_weights_of_the_hub_are_looked_for_in_its_cache_alone(tmp_path, capsys, nothing_cached):
    assert main(["doctor", "-c", recipe(tmp_path, model={"teacher": teacher(hub=True)})]) == 1
    told = capsys.readouterr().out
    assert "missing model.teacher: TimmTeacher vit_pe_core_tiny_patch16_384" in told
    assert "looked for timm/vit_pe_core_tiny_patch16_384.fb in" in told
    assert "not pinned" in told
    assert "give hub: false and weights_path" in told


def test_a_local_file_is_loaded_as_the_run_would(tmp_path, capsys):
    pytest.importorskip("timm")
    import timm

    cached = {"class_path": "x.CachedTeacher", "init_args": {"folder": "f", "teacher": teacher()}}
    path, file = recipe(tmp_path, model={"teacher": cached}), tmp_path / "pe.safetensors"
    given = f"model.teacher.init_args.teacher.init_args.weights_path={file}"
    assert main(["doctor", "-c", path]) == 1
    assert "the recipe names none" in capsys.readouterr().out
    assert main(["doctor", "-c", path, given]) == 1
    assert f"looked for {file}" in capsys.readouterr().out
    save_file({"x": torch.zeros(1)}, file)
    assert main(["doctor", "-c", path, given]) == 1
    assert f"wrong   model.teacher.init_args.teacher: TimmTeacher {PE}" in (told := capsys.readouterr().out)
    assert "does not hold the weights" in told
    save_file({name: value.bfloat16() for name, value in timm.create_model(PE).state_dict().items()}, file)
    assert main(["doctor", "-c", path, given]) == 0
    assert "MB, BF16, sha256 " in capsys.readouterr().out


def test_torchvisions_files_carry_the_beginning_of_their_digest(tmp_path):
    pytest.importorskip("lpips")
    (tmp_path / "vgg.pth").write_bytes(b"no weights")
    arguments = {"net": "vgg", "weights_path": str(tmp_path / "vgg.pth")}
    perceptual = {"class_path": "PerceptualLoss", "init_args": arguments}
    (need,) = needs({"model": {"perceptual": perceptual}})
    assert need.digest == "sha256 397923af..."
    assert need.problem is not None
    assert need.problem.startswith("another file")
    perceptual["init_args"] = {"net": "alex", "weights_path": str(tmp_path / "none.pth")}
    (need,) = needs({"model": {"perceptual": perceptual}})
    assert (need.digest, need.found) == ("sha256 7be5be79...", None)
    assert "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth" in str(need)


def test_models_and_text_encoders_are_looked_for(tmp_path, tok, nothing_cached):
    tok.save_pretrained(tmp_path / "ours")
    (tmp_path / "wan/vae").mkdir(parents=True)
    (tmp_path / "wan/vae/config.json").write_text('{"_class_name": "AutoencoderKLWan"}')
    named = {"ours": "ours", "wan": "wan", "none": "nowhere"}
    for name, problem in {"ours": False, "wan": None, "none": True}.items():
        (need,) = needs({"data": {"encoding": {"tokenizer": str(tmp_path / named[name])}}})
        assert problem is None or (need.problem is not None) == problem
    (need,) = needs({"data": {"text_encoder": "hf://facebook/Perception-LM-1B"}})
    assert (need.found, need.problem is not None) == (None, True)
    assert "facebook/Perception-LM-1B in" in need.looked
    (need,) = needs({"data": {"text_encoder": str(tmp_path / "no-folder")}})
    assert need.problem is not None
    (need,) = needs({"model": {"test_features": [{"class_path": "x.I3DFeatures", "init_args": {
        "variant": "pytorch-i3d", "weights_path": str(tmp_path / "i3d.pt")}}]}})  # fmt: skip
    assert need.key == "model.test_features.0"
    assert "i3d_pretrained_400.pt" in str(need)


def test_recipes_are_laid_over_each_other_as_fit_does(tmp_path):
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text(yaml.safe_dump({"model": {"teacher": teacher(hub=True), "x": 1}}))
    second.write_text(yaml.safe_dump({"model": {"teacher": {"class_path": "y.HOGTeacher"}}}))
    assert read_recipe([first, second], ["model.x=2"]) == {"model": {"teacher": {"class_path": "y.HOGTeacher"}, "x": 2}}
    second.write_text(yaml.safe_dump({"model": {"teacher": None}}))
    assert needs(read_recipe([first, second])) == []
    with pytest.raises(ValueError, match="expected KEY=VALUE"):
        read_recipe([first], ["model.x"])
