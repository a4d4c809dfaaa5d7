"""The config refuses what cannot work and survives JSON."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
from latent_action.config import LatentActionConfig
from repvitok.data.latents import LatentMeta


def meta(**changes) -> LatentMeta:
    values = {
        "tokenizer_digest": "d" * 64,
        "frame_rate_hz": 10.0,
        "stride": 1,
        "grid": (1, 2, 2),
        "cameras": ("camera",),
        "latent_dim": 2,
        "window": None,
        "source": "test",
        "mean": np.array([0.5, 1.0], np.float32),
        "std": np.array([1.0, 2.0], np.float32),
    }
    return LatentMeta(**(values | changes))


def test_defaults_are_the_papers():
    config = LatentActionConfig()
    assert (config.latent_dim, config.action_dim, config.hidden, config.layers) == (96, 4, 256, 4)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"action_dim": 0}, "action_dim"),
        ({"layers": 1}, "layers"),
        ({"hidden": -4}, "hidden"),
        ({"pooling": "max"}, "pooling"),
        ({"latent_mean": (0.0,)}, "belong together"),
        ({"latent_dim": 2, "latent_mean": (0.0,), "latent_std": (1.0,)}, "latent_dim = 2"),
        ({"latent_dim": 1, "latent_mean": (0.0,), "latent_std": (0.0,)}, "latent_std: .*expected float > 0"),
    ],
)
def test_impossible_settings_are_named(changes, told):
    with pytest.raises(ValueError, match=told):
        LatentActionConfig(**changes)


def test_json_round_trip_is_exact():
    config = LatentActionConfig(latent_dim=2).fitted_to(meta())
    again = LatentActionConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert again.latent_std == (1.0, 2.0)


def test_from_dict_is_strict():
    values = LatentActionConfig().to_dict()
    with pytest.raises(ValueError, match="missing"):
        LatentActionConfig.from_dict({k: v for k, v in values.items() if k != "hidden"})
    with pytest.raises(ValueError, match="unknown"):
        LatentActionConfig.from_dict(values | {"depth": 3})


def test_fitted_config_refuses_other_latents():
    fitted = LatentActionConfig(latent_dim=2).fitted_to(meta())
    assert fitted.fitted_to(meta()) == fitted
    with pytest.raises(ValueError, match="tokenizer_digest"):
        fitted.fitted_to(meta(tokenizer_digest="e" * 64))
    with pytest.raises(ValueError, match="latent_std"):
        fitted.fitted_to(meta(std=np.array([1.0, 3.0], np.float32)))
    with pytest.raises(ValueError, match="3 channels"):
        fitted.fitted_to(meta(latent_dim=3, mean=np.zeros(3, np.float32), std=np.ones(3, np.float32)))


def test_checkpoint_of_other_settings_is_named():
    config = LatentActionConfig()
    config.require_same(LatentActionConfig())
    with pytest.raises(ValueError, match="action_dim: here 4, there 8"):
        config.require_same(dataclasses.replace(config, action_dim=8))


def test_importing_the_package_imports_no_torch():
    code = (
        "import sys, latent_action, latent_action.cli; assert 'torch' not in sys.modules; "
        "assert set(latent_action.__all__) <= set(dir(latent_action)); "
        "[getattr(latent_action, name) for name in latent_action.__all__]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_transitions_of_one_frame_are_written_as_before_and_others_are_kept():
    config = LatentActionConfig(latent_dim=2).fitted_to(meta())
    assert "transition_frames" not in config.to_dict()
    longer = LatentActionConfig(latent_dim=2).fitted_to(meta(), 4)
    assert LatentActionConfig.from_dict(json.loads(json.dumps(longer.to_dict()))).transition_frames == 4
    with pytest.raises(ValueError, match=r"data\.transition_frames"):
        longer.fitted_to(meta(), 2)
    with pytest.raises(ValueError, match="transition_frames: here 1, there 4"):
        config.require_same(longer)
