"""What LeRobot's config.json says of a RepWAM policy: where its folder is, and how it is run."""

from __future__ import annotations

from dataclasses import dataclass

from lerobot.configs import FeatureType, PolicyFeature, PreTrainedConfig
from lerobot.utils.constants import ACTION, OBS_STATE
from repvitok.runtime.errors import UserError
from repwam_core.policy.folder import PolicyManifest

NOT_TRAINED_HERE = "a RepWAM policy is trained by `repwam fit`, on data sets in LeRobot's format, not by lerobot-train"


@PreTrainedConfig.register_subclass("repwam")
@dataclass
class RepWAMConfig(PreTrainedConfig):
    """A policy folder of `repwam export` as LeRobot meets it.

    Attributes:
        policy_folder: the folder.
        n_action_steps: actions carried out before planning again; None: as many as the folder says.
        seed: of the first episode's draws; every further episode takes the next number.
    """

    policy_folder: str = ""
    n_action_steps: int | None = None
    seed: int = 0

    def describe(self, manifest: PolicyManifest) -> None:
        """Say which pictures, state and actions the policy has, in LeRobot's words."""
        robot = manifest.embodiment
        self.input_features = {
            camera: PolicyFeature(type=FeatureType.VISUAL, shape=(3, *manifest.size)) for camera in robot.cameras
        }
        if robot.state_channels:
            self.input_features[OBS_STATE] = PolicyFeature(type=FeatureType.STATE, shape=(len(robot.state_channels),))
        self.output_features = {ACTION: PolicyFeature(type=FeatureType.ACTION, shape=(len(robot.action_channels),))}

    def validate_features(self) -> None:
        """Nothing can be said without the policy's folder; `RepWAMPolicy` checks what it is given against it."""

    @property
    def observation_delta_indices(self) -> None:
        """None: the policy remembers what it saw."""
        return None

    @property
    def action_delta_indices(self) -> None:
        """None, as nothing is trained here."""
        return None

    @property
    def reward_delta_indices(self) -> None:
        """None, as nothing is trained here."""
        return None

    def get_optimizer_preset(self):
        """Refuse: see `repwam fit`."""
        raise UserError(NOT_TRAINED_HERE)

    def get_scheduler_preset(self):
        """Refuse: see `repwam fit`."""
        raise UserError(NOT_TRAINED_HERE)
