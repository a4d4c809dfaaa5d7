"""Every recipe is parsed by the very parser that trains with it; every tiny one runs two steps and resumes."""

import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from latent_action.cli import LAPA_STAGE as LAPA
from latent_action.cli import STAGE as LATENT_ACTION
from repvitok.cli import STAGE as REPVITOK
from repvitok.runtime.commands import import_object
from repvitok.runtime.progress import read_curves
from repwam_core.cli import STAGE as REPWAM
from repwam_core.quickstart.config import RECIPES as QUICKSTART
from safetensors.torch import save_file

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes"
DATA = {
    REPVITOK.name: "--data.folders=[somewhere]",
    LATENT_ACTION.name: "--data.latents=x",
    LAPA.name: "--data={latents: x, dataset: y}",
    REPWAM.name: "--data.latents=x",
}
STAGES = {"1_repvitok": REPVITOK, "2_latent_action": LATENT_ACTION, "3_repwam": REPWAM}
PLANS = {"sim.yaml", "dataset.yaml", "mt50_cpu.yaml", "mt50_gpu.yaml", "aloha.yaml"}
QUICKSTART_STAGES = {
    "repvitok.yaml": REPVITOK,
    "latent_action.yaml": LATENT_ACTION,
    "pretrain.yaml": REPWAM,
    "adapt.yaml": REPWAM,
}
MT50 = {"1_repvitok/mt50": "mt50_repvitok", "3_repwam/mt50_pretrain": "mt50_pretrain", "3_repwam/mt50": "mt50"}


def _recipes():
    """(name, stage, the files to lay over each other) of every recipe in the tree."""
    for folder, stage in STAGES.items():
        for path in sorted((RECIPES / folder).glob("*.yaml")):
            bases = [] if path.name == "base.yaml" or _is_whole(path) else _bases(path)
            of = LAPA if path.name.startswith("lapa_") else stage
            yield pytest.param(of, [*bases, path], id=f"{folder}/{path.name}")
    for name, stage in QUICKSTART_STAGES.items():
        yield pytest.param(stage, [QUICKSTART / name], id=f"quickstart/{name}")
    yield pytest.param(REPWAM, [QUICKSTART / "adapt.yaml", QUICKSTART / "mt50_cpu_wam.yaml"], id="quickstart/mt50_cpu")


def _bases(path: Path) -> list[Path]:
    """What an overlay is laid over: as its first comment says, base.yaml unless another recipe is named there."""
    names = {
        "1_repvitok/mt50.yaml": ["tiny.yaml"],
        "1_repvitok/small.yaml": ["tiny.yaml"],
        "3_repwam/finetune.yaml": ["base.yaml", "adapt.yaml"],
        "3_repwam/frozen.yaml": ["base.yaml", "adapt.yaml", "finetune.yaml"],
        "3_repwam/lora.yaml": ["base.yaml", "adapt.yaml", "finetune.yaml"],
        "3_repwam/tune_tokenizer.yaml": ["base.yaml", "adapt.yaml"],
        "3_repwam/mt50.yaml": ["mt50_pretrain.yaml"],
        "3_repwam/one_gpu_adapt.yaml": ["one_gpu.yaml"],
    }
    return [path.parent / name for name in names.get(f"{path.parent.name}/{path.name}", ["base.yaml"])]


def _is_whole(path: Path) -> bool:
    """A recipe that says in its first lines that it stands alone has its own `seed_everything`."""
    return "seed_everything" in yaml.safe_load(path.read_text())


def test_every_yaml_in_the_tree_is_a_recipe_that_is_tested():
    tested = {path for parameter in _recipes() for path in parameter.values[1]}
    found = {path for path in RECIPES.rglob("*.yaml") if not {"quickstart", "loggers"} & set(path.parts)}
    found |= {path for path in QUICKSTART.glob("*.yaml") if path.name not in PLANS}
    assert {path.resolve() for path in found} - {path.resolve() for path in tested} == set()


