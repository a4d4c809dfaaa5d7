"""Every document that is read meets every wrong value in every field: one error that names the field, or nothing."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from latent_action.baselines.lapa import LapaConfig
from latent_action.config import LatentActionConfig
from repvitok import RepViTokConfig
from repvitok.data.latents import LatentEpisode, LatentMeta
from repvitok.data.shards import LatentShards, LatentShardWriter
from repvitok.runtime.documents import parse
from repvitok.runtime.errors import UserError
from repwam_core.data.layout import LAYOUTS, DatasetLayout
from repwam_core.interface import Embodiment
from repwam_core.model.config import ActionSpace, WAMConfig
from repwam_core.policy.folder import PolicyManifest
from repwam_core.quickstart.config import RECIPES, QuickstartConfig
from repwam_core.sampling import ChunkSpec, SamplingConfig
from repwam_core.sim.collect import CollectionConfig, Perturbation
from repwam_core.sim.metaworld import MetaWorldSettings
from repwam_core.sim.results import EpisodeResult, load_results, save_results
from repwam_core.statistics import ActionStatistics, StateStatistics, Statistics

META = LatentMeta(
    "a" * 64, 30, 2, (1, 2, 3), ("observation.images.top",), 4, 5, "source", ("x",), ("p",), depth_range=(10.0, 60.0)
)
STATISTICS = Statistics(
    ActionStatistics.from_values(np.arange(6.0).reshape(6, 1), ["x"]),
    StateStatistics.from_values(np.arange(6.0).reshape(6, 1), ["p"]),
)
FREE = ("provenance", "about", "rates", "statistics", "format", "digests")
"""Sections of no fixed form, and fields that another test is about."""


def _json(document: Any) -> Any:
    return json.loads(json.dumps(document))


def _latents(root: Path) -> tuple[Any, Callable[[Any], Any]]:
    with LatentShardWriter(root, META) as writer:
        writer.add(LatentEpisode("episode_0", 0, 0, "go", np.ones((3, 6, 4), np.float32)))

    def load(document: Any) -> Any:
        (root / "meta.json").write_text(json.dumps(document))
        return list(LatentShards(root))

    document = json.loads((root / "meta.json").read_text())
    del document["sha256"]  # which would refuse every change; each field is to be held by itself
    return document, load


def _policy(root: Path) -> tuple[Any, Callable[[Any], Any]]:
    robot = Embodiment.from_names("arm", ["x"], ["p"], META.cameras, 30.0)
    digests = dict.fromkeys(("wam", "tokenizer", "statistics"), "b" * 64)
    PolicyManifest("robot", robot, (32, 48), META, "minilm", SamplingConfig(), digests, CHUNKS).save(root)

    def load(document: Any) -> Any:
        (root / "policy.json").write_text(json.dumps(document))
        return PolicyManifest.load(root)

    return json.loads((root / "policy.json").read_text()), load


def _results(root: Path) -> tuple[Any, Callable[[Any], Any]]:
    path = root / "results.json"
    save_results(path, [EpisodeResult("reach", 1_000_000, "reach it", True, 7)])

    def load(document: Any) -> Any:
        path.write_text(json.dumps(document))
        return load_results(path)

    return json.loads(path.read_text()), load


def _layout(root: Path) -> tuple[Any, Callable[[Any], Any]]:
    path = root / "layout.yaml"

    def load(document: Any) -> Any:
        path.write_text(json.dumps(document))  # JSON is YAML, too
        return DatasetLayout.load(path)

    return yaml.safe_load((LAYOUTS / "agibot.yaml").read_text()), load


def _plain(document: Any, load: Callable[[Any], Any]) -> Callable[[Path], tuple[Any, Callable[[Any], Any]]]:
    return lambda _root: (_json(document), load)


CHUNKS = ChunkSpec(smallest=1, largest=4)
COLLECTION = CollectionConfig(("reach",), 3, 0, MetaWorldSettings(), Perturbation(), 4, "v2.1", "yuv444p", 10)
WAM = WAMConfig.preset("tiny", spaces={"robot": ActionSpace(channels=7, vectors_per_transition=4)})
DOCUMENTS: dict[str, Callable[[Path], tuple[Any, Callable[[Any], Any]]]] = {
    "meta.json of latents": _latents,
    "policy.json": _policy,
    "results.json": _results,
    "a layout": _layout,
    "RepViTok's config": _plain(RepViTokConfig().to_dict(), RepViTokConfig.from_dict),
    "LAT's config": _plain(LatentActionConfig().to_dict(), LatentActionConfig.from_dict),
    "LAPA's config": _plain(LapaConfig().to_dict(), LapaConfig.from_dict),
    "WAM's config": _plain(WAM.to_dict(), WAMConfig.from_dict),
    "statistics": _plain(STATISTICS.to_dict(), Statistics.from_dict),
    "collection.json": _plain(COLLECTION.to_dict(), CollectionConfig.from_dict),
    "a quickstart's recipe": _plain(
        yaml.safe_load((RECIPES / "sim.yaml").read_text()), lambda document: parse(document, QuickstartConfig, "plan")
    ),
}


def _places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where anything stands in a document; of a list the first and the last item."""
    if place and place[0] in FREE:
        return
    if place:
        yield place
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _places(item, (*place, key))
    elif isinstance(value, list) and value:
        for index in sorted({0, len(value) - 1}):
            yield from _places(value[index], (*place, index))


