"""The training objective: flow matching on video latents and actions under teacher forcing (RepWAM Eq. 6-7)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, TypeVar

import msgspec
import torch
from einops import rearrange, reduce, repeat
from jaxtyping import Bool, Float, Int
from repvitok.runtime.documents import Above0, Share, check_fields
from torch import Tensor, distributed
from torch.nn.functional import pad

from repwam_core.data.batches import Documents, Noise, SegmentBatch
from repwam_core.model.attention import AttentionFn, make_attention
from repwam_core.model.config import MOST_LOOK_AHEAD
from repwam_core.model.flow import UniformSNRSampler, interpolate, velocity_target
from repwam_core.model.sequence import (
    AheadTokens,
    TokenLayout,
    Velocities,
    WAMInputs,
    concat,
    document_inputs,
    look_ahead_tokens,
    to_device,
    training_layout,
)
from repwam_core.model.wam import WorldActionModel
from repwam_core.sampling import MOST_STEPS

Batch = TypeVar("Batch", SegmentBatch, Documents)


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """Numbers of the objective that the paper gives or leaves open (docs/decisions/000, entry 4).

    Attributes:
        video_shift: shift of the video's uniform SNR sampler; above 1 draws more noise.
        action_shift: shift of the actions' sampler.
        action_weight: lambda_a of Eq. 7.
        video_noise_prob: share of samples whose noisy video is pure noise in every chunk (t = 0) and has no video
            loss: what actions meet at inference when the video is left unsolved.
        history_noise: clean video is noised by a level uniform in [0, this], one per chunk, which the model is told.
        text_drop_prob: share of samples trained without their instruction, for "no instruction" and for guidance.
        delay: most action vectors at the beginning of a chunk that are given as committed, without noise, and not
            learned; how many is drawn for each sample and chunk, 0 .. this. What a robot carries out while it plans, in
            control steps (docs/decisions/082).
        look_ahead: chunks after the predicted one that further layers predict, in training alone; 0 for none, and no
            such layers (docs/decisions/081).
        look_ahead_weight: weight of their loss, Eq. 7 again, its means over what all of them predict.
    """

    video_shift: Above0 = 5.0
    action_shift: Above0 = 1.0
    action_weight: Above0 = 1.0
    video_noise_prob: Share = 0.0
    history_noise: Share = 0.0
    text_drop_prob: Share = 0.0
    delay: Annotated[int, msgspec.Meta(ge=0, le=MOST_STEPS)] = 0
    look_ahead: Annotated[int, msgspec.Meta(ge=0, le=MOST_LOOK_AHEAD)] = 0
    look_ahead_weight: Above0 = 0.3

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, eq=False)
class LossTerms:
    """Sums of squared errors over what is to be learned, and how many numbers (means over tokens) they are of.

    `ahead` are those of the look-ahead layers, where there are some.
    """

    video: Float[Tensor, ""]
    video_count: Float[Tensor, ""] | Int[Tensor, ""]
    action: Float[Tensor, ""]
    action_count: Float[Tensor, ""] | Int[Tensor, ""]
    ahead: LossTerms | None = None


@dataclass(frozen=True, eq=False)
class WAMLoss:
    """The two terms of Eq. 7, each a mean over its learned numbers, and `total = video + lambda_a * action`.

    `look_ahead` is such a total of what look-ahead layers predict, where there are some; `total` has it by its weight.
    `terms` are the sums and counts behind them, of this rank.
    """

    total: Float[Tensor, ""]
    video: Float[Tensor, ""]
    action: Float[Tensor, ""]
    terms: LossTerms
    look_ahead: Float[Tensor, ""] | None = None


def wam_loss(
    wam: WorldActionModel,
    batch: SegmentBatch,
    *,
    space: str,
    chunk_sizes: tuple[int, ...],
    grid: tuple[int, int, int],
    settings: LossSettings,
    generator: torch.Generator,
    attention: Callable[[TokenLayout], AttentionFn] | None = None,
) -> WAMLoss:
    """Return RepWAM Eq. 7 of a batch of segments, all chunks at once.

    Args:
        wam: the model.
        batch: segments of F transitions.
        space: the action space of the batch's actions.
        chunk_sizes: latent frames of the chunks 1 .. N, summing to F.
        grid: (views, h, w) of a latent frame.
        settings: weights and noise.
        generator: source of every draw, on the batch's device.
        attention: see `documents_loss`.
    """
    noise = draw_noise(batch, len(chunk_sizes), settings, generator, wam.config.joint_actions)
    documents = Documents.of_segments(batch, grid)
    weights = settings.action_weight, settings.look_ahead_weight
    return documents_loss(wam, documents, [chunk_sizes], noise, space, *weights, attention=attention)


def documents_loss(
    wam: WorldActionModel,
    documents: Documents,
    chunk_sizes: Sequence[tuple[int, ...]],
    noise: Noise,
    space: str,
    action_weight: float,
    look_ahead_weight: float = LossSettings.look_ahead_weight,
    *,
    attention: Callable[[TokenLayout], AttentionFn] | None = None,
) -> WAMLoss:
    """Return Eq. 7 of documents in one sequence; the means run over the numbers of all of them.

    Args:
        wam: the model.
        documents: what is learned from.
        chunk_sizes: of each document the latent frames of its chunks 1 .. N.
        noise: every draw.
        space: the action space.
        action_weight: lambda_a.
        look_ahead_weight: of what the model's look-ahead layers predict, if it has some.
        attention: makes the attention of a layout, which it gets on the CPU; None is the model's own choice.
    """
    joint = wam.config.joint_actions
    documents = from_chunk_starts(documents, [size for sizes in chunk_sizes for size in sizes])
    documents = with_joint_actions(documents) if joint else documents
    layout = documents_layout(wam, documents, chunk_sizes, space, vector_levels=noise.committed is not None)
    noise = with_committed(noise, layout)
    inputs = noised_inputs(documents, layout, noise, space)
    if attention is None:
        attention = partial(_blocked_attention, wam, documents.latents.device)
    steps = layout.once(look_ahead_tokens, wam.config.look_ahead) if wam.config.look_ahead else ()
    velocities = wam(inputs, attention(layout), ahead=[(step, attention(step.layout)) for step in steps])
    terms = loss_terms(velocities, documents, noise, joint)
    if steps:
        parts = zip(steps, velocities.ahead, strict=True)
        ahead = [_ahead_terms(step, velocities, part, documents, noise, joint) for step, part in parts]
        terms = replace(terms, ahead=_summed(ahead))
    return combined([terms], action_weight, look_ahead_weight)


def _blocked_attention(wam: WorldActionModel, device: torch.device, layout: TokenLayout) -> AttentionFn:
    return layout.once(make_attention, wam.config.coupling, wam.config.window, "blocked", device)


def _ahead_terms(
    step: AheadTokens, whole: Velocities, ahead: Velocities, documents: Documents, noise: Noise, joint: int
) -> LossTerms:
    """`loss_terms` of what one look-ahead layer predicts, at its places among all that `whole` predicts."""
    pairs = (whole.video, ahead.video, step.video), (whole.actions, ahead.actions, step.actions)
    placed = [torch.zeros_like(x).index_copy(1, to_device(at, x.device), y) for x, y, at in pairs]
    return loss_terms(Velocities(placed[0], placed[1]), documents, noise, joint, learned=_learned(step, documents))


def _learned(step: AheadTokens, documents: Documents) -> Bool[Tensor, " transitions"]:
    """The transitions that a look-ahead layer predicts."""
    of_transition = documents.document_of_transition
    transition = torch.arange(len(of_transition)).repeat_interleave(documents.frame_tokens[of_transition])
    learned = torch.zeros(len(of_transition), dtype=torch.bool)
    learned[transition[step.video]] = step.asked
    return learned


def documents_layout(
    wam: WorldActionModel, documents: Documents, chunk_sizes: Sequence[tuple[int, ...]], space: str,
    *, vector_levels: bool = False,
) -> TokenLayout:  # fmt: skip
    """The tokens of documents in one sequence of `wam`, on the CPU."""
    state = wam.config.has_state(space) and documents.state is not None
    vectors, history = documents.actions.shape[2], wam.config.action_history
    return concat(
        [
            training_layout(
                sum(sizes) + 1, sizes, grid, vectors, state=state, action_history=history, vector_levels=vector_levels
            )
            for sizes, grid in zip(chunk_sizes, documents.grids, strict=True)
        ]
    )


def from_chunk_starts(batch: Batch, chunk_sizes: Sequence[int]) -> Batch:
    """The same with every action measured from the state before its chunk, the last one a policy has seen.

    Args:
        batch: segments or documents whose actions are measured from the state at their own transition's first frame.
        chunk_sizes: latent frames of the chunks 1 .. N, of one document after the other; they cover all transitions.
    """
    if batch.reference is None:
        return batch
    sizes = torch.tensor(chunk_sizes)
    starts = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)  # of each transition the first of its chunk
    moved = batch.reference - batch.reference.index_select(1, starts.to(batch.reference.device))
    return replace(batch, actions=batch.actions + moved[:, :, None], reference=None)


def with_joint_actions(documents: Documents) -> Documents:
    """The same with the actions as channels of the latents, for `WAMConfig.joint_actions`, and no others.

    Frame f carries the action of the transition f -> f + 1, the same for all its tokens; the last frame's slot, after
    which nothing is recorded, is zero (the paper's "Joint Pred").
    """
    # One more row of zeros is the action after each last frame. Frame f of document i is frame f + i + (transitions of
    # those before) of all: but for the last ones, its following transition has the same number less i.
    actions = pad(rearrange(documents.actions, "b t a c -> b t (a c)"), (0, 0, 0, 1))
    of_frame, last = documents.document_of_frame, documents.last_frames
    following = torch.arange(len(of_frame)) - of_frame
    following[last] = actions.shape[1] - 1
    of_token = following.repeat_interleave(documents.frame_tokens[of_frame])
    channels = actions.index_select(1, of_token.to(actions.device))
    latents = torch.cat([documents.latents, channels], dim=-1)
    return replace(documents, latents=latents, actions=documents.actions[:, :, :0])


def draw_noise(
    batch: SegmentBatch, chunks: int, settings: LossSettings, generator: torch.Generator, joint: int = 0
) -> Noise:
    """Draw noise and noise times: one time per sample, chunk and modality (docs/decisions/000, entry 3).

    With `joint` channels of action in each latent frame, written once per token, these share one draw, and actions have
    no tokens.
    """
    b, device = len(batch), batch.latents.device
    _, frames, tokens, d = batch.latents.shape
    actions = batch.actions[:, :, :0] if joint else batch.actions

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    video_t = UniformSNRSampler(settings.video_shift)((b, chunks), generator, device)
    action_t = UniformSNRSampler(settings.action_shift)((b, chunks), generator, device)
    video_off = torch.rand(b, generator=generator, device=device) < settings.video_noise_prob
    level = settings.history_noise * torch.rand(b, chunks + 1, generator=generator, device=device)
    video = normal(b, frames - 1, tokens, d + joint)
    if joint:
        video[..., -joint:] = video[:, :, :1, -joint:].clone()
    of_actions = normal(*actions.shape) * batch.channel_mask[:, None, None]  # nothing stands in absent channels
    if settings.history_noise:
        history = normal(b, frames, tokens, d + joint)
    else:
        history = torch.zeros(b, frames, tokens, d + joint, device=device)
    text_off = torch.rand(b, generator=generator, device=device) < settings.text_drop_prob
    return Noise(
        video=video.flatten(1, 2),
        actions=of_actions,
        history=history.flatten(1, 2),
        video_t=video_t.masked_fill(video_off[:, None], 0.0),
        action_t=action_t,
        history_t=1 - level,
        video_off=video_off[:, None],
        text_off=text_off[:, None],
        committed=torch.randint(settings.delay + 1, (b, chunks), generator=generator, device=device)
        if settings.delay
        else None,
    )


def with_committed(noise: Noise, layout: TokenLayout) -> Noise:
    """The same draws for each action vector of a layout with `vector_levels`: those committed are at time 1.

    Example: of a chunk of four vectors at time 0.3, two committed, the times are 1, 1, 0.3, 0.3.
    """
    if noise.committed is None:
        return noise
    levels, of_actions = layout.levels, layout.levels.noisy_actions
    of_vector = torch.stack([levels.document[of_actions], levels.chunk[of_actions]])
    begins = pad((of_vector[:, 1:] != of_vector[:, :-1]).any(0), (1, 0), value=True)
    chunk = begins.long().cumsum(0) - 1  # of each vector, counted over all documents
    place = torch.arange(len(chunk)) - begins.nonzero()[:, 0][chunk]  # in its chunk
    device = noise.committed.device
    known = place.to(device) < noise.committed.index_select(1, chunk.to(device))
    action_t = noise.action_t.index_select(1, chunk.to(device)).masked_fill(known, 1.0)
    return replace(noise, action_t=action_t, known=known)


def noised_inputs(documents: Documents, layout: TokenLayout, noise: Noise, space: str) -> WAMInputs:
    """Put documents on the paths of Eq. 6 and lay them out for the model."""
    latents, device, levels = documents.latents, documents.latents.device, layout.levels
    times = latents.new_ones(len(latents), len(levels))
    for index, t in (
        (levels.clean_video, noise.history_t), (levels.noisy_video, noise.video_t),
        (levels.noisy_actions, noise.action_t),
    ):  # fmt: skip
        times[:, index.to(device)] = t

    def at(tokens: Int[Tensor, " m"]) -> Float[Tensor, "b m"]:
        """Noise time of tokens of the layout."""
        return times.index_select(1, layout.level[tokens].to(device))

    clean = layout.video[~layout.noisy[layout.video]]
    history = latents if documents.history is None else documents.history
    predicted = documents.predicted.to(device)
    return document_inputs(
        layout,
        latents=interpolate(noise.history, history, at(clean)),
        noisy_latents=interpolate(noise.video, latents.index_select(1, predicted), at(layout.noisy_video)),
        actions=documents.actions,
        noisy_actions=interpolate(
            noise.actions, documents.actions, at(layout.noisy_actions).unflatten(1, noise.actions.shape[1:3])
        ),
        states=documents.state,
        times=times,
        text=documents.text,
        text_mask=documents.text_mask & ~noise.text_off[..., None],
        space=space,
    )


def loss_terms(
    velocities: Velocities, documents: Documents, noise: Noise, joint: int = 0,
    learned: Bool[Tensor, " transitions"] | None = None,
) -> LossTerms:  # fmt: skip
    """Return the sums behind Eq. 7, `mean |F^v - (z - eps)|^2 + lambda_a mean |F^a - (u - eps)|^2`.

    The means run over real transitions, channels that the embodiment has, and documents whose video is not off; so
    padding, absent channels and the number of tokens do not change the weight of what is there. Eq. 7 writes sums.

    Args:
        velocities: of the noisy tokens.
        documents, noise: what they are to be.
        joint: how many channels of the latents are the action; their velocity is the mean over a frame's tokens.
        learned: the transitions that count, on the CPU; None is all.
    """
    device, valid, of_transition = documents.latents.device, documents.valid, documents.document_of_transition
    tokens = documents.frame_tokens[of_transition]
    transition = torch.arange(len(tokens)).repeat_interleave(tokens).to(device)  # of each noisy video token
    share = (1 / tokens).to(device).index_select(0, transition)  # of a token in the mean over its frame
    of_transition = of_transition.to(device)
    video_on = ~noise.video_off.index_select(1, of_transition)
    if learned is not None:
        valid, video_on = valid & learned.to(device), video_on & learned.to(device)
    video_mask = valid & video_on
    data = documents.latents.index_select(1, documents.predicted.to(device))
    error, action_count = velocities.video.float() - velocity_target(noise.video, data), None
    if joint:
        of_frame = error.new_zeros(*valid.shape, joint)
        action_values = of_frame.index_add(1, transition, error[..., -joint:] * share[:, None]).square()
        following = pad(valid[:, 1:], (0, 1))
        following[:, documents.last_transitions.to(device)] = False  # the last slot of a document is padding
        action_mask = repeat(following & video_on, "b frames -> b frames c", c=joint)
        error = error[..., :-joint]
    else:
        actions = rearrange(velocities.actions, "b (frames a) c -> b frames a c", frames=valid.shape[1])
        of_actions = actions.float() - velocity_target(noise.actions, documents.actions)
        action_values = reduce(of_actions.square(), "b frames a c -> b frames c", "mean")
        action_mask = valid[..., None] & documents.channel_mask.index_select(1, of_transition)
        if noise.known is not None:  # what is left of a transition counts by how many of its vectors are left
            left = (~noise.known).float().unflatten(1, of_actions.shape[1:3])
            action_values = reduce(of_actions.square() * left[..., None], "b frames a c -> b frames c", "mean")
            action_count = (action_mask * left.mean(2)[..., None]).sum()
    video = error.square().mean(-1) * (share * video_mask.index_select(1, transition))
    counts = video_mask.sum(), action_mask.sum() if action_count is None else action_count
    return LossTerms(video.sum(), counts[0], (action_values * action_mask).sum(), counts[1])


def combined(
    terms: Sequence[LossTerms], action_weight: float, look_ahead_weight: float = LossSettings.look_ahead_weight
) -> WAMLoss:
    """Both means of Eq. 7 over all terms; 0 where nothing is learned."""
    summed = _summed(terms)
    video = summed.video / summed.video_count.clamp(min=1)
    action = summed.action / summed.action_count.clamp(min=1)
    total = video + action_weight * action
    if summed.ahead is None:
        return WAMLoss(total, video, action, summed)
    ahead = combined([summed.ahead], action_weight).total
    return WAMLoss(total + look_ahead_weight * ahead, video, action, summed, ahead)


def over_ranks(terms: Sequence[LossTerms]) -> LossTerms:
    """The sums and counts of all terms of all ranks, each of which must call this; without a gradient.

    Means of these run over all ranks' numbers, whereas a mean of the ranks' means would weigh a rank that has few as
    much as one that has many. Training itself takes the mean of all ranks' gradients: every sequence counts once,
    whether it is one of several ranks' or one of several that accumulate (docs/decisions/061).
    """
    summed = _summed(terms)
    parts = [summed] if summed.ahead is None else [summed, summed.ahead]
    values = torch.stack([value for part in parts for value in _numbers(part)]).detach().double()
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(values)
    of_parts = [LossTerms(a, b, c, d) for a, b, c, d in values.float().unflatten(0, (-1, 4))]
    return replace(of_parts[0], ahead=of_parts[1]) if of_parts[1:] else of_parts[0]


def _summed(terms: Sequence[LossTerms]) -> LossTerms:
    numbers = [torch.stack(part).sum() for part in zip(*map(_numbers, terms), strict=True)]
    summed = LossTerms(numbers[0], numbers[1], numbers[2], numbers[3])
    ahead = [term.ahead for term in terms if term.ahead is not None]
    return replace(summed, ahead=_summed(ahead)) if ahead else summed


def _numbers(terms: LossTerms) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return terms.video, terms.video_count, terms.action, terms.action_count


def equal_chunks(transitions: int, size: int) -> tuple[int, ...]:
    """Cut F transitions into chunks of `size` latent frames; the last one may be smaller: (5, 2) -> (2, 2, 1)."""
    whole, rest = divmod(transitions, size)
    return (size,) * whole + ((rest,) if rest else ())
