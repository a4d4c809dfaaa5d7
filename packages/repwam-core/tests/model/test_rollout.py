"""The cached rollout equals the teacher-forced pass, forgets what the window forgets, and refuses what it cannot do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from repwam_core.model.cache import MASKED, attention_in_parts
from repwam_core.model.config import ActionSpace, WAMConfig
from repwam_core.model.rollout import Rollout
from repwam_core.model.sequence import WAMInputs, document_inputs, training_layout
from repwam_core.model.wam import WorldActionModel
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

GRID, VECTORS = (2, 1, 2), 2
TOKENS = 4


def small_model(**changes: object) -> WorldActionModel:
    """A model of a few thousand weights, none of them zero, so that every path shows in the output."""
    space = ActionSpace(channels=3, vectors_per_transition=VECTORS, state_channels=2)
    settings = {
        "width": 32, "depth": 2, "heads": 2, "ffn": 48, "action_width": 16, "action_ffn": 32, "text_dim": 6,
        "latent_dim": 5, "state_token": True, "spaces": {"robot": space},
    }  # fmt: skip
    model = WorldActionModel(WAMConfig(**{**settings, **changes}))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def episode(model: WorldActionModel, chunks: tuple[int, ...], batch: int = 2, seed: int = 0) -> WAMInputs:
    """Random tensors for one document of the given chunks; clean levels at 1."""
    generator = torch.Generator().manual_seed(seed)
    frames = sum(chunks) + 1
    layout = training_layout(
        frames, chunks, GRID, VECTORS,
        state=model.config.has_state("robot"), action_history=model.config.action_history,
    )  # fmt: skip
    noisy = layout.levels.noisy
    times = torch.where(noisy, torch.rand(batch, len(noisy), generator=generator), torch.ones(()))

    def draw(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator)

    mask = torch.ones(batch, 3, dtype=torch.bool)
    mask[0, 2:] = False
    return document_inputs(
        layout,
        latents=draw(frames, TOKENS, 5), noisy_latents=draw(frames - 1, TOKENS, 5),
        actions=draw(frames - 1, VECTORS, 3), noisy_actions=draw(frames - 1, VECTORS, 3),
        states=draw(frames, 2), times=times, text=draw(3, 6), text_mask=mask, space="robot",
    )  # fmt: skip


def parts(inputs: WAMInputs, frames: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Clean and noisy latents and actions of `episode`, frame by frame; clean actions may be absent (0 frames)."""
    video = inputs.video.unflatten(1, (-1, TOKENS))
    actions = inputs.actions.unflatten(1, (-1, VECTORS))
    history = actions.shape[1] - (frames - 1)
    return video[:, :frames], video[:, frames:], actions[:, :history], actions[:, history:]


def start(model: WorldActionModel, inputs: WAMInputs, chunk_frames: int, **settings: object) -> Rollout:
    return Rollout(
        model, space="robot", grid=GRID, text=inputs.text[:, 0], text_mask=inputs.text_mask[:, 0],
        chunk_frames=chunk_frames, **settings,
    )  # fmt: skip


def replay(
    model: WorldActionModel, inputs: WAMInputs, chunks: Sequence[int], **settings: object
) -> tuple[Tensor, Tensor]:
    """Velocities of every noisy chunk, each computed from the cache after observing what came before it."""
    latents, noisy_latents, actions, noisy_actions = parts(inputs, sum(chunks) + 1)
    rollout = start(model, inputs, max(chunks), **settings)
    levels = inputs.layout.levels
    states = inputs.states
    rollout.observe(latents[:, :1], None if states is None else states[:, :1])
    videos, planned, frame = [], [], 1
    for number, size in enumerate(chunks):
        now, noisy_now = slice(frame, frame + size), slice(frame - 1, frame - 1 + size)
        t_video = inputs.times[0, levels.noisy_video[number]].item()
        t_action = inputs.times[0, levels.noisy_actions[number]].item()
        noisy = noisy_latents[:, noisy_now], noisy_actions[:, noisy_now]
        if model.config.coupling == "joint":
            of_video, of_action = rollout.velocities(*noisy, t_video, t_action)
        else:
            of_video = rollout.velocities(noisy[0], None, video_time=t_video)[0]
            rollout.imagine(latents[:, now])
            of_action = rollout.velocities(None, noisy[1], action_time=t_action)[1]
        videos.append(of_video.flatten(1, 2))
        planned.append(of_action.flatten(1, 2))
        executed = actions[:, noisy_now] if actions.shape[1] else None
        rollout.observe(latents[:, now], None if states is None else states[:, now], executed)
        frame += size
    return torch.cat(videos, 1), torch.cat(planned, 1)


