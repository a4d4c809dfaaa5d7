"""A policy folder behind LeRobot's policy interface: batches of observations in, one action at a time out."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.utils.constants import ACTION, OBS_STATE
from repvitok.runtime.errors import UserError
from repwam_core.interface import Observation, stack_observations
from repwam_core.policy.folder import LoadedPolicy
from repwam_core.policy.policy import BatchedPolicy
from torch import Tensor

from .configuration_repwam import NOT_TRAINED_HERE, RepWAMConfig


class RepWAMPolicy(PreTrainedPolicy):
    """Episodes in step, one per row of LeRobot's batches.

    LeRobot hands in every observation once, by `select_action`. The policy plans with the first and then whenever the
    planned actions have run out, from all frames since it planned last: its tokenizer reads a video and must miss none.
    """

    config_class = RepWAMConfig
    name = "repwam"

    def __init__(self, config: RepWAMConfig, **_: Any) -> None:
        super().__init__(config)
        if not config.policy_folder:
            raise UserError(
                "policy_folder: expected a policy folder, got none; make a folder for LeRobot by "
                "`python -m lerobot_policy_repwam POLICY OUT` and give it as --policy.path"
            )
        parts = LoadedPolicy.load(config.policy_folder, config.device or "cpu")
        self.wam, self.tokenizer = parts.wam, parts.tokenizer  # submodules: LeRobot asks a policy for its parameters
        plan = {} if config.n_action_steps is None else {"execute_frames": _frames(parts, config.n_action_steps)}
        self.policy = BatchedPolicy(parts, **plan)
        self.robot = parts.manifest.embodiment
        channels, given = len(self.robot.action_channels), (config.output_features or {}).get(ACTION)
        if given is not None and tuple(given.shape) != (channels,):
            raise UserError(
                f"expected an environment or robot of {channels} actions ({', '.join(self.robot.action_names)}), got "
                f"one of {tuple(given.shape)}"
            )
        self.episodes = 0  # begun so far
        self.reset()

    @classmethod
    def from_pretrained(
        cls, pretrained_name_or_path: str | Path | None, *, config: RepWAMConfig | None = None, **_: Any
    ) -> RepWAMPolicy:
        """The policy that config.json of a folder names; its weights are read from the policy folder."""
        if config is None:
            config = RepWAMConfig.from_pretrained(pretrained_name_or_path)
        return cls(config).eval()

    def _save_pretrained(self, save_directory: Path, **_: Any) -> None:
        """Write config.json, which names the policy folder; the weights stay there."""
        self.config._save_pretrained(save_directory)

    def reset(self) -> None:
        """Begin new episodes with the next observation."""
        self._waiting: list[list[Observation]] = []  # of each frame since the policy planned, one per episode
        self._ahead: deque[Tensor] = deque()
        self._batch = 0

    def select_action(self, batch: dict[str, Any], **_: Any) -> Tensor:
        """The next action of each episode, (B, C) in the data set's units, for its newest observation."""
        self._see(batch)
        if not self._ahead:
            self._ahead.extend(self._plan().unbind(1))
        return self._ahead.popleft()

    def predict_action_chunk(self, batch: dict[str, Any], **_: Any) -> Tensor:
        """The next actions of each episode, (B, n, C), planned now; observations in between went to `select_action`."""
        self._see(batch)
        self._ahead.clear()
        return self._plan()

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, dict | None]:  # noqa: ARG002
        """Refuse: see `repwam fit`."""
        raise UserError(NOT_TRAINED_HERE)

    def get_optim_params(self) -> dict:
        """Refuse: see `repwam fit`."""
        raise UserError(NOT_TRAINED_HERE)

    def _see(self, batch: dict[str, Any]) -> None:
        if missing := [camera for camera in self.robot.cameras if camera not in batch]:
            pictures = sorted(key for key in batch if key.startswith("observation.image"))
            raise UserError(
                f"expected pictures of {list(self.robot.cameras)}, got {pictures}: no {missing}; say which is which, "
                '--rename_map=\'{"observation.image": "' + missing[0] + "\"}'"
            )
        images = {camera: _pixels(batch[camera]) for camera in self.robot.cameras}
        states, count = batch.get(OBS_STATE), len(next(iter(images.values())))
        told = batch.get("task") or [""] * count
        told = [told] * count if isinstance(told, str) else list(told)
        if not self._batch:
            self.policy.reset(told, [self.config.seed + self.episodes + row for row in range(count)])
            self._batch, self.episodes = count, self.episodes + count
        if count != self._batch:
            raise UserError(f"expected observations of {self._batch} episodes, got {count}; call reset first")
        rows = None if states is None else states.to("cpu", torch.float32).numpy()
        self._waiting.append(
            [
                Observation(
                    {camera: frames[row] for camera, frames in images.items()},
                    None if rows is None else rows[row],
                    told[row],
                )
                for row in range(count)
            ]
        )

    def _plan(self) -> Tensor:
        seen = [stack_observations(list(episode)) for episode in zip(*self._waiting, strict=True)]
        self._waiting = []
        return torch.from_numpy(np.stack([chunk.actions for chunk in self.policy.act(seen)]))


def _frames(parts: LoadedPolicy, actions: int) -> int:
    """Latent frames in which so many actions are carried out."""
    per = parts.wam.config.space(parts.manifest.space).vectors_per_transition
    if actions < 1 or actions % per:
        raise UserError(f"n_action_steps: expected a multiple of {per}, as many as a latent frame has, got {actions}")
    return actions // per


def _pixels(pictures: Tensor) -> np.ndarray:
    """LeRobot's pictures, (B, 3, H, W) in [0, 1], as the uint8 (B, H, W, 3) that they were."""
    return (pictures * 255).round().clamp(0, 255).to("cpu", torch.uint8).permute(0, 2, 3, 1).numpy()
