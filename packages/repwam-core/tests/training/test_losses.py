"""Eq. 6-7 against hand computations: paths, times per chunk and modality, masks, weights."""

from dataclasses import replace

import pytest
import torch
from repwam_core.data.batches import Documents, Noise, SegmentBatch
from repwam_core.model.config import ActionSpace, WAMConfig
from repwam_core.model.sequence import TokenLayout, Velocities, WAMInputs, training_layout
from repwam_core.model.wam import WorldActionModel
from repwam_core.training import losses as losses_module
from repwam_core.training.losses import (
    LossSettings,
    WAMLoss,
    combined,
    draw_noise,
    equal_chunks,
    loss_terms,
    noised_inputs,
    over_ranks,
    wam_loss,
    with_committed,
)

GRID = (1, 2, 1)


def _batch(b: int = 3, transitions: int = 3, a: int = 2, c: int = 3, d: int = 4) -> SegmentBatch:
    torch.manual_seed(0)
    return SegmentBatch(
        latents=torch.randn(b, transitions + 1, 2, d),
        actions=torch.randn(b, transitions, a, c),
        state=torch.randn(b, transitions + 1, 5),
        text=torch.randn(b, 4, 6),
        text_mask=torch.ones(b, 4, dtype=torch.bool),
        valid=torch.ones(b, transitions, dtype=torch.bool),
        channel_mask=torch.ones(b, c, dtype=torch.bool),
        episode=torch.arange(b),
        start=torch.zeros(b, dtype=torch.long),
    )


def _replaced(batch: SegmentBatch, **changes: torch.Tensor) -> SegmentBatch:
    return SegmentBatch(**{**vars(batch), **changes})


def _inputs(batch: SegmentBatch, layout: TokenLayout, noise: Noise) -> WAMInputs:
    return noised_inputs(Documents.of_segments(batch, GRID), layout, noise, "robot")


def flow_matching_loss(velocities: Velocities, batch: SegmentBatch, noise: Noise, action_weight: float) -> WAMLoss:
    """Eq. 7 of segments."""
    return combined([loss_terms(velocities, Documents.of_segments(batch, GRID), noise)], action_weight)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_eq_7_of_one_number_per_modality_by_hand():
    batch = _replaced(
        _batch(b=1, transitions=1, a=1, c=1, d=1),
        latents=torch.tensor([[[[0.0], [0.0]], [[2.0], [3.0]]]]),
        actions=torch.tensor([[[[0.5]]]]),
    )
    noise = draw_noise(batch, 1, LossSettings(), _generator())
    noise.video[:], noise.actions[:] = 1.0, -1.0
    velocities = Velocities(video=torch.tensor([[[0.5], [0.0]]]), actions=torch.tensor([[[1.0]]]))
    losses = flow_matching_loss(velocities, batch, noise, action_weight=0.5)
    # video targets 2 - 1 and 3 - 1: ((0.5 - 1)^2 + (0 - 2)^2) / 2; action target 0.5 - (-1): (1 - 1.5)^2
    assert losses.video.item() == pytest.approx((0.25 + 4.0) / 2)
    assert losses.action.item() == pytest.approx(0.25)
    assert losses.total.item() == pytest.approx(2.125 + 0.5 * 0.25)


def test_every_chunk_stands_at_its_own_time_on_the_path():
    batch, chunks = _batch(), (2, 1)
    layout = training_layout(4, chunks, GRID, 2, state=True)
    noise = draw_noise(batch, 2, LossSettings(), _generator())
    inputs = _inputs(batch, layout, noise)
    noisy = inputs.video.reshape(3, 7, 2, 4)[:, 4:]
    of_video = noise.video.reshape(3, 3, 2, 4)
    actions = inputs.actions.reshape(3, 6, 2, 3)[:, 3:]
    for frame, chunk in ((0, 0), (1, 0), (2, 1)):
        for sample in range(3):
            t = noise.video_t[sample, chunk]
            path = (1 - t) * of_video[sample, frame] + t * batch.latents[sample, frame + 1]
            torch.testing.assert_close(noisy[sample, frame], path)
            t = noise.action_t[sample, chunk]
            path = (1 - t) * noise.actions[sample, frame] + t * batch.actions[sample, frame]
            torch.testing.assert_close(actions[sample, frame], path)
    torch.testing.assert_close(inputs.video.reshape(3, 7, 2, 4)[:, :4], batch.latents)
    assert torch.equal(inputs.times[:, layout.levels.noisy_video], noise.video_t)
    assert torch.equal(inputs.times[:, layout.levels.noisy_actions], noise.action_t)
    assert (inputs.times[:, layout.levels.clean_video] == 1).all()


