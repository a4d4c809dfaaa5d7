"""The training objective: flow matching on video latents and actions under teacher forcing (RepWAM Eq. 6-7)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from einops import rearrange, reduce, repeat
from jaxtyping import Bool, Float, Int
from repvitok.runtime.documents import Above0, Share, check_fields
from torch import Tensor, distributed

from repwam_core.data.batches import SegmentBatch
from repwam_core.model.flow import UniformSNRSampler, interpolate, velocity_target
from repwam_core.model.inputs import Velocities, WAMInputs, document_inputs, pack, without_unread
from repwam_core.model.masks import Attend
from repwam_core.model.sequence import SequenceLayout, training_layout
from repwam_core.model.wam import WorldActionModel


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
    """

    video_shift: Above0 = 5.0
    action_shift: Above0 = 1.0
    action_weight: Above0 = 1.0
    video_noise_prob: Share = 0.0
    history_noise: Share = 0.0
    text_drop_prob: Share = 0.0

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, eq=False)
class Noise:
    """Every random draw of one step.

    Attributes:
        video, actions: standard normal noise of the frames 1 .. F and of their actions.
        history: standard normal noise for the clean video of the frames 0 .. F.
        video_t, action_t: noise time of each chunk 1 .. N, drawn independently.
        history_t: noise time of the clean video of each chunk 0 .. N; 1 without history noise.
        video_off: samples whose video is pure noise and not learned.
        text_off: samples whose instruction is withheld.
    """

    video: Float[Tensor, "b transitions tokens d"]
    actions: Float[Tensor, "b transitions a c"]
    history: Float[Tensor, "b frames tokens d"]
    video_t: Float[Tensor, "b chunks"]
    action_t: Float[Tensor, "b chunks"]
    history_t: Float[Tensor, "b chunks_with_prefix"]
    video_off: Bool[Tensor, " b"]
    text_off: Bool[Tensor, " b"]


@dataclass(frozen=True, eq=False)
class LossTerms:
    """Sums of squared errors over what is to be learned, and how many numbers (means over tokens) they are of."""

    video: Float[Tensor, ""]
    video_count: Float[Tensor, ""] | Int[Tensor, ""]
    action: Float[Tensor, ""]
    action_count: Float[Tensor, ""] | Int[Tensor, ""]


@dataclass(frozen=True, eq=False)
class WAMLoss:
    """The two terms of Eq. 7, each a mean over its learned numbers, and `total = video + lambda_a * action`.

    `terms` are the sums and counts behind them, of this rank.
    """

    total: Float[Tensor, ""]
    video: Float[Tensor, ""]
    action: Float[Tensor, ""]
    terms: LossTerms


def wam_loss(
    wam: WorldActionModel,
    batch: SegmentBatch,
    *,
    space: str,
    chunk_sizes: tuple[int, ...],
    grid: tuple[int, int, int],
    settings: LossSettings,
    generator: torch.Generator,
    attend: Callable[[SequenceLayout], Attend] | None = None,
) -> WAMLoss:
    """Return RepWAM Eq. 7 of a batch, all chunks at once.

    Args:
        wam: the model.
        batch: segments of F transitions.
        space: the action space of the batch's actions.
        chunk_sizes: latent frames of the chunks 1 .. N, summing to F.
        grid: (views, h, w) of a latent frame.
        settings: weights and noise.
        generator: source of every draw, on the batch's device.
        attend: see `documents_loss`.
    """
    joint = wam.config.joint_actions
    batch = from_chunk_starts(batch, chunk_sizes)
    if joint:
        batch = with_joint_actions(batch)
    noise = draw_noise(batch, len(chunk_sizes), settings, generator, joint)
    document = NoisedDocument(batch, chunk_sizes, grid, noise)
    return documents_loss(wam, [document], space, settings.action_weight, attend)


@dataclass(frozen=True, eq=False)
class NoisedDocument:
    """What one document of a sequence is trained on: its data, its chunks, its noise.

    Attributes:
        batch: segments of F transitions; of batch size one where several documents are packed.
        chunk_sizes: latent frames of the chunks 1 .. N, summing to F.
        grid: (views, h, w) of a latent frame.
        noise: every draw.
    """

    batch: SegmentBatch
    chunk_sizes: tuple[int, ...]
    grid: tuple[int, int, int]
    noise: Noise

    def layout(self, wam: WorldActionModel, space: str) -> SequenceLayout:
        """The tokens of this document in the sequences of `wam`, on the CPU."""
        return training_layout(
            self.batch.latents.shape[1],
            self.chunk_sizes,
            self.grid,
            self.batch.actions.shape[2],
            state=wam.config.has_state(space) and self.batch.state is not None,
            action_history=wam.config.action_history,
        )


