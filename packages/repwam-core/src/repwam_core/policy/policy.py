"""The policy: camera frames, robot state and an instruction in, a chunk of actions in SI units out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from repvitok.data.transforms import prepare_frames
from repvitok.runtime.errors import UserError
from torch import Tensor
from torch.nn.functional import pad

from repwam_core.interface import ActionChunk, BasePolicy, BatchedBasePolicy, Embodiment, Observation
from repwam_core.model.cache import CapturedPasses
from repwam_core.model.rollout import Rollout
from repwam_core.model.sequence import to_device
from repwam_core.policy.folder import LoadedPolicy

TEXT_BUCKET = 32
"""Compiled and captured passes see instructions of a multiple of this many tokens, the null token among them, so that
there are few lengths."""


@dataclass
class _Episodes:
    """What the policy remembers of the episodes under way; a reset begins a new one.

    Attributes:
        instructions: what each is to do; "" for no instruction.
        seeds: of every draw.
        acts: how often the policy was asked.
        sizes: camera -> picture size of the first frame.
        history: observed latents, states and the actions that led there, the newest last.
        returned: scaled actions of the last chunk as it was returned, clipping included, (n, frames, a, c).
        executed: scaled actions that were carried out instead, if `record` was told.
        committed: actions (m, C) of each in its units that the next chunk has to begin with, if `commit` was told.
        reference: what the actions of the last chunk are measured from, (n, C), in the channels' units.
    """

    instructions: list[str]
    seeds: list[int]
    rollout: Rollout
    stream: Any
    acts: int
    sizes: dict[str, tuple[int, int]]
    history: list[tuple[Tensor, Tensor | None, Tensor | None]]
    returned: Tensor | None = None
    executed: Tensor | None = None
    committed: np.ndarray | None = None
    reference: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))


Made = TypeVar("Made", bound="_OfParts")  # beartype cannot check typing.Self on a lone method


class _OfParts:
    """What `Policy` and `BatchedPolicy` have in common: a loaded policy folder, and what it says of the robot.

    Attributes:
        parts: the loaded policy folder.
        plan: how it plans.
    """

    def __init__(self, parts: LoadedPolicy, **plan: Any) -> None:
        self.parts, self.plan = parts, replace(parts.manifest.plan, **plan)

    @classmethod
    def from_pretrained(
        cls: type[Made], source: str | Path, device: str = "cpu", *, dtype: torch.dtype | None = None,
        revision: str | None = None, local_files_only: bool = False, **plan: Any,
    ) -> Made:  # fmt: skip
        """`LoadedPolicy.load` a policy; `plan` overrides how it plans, for example `execute_frames=1`."""
        hub = {"revision": revision, "local_files_only": local_files_only}
        return cls(LoadedPolicy.load(source, device, dtype=dtype, **hub), **plan)

    @property
    def embodiment(self) -> Embodiment:
        """The robot that this policy drives."""
        return self.parts.manifest.embodiment

    @property
    def frames_per_latent(self) -> int:
        """Camera frames of a latent frame: every `act` but the first takes a multiple of them."""
        return self.parts.tokenizer.config.tubelet_frames * self.parts.manifest.latents.stride

    @property
    def action_kind(self) -> Literal["absolute", "relative"]:
        """Whether an action is a target or a change, as the data set's were said to be."""
        return "relative" if self.parts.statistics.targets.kind == "relative" else "absolute"