def test_times_are_independent_and_shifted_per_modality():
    batch = _batch(b=2000, d=1, c=1)
    noise = draw_noise(batch, 3, LossSettings(video_shift=5.0), _generator())
    assert noise.action_t.mean().item() == pytest.approx(0.5, abs=0.02)
    # The mean of s u / (1 + (s - 1) u) over u is s / (s - 1) - s ln s / (s - 1)^2.
    assert 1 - noise.video_t.mean().item() == pytest.approx(1.25 - 5 * 1.6094 / 16, abs=0.02)
    correlation = torch.corrcoef(torch.stack([noise.video_t.flatten(), noise.action_t.flatten()]))[0, 1]
    assert abs(correlation) < 0.05


def test_samples_with_the_video_off_are_pure_noise_without_video_loss():
    batch = _batch(b=200)
    noise = draw_noise(batch, 3, LossSettings(video_noise_prob=0.3), _generator())
    assert 0.2 < noise.video_off.float().mean() < 0.4
    assert (noise.video_t[noise.video_off[:, 0]] == 0).all()
    assert (noise.video_t[~noise.video_off[:, 0]] > 0).any()
    velocities = Velocities(torch.zeros(200, 6, 4), torch.zeros(200, 6, 3))
    losses = flow_matching_loss(velocities, batch, noise, 1.0)
    kept = ~noise.video_off[:, 0]
    expected = (batch.latents[kept, 1:].flatten(1, 2) - noise.video[kept]).square().mean()
    torch.testing.assert_close(losses.video, expected)


def test_padding_and_absent_channels_cost_nothing():
    batch = _batch()
    noise = draw_noise(batch, 3, LossSettings(), _generator())
    masked = _replaced(batch, valid=batch.valid.clone(), channel_mask=batch.channel_mask.clone())
    masked.valid[1, 2], masked.channel_mask[0, 1] = False, False
    velocities = Velocities(torch.randn(3, 6, 4), torch.randn(3, 6, 3))
    before = flow_matching_loss(velocities, masked, noise, 1.0)
    velocities.video[1, 4:], velocities.actions[1, 4:], velocities.actions[0, :, 1] = 1e3, 1e3, 1e3
    after = flow_matching_loss(velocities, masked, noise, 1.0)
    assert before.total == after.total
    squared = (velocities.actions.reshape(3, 3, 2, 3) - (batch.actions - noise.actions)).square()
    weight = masked.valid[:, :, None, None] & masked.channel_mask[:, None, None, :]
    expected = (squared * weight).sum() / weight.expand_as(squared).sum()
    torch.testing.assert_close(after.action, expected)


def test_history_noise_is_told_to_the_model():
    batch, chunks = _batch(), (1, 1, 1)
    layout = training_layout(4, chunks, GRID, 2, state=True)
    noise = draw_noise(batch, 3, LossSettings(history_noise=0.2), _generator())
    inputs = _inputs(batch, layout, noise)
    assert (noise.history_t >= 0.8).all()
    assert (noise.history_t < 1).all()
    assert torch.equal(inputs.times[:, layout.levels.clean_video], noise.history_t)
    assert not torch.equal(inputs.video.reshape(3, 7, 2, 4)[:, :4], batch.latents)


def test_a_withheld_instruction_is_masked_out_entirely():
    batch = _batch()
    noise = draw_noise(batch, 3, LossSettings(text_drop_prob=1.0), _generator())
    layout = training_layout(4, (1, 1, 1), GRID, 2, state=True)
    assert not _inputs(batch, layout, noise).text_mask.any()


def test_a_drawn_delay_changes_no_other_draw_and_is_drawn_for_every_chunk():
    batch = _batch(b=200)
    plain, delayed = (draw_noise(batch, 3, LossSettings(delay=delay), _generator()) for delay in (0, 3))
    assert plain.committed is None
    for name, value in vars(plain).items():
        assert value is None or torch.equal(value, getattr(delayed, name)), name
    counts = delayed.committed
    assert counts.unique().tolist() == [0, 1, 2, 3]
    assert (counts[:, 0] != counts[:, 1]).any()
    with pytest.raises(ValueError, match="delay"):
        LossSettings(delay=-1)