@pytest.mark.parametrize("overlay", sorted((RECIPES / "loggers").glob("*.yaml")), ids=lambda path: path.stem)
@pytest.mark.parametrize(
    ("stage", "recipe"),
    [(REPVITOK, "1_repvitok/tiny"), (LATENT_ACTION, "2_latent_action/tiny"), (REPWAM, "3_repwam/tiny_pretrain")],
)
def test_a_logger_is_laid_over_any_stage_and_writes_into_the_runs_folder(stage, recipe, overlay):
    from repvitok.runtime.lightning_cli import parse_recipe

    files = [str(RECIPES / f"{recipe}.yaml"), str(overlay)]
    (logger,) = parse_recipe("fit", files, stage, [DATA[stage.name]]).trainer.logger
    assert import_object(logger.class_path.replace(".loggers.", ".loggers:"))
    assert not Path(logger.init_args.save_dir).is_absolute()


@pytest.mark.parametrize(("stage", "files"), list(_recipes()))
def test_recipe_parses(stage, files, tmp_path):
    """Unknown keys, wrong types and missing classes are errors of the parser."""
    from repvitok.runtime.lightning_cli import parse_recipe

    config = parse_recipe("fit", [str(path) for path in files], stage, [DATA[stage.name]])
    assert config.trainer.max_steps is None or config.trainer.max_steps != 0
    assert import_object(stage.module).__name__ in (
        "RepViTokTraining",
        "LatentActionTraining",
        "LapaTraining",
        "WAMTraining",
    )


