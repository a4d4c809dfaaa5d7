"""Transitions as tensors: none crosses an episode, splits are by episode, sampling depends on the seed and the step."""

import dataclasses

import numpy as np
import pytest
import torch
from latent_action.datamodule import EvaluationBatches, LatentActionData, TrainingBatches
from latent_action.transitions import lie_within, load_transitions
from repvitok.data.latents import LatentEpisode, LatentMeta
from repvitok.data.shards import LatentShards, LatentShardWriter
from repvitok.data.split import LatentSpan

META = LatentMeta(
    tokenizer_digest="a" * 64,
    frame_rate_hz=10.0,
    stride=1,
    grid=(1, 2, 2),
    cameras=("camera",),
    latent_dim=2,
    window=None,
    source="x",
)


def episode(index: int, frames: int, offset: int = 0) -> LatentEpisode:
    latents = np.full((frames, 4, 2), 100.0 * index, np.float32) + np.arange(frames, dtype=np.float32)[:, None, None]
    actions = np.arange(max(frames - 1, 0) * 8, dtype=np.float32).reshape(-1, 4, 2)
    return LatentEpisode(f"e{index}-{offset}", index, offset, "task", latents, actions=actions)


def identity(latents: torch.Tensor) -> torch.Tensor:
    return latents


def test_transitions_never_cross_an_episode():
    table = load_transitions([episode(1, 3), episode(2, 1), episode(3, 4)], identity)
    z_t, z_next = table.pairs(torch.arange(len(table)))
    assert table.episode.tolist() == [1, 1, 3, 3, 3]
    assert (z_next - z_t == 1).all()
    assert z_t[:, 0, 0].tolist() == [100, 101, 300, 301, 302]
    assert table.actions is not None
    assert table.actions[0].tolist() == [3, 4]


def test_standardisation_is_applied():
    table = load_transitions([episode(1, 3)], lambda raw: raw / 2)
    assert table.frames[2, 0, 0] == 51


def test_no_transition_is_an_error():
    with pytest.raises(ValueError, match="two latent frames"):
        load_transitions([episode(1, 1)], identity)


def test_selecting_episodes_keeps_everything_aligned():
    table = load_transitions([episode(1, 3), episode(3, 4), episode(1, 2, offset=2)], identity)
    chosen = table.of_episodes([1])
    assert chosen.episode.tolist() == [1, 1, 1]
    assert chosen.pairs(torch.arange(3))[0][:, 0, 0].tolist() == [100, 101, 100]


def test_batch_k_depends_on_seed_k_and_rank_only(blobs):
    data = LatentActionData(str(blobs), batch_size=8, held_out=0.25, seed=3)
    data.setup()
    batches = data.train_dataloader()
    first = [batch for batch, _ in zip(batches, range(6), strict=False)]
    later = TrainingBatches(batches.table, 8, seed=3, first_batch=4)
    for batch, number in zip(later, (4, 5), strict=False):
        torch.testing.assert_close(batch.z_t, first[number].z_t, atol=0, rtol=0)
    assert (TrainingBatches(batches.table, 8, seed=4).batch(0).z_t != first[0].z_t).any()
    assert (TrainingBatches(batches.table, 8, seed=3, rank=1).batch(0).z_t != first[0].z_t).any()


def test_data_module_standardises_and_splits(blobs):
    data = LatentActionData(str(blobs), held_out=0.25, val_transitions=50, batch_size=16)
    data.setup()
    train, held_out = data.train_dataloader().table, data.val_dataloader().table
    assert not set(train.episode.tolist()) & set(held_out.episode.tolist())
    assert len(train) + len(held_out) == 22 * len(LatentShards(blobs))  # without each clip's first
    flat = train.frames.reshape(-1, train.frames.shape[-1])
    torch.testing.assert_close(flat.mean(0), torch.zeros(8), atol=1e-3, rtol=0)
    torch.testing.assert_close(flat.std(0), torch.ones(8), atol=1e-2, rtol=0)
    assert sum(len(batch.z_t) for batch in data.val_dataloader()) == 50
    assert sum(len(batch.z_t) for batch in data.test_dataloader()) == len(held_out)
    assert data.meta.grid == LatentShards(blobs).meta.grid


def test_evaluation_batches_are_spread_and_ordered(blobs):
    data = LatentActionData(str(blobs))
    data.setup()
    table = data.train_dataloader().table
    index = torch.cat(list(EvaluationBatches(table, 7, 20).index))
    assert len(index) == 20
    assert index[0] == 0
    assert index[-1] == len(table) - 1
    assert (index.diff() > 0).all()