def test_committed_actions_are_given_without_noise_and_not_learned():
    """Chunks of two transitions and one, two vectors each: three committed, and in the second sample none; then one."""
    batch = _batch(b=2)
    noise = draw_noise(batch, 2, LossSettings(delay=3), _generator(1))
    noise = replace(noise, committed=torch.tensor([[3, 1], [0, 1]]))
    layout = training_layout(4, (2, 1), GRID, 2, state=True, vector_levels=True)
    placed = with_committed(noise, layout)
    known = torch.tensor([[1, 1, 1, 0, 1, 0], [0, 0, 0, 0, 1, 0]]).bool()
    assert torch.equal(placed.known, known)
    chunk = torch.tensor([0, 0, 0, 0, 1, 1])
    assert torch.equal(placed.action_t, torch.where(known, 1.0, noise.action_t[:, chunk]))
    inputs = _inputs(batch, layout, placed)
    given = inputs.actions[:, layout.noisy[layout.actions]]
    assert torch.equal(given[known], batch.actions.flatten(1, 2)[known])
    assert not (given == batch.actions.flatten(1, 2))[~known].any()
    levels = inputs.times[:, layout.level[layout.noisy_actions]]
    assert torch.equal(levels, placed.action_t)
    target = (batch.actions - noise.actions).flatten(1, 2)
    error = torch.arange(1.0, 7.0)[None, :, None].expand(2, 6, 3)
    velocities = Velocities(torch.zeros(2, 6, 4), target + error)
    learned = error.square()[~known]  # numbers of vectors that are left, of three channels each
    loss = flow_matching_loss(velocities, batch, placed, 1.0)
    torch.testing.assert_close(loss.action, learned.mean())
    assert loss.terms.action_count == len(learned) * 3 / 2  # means over a transition's two vectors


def test_the_loss_is_a_function_of_the_generator_and_flows_to_every_part():
    space = ActionSpace(channels=3, vectors_per_transition=2, state_channels=5)
    config = WAMConfig.preset(
        "tiny", width=32, depth=1, heads=2, ffn=32, action_width=32, action_ffn=32, text_dim=6, latent_dim=4,
        state_token=True, spaces={"robot": space},
    )  # fmt: skip
    torch.manual_seed(0)
    wam = WorldActionModel(config)
    arguments = {"space": "robot", "chunk_sizes": (2, 1), "grid": GRID, "settings": LossSettings()}
    first = wam_loss(wam, _batch(), generator=_generator(1), **arguments)
    assert first.total == wam_loss(wam, _batch(), generator=_generator(1), **arguments).total
    assert first.total != wam_loss(wam, _batch(), generator=_generator(2), **arguments).total
    first.total.backward()
    assert wam.video_out.weight.grad is not None
    assert wam.spaces["robot"].action_out.weight.grad is not None


def test_chunks_cover_the_transitions():
    assert equal_chunks(5, 2) == (2, 2, 1)
    assert equal_chunks(4, 4) == (4,)
    assert equal_chunks(2, 3) == (2,)


@pytest.mark.parametrize("field", ["video_noise_prob", "history_noise", "text_drop_prob"])
def test_a_share_outside_zero_to_one_is_refused(field):
    with pytest.raises(ValueError, match=field):
        LossSettings(**{field: 1.5})


def test_means_over_ranks_weigh_every_number_alike(monkeypatch):
    """A rank with three real transitions and one with nine are one process with twelve, not the mean of two means."""
    whole = _batch(b=4)
    whole.valid[0] = False
    noise = draw_noise(whole, 3, LossSettings(), _generator())
    velocities = Velocities(torch.randn(4, 6, 4), torch.randn(4, 6, 3))
    expected = flow_matching_loss(velocities, whole, noise, 0.5)
    assert expected.terms.video_count == 9
    ranks = [[0, 1], [2, 3]]
    terms = []
    for rows in ranks:
        part = SegmentBatch(**{k: v[rows] if isinstance(v, torch.Tensor) else v for k, v in vars(whole).items()})
        drawn = type(noise)(**{name: value[rows] for name, value in vars(noise).items() if value is not None})
        terms.append(flow_matching_loss(Velocities(velocities.video[rows], velocities.actions[rows]), part, drawn, 0.5))
    others = iter([terms[1].terms, terms[0].terms])

    def all_reduce(values):
        other = next(others)
        values += torch.stack([other.video, other.video_count, other.action, other.action_count])

    monkeypatch.setattr(losses_module.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(losses_module.distributed, "all_reduce", all_reduce)
    for rank in terms:
        shared = combined([over_ranks([rank.terms])], 0.5)
        torch.testing.assert_close(shared.total, expected.total)
        assert not torch.isclose(rank.total, expected.total)