def test_overlays_shown_in_the_tokenizers_readme_parse(tmp_path):
    from repvitok.runtime.lightning_cli import parse_recipe

    readme = (ROOT / "packages" / "repvitok" / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```yaml\n(.*?)```", readme, flags=re.DOTALL)
    assert blocks
    for number, block in enumerate(blocks):
        path = tmp_path / f"{number}.yaml"
        path.write_text(block)
        config = parse_recipe(
            "test", [str(RECIPES / "1_repvitok" / "tiny.yaml"), str(path)], REPVITOK, [DATA[REPVITOK.name]]
        )
        assert config.model.test_features[0].class_path == "repvitok.training.metrics.I3DFeatures"


def test_the_tiny_recipes_are_the_files_that_the_quickstart_runs():
    """Once each (docs/decisions/062): a recipe of its own beside the package's would be a second truth."""
    tiny = ("1_repvitok/tiny", "2_latent_action/tiny", "3_repwam/tiny_pretrain", "3_repwam/tiny_adapt")
    for name, packaged in zip(tiny, QUICKSTART_STAGES, strict=True):
        assert (RECIPES / f"{name}.yaml").samefile(QUICKSTART / packaged), name
    for name, packaged in MT50.items():
        assert (RECIPES / f"{name}.yaml").samefile(QUICKSTART / f"{packaged}.yaml"), name
    overlays = {f"{name}.yaml" for name in (*MT50.values(), "mt50_cpu_wam")}
    assert {path.name for path in QUICKSTART.glob("*.yaml")} == PLANS | set(QUICKSTART_STAGES) | overlays


def test_the_papers_numbers_stand_in_the_base_recipes():
    tokenizer = yaml.safe_load((RECIPES / "1_repvitok/base.yaml").read_text())["model"]
    assert {name: tokenizer["weights"][name] for name in ("l1", "perceptual", "gan", "align")} == {
        "l1": 1.0,
        "perceptual": 1.0,
        "gan": 0.1,
        "align": 1.0,
    }
    assert yaml.safe_load((RECIPES / "1_repvitok/vitok.yaml").read_text())["model"]["weights"]["align"] == 0
    wam = yaml.safe_load((RECIPES / "3_repwam/base.yaml").read_text())
    assert wam["model"]["optimizer"]["lr"] == 1e-2
    assert wam["model"]["optimizer"]["name"] == "muon"
    assert wam["model"]["optimizer"]["weight_decay"] == 0.01
    assert wam["model"]["loss"]["action_weight"] == 1.0
    assert wam["model"]["chunk_sizes"] == [1, 4]
    assert wam["model"]["wam"]["window"] == 32
    assert wam["data"]["packing"]["token_budget"] == 200_000
    overlays = {name: yaml.safe_load((RECIPES / f"3_repwam/{name}.yaml").read_text()) for name in ("5b", "finetune")}
    assert overlays["5b"]["data"]["packing"]["token_budget"] == 160_000
    assert overlays["finetune"]["model"]["optimizer"]["lr"] == 1e-4
    assert overlays["finetune"]["trainer"]["max_steps"] == 500
    assert overlays["finetune"]["data"]["packing"]["token_budget"] == 150_000
    assert wam["trainer"]["gradient_clip_val"] == 2.0


def test_the_alignment_recipe_runs_with_a_perception_encoder_the_moment_a_file_is_given(tmp_path, capsys):
    """The paper's recipe but for its sizes, on a file as timm publishes it, in bfloat16; `doctor` agrees beforehand."""
    timm = pytest.importorskip("timm")
    from repvitok.cli import main
    from repvitok.data.video import write_video

    name, file = "vit_pe_core_tiny_patch16_384", tmp_path / "model.safetensors"
    frames = np.random.default_rng(0).integers(0, 256, (12, 4, 4, 3), np.uint8).repeat(8, 1).repeat(8, 2)
    for number in range(2):
        write_video(tmp_path / f"videos/{number}.mp4", frames, 10)
    teacher = {"name": name, "hub": "false", "weights_path": str(file)}
    named = [f"model.teacher.init_args.{key}={value}" for key, value in teacher.items()]
    doctor = ["doctor", "-c", str(RECIPES / "1_repvitok/base.yaml"), *named, "model.perceptual=null"]
    assert main(doctor) == 1
    assert f"looked for {file}" in capsys.readouterr().out
    save_file({key: value.bfloat16() for key, value in timm.create_model(name).state_dict().items()}, file)
    assert main(doctor) == 0
    small = {
        "trainer.max_steps": 1, "trainer.accelerator": "cpu", "trainer.precision": "32-true", "data.num_workers": 0,
        "trainer.log_every_n_steps": 1, "trainer.default_root_dir": tmp_path / "run", "data.frames": 9,
        "data.size": "[32,32]", "data.batch_size": 1, "data.val_clips": 1, "data.held_out": 0.5,
        "model.tokenizer.width": 32, "model.tokenizer.depth": 1, "model.tokenizer.heads": 2, "model.weights.gan": 0,
        "model.weights.perceptual": 0, "model.perceptual": "null", "data.folders": f"[{tmp_path / 'videos'}]",
    }  # fmt: skip
    overrides = [f"--{pair}" for pair in (*named, *(f"{key}={value}" for key, value in small.items()))]
    assert main(["fit", "-c", str(RECIPES / "1_repvitok/base.yaml"), *overrides]) == 0
    assert np.isfinite(read_curves(tmp_path / "run")["train/align"]).all()


@pytest.mark.slow
def test_quickstart_recipes_run_two_steps_one_after_the_other(tmp_path, shared_video_dataset):
    """From video to a policy folder through the stages' own commands, two steps each, by the quickstart's recipes."""
    import argparse

    from repwam_core.cli import main as repwam
    from repwam_core.policy.policy import Policy
    from repwam_core.quickstart import work
    from repwam_core.quickstart.config import load_config

    unused = dict.fromkeys(("preset", "tasks", "suite", "episodes", "eval_episodes"))
    config = load_config(argparse.Namespace(**unused, size=[32, 48], budget=1e-6, dataset=shared_video_dataset))
    common = {"config": config, "seed": 0}
    later = {**common, "repwam": repwam}
    work.train_tokenizer(tmp_path / "tok", **common, dataset=shared_video_dataset)
    tokenizer = tmp_path / "tok" / "tokenizer"
    work.encode(tmp_path / "enc", config=config, dataset=shared_video_dataset, tokenizer=tokenizer)
    latents = tmp_path / "enc" / "latents"
    work.train_latent_actions(tmp_path / "lat", **common, latents=latents)
    lat = tmp_path / "lat" / "lat"
    work.label(tmp_path / "label", config=config, lat=lat, latents=latents)
    labelled = tmp_path / "label" / "latents"
    work.pretrain(tmp_path / "pre", **later, latents=labelled)
    work.adapt(
        tmp_path / "ad",
        **later,
        steps=2,
        latents=labelled,
        pretrained=tmp_path / "pre" / "wam",
        tokenizer=tokenizer,
        lat=lat,
    )
    assert (tmp_path / "ad" / "policy" / "lat" / "config.json").exists()
    assert Policy.from_pretrained(tmp_path / "ad" / "policy").embodiment.action_names == ("x", "y", "grip")
    for stage in ("tok", "lat", "pre", "ad"):
        assert read_curves(tmp_path / stage / work.FIT)
