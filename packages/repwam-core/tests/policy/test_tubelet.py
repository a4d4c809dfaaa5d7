"""A tokenizer of two frames per tubelet: which raw frames and actions belong together, from encoding to the policy."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from latent_action import LatentActionConfig, LatentActionTokenizer, visualize
from latent_action.baselines.lapa import load_frame_table
from latent_action.labelling import label_shards
from repvitok import RepViTok, RepViTokConfig
from repvitok.data import LatentShards, LeRobotReader, LeRobotWriter
from repvitok.encoding import encode_dataset
from repwam_core.data.episodes import EpisodeStore, text_cache
from repwam_core.interface import Embodiment
from repwam_core.model.config import ActionSpace, WAMConfig
from repwam_core.model.wam import WorldActionModel
from repwam_core.policy import BatchedPolicy, evaluate_open_loop
from repwam_core.policy.folder import PolicyManifest, write_policy
from repwam_core.quickstart import figures
from repwam_core.sampling import SamplingConfig

CAMERA, SIZE, LENGTHS = "observation.images.top", (32, 32), (24, 32)
STRIDE, PER_LATENT = 3, 6  # two frames a tubelet, every third one


def grey(frame):
    return 8 + 7 * np.asarray(frame)


@pytest.fixture(scope="module")
def made(tmp_path_factory, write_text_cache):
    """A data set whose frame and action i say i, its labelled latents, and the models that made them."""
    root = tmp_path_factory.mktemp("tubelet")
    names = {"state_names": [], "action_names": ["row"], "robot_type": "arm"}
    writer = LeRobotWriter(root / "data", fps=12, cameras={CAMERA: SIZE}, **names)
    for index, length in enumerate(LENGTHS):
        rows = np.arange(length)
        frames = np.broadcast_to(grey(rows).astype(np.uint8)[:, None, None, None], (length, *SIZE, 3))
        action = rows[:, None].astype(np.float32)
        writer.add_episode(index, frames={CAMERA: frames}, state=None, action=action, task="go left")
    writer.finalize()
    torch.manual_seed(0)
    config = RepViTokConfig(tubelet_frames=2, width=32, depth=1, heads=2, latent_dim=8, episode_window=2)
    tokenizer = RepViTok(config).eval()
    tokenizer.save_pretrained(root / "tokenizer")
    moments = {"latent_mean": (0.0,) * 8, "latent_std": (1.0,) * 8, "hidden": 16}
    lat = LatentActionTokenizer(LatentActionConfig(latent_dim=8, tokenizer_digest=tokenizer.digest(), **moments))
    lat.save_pretrained(root / "lat")
    encode_dataset(tokenizer, LeRobotReader(root / "data"), root / "unlabelled", size=SIZE, stride=STRIDE)
    label_shards(lat, root / "unlabelled", root / "latents")
    write_text_cache(root / "latents")
    return root


def test_shards_say_how_many_frames_a_latent_has_and_labels_keep_it(made):
    for name in ("unlabelled", "latents"):
        shards = LatentShards(made / name)
        assert (shards.meta.tubelet_frames, shards.meta.frames_per_latent) == (2, PER_LATENT)
        for episode, length in zip(shards, LENGTHS, strict=True):
            assert len(episode.latents) == 1 + (length - 1) // PER_LATENT
            rows = np.arange(PER_LATENT * (len(episode.latents) - 1)).reshape(-1, PER_LATENT)
            np.testing.assert_array_equal(episode.actions[..., 0], rows)


def test_pixels_beside_transitions_are_those_of_their_ends(made):
    table = load_frame_table(made / "latents", made / "data", SIZE)
    ends = np.concatenate([np.arange(0, length, PER_LATENT) for length in LENGTHS])
    np.testing.assert_allclose(table.frames.float().mean(dim=(1, 2, 3)), grey(ends), atol=2)


def test_pictures_show_the_frame_at_a_transition(made, tmp_path, monkeypatch):
    drawn = []

    def draw(frame, *_rest):
        drawn.append(float(frame.mean()))
        return frame

    monkeypatch.setattr(visualize, "draw_transition", draw)
    lat = LatentActionTokenizer.from_pretrained(made / "lat")
    given = {"lat": lat, "latents": made / "latents", "dataset": made / "data", "episode": 1}
    visualize.write_episode_picture(**given, out=tmp_path / "sheet.png")
    np.testing.assert_allclose(drawn, grey(PER_LATENT * np.arange(1, 5)), atol=2)


def test_pictures_of_the_report_do_too(made):
    shards, lat = LatentShards(made / "latents"), LatentActionTokenizer.from_pretrained(made / "lat")
    plan = SimpleNamespace(size=SIZE, stride=STRIDE, held_out=0.5)
    this, reader = SimpleNamespace(config=plan), LeRobotReader(made / "data")
    shown = figures._transition(this, reader, lat, shards[1], shards.meta, np.zeros(shards.meta.grid, np.float32))
    step = int(shown.name.split("latent frame ")[1].split(":")[0])
    assert shown.frame.mean() == pytest.approx(grey(step * PER_LATENT), abs=2)
    assert shown.next_frame.mean() == pytest.approx(grey((step + 1) * PER_LATENT), abs=2)
    data = SimpleNamespace(folder=made / "data")
    prepared = SimpleNamespace(data=data, latents=made / "latents", tokenizer_folder=made / "tokenizer")
    clips = figures.reconstruction(this, SimpleNamespace(prepared=prepared), [0, 1]).clips
    for clip, last in zip(clips, (18, 30), strict=True):
        assert clip.original[-1].mean() == pytest.approx(grey(last), abs=2)


def test_the_policy_plans_and_is_compared_at_the_same_frames(made):
    store = EpisodeStore(made / "latents")
    space = ActionSpace(channels=1, vectors_per_transition=PER_LATENT)
    sizes = {"width": 32, "depth": 1, "heads": 2, "ffn": 32, "action_width": 32, "action_ffn": 32}
    sizes |= {"text_dim": 16, "latent_dim": 8, "window": 2}
    wam = WorldActionModel(WAMConfig.preset("tiny", **sizes, spaces={"robot": space}))
    tokenizer = RepViTok.from_pretrained(made / "tokenizer")
    manifest = PolicyManifest(
        space="robot",
        embodiment=Embodiment.from_names("arm", store.action_channels, (), (CAMERA,), 12.0),
        size=SIZE,
        latents=store.meta,
        text_encoder="minilm",
        plan=SamplingConfig(chunk_frames=1, execute_frames=1, video_steps=1, action_steps=1),
        digests={"wam": wam.digest(), "tokenizer": tokenizer.digest(), "statistics": store.statistics.digest},
    )
    text = text_cache(made / "latents", "minilm")
    write_policy(made / "policy", wam, tokenizer, store.statistics, manifest, {}, text)
    policy = BatchedPolicy.from_pretrained(made / "policy")
    assert policy.frames_per_latent == store.meta.frames_per_latent == PER_LATENT
    result = evaluate_open_loop(policy, LeRobotReader(made / "data"))
    for episode, length in zip(result.episodes, LENGTHS, strict=True):
        np.testing.assert_array_equal(episode.real[:, 0], np.arange((length - 1) // PER_LATENT * PER_LATENT))
        assert episode.chunk == PER_LATENT
