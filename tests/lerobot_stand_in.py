"""What `integrations/lerobot_policy_repwam` takes of LeRobot, for tests where LeRobot is absent."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import ClassVar, Generic, TypeVar

import torch

Before, After = TypeVar("Before"), TypeVar("After")


class FeatureType:
    VISUAL, STATE, ACTION = "VISUAL", "STATE", "ACTION"


@dataclass
class PolicyFeature:
    type: str
    shape: tuple


@dataclass
class PreTrainedConfig:
    input_features: dict = field(default_factory=dict)
    output_features: dict = field(default_factory=dict)
    device: str | None = None
    known: ClassVar[dict] = {}

    @classmethod
    def register_subclass(cls, name):
        return lambda subclass: cls.known.setdefault(name, subclass)

    def _save_pretrained(self, folder):
        (kind,) = (name for name, known in self.known.items() if known is type(self))
        (Path(folder) / "config.json").write_text(json.dumps({"type": kind, **asdict(self)}))

    @classmethod
    def from_pretrained(cls, folder):
        values = json.loads((Path(folder) / "config.json").read_text())
        config = cls.known[values.pop("type")](**values)
        config.device = config.device or "cpu"
        for features in (config.input_features, config.output_features):
            features.update({key: PolicyFeature(**value) for key, value in features.items()})
        return config


class PreTrainedPolicy(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config


class PolicyProcessorPipeline(Generic[Before, After]):
    def __init__(self, steps, name, **_):
        self.steps, self.name = steps, name

    def save_pretrained(self, folder):
        (Path(folder) / f"{self.name}.json").write_text(json.dumps([type(step).__name__ for step in self.steps]))


def step(name):
    return type(name, (), {"__init__": lambda self, **given: self.__dict__.update(given)})


def modules():
    """Name -> module, as `sys.modules` has them."""
    steps = ("RenameObservationsProcessorStep", "AddBatchDimensionProcessorStep", "DeviceProcessorStep")
    names = {"POLICY_PREPROCESSOR_DEFAULT_NAME": "policy_preprocessor"}
    names["POLICY_POSTPROCESSOR_DEFAULT_NAME"] = "policy_postprocessor"
    held = {
        "lerobot": {},
        "lerobot.configs": {
            "FeatureType": FeatureType,
            "PolicyFeature": PolicyFeature,
            "PreTrainedConfig": PreTrainedConfig,
        },
        "lerobot.policies": {},
        "lerobot.policies.pretrained": {"PreTrainedPolicy": PreTrainedPolicy},
        "lerobot.processor": {
            "PolicyAction": torch.Tensor,
            "PolicyProcessorPipeline": PolicyProcessorPipeline,
            **{name: step(name) for name in steps},
        },
        "lerobot.processor.converters": dict.fromkeys(("policy_action_to_transition", "transition_to_policy_action")),
        "lerobot.utils": {},
        "lerobot.utils.constants": {"ACTION": "action", "OBS_STATE": "observation.state", **names},
    }
    made = {}
    for name, values in held.items():
        made[name] = ModuleType(name)
        vars(made[name]).update(values)
    return made
