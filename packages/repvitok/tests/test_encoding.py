"""Encoding a data set: latents are the stream's, actions stand beside their transition, a killed run continues."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextvars import Context
from pathlib import Path

import numpy as np
import pytest
import torch
from repvitok import RepViTok, RepViTokConfig, encoding
from repvitok.data.contents import without_actions
from repvitok.data.folders import open_episodes
from repvitok.data.lerobot.format import EpisodeInfo
from repvitok.data.shards import LatentShards
from repvitok.data.split import split_latents
from repvitok.data.transforms import Augmentation, prepare_frames, resize_frames
from repvitok.data.video import write_video
from repvitok.encoding import decode_shards, encode_dataset
from repvitok.encoding_plan import episodes_of_slice, make_config, merge_latents
from repvitok.runtime.errors import UserError

LENGTHS = (23, 9, 40, 12)


class Recording:
    """A data set in memory with state[i] = i, action[i] = (i, episode) and smooth frames; stops after `reads` reads."""

    def __init__(self, lengths: Sequence[int] = LENGTHS, cameras: int = 2, reads: int | None = None) -> None:
        self.root = Path("recording")
        self.fps = 20.0
        self.camera_keys = [f"camera_{number}" for number in range(cameras)]
        self.features = {"observation.state": {}, "action": {}}
        self.depth_range = None
        self.episodes = [EpisodeInfo(index, length, f"task {index}") for index, length in enumerate(lengths)]
        self.reads, self.read = reads, 0

    def require_camera(self, camera: str) -> None:
        if camera not in self.camera_keys:
            raise UserError(f"no camera {camera!r}; there are {self.camera_keys}")

    def episode(self, index: int, keys: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        frame = np.arange(self.episodes[index].length, dtype=np.float32)
        columns = {"observation.state": frame, "action": np.stack([frame, np.full_like(frame, index)], axis=1)}
        return {key: column for key, column in columns.items() if keys is None or key in keys}

    def frames(self, episode: int, camera: str, frames: Sequence[int] | None = None) -> np.ndarray:
        self.read += 1
        if self.reads is not None and self.read > self.reads:
            raise KeyboardInterrupt
        wanted = np.arange(self.episodes[episode].length) if frames is None else np.array(frames)
        rows, columns = np.meshgrid(np.arange(40), np.arange(48), indexing="ij")
        phase = wanted[:, None, None, None] / 3 + episode + 5 * self.camera_keys.index(camera) + np.arange(3)
        wave = np.sin(rows[..., None] / 7 + phase) + np.cos(columns[..., None] / 9 - phase)
        return (127.5 + 60 * wave).astype(np.uint8)

    def channel_names(self, key: str) -> tuple[str, ...]:
        return ("frame",) if key == "observation.state" else ("frame", "episode")


@pytest.fixture(scope="module")
def tok() -> RepViTok:
    torch.manual_seed(0)
    return RepViTok(RepViTokConfig(width=24, depth=2, heads=2, latent_dim=8, episode_window=3)).eval()


def encode(tok, out, recording=None, **settings) -> LatentShards:
    encode_dataset(tok, recording or Recording(), out, size=(32, 32), **settings)
    return LatentShards(out, expect_digest=tok.digest())


@pytest.mark.parametrize("stride", [1, 2])
def test_latents_are_those_of_the_bounded_stream(tmp_path, tok, stride):
    recording = Recording()
    shards = encode(tok, tmp_path, stride=stride, offsets=(0, 1, 3), batch_size=7)
    assert [(item.episode_index, item.offset) for item in shards] == [(e, o) for e in range(4) for o in (0, 1, 3)]
    for item in shards:
        views = []
        for camera in recording.camera_keys:
            frames = recording.frames(item.episode_index, camera)[item.offset :: stride]
            frames = frames[: 1 + (len(frames) - 1) // 4 * 4]
            video = prepare_frames(frames, (32, 32))[None]
            views.append(tok.encode(video, window=3)[0].detach())
        expected = torch.cat(views, dim=1).numpy()
        assert item.latents.shape == expected.shape
        np.testing.assert_allclose(item.latents, expected, atol=1e-5)
        assert item.task == f"task {item.episode_index}"


def test_bfloat16_is_near_float32_and_not_mixed_with_it(tmp_path, tok):
    exact, fast = encode(tok, tmp_path / "exact"), encode(tok, tmp_path / "fast", precision="bfloat16")
    assert fast.provenance["precision"] == "bfloat16"
    for ours, expected in zip(fast, exact, strict=True):
        assert ours.latents.dtype == np.float32
        assert 0 < np.abs(ours.latents - expected.latents).max() < 0.2
    with pytest.raises(UserError, match="precision bfloat16"):
        encode(tok, tmp_path / "fast")


def test_actions_and_states_stand_beside_the_right_latents_by_hand(tmp_path, tok):
    shards = encode(tok, tmp_path, stride=2, offsets=(0, 3))
    plain, shifted = shards[0], shards[1]  # 23 frames; every second one: 0, 2, .. 22, and 3, 5, .. 21
    assert plain.state is not None
    assert plain.actions is not None
    assert plain.state[:, 0].tolist() == [0, 8, 16]
    assert plain.actions.shape == (2, 8, 2)
    assert plain.actions[0, :, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert plain.actions[1, :, 0].tolist() == [8, 9, 10, 11, 12, 13, 14, 15]
    assert shifted.state is not None
    assert shifted.actions is not None
    assert shifted.state[:, 0].tolist() == [3, 11, 19]
    assert shifted.actions[1, :, 0].tolist() == [11, 12, 13, 14, 15, 16, 17, 18]
    last = shards[7].actions
    assert last is not None
    assert (last[..., 1] == 3).all()


def test_meta_says_how_the_latents_were_made(tmp_path, tok):
    shards = encode(tok, tmp_path, cameras=["camera_1"], offsets=(0, 2))
    meta = shards.meta
    assert (meta.tokenizer_digest, meta.frame_rate_hz, meta.stride) == (tok.digest(), 20.0, 1)
    assert (meta.grid, meta.cameras, meta.window) == ((1, 2, 2), ("camera_1",), 3)
    assert (meta.source, meta.action_names, meta.state_names) == ("recording", ("frame", "episode"), ("frame",))
    everything = np.concatenate([item.latents.reshape(-1, 8) for item in shards]).astype(np.float64)
    np.testing.assert_allclose(meta.mean, everything.mean(0), atol=1e-6)
    np.testing.assert_allclose(meta.std, everything.std(0), rtol=1e-5)
    assert shards.provenance["offsets"] == [0, 2]


def test_a_camera_has_the_same_latents_alone_and_beside_others(tmp_path, tok):
    both = encode(tok, tmp_path / "both")
    swapped = encode(tok, tmp_path / "swapped", cameras=["camera_1", "camera_0"])
    alone = encode(tok, tmp_path / "alone", cameras=["camera_1"])
    for first, second, third in zip(both, swapped, alone, strict=True):
        np.testing.assert_allclose(first.latents[:, 4:], third.latents, atol=1e-5)
        np.testing.assert_allclose(second.latents[:, :4], third.latents, atol=1e-5)


def test_a_killed_run_continues_to_the_same_bytes(tmp_path, tok):
    whole = encode(tok, tmp_path / "whole", offsets=(0, 1), batch_size=4)
    for reads in (3, 5, 1):
        with pytest.raises(KeyboardInterrupt):
            encode(tok, tmp_path / "parts", Recording(reads=reads), offsets=(0, 1), batch_size=4)
        (tmp_path / "parts/.work/.partial-episode_000002-o0.tar").write_bytes(b"half written")
    with pytest.raises(ValueError, match=r"has no meta\.json"):
        LatentShards(tmp_path / "parts")
    recording = Recording()
    parts = encode(tok, tmp_path / "parts", recording, offsets=(0, 1), batch_size=4)
    assert 0 < recording.read < 8
    assert [path.name for path in parts.paths] == [path.name for path in whole.paths]
    for one, two in zip(whole.paths, parts.paths, strict=True):
        assert one.read_bytes() == two.read_bytes()
    assert not (tmp_path / "parts/.work").exists()


def test_a_finished_run_is_not_done_again(tmp_path, tok):
    first = encode(tok, tmp_path).meta
    again = encode_dataset(tok, Recording(reads=0), tmp_path, size=(32, 32))
    assert again.to_dict() == first.to_dict()


def test_other_settings_never_mix(tmp_path, tok):
    with pytest.raises(KeyboardInterrupt):
        encode(tok, tmp_path, Recording(reads=2))
    with pytest.raises(ValueError, match=r"holds latents made otherwise: stride 1 \(now 2\)"):
        encode(tok, tmp_path, stride=2)
    encode(tok, tmp_path)
    with pytest.raises(ValueError, match=r"size \[32, 32\] \(now \[16, 16\]\)"):
        encode_dataset(tok, Recording(), tmp_path, size=(16, 16))
    other = RepViTok(tok.config)
    with pytest.raises(ValueError, match="tokenizer_digest"):
        encode(other, tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": (30, 32)}, "multiples of 16"),
        ({"stride": 0}, "stride must be 1 or more"),
        ({"offsets": ()}, "offsets must be different numbers"),
        ({"offsets": (0, 0)}, "offsets must be different numbers"),
        ({"offsets": (0, 99)}, f"no episode has a frame at offset 99, the longest has {max(LENGTHS)}"),
        ({"cameras": ["left"]}, r"no camera 'left'; there are \['camera_0', 'camera_1'\]"),
        ({"dtype": "int8"}, 'dtype must be "float32" or "float16"'),
        ({"precision": "bf16"}, 'precision must be "float32" or "bfloat16"'),
        ({"workers": 0}, "workers must be 1 or more"),
        ({"shard": (4, 4)}, "expected 0 <= i < n, got 4/4"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_is_written(tmp_path, tok, settings, message):
    with pytest.raises(ValueError, match=message):
        encode_dataset(tok, Recording(), tmp_path / "out", **{"size": (32, 32), **settings})
    assert not (tmp_path / "out").exists()


def test_shares_are_neighbours_of_like_length_and_cover_all():
    episodes = Recording((5, 1, 1, 1, 30, 2, 2, 8)).episodes
    for shares in range(1, 9):
        parts = [episodes_of_slice(episodes, (index, shares)) for index in range(shares)]
        assert [info for part in parts for info in part] == episodes
        assert all(parts)
    assert [[info.length for info in episodes_of_slice(episodes, (index, 2))] for index in range(2)] == [
        [5, 1, 1, 1, 30],
        [2, 2, 8],
    ]
    with pytest.raises(ValueError, match="9 shares of 8 episodes: choose at most 8"):
        episodes_of_slice(episodes, (0, 9))
    with pytest.raises(ValueError, match="expected 0 <= i < n, got 2/2"):
        episodes_of_slice(episodes, (2, 2))


def test_frames_in_memory_are_bounded_unless_one_episode_has_more(tok, monkeypatch):
    recording = Recording((30, 4, 4, 4, 4))
    plan = make_config(tok, recording, (32, 32), 1, (0,), None, "float32")
    monkeypatch.setattr(encoding, "_BATCH_BYTES", 8 * 2 * 3 * 32 * 32)  # eight frames of both cameras
    batches = encoding._batches(recording.episodes, plan, batch_size=100)
    assert [[info.length for info in batch] for batch in batches] == [[4, 4], [4, 4], [30]]


@pytest.mark.parametrize("workers", [1, 3])
def test_decoding_runs_ahead_in_the_order_of_the_batches(tok, tmp_path, workers):
    said: list[str] = []
    shards = encode(tok, tmp_path, Recording((9,) * 7), batch_size=2, workers=workers, report=said.append)
    assert [item.episode_index for item in shards] == list(range(7))
    assert [item.actions[0, 0, 1] for item in shards if item.actions is not None] == list(range(7))
    assert len(said) == 1
    assert "clips/s of 17 frames, bound by" in said[0]


def test_videos_without_actions_encode_too(tmp_path, tok):
    frames = Recording(cameras=1).frames(0, "camera_0")
    write_video(tmp_path / "videos/a.mp4", frames[:, :32], 10)
    write_video(tmp_path / "videos/b.mp4", frames[:9, :32], 10)
    reader = open_episodes(str(tmp_path / "videos"))
    encode_dataset(tok, reader, tmp_path / "out", size=(32, 32))
    shards = LatentShards(tmp_path / "out")
    assert [len(item.latents) for item in shards] == [6, 3]
    assert all(item.state is None and item.actions is None for item in shards)
    assert (shards.meta.cameras, shards.meta.frame_rate_hz, shards.meta.source) == (("video",), 10.0, "videos")
    write_video(tmp_path / "videos/c.mp4", frames[:9, :32], 20)
    with pytest.raises(ValueError, match="latents of one folder have one rate"):
        open_episodes(str(tmp_path / "videos"))


def test_a_real_data_set_goes_all_the_way(tmp_path, tok, shared_data):
    from repvitok.data.lerobot.reader import LeRobotReader

    reader = LeRobotReader(shared_data / "unitree-g1-lerobot-v3.0")
    reader.episodes = reader.episodes[1:2]
    encode_dataset(tok, reader, tmp_path, size=(48, 64))
    shards = LatentShards(tmp_path)
    assert [item.latents.shape for item in shards] == [(70, 12, 8)]  # 277 frames = 1 + 4 * 69
    assert shards[0].actions is not None
    assert shards[0].actions.shape == (69, 4, 26)
    np.testing.assert_array_equal(shards[0].actions[2], reader.episode(1)["action"][8:12])
    assert shards.meta.action_names[0] == "kLeftShoulderPitch"


def test_episodes_are_chosen_by_their_numbers_and_belong_to_the_plan(tmp_path, tok):
    chosen = encode(tok, tmp_path, episodes="1-2")
    assert [info.episode_index for info in chosen.infos] == [1, 2]
    assert (chosen.provenance["episodes"], chosen.provenance["num_episodes"]) == ("1-2", 2)
    whole = encode(tok, tmp_path / "whole")
    np.testing.assert_allclose(chosen[1].latents, whole[2].latents, atol=1e-5)
    with pytest.raises(ValueError, match=r"holds latents made otherwise: .*episodes 1-2 \(now None\)"):
        encode(tok, tmp_path)
    with pytest.raises(ValueError, match="recording: no episodes 7; there are 0-3"):
        encode(tok, tmp_path / "none", episodes=[0, 7])
    assert encode(tok, tmp_path / "whole", episodes=[3, 2, 1, 0]).provenance["episodes"] is None


def test_channels_that_never_move_are_said_at_the_end(tmp_path, tok):
    said: list[str] = []
    encode(tok, tmp_path / "one", Recording((9, 9)), episodes=[1], report=said.append)
    assert said[-1] == f"{tmp_path / 'one'}: never moves in these episodes: action episode"
    said.clear()
    encode(tok, tmp_path / "two", Recording((9, 9)), report=said.append)
    assert not any("never moves" in line for line in said)


def test_corrected_instructions_reach_finished_and_interrupted_latents(tmp_path, tok):
    def corrected() -> Recording:
        recording = Recording()
        recording.episodes = [dataclasses.replace(info, task=f"better {info.index}") for info in recording.episodes]
        return recording

    said: list[str] = []
    encode(tok, tmp_path / "finished")
    shards = encode(tok, tmp_path / "finished", corrected(), report=said.append)
    assert [info.task for info in shards.infos] == [item.task for item in shards] == [f"better {n}" for n in range(4)]
    assert said[0].endswith("4 of 4 episodes have another instruction now")
    with pytest.raises(KeyboardInterrupt):
        encode(tok, tmp_path / "killed", Recording(reads=5), batch_size=1)
    assert [info.task for info in encode(tok, tmp_path / "killed", corrected()).infos] == [
        f"better {n}" for n in range(4)
    ]


def test_shards_know_the_columns_of_their_data_set(tmp_path, tok):
    recording = Recording()
    recording.features = {"observation.state": {}, "actions": {"dtype": "float32", "shape": [2]}}
    shards = encode(tok, tmp_path, recording)
    assert shards.meta.action_names == ()
    assert shards.provenance["columns"] == {"observation.state": ["frame"], "actions": ["frame", "episode"]}
    assert "action: [{column: actions, names: [frame, episode]}]" in without_actions(shards)
    assert shards.meta.instruction_source == "tasks"


def test_a_second_encoding_of_one_folder_is_refused_and_the_first_goes_on(tmp_path, tok):
    class Slow(Recording):
        """While the first run reads, the same command is given again, as by another process."""

        def frames(self, *arguments):
            if not refused:
                refused.append(True)
                with pytest.raises(UserError, match="another process is writing here"):
                    Context().run(encode, tok, tmp_path / "out")
            return super().frames(*arguments)

    refused: list[bool] = []
    out = encode(tok, tmp_path / "out", Slow())
    assert refused
    assert sorted(path.name for path in out.root.iterdir()) == ["latents-000000.tar", "meta.json"]
    assert out.paths[0].read_bytes() == encode(tok, tmp_path / "alone").paths[0].read_bytes()


@pytest.mark.parametrize("name", ["my-latents-backup.tar", "latents-000000.tar", "meta/info.json", "notes.txt"])
def test_nothing_is_written_beside_or_over_what_is_anothers(tmp_path, tok, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("a user's")
    with pytest.raises(UserError, match="is not empty and holds no unfinished latents but"):
        encode(tok, tmp_path)
    assert [(path.name, path.is_file()) for path in tmp_path.iterdir()] == [(name.split("/")[0], "/" not in name)]
    assert (tmp_path / name).read_text() == "a user's"
    latents = encode(tok, tmp_path / "latents").root
    with pytest.raises(UserError, match="is not empty and holds no decoded videos but"):
        decode_shards(tok, latents, tmp_path)


def test_episodes_without_a_frame_at_an_offset_are_left_out_with_a_count(tmp_path, tok, caplog):
    """And they still count as episodes of the data set: which ones a later stage holds out does not change."""
    shards = encode(tok, tmp_path / "a", Recording([3, 12, 2, 9]), offsets=(0, 3))
    assert [info.episode_index for info in shards.infos] == [1, 1, 3, 3]
    assert shards.recorded == [0, 1, 2, 3]
    told = "recording: left out 2 of 4 episodes, too short with a length of 2 to 3: offset 3 takes 4 frames"
    assert caplog.messages == [told]
    for job in (0, 1):
        encode_dataset(tok, Recording([3, 12, 2, 9]), tmp_path / "b", size=(32, 32), offsets=(0, 3), shard=(job, 2))
    assert caplog.messages == [told] * 2, "one of the jobs says it"
    merge_latents(tmp_path / "b")
    assert LatentShards(tmp_path / "b").recorded == [0, 1, 2, 3]


@pytest.mark.parametrize(("number", "told"), [(1e300, "got 1e.300"), (2**24 + 1, "got 16777217"), (np.nan, "got nan")])
def test_numbers_that_float32_cannot_hold_are_named_when_they_are_read(tmp_path, tok, number, told):
    class Huge(Recording):
        def episode(self, index, keys=None):
            columns = super().episode(index, keys)
            columns["action"] = columns["action"].astype(np.array(number).dtype)
            columns["action"][5, 1] = number
            return columns

    with pytest.raises(UserError, match=rf"recording: episode 0, row 5, action, channel 'episode': .*{told}"):
        encode_dataset(tok, Huge((9,)), tmp_path, size=(32, 32))


def test_a_camera_is_taken_once(tok):
    with pytest.raises(UserError, match="expected different cameras, got 'camera_0' twice"):
        make_config(tok, Recording(), (32, 32), 1, (0,), ["camera_0", "camera_1", "camera_0"], "float32")


def test_augmented_encodings_are_further_ones_of_training_episodes_alone(tmp_path, tok):
    shards = encode(tok, tmp_path / "one", augment=2, offsets=(0, 1), batch_size=32)
    assert [(info.episode_index, info.offset, info.augmentation) for info in shards.infos[:6]] == [
        (0, offset, copy) for offset in (0, 1) for copy in (0, 1, 2)
    ]
    assert [shards.keys[number] for number in (0, 1, 5)] == [
        f"episode_000000-{end}" for end in ("o0", "o0-a1", "o1-a2")
    ]
    plain = encode(tok, tmp_path / "plain", offsets=(0, 1), batch_size=32)
    recorded = [episode for episode in shards if not episode.augmentation]
    for mine, theirs in zip(recorded, plain, strict=True):
        np.testing.assert_allclose(mine.latents, theirs.latents, atol=1e-5)
        assert mine.info == theirs.info
    one, other = shards[1], shards[2]
    assert np.array_equal(one.actions, recorded[0].actions)
    assert np.abs(one.latents - recorded[0].latents).max() > 1e-2 < np.abs(one.latents - other.latents).max()
    train, kept = split_latents(shards, 0.3)
    held_out = {shards.infos[span.number].episode_index for span in kept}
    assert {shards.infos[span.number].augmentation for span in kept} == {0}
    assert not held_out & {shards.infos[span.number].episode_index for span in train}
    assert len(train) == 6 * (4 - len(held_out))
    assert shards.provenance["augment"]["copies"] == 2
    assert "augmentation" not in (tmp_path / "plain" / "meta.json").read_text()


def test_augmented_encodings_resume_merge_and_mix_with_no_others(tmp_path, tok):
    whole = encode(tok, tmp_path / "whole", augment=1, batch_size=4)
    for _ in range(20):
        try:
            encode_dataset(tok, Recording(reads=4), tmp_path / "killed", size=(32, 32), augment=1, batch_size=4)
            break
        except KeyboardInterrupt:
            continue
    killed = LatentShards(tmp_path / "killed")
    assert (killed.root / "meta.json").read_bytes() == (whole.root / "meta.json").read_bytes()
    with pytest.raises(UserError, match="augment"):
        encode(tok, tmp_path / "whole", augment=2)
    for index in range(2):
        encode_dataset(tok, Recording(), tmp_path / "parts", size=(32, 32), augment=1, batch_size=4, shard=(index, 2))
    merge_latents(tmp_path / "parts")
    assert LatentShards(tmp_path / "parts").keys == whole.keys


def test_an_augmented_episode_is_cut_and_coloured_alike_in_all_frames():
    draw = np.random.default_rng(0)
    frames = np.repeat(draw.integers(0, 256, (1, 40, 48, 3), dtype=np.uint8), 3, axis=0)
    changes = Augmentation(copies=2)
    first = changes.resize(frames, (20, 24), (3, 1, "front"))
    assert first.shape == (3, 20, 24, 3)
    assert np.array_equal(first[0], first[2])
    assert np.array_equal(first[:1], changes.resize(frames[:1], (20, 24), (3, 1, "front")))
    for key in ((3, 2, "front"), (4, 1, "front"), (3, 1, "wrist")):
        assert not np.array_equal(first, changes.resize(frames, (20, 24), key))
    depth = np.repeat(frames[..., :1], 3, axis=-1)
    grey = changes.resize(depth, (40, 48), (0, 1, "depth"), colour=False)
    assert np.array_equal(grey[..., 0], grey[..., 2])
    none = Augmentation(copies=1, crop=1.0, brightness=0.0, contrast=0.0, saturation=0.0)
    assert np.array_equal(none.resize(frames, (20, 24), (0, 1, "front")), resize_frames(frames, (20, 24)))