class BatchedPolicy(_OfParts, BatchedBasePolicy):
    """Many episodes in step, each exactly as it would run alone.

    The first `act` of an episode takes one frame per camera. Every later one takes all the frames since, which are
    `frames_per_latent` frames for each latent frame that was carried out, the newest last; the actions carried out are
    taken to be the ones returned, unless `record` says otherwise.

    Args:
        parts: the loaded policy folder.
        compile_passes: compile the model's layers when a kind of pass first runs, which takes a while and makes every
            later one faster on a GPU; cached attention then always runs over the whole window.
        graphs: capture each kind of pass as a CUDA graph at the first `reset`, and replay it from then on; None does so
            on a GPU. Memory for one cache and its graphs is kept for as long as the policy lives.
        **plan: fields of `SamplingConfig` that differ from the folder's.

    Attributes:
        planned: what the model expects of the chunk returned last: scaled actions and standardised latents.
    """

    def __init__(
        self, parts: LoadedPolicy, *, compile_passes: bool = False, graphs: bool | None = None, **plan: Any
    ) -> None:
        super().__init__(parts, **plan)
        if parts.manifest.chunks is not None:
            parts.manifest.chunks.require(self.plan.chunk_frames)
        self._run = parts.compiled if compile_passes else None
        self.device = next(parts.wam.parameters()).device
        on_gpu = self.device.type == "cuda"
        if graphs and not on_gpu:
            raise UserError(f"graphs: expected a policy on a CUDA device, this one is on {self.device}")
        self._captured = CapturedPasses(parts.wam, self._run) if on_gpu and graphs is not False else None
        self._standardizer = parts.manifest.latents.standardizer.like(torch.empty(0, device=self.device))
        self.planned: Any = None
        self._now: _Episodes | None = None

    def reset(self, instructions: Sequence[str | None], seeds: Sequence[int]) -> None:
        """Begin episodes; None or "" is no instruction."""
        if len(instructions) != len(seeds) or not instructions:
            raise UserError(f"expected one seed per instruction, got {len(instructions)} and {len(seeds)}")
        told = [instruction or "" for instruction in instructions]
        latents = self.parts.manifest.latents
        stream = self.parts.tokenizer.stream(len(told) * latents.grid[0], window=latents.window)
        self._now = _Episodes(told, list(seeds), self._rollout(told), stream, 0, {}, [])
        self.planned = None

    def record(self, actions_si: Sequence[np.ndarray]) -> None:
        """Tell which actions were carried out since the last `act`, (frames, C) each, if not those returned."""
        now = self._episodes()
        if not now.acts:
            raise UserError("executed actions were given before the first observation: nothing was carried out yet")
        if len(actions_si) != len(now.seeds):
            raise UserError(f"expected the actions of {len(now.seeds)} episodes, got {len(actions_si)}")
        per = self.parts.wam.config.space(self.parts.manifest.space).vectors_per_transition
        channels = len(self.parts.statistics.actions.channels)
        for actions in actions_si:
            shape = np.shape(actions)
            if len(shape) != 2 or shape[1] != channels or not shape[0] or shape[0] % per:
                raise UserError(
                    f"expected executed actions of shape (n, {channels}), n = {per} for each latent frame carried out, "
                    f"got {shape}"
                )
            if not np.isfinite(actions).all():
                raise UserError("expected executed actions that are finite, some are infinite or not a number")
        if len({len(actions) for actions in actions_si}) > 1:
            counts = [len(actions) for actions in actions_si]
            raise UserError(f"expected as many executed actions in every episode of a batch, got {counts}")
        now.executed = self._scaled(actions_si)

    def commit(self, actions_si: Sequence[np.ndarray]) -> None:
        """Tell which actions (m, C) of each episode will be carried out first after the next `act`, as it computes.

        The chunk that it returns begins with them, and what follows is planned to follow them.
        """
        now = self._episodes()
        channels = len(self.parts.statistics.actions.channels)
        most = self.plan.chunk_frames * self.parts.wam.config.space(self.parts.manifest.space).vectors_per_transition
        shapes = {np.shape(actions) for actions in actions_si}
        shape = next(iter(shapes), ())
        if len(actions_si) != len(now.seeds) or len(shapes) != 1:
            raise UserError(f"expected as many committed actions for each of {len(now.seeds)} episodes, got {shapes}")
        if len(shape) != 2 or shape[1] != channels or shape[0] >= most:
            raise UserError(
                f"expected committed actions of shape (m, {channels}), m < {most}, the rows of a planned chunk, got "
                f"{shape}"
            )
        rows = np.stack([np.asarray(actions, np.float32) for actions in actions_si])
        if not np.isfinite(rows).all():
            raise UserError("expected committed actions that are finite, some are infinite or not a number")
        now.committed = rows

    @torch.no_grad()
    def act(self, observations: Sequence[Observation]) -> list[ActionChunk]:
        """Return the next chunk of each episode."""
        now = self._episodes()
        self._check(observations)
        states = self._states(observations)
        actions = self._executed(observations[0].num_frames // self.frames_per_latent) if now.acts else None
        self._follow_instructions(observations)
        latents = self._encode(observations)
        now.rollout.observe(latents, states, actions)
        keep = self.parts.wam.config.window + 1
        now.history = [*now.history, (latents, states, actions)][-keep:]
        states_si, scaling = [observation.states() for observation in observations], self.parts.statistics
        now.reference = np.stack([scaling.reference(None if x is None else x[-1]) for x in states_si])
        self.planned = self._plan(now)
        chunks = self._chunks(self.planned.actions[:, : self.plan.executed])
        now.returned = self._scaled([chunk.actions for chunk in chunks])
        now.acts, now.executed, now.committed = now.acts + 1, None, None
        return chunks

    def imagined_latents(self) -> Float[Tensor, "n frames tokens d"] | None:
        """Latents that the model expects of the chunk returned last, as the tokenizer speaks them; None if skipped."""
        if self.planned is None or self.planned.latents is None:
            return None
        return self._standardizer.inverse(self.planned.latents)

    def observed_latents(self) -> Float[Tensor, "n frames tokens d"]:
        """Latents of the frames seen in the last `act`, as the tokenizer speaks them."""
        return self._standardizer.inverse(self._episodes().history[-1][0])

    # -- observations --------------------------------------------------------------------------------------------

    def _check(self, observations: Sequence[Observation]) -> None:
        now = self._episodes()
        if len(observations) != len(now.seeds):
            raise UserError(f"expected {len(now.seeds)} observations, one per episode, got {len(observations)}")
        for observation in observations:
            self._check_frames(observation, now.acts)
            self._check_cameras(observation, now.sizes)
        if len({observation.num_frames for observation in observations}) != 1:
            counts = [observation.num_frames for observation in observations]
            raise UserError(f"expected the same number of frames in every observation of a batch, got {counts}")

    def _check_frames(self, observation: Observation, acts: int) -> None:
        per, most = self.frames_per_latent, self.plan.chunk_frames
        frames = observation.num_frames
        if acts == 0 and frames != 1:
            raise UserError(f"expected one frame per camera in the first observation after reset, got {frames}")
        if acts and (frames % per or not 1 <= frames // per <= most):
            raise UserError(
                f"expected all frames since the last act, {per} per latent frame carried out, at most {most * per}; "
                f"got {frames}: carry out whole multiples of {per} actions"
            )

    def _check_cameras(self, observation: Observation, sizes: dict[str, tuple[int, int]]) -> None:
        for camera in self.embodiment.cameras:
            if camera not in observation.images:
                raise UserError(
                    f"expected the cameras {list(self.embodiment.cameras)}, got {list(observation.images)}; "
                    f"{camera!r} is missing"
                )
            size = observation.frames(camera).shape[1:3]
            before = sizes.setdefault(camera, (size[0], size[1]))
            if size != before:
                raise UserError(f"camera {camera!r} gave {before} pixels before, now {size}; call reset first")

    def _encode(self, observations: Sequence[Observation]) -> Tensor:
        """Standardised latents (n, frames, tokens, d) of the new frames, as `repvitok encode` makes them."""
        now, latents = self._episodes(), self.parts.manifest.latents
        every = slice(None) if now.acts == 0 else slice(latents.stride - 1, None, latents.stride)
        clips = [
            prepare_frames(observation.frames(camera)[every], self.parts.manifest.size)
            for observation in observations
            for camera in self.embodiment.cameras
        ]
        z = now.stream.encode(torch.stack(clips).to(self.device))
        z = rearrange(z, "(n views) frames tokens d -> n frames (views tokens) d", views=latents.grid[0])
        return self._standardizer(z)

    def _states(self, observations: Sequence[Observation]) -> Tensor | None:
        """Standardised states (n, frames, S) at the last raw frame of each new latent frame."""
        if not self.parts.wam.config.has_state(self.parts.manifest.space):
            return None
        statistics, rows = self.parts.statistics.state, []
        if statistics is None:
            raise UserError("this policy's model takes a robot state, but its statistics.json has none; export again")
        every = self.frames_per_latent if self._episodes().acts else 1
        for observation in observations:
            states = observation.states()
            if states is None:
                names = ", ".join(statistics.channels)
                raise UserError(f"expected a state of {len(statistics.channels)} numbers ({names}), got none")
            rows.append(torch.from_numpy(statistics.standardise(states[every - 1 :: every])))
        return to_device(torch.stack(rows), self.device)

    def _executed(self, frames: int) -> Tensor:
        """Scaled actions (n, frames, a, c) that were carried out since the last act."""
        now = self._episodes()
        if now.executed is not None and now.executed.shape[1] != frames:
            raise UserError(
                f"expected recorded actions for the {frames} latent frames seen since the last act, got those of "
                f"{now.executed.shape[1]}"
            )
        actions = now.executed if now.executed is not None else now.returned
        if actions is None or actions.shape[1] < frames:
            got = 0 if actions is None else actions.shape[1]
            raise UserError(
                f"expected the actions that led through {frames} latent frames, only those of {got} were returned; "
                "call record with what was carried out"
            )
        return to_device(actions[:, :frames], self.device)

    def _scaled(self, actions_si: Sequence[np.ndarray]) -> Tensor:
        """Actions (frames * a, C) of each episode as the model takes them, (n, frames, a, c)."""
        a = self.parts.wam.config.space(self.parts.manifest.space).vectors_per_transition
        rows, reference = np.stack([np.asarray(actions) for actions in actions_si]), self._episodes().reference[:, None]
        norm = self.parts.statistics.actions.normalise(rows - reference)
        return rearrange(torch.from_numpy(norm), "n (frames a) c -> n frames a c", a=a)

    # -- planning ------------------------------------------------------------------------------------------------

    def _plan(self, now: _Episodes) -> Any:
        """Plan with noise that depends on each episode's seed and the number of the act, not on its neighbours."""
        config, frames, tokens = self.parts.wam.config, self.plan.chunk_frames, self.parts.manifest.latents.tokens
        space = config.space(self.parts.manifest.space)
        video, actions = [], []
        for seed in now.seeds:
            key = np.random.SeedSequence((seed, now.acts)).generate_state(1, np.uint64)[0]
            generator = torch.Generator().manual_seed(int(key >> 1))
            actions.append(torch.randn(frames, space.vectors_per_transition, space.channels, generator=generator))
            video.append(torch.randn(frames, tokens, config.latent_dim, generator=generator))
        committed = None
        if now.committed is not None:
            rows = self.parts.statistics.actions.normalise(now.committed - now.reference[:, None])
            committed = torch.from_numpy(rows)
        return now.rollout.plan_chunk(
            self.plan, video_noise=torch.stack(video), action_noise=torch.stack(actions), committed=committed
        )

    def _chunks(self, actions_norm: Tensor) -> list[ActionChunk]:
        """Actions in SI units, clipped to the recorded range if the plan says so."""
        statistics, rate_hz = self.parts.statistics, self.embodiment.rate_hz
        rows = rearrange(actions_norm.float().cpu().numpy(), "n frames a c -> n (frames a) c")
        actions_si = statistics.actions.denormalise(rows) + self._episodes().reference[:, None]
        if self.plan.clip:
            actions_si = statistics.targets.clip(actions_si)
        return [ActionChunk(np.ascontiguousarray(row), statistics.targets.channels, rate_hz) for row in actions_si]

    def _follow_instructions(self, observations: Sequence[Observation]) -> None:
        """A new instruction in mid-episode: what is remembered is read again in its light."""
        now = self._episodes()
        told = [
            old if observation.instruction is None else observation.instruction
            for observation, old in zip(observations, now.instructions, strict=True)
        ]
        if told == now.instructions:
            return
        now.instructions, now.rollout = told, self._rollout(told)
        for latents, states, actions in now.history:
            for frame in range(latents.shape[1]):
                at = slice(frame, frame + 1)
                first = now.rollout.frame == 0
                now.rollout.observe(
                    latents[:, at],
                    None if states is None else states[:, at],
                    None if first or actions is None else actions[:, at],
                )

    def _rollout(self, instructions: list[str]) -> Rollout:
        told = torch.tensor([[bool(text)] for text in instructions])
        if told.any():
            filler = next(text for text in instructions if text)
            tokens, mask = self.parts.text.encode([text or filler for text in instructions])
        else:
            tokens = torch.zeros(len(instructions), 1, self.parts.wam.config.text_dim)
            mask = torch.zeros(len(instructions), 1, dtype=torch.bool)
        if self._run is not None or self._captured is not None:
            more = -(mask.shape[1] + 1) % TEXT_BUCKET
            tokens, mask = pad(tokens, (0, 0, 0, more)), pad(mask, (0, more))
        manifest = self.parts.manifest
        rollout = Rollout.from_settings(
            self.parts.wam,
            self.plan,
            space=manifest.space,
            grid=manifest.latents.grid,
            text=tokens.to(self.device),
            text_mask=(mask & told).to(self.device),
            run=self._run,
            graphs=self._captured or False,
            delay=0 if manifest.chunks is None else manifest.chunks.delay,
        )
        rollout.warm_up(self.plan)
        return rollout

    def _episodes(self) -> _Episodes:
        if self._now is None:
            raise UserError("call reset before act: no episode has begun")
        return self._now


class Policy(_OfParts, BasePolicy):
    """One robot, one episode at a time; see `BatchedPolicy` for which frames `act` takes."""

    def __init__(self, parts: LoadedPolicy, **plan: Any) -> None:
        self.batched = BatchedPolicy(parts, **plan)
        self.parts, self.plan = parts, self.batched.plan

    def reset(self, instruction: str | None, seed: int = 0) -> None:
        """Begin an episode; None or "" is no instruction."""
        self.batched.reset([instruction], [seed])

    def record(self, actions_si: np.ndarray) -> None:
        """Tell which actions (frames, C) were carried out since the last `act`, if not those returned."""
        self.batched.record([actions_si])

    def commit(self, actions_si: np.ndarray) -> None:
        """Tell which actions (m, C) will be carried out while the next `act` computes; its chunk begins with them."""
        self.batched.commit([actions_si])

    def act(self, observation: Observation) -> ActionChunk:
        """Return the next actions, given every frame since the last call."""
        return self.batched.act([observation])[0]
