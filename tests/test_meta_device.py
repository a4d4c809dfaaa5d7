"""Every recipe's model exists on the meta device, at the sizes that the paper gives, without a byte of weights."""

from pathlib import Path

import pytest
import torch
import yaml
from latent_action import LatentActionConfig, LatentActionTokenizer
from latent_action.cli import STAGE as LATENT_ACTION
from repvitok import RepViTok, RepViTokConfig
from repvitok.cli import STAGE as REPVITOK
from repvitok.runtime.lightning_cli import parse_recipe
from repwam_core import ActionSpace, WAMConfig, WorldActionModel
from repwam_core.cli import STAGE as REPWAM
from repwam_core.data.layout import DatasetLayout
from repwam_core.interface import shared_channels

RECIPES = Path(__file__).parents[1] / "recipes"
PLM_WIDTH = 2048  # hidden states of the paper's text encoder at 1 B
LAYOUTS = {
    "adapt_agibot.yaml": "agibot",
    "adapt_robomind.yaml": "robomind_agilex",
    "adapt_robocoin.yaml": "robocoin",
    "adapt_interndata_a1.yaml": "interndata_a1_genie1",
}


def _overlays(folder):
    names = [path.name for path in sorted((RECIPES / folder).glob("*.yaml"))]
    return [
        name for name in names if name != "base.yaml" and not name.startswith("lapa_")
    ]  # LAPA is a stage of its own


def _parse(stage, folder, overlay, data):
    over_tiny = folder == "1_repvitok" and overlay in ("mt50.yaml", "small.yaml")
    files = [RECIPES / folder / ("tiny.yaml" if over_tiny else "base.yaml")]
    if overlay:
        path = RECIPES / folder / overlay
        files = [path] if "seed_everything" in yaml.safe_load(path.read_text()) else [*files, path]
    return parse_recipe("fit", list(map(str, files)), stage, [data])


def _given(section):
    """What a recipe says of a model, without what it leaves open."""
    values = section.as_dict() if hasattr(section, "as_dict") else dict(section or {})
    return {name: value for name, value in values.items() if value is not None}


def _count(module):
    assert all(parameter.is_meta for parameter in module.parameters())
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("overlay", [None, *_overlays("1_repvitok")])
def test_tokenizers(overlay):
    config = _parse(REPVITOK, "1_repvitok", overlay, "--data.folders=[x]")
    with torch.device("meta"):
        tokenizer = RepViTok(RepViTokConfig(**_given(config.model.tokenizer)))
    count = _count(tokenizer)
    small = {"tiny.yaml": (1e6, 3e6), "small.yaml": (1e6, 3e6), "mt50.yaml": (5e6, 20e6)}
    least, most = small.get(overlay or "", (176e6, 178e6))
    assert least < count < most


@pytest.mark.parametrize("overlay", [None, *_overlays("2_latent_action")])
def test_latent_action_tokenizers(overlay):
    config = _parse(LATENT_ACTION, "2_latent_action", overlay, "--data.latents=x")
    with torch.device("meta"):
        lat = LatentActionTokenizer(LatentActionConfig(**_given(config.model.lat)))
    assert _count(lat) < 1e6


def _wam(config, space):
    sizes = {"latent_dim": 96, "text_dim": PLM_WIDTH, "spaces": {config.model.space: space}}
    with torch.device("meta"):
        return WorldActionModel(WAMConfig.preset(config.model.preset, **_given(config.model.wam) | sizes))


@pytest.mark.parametrize("overlay", [None, *_overlays("3_repwam")])
def test_world_action_models(overlay):
    config = _parse(REPWAM, "3_repwam", overlay, "--data.latents=x")
    wam = _wam(config, ActionSpace(channels=4, vectors_per_transition=1, state_channels=0))
    widened = {"mt50": (50e6, 60e6), "one_": (75e6, 90e6)}
    tiny = widened.get((overlay or "")[:4], (0.3e6, 5e6))
    expected = {"1.3b": (1.27e9, 1.33e9), "5b": (4.9e9, 5.1e9), "tiny": tiny}[config.model.preset]
    counts = wam.parameter_counts()
    assert expected[0] < counts["video"] < expected[1], counts
    assert _count(wam) == sum(counts.values())


@pytest.mark.parametrize("overlay", list(LAYOUTS))
def test_adaptation_recipes_name_the_units_of_their_layouts(overlay):
    config = _parse(REPWAM, "3_repwam", overlay, "--data.seed=0")
    robot = DatasetLayout.load(LAYOUTS[overlay]).robot(30.0)
    assert tuple(config.data.action_units) == robot.action_units
    assert LAYOUTS[overlay] in str(config.data.latents)


def test_the_recipe_for_all_collections_names_the_units_of_their_layouts():
    config = _parse(REPWAM, "3_repwam", "adapt_all.yaml", "--data.seed=0")
    robots = {entry.latents.split("/")[1]: entry.action_units for entry in config.data.data_sets}
    assert set(LAYOUTS.values()) < set(robots)
    known = [DatasetLayout.load(name).robot(30.0) for name in robots]
    assert [tuple(units) for units in robots.values()] == [robot.action_units for robot in known]
    assert len(shared_channels(known)) == 20
