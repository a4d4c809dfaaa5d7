"""Closed loop: what was observed and done goes into the cache, the next chunk is planned from it, chunk by chunk.

Equal to the teacher-forced pass over the same frames, at a cost that does not grow with the episode.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import overload

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from repvitok.runtime.errors import UserError
from torch import Tensor

from repwam_core.model.cache import CachedAttention, CapturedPasses, KeyValueCache, Run
from repwam_core.model.flow import euler, time_grid
from repwam_core.model.sequence import TokenLayout, Velocities, WAMInputs, chunk_layout, history_layout, to_device
from repwam_core.model.wam import WorldActionModel
from repwam_core.sampling import SamplingConfig

VIDEO_MODES = ("imagine", "skip")
Pass = tuple[TokenLayout, CachedAttention]
"""Tokens of one kind of pass over a chunk, and what they attend to."""


@dataclass(frozen=True, eq=False)
class PlannedChunk:
    """What the model expects of the next `frames` latent frames.

    Attributes:
        actions: normalised action vectors of the transitions into them.
        latents: imagined standardised latents; None if the video was skipped.
    """

    actions: Float[Tensor, "b frames a c"]
    latents: Float[Tensor, "b frames tokens d"] | None


class Rollout:
    """A batch of episodes driven in step: `observe` the first frame, then `plan`, act, `observe`, `plan`, ...

    Args:
        wam: the model; used without gradients.
        space: name of the action space.
        grid: views, rows, columns of a latent frame.
        text: token-level hidden states of each episode's instruction.
        text_mask: which of them are real.
        chunk_frames: the largest chunk, in latent frames, that will be observed or planned.
        guidance: classifier-free guidance of the video against no instruction; 1 is off and costs nothing, anything
            else runs a second, unconditional copy of every episode. Actions are never guided.
        static_shapes: see `KeyValueCache`; None means only on a GPU, or where `run` is given.
        run: `wam.run`, compiled; None is `wam.run` itself. With static shapes one graph per kind of pass serves all
            chunks.
        graphs: whether passes are captured as CUDA graphs and replayed; or what has captured those of earlier rollouts,
            which end when this one begins.
        delay: most committed action vectors that the model was trained to be given without noise (`ChunkSpec.delay`).

    Attributes:
        frame: number of the next latent frame.
        chunk: number of the next chunk.
    """

    def __init__(
        self,
        wam: WorldActionModel,
        *,
        space: str,
        grid: tuple[int, int, int],
        text: Float[Tensor, "b s width"],
        text_mask: Bool[Tensor, "b s"],
        chunk_frames: int = 2,
        guidance: float = 1.0,
        static_shapes: bool | None = None,
        run: Run | None = None,
        graphs: CapturedPasses | bool = False,
        delay: int = 0,
    ) -> None:
        if chunk_frames < 1:
            raise UserError(f"chunk_frames: expected at least 1, got {chunk_frames}.")
        self.wam, self.space, self.grid, self.guidance = wam, space, grid, guidance
        self.sizes, self.delay = wam.config.space(space), delay
        self.chunk_frames, self.batch, self.frame, self.chunk = chunk_frames, text.shape[0], 0, 0
        weight = wam.video_in.weight
        self.device, self.dtype = weight.device, weight.dtype
        if graphs is True and self.device.type != "cuda":
            raise UserError(f"graphs: expected a model on a CUDA device to capture its passes, it is on {self.device}.")
        self._run: Run = wam.run if run is None else run
        self._captured = CapturedPasses(wam, run) if graphs is True else graphs or None
        self._text = self._double(text.to(weight))[:, None]
        self._text_mask = self._double(text_mask.to(self.device))[:, None].clone()
        self._text_mask[self.batch :] = False
        with torch.no_grad():
            self._texts = wam.embed_text(self._text, self._text_mask, per_layer=True)
        shape = {
            "batch": len(self._text), "grid": grid, "vectors": self.sizes.vectors_per_transition, "room": chunk_frames,
            "device": self.device, "dtype": self.dtype,
        }  # fmt: skip
        if self._captured is not None:
            self.cache = self._captured.cache(**shape)
        else:
            by_default = self.device.type == "cuda" or run is not None
            static = by_default if static_shapes is None else static_shapes
            self.cache = KeyValueCache(wam.config, static_shapes=static, **shape)
        self._cache_episodes = self.cache.episodes
        self._passes: dict[tuple[str, int, int], Pass] = {}

    @classmethod
    def from_settings(
        cls,
        wam: WorldActionModel,
        settings: SamplingConfig,
        *,
        space: str,
        grid: tuple[int, int, int],
        text: Float[Tensor, "b s width"],
        text_mask: Bool[Tensor, "b s"],
        run: Run | None = None,
        graphs: CapturedPasses | bool = False,
        delay: int = 0,
    ) -> Rollout:
        """A rollout whose chunks are to be planned by `plan_chunk` with these settings."""
        return cls(
            wam,
            space=space,
            grid=grid,
            text=text,
            text_mask=text_mask,
            chunk_frames=settings.chunk_frames,
            guidance=settings.guidance,
            run=run,
            graphs=graphs,
            delay=delay,
        )

    def warm_up(self, settings: SamplingConfig) -> None:
        """Capture all kinds of passes that chunks need, before the first observation, and nothing where it was done."""
        text = tuple(self._text_mask.shape)
        if self._captured is None or self._captured.ready((text, settings.chunk_frames, settings.executed)):
            return
        config, vectors, channels = self.wam.config, self.sizes.vectors_per_transition, self.sizes.channels

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(self.batch, *shape, device=self.device)

        for frames in (1, *sorted({1, settings.executed})):  # frame 0; an episode told anew comes frame by frame
            states = zeros(frames, self.sizes.state_channels) if config.has_state(self.space) else None
            latents = zeros(frames, self.cache.tokens, config.latent_dim)
            self.observe(latents, states, zeros(frames, vectors, channels) if self.frame else None)
        for committed in (0, 1) if self.delay else (0,):
            self.plan_chunk(
                replace(settings, video_steps=1, action_steps=2),  # with and without a video that is held
                video_noise=zeros(settings.chunk_frames, self.cache.tokens, config.latent_dim),
                action_noise=zeros(settings.chunk_frames, vectors, channels),
                committed=zeros(committed, channels),
            )
        self.cache.reset()
        self._cache_episodes, self.frame, self.chunk = self.cache.episodes, 0, 0
        self._clear()

    @torch.no_grad()
    def observe(
        self,
        latents: Float[Tensor, "b frames tokens d"],
        states: Float[Tensor, "b frames state"] | None = None,
        actions: Float[Tensor, "b frames a c"] | None = None,
    ) -> None:
        """Append observed frames to the history as one clean chunk; the first call gives frame 0 alone.

        Args:
            latents: standardised latents of the frames.
            states: normalised robot state at each frame, where the model takes it.
            actions: normalised actions that were executed in the transitions into the frames (not the planned ones),
                where the model has an action history; None for frame 0, which nothing led to.
        """
        frames = latents.shape[1]
        self._check_frames(frames)
        if self.frame == 0 and frames != 1:
            raise UserError(f"latents: expected the first observation to be frame 0 alone, got {frames} frames.")
        config = self.wam.config
        has_state, has_actions = config.has_state(self.space), config.action_history and self.frame > 0
        if has_state and states is None:
            raise UserError(f"states: space {self.space!r} expects a robot state with each observed frame, got none.")
        if has_actions and actions is None:
            raise UserError(f"actions: expected those executed on the way to frame {self.frame}, got none.")
        layout = history_layout(*self._place(frames), state=has_state, action_history=config.action_history)
        inputs = self._inputs(
            layout,
            _flat(latents),
            _flat(actions) if has_actions else None,
            states if has_state else None,
            (1.0, 1.0),
        )
        self._clear()
        self._pass(inputs, self.cache.attend_history(layout.streams))
        self.frame, self.chunk = self.frame + frames, self.chunk + 1

    def plan_chunk(
        self,
        settings: SamplingConfig,
        *,
        frames: int | None = None,
        generator: torch.Generator | None = None,
        video_noise: Float[Tensor, "b frames tokens d"] | None = None,
        action_noise: Float[Tensor, "b frames a c"] | None = None,
        committed: Float[Tensor, "b m c"] | None = None,
    ) -> PlannedChunk:
        """`plan` with these settings."""
        return self.plan(
            frames,
            video=settings.video,
            video_steps=settings.video_steps,
            action_steps=settings.action_steps,
            video_shift=settings.video_shift,
            action_shift=settings.action_shift,
            hold_video=settings.hold_video,
            generator=generator,
            video_noise=video_noise,
            action_noise=action_noise,
            committed=committed,
        )

    @torch.no_grad()
    def plan(
        self,
        frames: int | None = None,
        *,
        video: str = "imagine",
        video_steps: int = 5,
        action_steps: int = 10,
        video_shift: float = 1.0,
        action_shift: float = 1.0,
        hold_video: bool = False,
        generator: torch.Generator | None = None,
        video_noise: Float[Tensor, "b frames tokens d"] | None = None,
        action_noise: Float[Tensor, "b frames a c"] | None = None,
        committed: Float[Tensor, "b m c"] | None = None,
    ) -> PlannedChunk:
        """Draw the next chunk; the history is left as it is.

        `joint`: video and actions are refined together in max(video_steps, action_steps) passes; the modality with
        fewer steps waits at its own noise time between its steps (their levels are independent in training). "skip"
        leaves the video at pure noise. `sequential`: first the video, then, with the keys of the finished video
        cached, the actions alone; "skip" cannot do without the video and only does not return it.

        Args:
            frames: latent frames k of the chunk; None is the largest.
            video: "imagine" or "skip".
            video_steps, action_steps: Euler steps of each modality.
            video_shift, action_shift: bend their time grids, see `flow.time_grid`.
            hold_video: see `SamplingConfig`.
            generator: source of the noise.
            video_noise, action_noise: the noise itself, e.g. drawn episode by episode.
            committed: normalised action vectors that will be carried out first, whatever is planned: the chunk begins
                with them, and the others are drawn to follow them, see `_frozen`. Up to `delay` of them the model sees
                without noise, as in training (docs/decisions/082).
        """
        frames = self.chunk_frames if frames is None else frames
        self._check_frames(frames)
        if self.frame == 0:
            raise UserError("expected an observed first frame before planning; call observe first.")
        if video not in VIDEO_MODES:
            raise UserError(f"video: expected one of {VIDEO_MODES}, got {video!r}.")
        self._clear()
        latent_dim, sizes = self.wam.config.latent_dim, self.sizes
        x_video = self._noise((self.batch, frames, self.cache.tokens, latent_dim), generator, video_noise)
        shape = (self.batch, frames, sizes.vectors_per_transition, sizes.channels)
        x_action = self._noise(shape, generator, action_noise)
        video_times = time_grid(video_steps, video_shift).tolist()
        action_times = time_grid(action_steps, action_shift).tolist()
        frozen, clean = self._frozen(x_action, committed)
        if clean:
            x_action = frozen(x_action, 0.0)
        if self.wam.config.coupling == "sequential":
            # First the video, drawn without the committed actions; then the actions that lead to it.
            x_video = euler(lambda x, t: self.velocities(x, None, video_time=t)[0], x_video, video_times)
            self.imagine(x_video)
            x_action = euler(
                lambda x, t: self.velocities(None, frozen(x, t), action_time=t, committed=clean)[1],
                x_action,
                action_times,
            )
            x_action = frozen(x_action, 1.0)
        else:
            held = [0.0] if video == "skip" else video_times
            x_video, x_action = self._solve_joint(x_video, x_action, held, action_times, hold_video, frozen, clean)
        return PlannedChunk(x_action, x_video if video == "imagine" else None)

    @torch.no_grad()
    def velocities(
        self,
        video: Float[Tensor, "b frames tokens d"] | None,
        actions: Float[Tensor, "b frames a c"] | None,
        video_time: float = 0.0,
        action_time: float = 0.0,
        committed: int = 0,
    ) -> tuple[Float[Tensor, "b video_frames tokens d"], Float[Tensor, "b action_frames a c"]]:
        """One pass over the noisy next chunk, or one modality of it; the other then comes back empty.

        Args:
            video, actions: the chunk on its path; None leaves the modality out (`sequential` only makes sense of it).
            video_time, action_time: their noise times.
            committed: how many first action vectors are at time 1 in place of `action_time`.
        """
        given = video if video is not None else actions
        if given is None:
            raise UserError("expected the video or the actions of the chunk, got neither.")
        kind = "both" if video is not None and actions is not None else "actions" if video is None else "video"
        committed = committed if actions is not None else 0
        layout, attention = self._scratch_pass(kind, given.shape[1], committed)
        times = (video_time, action_time, 1.0) if committed else (video_time, action_time)
        inputs = self._inputs(layout, _flat(video), _flat(actions), None, times)
        output = self._pass(inputs, attention)
        video, actions = output.video, output.actions
        if self.guidance != 1.0:  # the batch was there twice, see `_double`; actions are those with the instruction
            given, without = video.split(self.batch)
            video, actions = without + self.guidance * (given - without), actions[: self.batch]
        if self._captured is not None:
            video, actions = video.clone(), actions.clone()  # the next pass overwrites them
        return (
            rearrange(video, "b (frames tokens) d -> b frames tokens d", tokens=self.cache.tokens),
            rearrange(actions, "b (frames a) c -> b frames a c", a=self.sizes.vectors_per_transition),
        )

    @torch.no_grad()
    def imagine(self, latents: Float[Tensor, "b frames tokens d"]) -> None:
        """Let the planned chunk's actions see this as the clean video of their chunk (`sequential`)."""
        layout, attention = self._scratch_pass("imagined", latents.shape[1])
        self._passes = {key: value for key, value in self._passes.items() if key[0] != "actions"}
        self._pass(self._inputs(layout, _flat(latents), None, None, (1.0, 1.0)), attention)

    def _clear(self) -> None:
        """Forget what was planned."""
        self._passes.clear()
        self.cache.clear_scratch()

    def _place(self, frames: int) -> tuple[int, int, int, tuple[int, int, int], int]:
        """The first arguments of the layout of the next chunk."""
        return self.frame, frames, self.chunk, self.grid, self.sizes.vectors_per_transition

    def _pass(self, inputs: WAMInputs, attention: CachedAttention) -> Velocities:
        """One pass of the model."""
        inputs.check(self.wam.config)
        if self._captured is not None:
            if self.cache.episodes != self._cache_episodes:
                raise UserError("this rollout has ended: another one has begun with its captured passes")
            return self._captured(inputs, attention, self._texts)
        return self._run(inputs, self.wam.tensors(inputs.layout, self.device), attention, self._texts)

    def _scratch_pass(self, kind: str, frames: int, committed: int = 0) -> Pass:
        """What a pass over the next chunk needs, made once for all its steps."""
        if any(length != frames for _, length, _ in self._passes):
            self._clear()
        key = kind, frames, committed
        if key not in self._passes:
            if kind == "imagined":
                layout = history_layout(*self._place(frames), action_history=False)
            else:
                parts = {"video": kind != "actions", "actions": kind != "video"}
                layout = chunk_layout(*self._place(frames), **parts, committed=committed)
            self._passes[key] = layout, self.cache.attend_scratch(layout.streams)
        return self._passes[key]

    def _frozen(self, noise: Tensor, committed: Tensor | None) -> tuple[Callable[[Tensor, float], Tensor], int]:
        """What puts the committed actions into a chunk (b, frames, a, c) that is at noise time t; how many are clean.

        Of the first m vectors the end is known: at time t they are at `(1 - t) noise + t committed` (Eq. 6), whatever
        the velocities said, so that the other tokens see them at the noise level that all actions of a chunk share. Of
        up to `delay` vectors the model was told in training: they are what they end in at all times.
        """
        if committed is None or not committed.shape[1]:
            return lambda action, _: action, 0
        _, frames, vectors, channels = noise.shape
        m = committed.shape[1]
        if committed.shape != (self.batch, m, channels) or m > frames * vectors:
            raise UserError(
                f"committed: expected ({self.batch}, up to {frames * vectors}, {channels}) actions, got "
                f"{tuple(committed.shape)}."
            )
        first, end = _flat(noise)[:, :m], to_device(committed.float(), self.device)

        clean = m if m <= self.delay else 0

        def freeze(action: Tensor, t: float) -> Tensor:
            kept = torch.cat([end if clean else (1 - t) * first + t * end, _flat(action)[:, m:]], dim=1)
            return rearrange(kept, "b (frames a) c -> b frames a c", a=vectors)

        return freeze, clean

    def _solve_joint(
        self, video: Tensor, action: Tensor, video_times: list[float], action_times: list[float], hold_video: bool,
        frozen: Callable[[Tensor, float], Tensor], committed: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Refine both together; in pass p of n a modality with s steps is in its step p * s // n.

        A video that is held takes its step in the first of these passes, and in the others leaves its keys.
        """
        video_steps, action_steps = len(video_times) - 1, len(action_times) - 1
        passes = max(video_steps, action_steps)
        for number in range(passes):
            i, j = number * video_steps // passes, number * action_steps // passes
            first = number == 0 or i > (number - 1) * video_steps // passes
            last = (number + 1) * video_steps // passes > i
            runs = first or not hold_video
            shown, times = video if runs else None, (video_times[i], action_times[j])
            to_video, to_action = self.velocities(shown, action, *times, committed)
            if video_steps and (first if hold_video else last):
                video = video + (video_times[i + 1] - video_times[i]) * to_video
            if (number + 1) * action_steps // passes > j:
                action = action + (action_times[j + 1] - action_times[j]) * to_action
                action = frozen(action, action_times[j + 1])
        return video, action

    def _inputs(
        self, layout: TokenLayout, video: Tensor | None, actions: Tensor | None, states: Tensor | None,
        times: tuple[float, ...],
    ) -> WAMInputs:  # fmt: skip
        """One pass's inputs, for both copies of the batch where the video is guided."""
        config = self.wam.config
        kind = {"device": self.device, "dtype": self.dtype}
        of_levels = torch.empty(len(self._text), len(times), device=self.device)
        for level, time in enumerate(times):
            of_levels[:, level] = time  # a tensor made of numbers would come from the CPU
        empty_video = torch.zeros(self.batch, 0, config.latent_dim, **kind)
        empty_actions = torch.zeros(self.batch, 0, self.sizes.channels, **kind)
        return WAMInputs(
            layout=layout,
            video=self._double(empty_video if video is None else video.to(**kind)),
            actions=self._double(empty_actions if actions is None else actions.to(**kind)),
            states=None if states is None else self._double(states.to(**kind)),
            times=of_levels,
            text=self._text,
            text_mask=self._text_mask,
            space=self.space,
        )

    def _double(self, values: Tensor) -> Tensor:
        """The batch once, or twice where the video is guided: with the instruction, then without."""
        return values if self.guidance == 1.0 else torch.cat([values, values])

    def _noise(self, shape: tuple[int, ...], generator: torch.Generator | None, given: Tensor | None) -> Tensor:
        if given is None:
            where = self.device if generator is None else generator.device
            return torch.randn(shape, generator=generator, device=where).to(self.device)
        if tuple(given.shape) != shape:
            raise UserError(f"noise: expected the shape of the chunk, {shape}, got {tuple(given.shape)}.")
        return to_device(given, self.device)

    def _check_frames(self, frames: int) -> None:
        if not 1 <= frames <= self.chunk_frames:
            raise UserError(
                f"expected 1 to chunk_frames = {self.chunk_frames} latent frames, got {frames}; give Rollout a larger "
                "chunk_frames, or observe in smaller chunks."
            )


@overload
def _flat(values: Tensor) -> Tensor: ...
@overload
def _flat(values: None) -> None: ...
def _flat(values: Tensor | None) -> Tensor | None:
    """(b, frames, tokens, channels) to (b, frames * tokens, channels)."""
    return None if values is None else rearrange(values, "b frames tokens c -> b (frames tokens) c")
