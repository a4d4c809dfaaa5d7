"""Latent episodes come back as they were written, and a damaged, unfinished or foreign folder is refused."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from repvitok.data.latents import LatentEpisode, LatentMeta
from repvitok.data.shards import LatentShards, LatentShardWriter, read_episode_file, write_episode_file
from repvitok.runtime.errors import UserError

META = LatentMeta(
    tokenizer_digest="a" * 64,
    frame_rate_hz=30,
    stride=2,
    grid=(2, 2, 3),
    cameras=("left", "right"),
    latent_dim=5,
    window=5,
    source="test",
    action_names=("x", "y"),
    state_names=("p",),
)
ARRAYS = ("latents", "state", "actions", "latent_actions")


def episode(number: int, frames: int = 4, **changes: object) -> LatentEpisode:
    random = np.random.default_rng(number)

    def normal(*shape: int) -> np.ndarray:
        return random.normal(loc=3.0, scale=2.0, size=shape).astype(np.float32)

    values = {
        "latents": normal(frames, 12, 5),
        "state": normal(frames, 1),
        "actions": normal(frames - 1, 8, 2),
        "latent_actions": normal(frames - 1, 4),
    }
    return LatentEpisode(f"episode_{number:06d}-o0", number, 0, f"täsk {number}", **{**values, **changes})  # type: ignore[arg-type]


def assert_same(one: LatentEpisode, two: LatentEpisode) -> None:
    for field in dataclasses.fields(LatentEpisode):
        first, second = getattr(one, field.name), getattr(two, field.name)
        if field.name in ARRAYS and first is not None:
            assert second.dtype == np.float32
            np.testing.assert_array_equal(first, second)
        else:
            assert first == second


def write(root, episodes, meta=META, **settings) -> LatentMeta:
    with LatentShardWriter(root, meta, **settings) as writer:
        for item in episodes:
            writer.add(item)
    return writer.meta


def test_episodes_come_back_in_order_and_at_random(tmp_path):
    episodes = [episode(number, frames=1 + number % 4) for number in range(9)]
    episodes[3] = episode(3, state=None, actions=None, latent_actions=None)
    write(tmp_path, episodes, shard_bytes=12_000, provenance={"offsets": [0]})
    shards = LatentShards(tmp_path, expect_digest="a" * 64)
    assert len(shards.paths) > 1
    assert len(shards) == 9
    assert shards.provenance == {"offsets": [0]}
    for one, two in zip(episodes, shards, strict=True):
        assert_same(one, two)
    assert_same(episodes[7], shards[7])
    assert_same(episodes[8], shards[-1])
    with pytest.raises(IndexError):
        shards[9]
    shards.verify()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_mapped_arrays_are_those_on_disk_and_are_read_only(tmp_path, dtype):
    episodes = [episode(number, frames=3 + number) for number in range(5)]
    write(tmp_path / "latents", episodes, shard_bytes=6000, dtype=dtype)
    shards = LatentShards(tmp_path / "latents")
    assert len(shards.paths) > 1
    for number in (4, 0, 2):
        mapped, read = shards.mapped(number), shards[number]
        assert set(mapped) == set(ARRAYS)
        assert mapped["latents"].dtype == dtype
        for name in ARRAYS:
            np.testing.assert_array_equal(mapped[name].astype(np.float32), getattr(read, name))
        with pytest.raises(ValueError, match="read-only"):
            mapped["latents"][0] = 0


def test_what_the_episodes_are_is_known_without_a_shard(tmp_path):
    episodes = [episode(number, frames=3 + number) for number in range(3)]
    write(tmp_path / "latents", episodes)
    shards = LatentShards(tmp_path / "latents")
    shards.paths[0].unlink()
    assert shards.infos == [item.info for item in episodes]
    write(tmp_path / "older", episodes)
    document = json.loads((tmp_path / "older/meta.json").read_text())
    for shard in document["shards"]:
        del shard["episodes"]  # as folders of before this list
    del document["sha256"]
    (tmp_path / "older/meta.json").write_text(json.dumps(document))
    assert LatentShards(tmp_path / "older").infos == shards.infos


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_changed_bit_in_meta_json_is_refused(tmp_path, data):
    if not (tmp_path / "meta.json").exists():
        write(tmp_path, [episode(number) for number in range(2)])
        (tmp_path / "whole.json").write_bytes((tmp_path / "meta.json").read_bytes())
    whole = (tmp_path / "whole.json").read_bytes()
    changed = bytearray(whole)
    start = data.draw(st.sampled_from([0, whole.index(b'"mean"'), whole.index(b'"std"'), whole.index(b'"statistics"')]))
    changed[data.draw(st.integers(start, min(start + 400, len(whole) - 1)))] ^= 1 << data.draw(st.integers(0, 7))
    (tmp_path / "meta.json").write_bytes(changed)
    try:
        same = json.loads(changed) == json.loads(whole)  # a space became a tab
    except ValueError:
        same = False
    if not same:
        with pytest.raises(UserError, match=r"meta\.json"):
            LatentShards(tmp_path)
    document = json.loads(whole)
    del document["sha256"]  # as version 0.1 wrote it
    (tmp_path / "meta.json").write_text(json.dumps(document))
    assert len(LatentShards(tmp_path)) == 2


def test_one_standardizer_for_arrays_and_tensors(tmp_path):
    meta = dataclasses.replace(write(tmp_path, [episode(0, frames=6)]), std=np.array([0.3, 2, 1e-9, 1e-6, 7]))
    raw = LatentShards(tmp_path)[0].latents
    mean, std = meta.mean, np.maximum(meta.std, 1e-6)
    z = meta.standardizer(raw)
    np.testing.assert_array_equal(z, (raw - mean) / std)
    np.testing.assert_array_equal(meta.standardizer.inverse(z), z * std + mean)
    assert z.dtype == np.float32
    on_cpu = meta.standardizer.like(torch.from_numpy(raw))
    tensor = on_cpu(torch.from_numpy(raw))
    np.testing.assert_array_equal(tensor.numpy(), z)
    np.testing.assert_array_equal(on_cpu.inverse(tensor).numpy(), meta.standardizer.inverse(z))
    assert meta.standardizer.like(tensor.bfloat16())(tensor.bfloat16()).dtype == torch.bfloat16


def test_statistics_are_those_of_everything_written(tmp_path):
    episodes = [episode(number, frames=2 + number) for number in range(5)]
    meta = write(tmp_path, episodes, shard_bytes=5000)
    everything = np.concatenate([item.latents.reshape(-1, 5) for item in episodes]).astype(np.float64)
    np.testing.assert_allclose(meta.mean, everything.mean(0), rtol=1e-6)
    np.testing.assert_allclose(meta.std, everything.std(0), rtol=1e-6)
    actions = np.concatenate([item.latent_actions for item in episodes if item.latent_actions is not None])
    assert meta.latent_action_mean is not None
    np.testing.assert_allclose(meta.latent_action_mean, actions.mean(0), rtol=1e-5)
    loaded = LatentShards(tmp_path).meta
    assert loaded.to_dict() == meta.to_dict()
    np.testing.assert_array_equal(loaded.mean, meta.mean)


def test_given_statistics_are_kept(tmp_path):
    meta = dataclasses.replace(META, mean=np.arange(5, dtype=np.float32), std=np.full(5, 2, dtype=np.float32))
    kept = write(tmp_path, [episode(0)], meta, measure=False)
    np.testing.assert_array_equal(kept.mean, meta.mean)
    np.testing.assert_array_equal(kept.std, meta.std)


def test_half_precision_takes_half_the_space(tmp_path):
    for dtype in ("float32", "float16"):
        write(tmp_path / dtype, [episode(0, 500, latent_actions=None)], dtype=dtype)
    plain, half = LatentShards(tmp_path / "float32"), LatentShards(tmp_path / "float16")
    assert half.paths[0].stat().st_size < 0.75 * plain.paths[0].stat().st_size
    assert half[0].latents.dtype == np.float32
    np.testing.assert_allclose(half[0].latents, plain[0].latents, rtol=1e-3)
    np.testing.assert_array_equal(half[0].actions, plain[0].actions)


def test_the_same_episodes_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / name, [episode(0), episode(1)])
    for file in ("latents-000000.tar", "meta.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_webdataset_reads_the_shards(tmp_path):
    import webdataset

    episodes = [episode(number) for number in range(3)]
    write(tmp_path, episodes)
    paths = [str(path) for path in LatentShards(tmp_path).paths]
    samples = list(webdataset.WebDataset(paths, shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == [item.key for item in episodes]
    np.testing.assert_array_equal(samples[1]["latents.npy"], episodes[1].latents)
    assert samples[2]["json"]["task"] == "täsk 2"


def test_one_episode_can_lie_in_a_file_of_its_own(tmp_path):
    write_episode_file(tmp_path / "episode_000003-o0.tar", episode(3))
    assert_same(read_episode_file(tmp_path / "episode_000003-o0.tar"), episode(3))


def test_an_unfinished_folder_is_refused_and_may_be_written_again(tmp_path):
    def killed() -> None:
        with LatentShardWriter(tmp_path, META, shard_bytes=1000) as writer:
            for number in range(3):
                writer.add(episode(number))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        killed()
    with pytest.raises(
        ValueError, match=r"has no meta\.json: it holds no latent shards, or encoding them never finished"
    ):
        LatentShards(tmp_path)
    write(tmp_path, [episode(5)])
    assert [item.episode_index for item in LatentShards(tmp_path)] == [5]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latents-000000.tar", "meta.json"]
    with pytest.raises(ValueError, match="already holds finished latents"):
        LatentShardWriter(tmp_path, META)


def test_a_data_set_in_place_of_its_latents_is_told_how_to_make_them(data_sets):
    with pytest.raises(ValueError, match=r"is a LeRobot data set, not its latents: make them with `repvitok encode"):
        LatentShards(data_sets["v3.0"])


def test_damage_is_named(tmp_path):
    write(tmp_path, [episode(number) for number in range(4)], shard_bytes=3000)
    path = tmp_path / "latents-000001.tar"
    data = path.read_bytes()
    path.write_bytes(data[:1000] + bytes([data[1000] ^ 1]) + data[1001:])
    with pytest.raises(ValueError, match=r"latents-000001\.tar: its SHA-256 is not"):
        LatentShards(tmp_path).verify()
    for touch in (list, lambda shards: [shards.mapped(number) for number in range(len(shards))]):
        with pytest.raises(ValueError, match=r"latents-000001\.tar: its SHA-256 is not"):
            touch(LatentShards(tmp_path))
    path.write_bytes(data[:-512])
    with pytest.raises(ValueError, match=rf"latents-000001\.tar: expected {len(data)} bytes, found {len(data) - 512}"):
        LatentShards(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=r"latents-000001\.tar: missing, though meta\.json lists it"):
        LatentShards(tmp_path)


def test_another_tokenizer_or_format_is_refused(tmp_path):
    write(tmp_path, [episode(0)])
    with pytest.raises(ValueError, match=r"made by tokenizer aaaaaaaaaaaaaaaa, expected bbbbbbbbbbbbbbbb"):
        LatentShards(tmp_path, expect_digest="b" * 64)
    document = json.loads((tmp_path / "meta.json").read_text())
    (tmp_path / "meta.json").write_text(json.dumps({**document, "format_version": 99}))
    with pytest.raises(ValueError, match="expected format 'repvitok-latents' version 1"):
        LatentShards(tmp_path)
    document["meta"].pop("window")
    (tmp_path / "meta.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"missing fields \['window'\]"):
        LatentShards(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder; expected latent shards"):
        LatentShards(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latents": np.zeros((4, 11, 5), np.float32)}, r"expected latents \(frames, 12, 5\)"),
        ({"latents": np.zeros((4, 12, 6), np.float32)}, r"expected latents \(frames, 12, 5\)"),
        ({"state": np.zeros((3, 1), np.float32)}, "4 latent frames need state with 2 axes, the first of 4"),
        ({"actions": np.zeros((4, 8, 2), np.float32)}, "need actions with 3 axes, the first of 3"),
        ({"latents": np.full((4, 12, 5), np.nan, np.float32)}, "not finite"),
    ],
)
def test_episodes_that_do_not_fit_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message), LatentShardWriter(tmp_path, META) as writer:
        writer.add(episode(0, **changes))


def test_keys_and_grids_are_checked(tmp_path):
    with pytest.raises(ValueError, match=r"without '\.' and '/'"):
        dataclasses.replace(episode(0), key="a.b")
    with pytest.raises(ValueError, match="one view per camera"):
        dataclasses.replace(META, grid=(1, 2, 3))
    with pytest.raises(ValueError, match="no episode was added"):
        write(tmp_path / "empty", [])
    with pytest.raises(ValueError, match="already written"):
        write(tmp_path / "twice", [episode(0), episode(0)])
    with pytest.raises(ValueError, match='dtype must be "float32" or "float16"'):
        LatentShardWriter(tmp_path / "dtype", META, dtype="int8")