def _wrong_values(value: Any) -> list[Any]:
    """Values that stand for nothing where `value` stands."""
    if isinstance(value, bool):
        return [0, 1.5, "true", [], {}]
    if isinstance(value, int | float):
        return [math.nan, math.inf, -math.inf, "1", [value], {}, True, 10**400]
    if isinstance(value, str):
        return [1, 1.5, True, [value], {}, "\ud800"]
    if value is None:
        return []
    return [1, 1.5, True, "x", {"x": 1} if isinstance(value, list) else [1], [[[[]]]]]


def _replaced(document: Any, place: tuple[Any, ...], value: Any) -> Any:
    changed = copy.deepcopy(document)
    parent = changed
    for key in place[:-1]:
        parent = parent[key]
    parent[place[-1]] = value
    return changed


def _refused(load: Callable[[Any], Any], document: Any) -> bool:
    """Whether a document is refused by the one error, in one line; any other error fails the test."""
    try:
        load(document)
    except UserError as error:
        return "\n" not in str(error)
    return False


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_wrong_value_anywhere_is_one_error(name: str, tmp_path: Path) -> None:
    document, load = DOCUMENTS[name](tmp_path)
    load(document)
    for place in list(_places(document)):
        value = document
        for key in place:
            value = value[key]
        for wrong in _wrong_values(value):
            assert _refused(load, _replaced(document, place, wrong)), f"{place} = {wrong!r} was taken"
        for odd in (None, -1, 0, 10**30, "", [], {}):  # which may make sense here, or not
            _refused(load, _replaced(document, place, odd))


@pytest.mark.parametrize("name", DOCUMENTS)
def test_keys_are_all_there_and_no_others(name: str, tmp_path: Path) -> None:
    document, load = DOCUMENTS[name](tmp_path)
    optional = ("joint_actions", "recorded", "unit", "units", "select", "episodes", "crashed", "latent_action_mean")
    optional += ("latent_action_std", "execute_frames", "provenance", "statistics", "kind", "tubelet_frames")
    optional += ("instruction_source", "traceback", "suite", "chunks", "depth_range", "latent_action_frames")
    for place in [(), *_places(document)]:
        section = document
        for key in place:
            section = section[key]
        if isinstance(section, dict) and not (place and place[-1] in ("spaces", *FREE)):
            with pytest.raises(UserError, match="colour"):
                load(_replaced(document, (*place, "colour"), 1))
            for key in section:
                if key not in optional and (not place or place[0] not in ("plan",)):
                    less = copy.deepcopy(document)
                    inside = less
                    for step in place:
                        inside = inside[step]
                    del inside[key]
                    assert _refused(load, less), f"nobody missed {(*place, key)}"


@pytest.mark.parametrize("name", ["meta.json of latents", "policy.json", "results.json"])
@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "1", '"x"', "[" * 100_000, "[" * 900 + "]" * 900, "9" * 10_000]
)
def test_what_is_no_document_is_one_error(name: str, text: str, tmp_path: Path) -> None:
    document, load = DOCUMENTS[name](tmp_path)
    load(document)
    path = next(path for path in tmp_path.glob("*.json"))
    reread = {
        "meta.json of latents": lambda: LatentShards(tmp_path),
        "policy.json": lambda: PolicyManifest.load(tmp_path),
        "results.json": lambda: load_results(path),
    }[name]
    path.write_text(text)
    with pytest.raises(UserError, match=path.name):
        reread()


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (RepViTokConfig, {"depth": 10**9}),
        (RepViTokConfig, {"width": 10**9}),
        (RepViTokConfig, {"width": 2**20, "heads": 2**14, "depth": 1000}),
        (LatentActionConfig, {"layers": 10**9}),
        (LatentActionConfig, {"hidden": 2**20, "layers": 1000}),
        (LatentActionConfig, {"position_frequencies": 10**9}),
        (LapaConfig, {"depth": 10**9}),
        (LapaConfig, {"size": (10**12, 10**12)}),
        (WAMConfig, {"depth": 10**9}),
        (WAMConfig, {"max_views": 10**9}),
        (WAMConfig, {"width": 2**20, "heads": 2**13, "depth": 1000, "action_width": 2**20}),
    ],
)
def test_models_of_no_size_that_exists_are_refused_before_they_are_built(config: Any, changes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(changes)) + "|parameters"):
        config(**changes)