def test_nothing_held_out_means_no_validation(blobs):
    data = LatentActionData(str(blobs), held_out=0.0)
    data.setup()
    assert len(data.train_dataloader().table) == 22 * len(LatentShards(blobs))  # without each clip's first
    assert list(data.val_dataloader()) == []
    with pytest.raises(ValueError, match=r"data\.held_out: nothing is held out of these episodes"):
        data.test_dataloader()


def test_episodes_can_be_held_out_by_index(blobs):
    data = LatentActionData(str(blobs), held_out=[2, 5])
    data.setup()
    assert set(data.val_dataloader().table.episode.tolist()) == {2, 5}


def test_bad_data_arguments(blobs, tmp_path):
    with pytest.raises(ValueError, match="batch_size"):
        LatentActionData(str(blobs), batch_size=0)
    with pytest.raises(ValueError, match="memory_limit_gb"):
        LatentActionData(str(blobs), memory_limit_gb=1e-6).setup()
    with pytest.raises(FileNotFoundError):
        LatentActionData(str(tmp_path / "missing")).setup()


def test_the_first_transition_of_a_clip_is_left_out_unless_asked_for(tmp_path):
    with LatentShardWriter(tmp_path / "latents", META) as writer:
        for index, frames in enumerate((4, 2, 3)):
            writer.add(dataclasses.replace(episode(index, frames), actions=None))
    counts = {}
    for first in (False, True):
        data = LatentActionData(str(tmp_path / "latents"), held_out=0.0, first_transitions=first)
        data.setup()
        counts[first] = data.train_dataloader().table.place.tolist()
    assert counts == {False: [1, 2, 1], True: [0, 1, 2, 0, 0, 1]}


def test_clips_of_first_transitions_only_are_refused(tmp_path):
    with LatentShardWriter(tmp_path / "latents", META) as writer:
        writer.add(episode(0, 2))
    with pytest.raises(ValueError, match="no episode has 3 latent frames, the longest 2"):
        LatentActionData(str(tmp_path / "latents"), held_out=0.0).setup()


def test_motion_is_the_change_of_the_state():
    state = np.array([[0.0, 1.0], [2.0, 1.0], [5.0, 0.0]], np.float32)
    table = load_transitions([dataclasses.replace(episode(1, 3), state=state)], identity)
    assert table.motion is not None
    assert table.motion.tolist() == [[2, 0], [3, -1]]
    assert load_transitions([episode(1, 3)], identity).motion is None
    assert load_transitions([episode(1, 3), episode(2, 2)], identity).place.tolist() == [0, 1, 0]


@pytest.mark.parametrize("step", [1, 2, 4])
def test_transitions_of_several_latent_frames(step):
    frames = {1: 7, 2: step, 3: step + 1}  # episode 2 is too short
    state = np.arange(7, dtype=np.float32)[:, None] ** 2
    episodes = [episode(index, count) for index, count in frames.items()]
    episodes = [dataclasses.replace(e, state=state[: len(e.latents)]) for e in episodes]
    table = load_transitions(episodes, identity, step)
    assert table.episode.tolist() == [1] * (7 - step) + [3]
    z_t, z_next = table.pairs(torch.arange(len(table)))
    assert (z_next - z_t == step).all()
    assert table.motion[0].item() == step**2
    per_frame = episodes[0].actions.mean(axis=1)
    np.testing.assert_allclose(table.actions[1].numpy(), per_frame[1 : 1 + step].mean(axis=0), rtol=1e-6)
    inside = lie_within([LatentSpan(0, 1, 7)], [e.info for e in episodes], table.first, step)
    assert inside.tolist() == [False] + [True] * (6 - step) + [False]


def test_triplets_stay_inside_an_episode_and_a_selection():
    table = load_transitions([episode(1, 6), episode(2, 3)], identity, 2)
    assert table.continued.tolist() == [True, True, False, False, False]
    after = table.after(torch.arange(len(table)))[:, 0, 0]
    assert after.tolist() == [104, 105, 104, 105, 202]  # z_next itself where nothing follows
    assert table.where(torch.tensor([True, True, False, True, True])).continued.tolist() == [False, True, False, False]


def test_triplets_beside_a_batch_change_nothing_of_it(blobs):
    data = LatentActionData(str(blobs), batch_size=8, held_out=0.25)
    data.setup()
    table = data.train_dataloader().table
    plain, with_triplets = (TrainingBatches(table, 8, seed=0, triplets=wanted).batch(3) for wanted in (False, True))
    assert plain.z_after is None
    assert torch.equal(plain.z_t, with_triplets.z_t)
    assert torch.equal(plain.z_next, with_triplets.z_next)
    assert with_triplets.continued.any()
    assert next(iter(data.val_dataloader())).z_after is not None