def documents_loss(
    wam: WorldActionModel,
    documents: Sequence[NoisedDocument],
    space: str,
    action_weight: float,
    attend: Callable[[SequenceLayout], Attend] | None = None,
) -> WAMLoss:
    """Return Eq. 7 of documents packed into one sequence; the means run over the numbers of all of them.

    Args:
        wam: the model.
        documents: what is packed, in order.
        space: the action space.
        action_weight: lambda_a.
        attend: makes the attention of the packed layout, which it gets on the CPU; None is the model's own choice.
    """
    layouts = [document.layout(wam, space) for document in documents]
    inputs = [
        noised_inputs(document.batch, layout, document.chunk_sizes, document.noise, space)
        for document, layout in zip(documents, layouts, strict=True)
    ]
    if attend is None:
        velocities = wam(_packed(inputs))
    else:
        packed = _packed([without_unread(entry, wam.config.coupling) for entry in inputs])
        velocities = wam(packed, attend(packed.layout))
    parts = _velocities_of(velocities, layouts)
    terms = [
        loss_terms(part, item.batch, item.noise, wam.config.joint_actions)
        for part, item in zip(parts, documents, strict=True)
    ]
    return combined(terms, action_weight)


def _packed(inputs: Sequence[WAMInputs]) -> WAMInputs:
    return inputs[0] if len(inputs) == 1 else pack(inputs)


def _velocities_of(velocities: Velocities, layouts: Sequence[SequenceLayout]) -> list[Velocities]:
    """The velocities of each document of a packed sequence."""
    if len(layouts) == 1:
        return [velocities]
    video = velocities.video.split([len(layout.noisy_video) for layout in layouts], dim=1)
    actions = velocities.actions.split([len(layout.noisy_actions) for layout in layouts], dim=1)
    return [Velocities(*parts) for parts in zip(video, actions, strict=True)]


def from_chunk_starts(batch: SegmentBatch, chunk_sizes: tuple[int, ...]) -> SegmentBatch:
    """The same segments with every action measured from the state before its chunk, the last one a policy has seen.

    Args:
        batch: segments whose actions are measured from the state at the first frame of their own transition.
        chunk_sizes: latent frames of the chunks 1 .. N, summing to F.
    """
    if batch.reference is None:
        return batch
    sizes = torch.tensor(chunk_sizes, device=batch.reference.device)
    starts = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    moved = batch.reference - batch.reference[:, starts]
    return replace(batch, actions=batch.actions + moved[:, :, None], reference=None)


def with_joint_actions(batch: SegmentBatch) -> SegmentBatch:
    """The same segments with the actions as channels of the latents, for `WAMConfig.joint_actions`, and no others.

    Frame f carries the action of the transition f -> f + 1, the same for all its tokens; the last frame's slot, after
    which nothing is recorded, is zero (the paper's "Joint Pred").
    """
    following = torch.nn.functional.pad(rearrange(batch.actions, "b t a c -> b t (a c)"), (0, 0, 0, 1))
    channels = repeat(following, "b frames c -> b frames tokens c", tokens=batch.latents.shape[2])
    return replace(batch, latents=torch.cat([batch.latents, channels], dim=-1), actions=batch.actions[:, :, :0])


def draw_noise(
    batch: SegmentBatch, chunks: int, settings: LossSettings, generator: torch.Generator, joint: int = 0
) -> Noise:
    """Draw noise and noise times: one time per sample, chunk and modality (docs/decisions/000, entry 3).

    The last `joint` channels of a latent frame are an action, written once per token: they share one draw.
    """
    b, device = len(batch), batch.latents.device

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, device=device)

    video_t = UniformSNRSampler(settings.video_shift)((b, chunks), generator, device)
    action_t = UniformSNRSampler(settings.action_shift)((b, chunks), generator, device)
    video_off = torch.rand(b, generator=generator, device=device) < settings.video_noise_prob
    level = settings.history_noise * torch.rand(b, chunks + 1, generator=generator, device=device)
    video = normal(batch.latents[:, 1:])
    if joint:
        video[..., -joint:] = video[:, :, :1, -joint:].clone()
    return Noise(
        video=video,
        actions=normal(batch.actions) * batch.channel_mask[:, None, None],  # nothing stands in absent channels
        history=normal(batch.latents) if settings.history_noise else torch.zeros_like(batch.latents),
        video_t=video_t.masked_fill(video_off[:, None], 0.0),
        action_t=action_t,
        history_t=1 - level,
        video_off=video_off,
        text_off=torch.rand(b, generator=generator, device=device) < settings.text_drop_prob,
    )