@pytest.mark.parametrize("coupling", ["joint", "sequential"])
@pytest.mark.parametrize("attention", ["shared", "per_modality"])
@pytest.mark.parametrize(("action_history", "state_token"), [(True, True), (False, True), (True, False)])
def test_cached_equals_teacher_forced_also_past_the_window(
    coupling: str, attention: str, action_history: bool, state_token: bool
) -> None:
    model = small_model(
        coupling=coupling, attention=attention, action_history=action_history, state_token=state_token, window=3
    )
    chunks = (2, 1, 3, 1, 2, 2, 1)  # 12 frames; the ring holds 3 + 3, so it wraps twice
    inputs = episode(model, chunks)
    inputs.times[1] = inputs.times[0]
    with torch.no_grad():
        expected = model(inputs)
    of_video, of_actions = replay(model, inputs, chunks)
    torch.testing.assert_close(of_video, expected.video, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(of_actions, expected.actions, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("coupling", ["joint", "sequential"])
def test_static_shapes_change_nothing(coupling: str) -> None:
    model = small_model(coupling=coupling, window=2)
    inputs = episode(model, (1, 2, 1, 2))
    for static, dynamic in zip(
        replay(model, inputs, (1, 2, 1, 2), static_shapes=True),
        replay(model, inputs, (1, 2, 1, 2), static_shapes=False), strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(static, dynamic, atol=1e-5, rtol=1e-4)


def observed(model: WorldActionModel, frames: int = 3, *, instruction: bool = True, **settings: object) -> Rollout:
    """A rollout that has seen `frames` random frames one by one."""
    inputs = episode(model, (1,) * (frames - 1))
    latents, _, actions, _ = parts(inputs, frames)
    inputs.text_mask[:] &= instruction
    rollout = start(model, inputs, 2, **settings)
    for frame in range(frames):
        executed = actions[:, frame - 1 : frame] if frame else None
        rollout.observe(latents[:, frame : frame + 1], inputs.states[:, frame : frame + 1], executed)
    return rollout


def plan(rollout: Rollout, seed: int = 0, **settings: object) -> tuple[Tensor, Tensor | None]:
    chunk = rollout.plan(generator=torch.Generator().manual_seed(seed), **settings)
    return chunk.actions, chunk.latents


@pytest.mark.parametrize("coupling", ["joint", "sequential"])
def test_planning_is_repeatable_and_leaves_the_history_alone(coupling: str) -> None:
    rollout = observed(small_model(coupling=coupling))
    first = plan(rollout)
    plan(rollout, seed=1, frames=1, video_steps=1)
    again = plan(rollout)
    assert first[0].shape == (2, 2, VECTORS, 3)
    assert first[1] is not None
    assert first[1].shape == (2, 2, TOKENS, 5)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], plan(rollout, seed=2)[0])


def test_joint_plan_is_the_interleaved_euler_solution() -> None:
    """Two video and four action steps, written out: the video moves after passes 2 and 4 only."""
    rollout = observed(small_model())
    generator = torch.Generator().manual_seed(3)
    video, action = (
        torch.randn(2, 2, TOKENS, 5, generator=generator),
        torch.randn(2, 2, VECTORS, 3, generator=generator),
    )
    given = rollout.plan(video_steps=2, action_steps=4, video_noise=video, action_noise=action)
    for number, (t_video, t_action) in enumerate([(0.0, 0.0), (0.0, 0.25), (0.5, 0.5), (0.5, 0.75)]):
        of_video, of_action = rollout.velocities(video, action, t_video, t_action)
        action = action + 0.25 * of_action
        video = video + 0.5 * of_video if number % 2 else video
    torch.testing.assert_close(given.actions, action)
    torch.testing.assert_close(given.latents, video)


def test_skipped_video_stays_noise_in_joint() -> None:
    rollout = observed(small_model())
    video, action = torch.randn(2, 2, TOKENS, 5), torch.randn(2, 2, VECTORS, 3)
    given = rollout.plan(video="skip", action_steps=2, video_noise=video, action_noise=action)
    assert given.latents is None
    for t in (0.0, 0.5):
        action = action + 0.5 * rollout.velocities(video, action, 0.0, t)[1]
    torch.testing.assert_close(given.actions, action)


@pytest.mark.parametrize("video", ["imagine", "skip"])
def test_a_held_video_runs_only_where_it_moves(video: str) -> None:
    """Two video and four action steps: actions alone in passes 2 and 4, or in all but the first."""
    rollout = observed(small_model())
    x, action = torch.randn(2, 2, TOKENS, 5), torch.randn(2, 2, VECTORS, 3)
    given = rollout.plan(
        video=video, video_steps=2, action_steps=4, hold_video=True, video_noise=x, action_noise=action
    )
    for number in range(4):
        whole = number == 0 or (video == "imagine" and number == 2)
        t_video = 0.5 if number >= 2 and video == "imagine" else 0.0
        of_video, of_action = rollout.velocities(x if whole else None, action, t_video, number / 4)
        action = action + 0.25 * of_action
        x = x + 0.5 * of_video if whole and video == "imagine" else x
    torch.testing.assert_close(given.actions, action)
    assert video == "skip" or torch.equal(given.latents, x)


def test_a_held_video_changes_nothing_where_it_moves_in_every_pass() -> None:
    rollout = observed(small_model())
    moving, held = (plan(rollout, video_steps=4, action_steps=2, hold_video=hold) for hold in (False, True))
    assert torch.equal(moving[0], held[0])
    assert torch.equal(moving[1], held[1])


def test_skipped_video_only_hides_the_latents_in_sequential() -> None:
    rollout = observed(small_model(coupling="sequential"))
    imagined, skipped = plan(rollout), plan(rollout, video="skip")
    assert skipped[1] is None
    assert torch.equal(imagined[0], skipped[0])


def test_guidance_moves_the_video_between_without_and_with_instruction() -> None:
    model = small_model(coupling="sequential")
    x = torch.randn(2, 2, TOKENS, 5)
    with_it, without, guided = (
        observed(model, **settings).velocities(x, None, video_time=0.4)[0]
        for settings in ({}, {"instruction": False}, {"guidance": 3.0})
    )
    torch.testing.assert_close(guided, without + 3.0 * (with_it - without), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("coupling", ["joint", "sequential"])
@pytest.mark.parametrize("m", [1, 3, 4])
def test_a_chunk_begins_with_what_is_committed_and_goes_on_from_there(coupling: str, m: int) -> None:
    model = small_model(coupling=coupling)
    free, _ = plan(observed(model))
    nothing, _ = plan(observed(model), committed=free.flatten(1, 2)[:, :0])
    torch.testing.assert_close(nothing, free, rtol=0, atol=0)
    committed = torch.linspace(-1, 1, m)[None, :, None].expand(free.shape[0], m, free.shape[-1])
    frozen, _ = plan(observed(model), committed=committed)
    torch.testing.assert_close(frozen.flatten(1, 2)[:, :m], committed)
    if m < free.flatten(1, 2).shape[1]:
        assert (frozen - free).flatten(1, 2)[:, m:].abs().max() > 1e-4
    with pytest.raises(ValueError, match="committed: expected"):
        plan(observed(model), committed=committed[..., :1])


@pytest.mark.parametrize("coupling", ["joint", "sequential"])
def test_what_was_trained_as_committed_is_seen_as_in_training(coupling: str) -> None:
    """Three first vectors of a chunk of four at time 1: the teacher-forced pass and the cached one agree."""
    model, chunks = small_model(coupling=coupling), (1, 2)
    whole = episode(model, chunks)
    layout = training_layout(
        4, chunks, GRID, VECTORS, state=True, action_history=model.config.action_history, vector_levels=True
    )
    times = torch.ones(2, len(layout.levels))
    times[:, layout.levels.noisy_video] = torch.tensor([0.2, 0.6])
    times[:, layout.levels.noisy_actions] = torch.tensor([0.3, 0.3, 1.0, 1.0, 1.0, 0.4])
    inputs = replace(whole, layout=layout, times=times)
    expected = model(inputs)
    latents, noisy_latents, actions, noisy_actions = parts(inputs, 4)
    rollout = start(model, inputs, 2, delay=3)
    rollout.observe(latents[:, :1], inputs.states[:, :1])
    rollout.observe(latents[:, 1:2], inputs.states[:, 1:2], actions[:, :1])
    if coupling == "joint":
        video, action = rollout.velocities(noisy_latents[:, 1:], noisy_actions[:, 1:], 0.6, 0.4, committed=3)
        torch.testing.assert_close(video.flatten(1, 2), expected.video[:, -2 * TOKENS :], atol=1e-5, rtol=1e-4)
    else:
        rollout.imagine(latents[:, 2:])
        _, action = rollout.velocities(None, noisy_actions[:, 1:], action_time=0.4, committed=3)
    torch.testing.assert_close(action.flatten(1, 2), expected.actions[:, -2 * VECTORS :], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("coupling", ["joint", "sequential"])
def test_a_model_trained_with_delay_is_given_no_more_without_noise_than_it_was(coupling: str) -> None:
    model = small_model(coupling=coupling)
    inputs = episode(model, (1, 2))

    def planned(delay: int, m: int) -> Tensor:
        rollout = start(model, inputs, 2, delay=delay)
        rollout.observe(inputs.video[:, :TOKENS].unflatten(1, (1, TOKENS)), inputs.states[:, :1])
        committed = torch.linspace(-1, 1, m)[None, :, None].expand(2, m, 3)
        return plan(rollout, committed=committed)[0].flatten(1, 2)

    for m in (0, 3):  # nothing committed, and more than was trained: as a model without
        assert torch.equal(planned(2, m), planned(0, m))
    assert torch.equal(planned(2, 2)[:, :2], torch.tensor([-1.0, 1.0])[None, :, None].expand(2, 2, 3))
    assert (planned(2, 2) - planned(0, 2)).abs().max() > 1e-5


@pytest.mark.parametrize("coupling", ["joint", "sequential"])
def test_a_model_in_bfloat16_plans_nearly_the_same(coupling: str) -> None:
    """Noise and Euler steps stay float32; weights, cache and activations are bfloat16."""
    model = small_model(coupling=coupling)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * parameter.bfloat16())
    full = plan(observed(model))
    half_rollout = observed(model.bfloat16())
    assert half_rollout.cache.layers[0][0].dtype == torch.bfloat16
    half = plan(half_rollout)
    assert half[0].dtype == torch.float32
    for ours, expected in zip(half, full, strict=True):
        torch.testing.assert_close(ours, expected, atol=0.05, rtol=0.05)


def test_what_cannot_be_is_refused() -> None:
    model = small_model()
    inputs = episode(model, (1, 1))
    latents, _, _, _ = parts(inputs, 3)
    rollout = start(model, inputs, 2)
    with pytest.raises(ValueError, match="observe first"):
        rollout.plan()
    with pytest.raises(ValueError, match="frame 0 alone"):
        rollout.observe(latents[:, :2], inputs.states[:, :2])
    with pytest.raises(ValueError, match="expects a robot state"):
        rollout.observe(latents[:, :1])
    rollout.observe(latents[:, :1], inputs.states[:, :1])
    with pytest.raises(ValueError, match="those executed on the way to frame 1"):
        rollout.observe(latents[:, :1], inputs.states[:, :1])
    with pytest.raises(ValueError, match="1 to chunk_frames = 2"):
        rollout.plan(3)
    with pytest.raises(ValueError, match="'imagine', 'skip'"):
        rollout.plan(video="maybe")
    with pytest.raises(ValueError, match="shape of the chunk"):
        rollout.plan(video_noise=torch.zeros(2, 1, TOKENS, 5))
    with pytest.raises(ValueError, match="expected one of the model's action spaces"):
        Rollout(model, space="other", grid=GRID, text=inputs.text[:, 0], text_mask=inputs.text_mask[:, 0])


@pytest.mark.parametrize("rows", [1, 6])
def test_keys_in_parts_are_attended_as_a_whole(rows):
    q, k, v = torch.randn(1, 3, 6, 16), torch.randn(1, 3, 64, 16), torch.randn(1, 3, 64, 16)
    seen = torch.rand(rows, 64) < 0.5
    seen[:, 16:32], seen[:, 0] = False, True  # a whole part that nobody sees
    expected = scaled_dot_product_attention(q, k, v, attn_mask=seen)
    bias = torch.zeros(rows, 64).masked_fill_(~seen, MASKED)
    for parts in (2, 4):
        torch.testing.assert_close(attention_in_parts(q, k, v, bias, parts), expected, atol=1e-6, rtol=1e-5)