def noised_inputs(
    batch: SegmentBatch, layout: SequenceLayout, chunk_sizes: tuple[int, ...], noise: Noise, space: str
) -> WAMInputs:
    """Put the batch on the paths of Eq. 6 and lay it out for the model."""
    sizes = torch.tensor(chunk_sizes, device=batch.latents.device)
    sizes_with_prefix = torch.tensor((1, *chunk_sizes), device=batch.latents.device)
    video_t = noise.video_t.repeat_interleave(sizes, dim=1)
    action_t = noise.action_t.repeat_interleave(sizes, dim=1)
    history_t = noise.history_t.repeat_interleave(sizes_with_prefix, dim=1)
    times = batch.latents.new_ones(len(batch), len(layout.levels))
    times[:, layout.levels.clean_video] = noise.history_t
    times[:, layout.levels.noisy_video] = noise.video_t
    times[:, layout.levels.noisy_actions] = noise.action_t
    return document_inputs(
        layout,
        latents=interpolate(noise.history, batch.latents, history_t),
        noisy_latents=interpolate(noise.video, batch.latents[:, 1:], video_t),
        actions=batch.actions,
        noisy_actions=interpolate(noise.actions, batch.actions, action_t),
        states=batch.state,
        times=times,
        text=batch.text,
        text_mask=batch.text_mask & ~noise.text_off[:, None],
        space=space,
    )


def flow_matching_loss(velocities: Velocities, batch: SegmentBatch, noise: Noise, action_weight: float) -> WAMLoss:
    """Return `mean |F^v - (z - eps)|^2 + lambda_a mean |F^a - (u - eps)|^2` (Eq. 7) over what is to be learned.

    The means run over real transitions, channels that the embodiment has, and samples whose video is not off; so
    padding, absent channels and the number of tokens do not change the weight of what is there. Eq. 7 writes sums.
    """
    return combined([loss_terms(velocities, batch, noise)], action_weight)


def loss_terms(velocities: Velocities, batch: SegmentBatch, noise: Noise, joint: int = 0) -> LossTerms:
    """Return the sums behind `flow_matching_loss`, of one document.

    Args:
        velocities: of the noisy tokens.
        batch, noise: what they are to be.
        joint: how many channels of the latents are the action; their velocity is the mean over a frame's tokens.
    """
    frames = batch.valid.shape[1]
    video = rearrange(velocities.video, "b (frames tokens) d -> b frames tokens d", frames=frames).float()
    target = velocity_target(noise.video, batch.latents[:, 1:])
    video_mask = batch.valid & ~noise.video_off[:, None]
    if joint:
        action_error = (
            reduce(video[..., -joint:], "b f tokens c -> b f c", "mean") - target[:, :, 0, -joint:]
        ).square()
        following = torch.nn.functional.pad(batch.valid[:, 1:], (0, 1))  # the last slot is padding
        action_mask = repeat(following & ~noise.video_off[:, None], "b frames -> b frames c", c=joint)
        action_values, video, target = action_error, video[..., :-joint], target[..., :-joint]
    else:
        actions = rearrange(velocities.actions, "b (frames a) c -> b frames a c", frames=frames)
        action_error = (actions.float() - velocity_target(noise.actions, batch.actions)).square()
        action_mask = repeat(batch.valid, "b frames -> b frames c", c=actions.shape[-1]) & batch.channel_mask[:, None]
        action_values = reduce(action_error, "b frames a c -> b frames c", "mean")
    video_values = reduce((video - target).square(), "b frames tokens d -> b frames", "mean")
    return LossTerms(
        (video_values * video_mask).sum(), video_mask.sum(), (action_values * action_mask).sum(), action_mask.sum()
    )


def combined(terms: Sequence[LossTerms], action_weight: float) -> WAMLoss:
    """Both means of Eq. 7 over all terms; 0 where nothing is learned."""
    summed = _summed(terms)
    video = summed.video / summed.video_count.clamp(min=1)
    action = summed.action / summed.action_count.clamp(min=1)
    return WAMLoss(video + action_weight * action, video, action, summed)


def over_ranks(terms: Sequence[LossTerms]) -> LossTerms:
    """The sums and counts of all terms of all ranks, each of which must call this; without a gradient.

    Means of these run over all ranks' numbers, whereas a mean of the ranks' means would weigh a rank that has few as
    much as one that has many. Training itself takes the mean of all ranks' gradients: every sequence counts once,
    whether it is one of several ranks' or one of several that accumulate (docs/decisions/061).
    """
    summed = _summed(terms)
    values = torch.stack([summed.video, summed.video_count, summed.action, summed.action_count]).detach().double()
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(values)
    return LossTerms(*values.float())


def _summed(terms: Sequence[LossTerms]) -> LossTerms:
    parts = zip(*((term.video, term.video_count, term.action, term.action_count) for term in terms), strict=True)
    return LossTerms(*(torch.stack(part).sum() for part in parts))


def equal_chunks(transitions: int, size: int) -> tuple[int, ...]:
    """Cut F transitions into chunks of `size` latent frames; the last one may be smaller: (5, 2) -> (2, 2, 1)."""
    whole, rest = divmod(transitions, size)
    return (size,) * whole + ((rest,) if rest else ())
