"""Modules under the names they had in version 0.1 or since, for class paths in recipes and imports of programs.

Kept for one version. A module that is asked for by its old name is the new module itself, with a warning.
"""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MOVED = {
    "repvitok.baselines.convnet_teacher": "repvitok.training.teacher",
    "repvitok.callbacks": "repvitok.runtime.callbacks",
    "repvitok.convnet_teacher": "repvitok.training.teacher",
    "repvitok.data.lerobot.finalize": "repvitok.data.lerobot.writer",
    "repvitok.data.lerobot_writer": "repvitok.data.lerobot.writer",
    "repvitok.data.tars": "repvitok.data.sources",
    "repvitok.encoding_jobs": "repvitok.encoding",
    "repvitok.errors": "repvitok.runtime.errors",
    "repvitok.export": "repvitok.training.export",
    "repvitok.features": "repvitok.training.metrics",
    "repvitok.losses": "repvitok.training.losses",
    "repvitok.merging": "repvitok.encoding_plan",
    "repvitok.metrics": "repvitok.training.metrics",
    "repvitok.nn.blocks": "repvitok.nn.codec",
    "repvitok.nn.rope": "repvitok.nn.attention",
    "repvitok.optim": "repvitok.runtime.training",
    "repvitok.runtime.curves": "repvitok.runtime.progress",
    "repvitok.runtime.optim": "repvitok.runtime.training",
    "repvitok.streaming": "repvitok.model",
    "repvitok.teacher": "repvitok.training.teacher",
    "repvitok.teacher_cache": "repvitok.training.teacher",
    "repvitok.training.features": "repvitok.training.metrics",
    "latent_action.baselines.datamodule": "latent_action.baselines.lapa_training",
    "latent_action.baselines.frame_pairs": "latent_action.baselines.lapa",
    "latent_action.export": "latent_action.training",
    "latent_action.losses": "latent_action.model",
    "latent_action.transport": "latent_action.dynamics",
    "repwam_core.data.encoding": "repwam_core.data.datamodule",
    "repwam_core.data.episode_arrays": "repwam_core.data.episodes",
    "repwam_core.data.mixture": "repwam_core.data.packing",
    "repwam_core.data.packed": "repwam_core.data.packing",
    "repwam_core.embodiment": "repwam_core.interface",
    "repwam_core.model.masks": "repwam_core.model.attention",
    "repwam_core.planning": "repwam_core.sampling",
    "repwam_core.policy.chunking": "repwam_core.policy.execution",
    "repwam_core.quickstart.closed_loop": "repwam_core.quickstart.work",
    "repwam_core.quickstart.pipeline": "repwam_core.quickstart.stages",
    "repwam_core.quickstart.training": "repwam_core.quickstart.work",
    "repwam_core.recorded": "repwam_core.export",
    "repwam_core.report.charts": "repwam_core.report.page",
    "repwam_core.report.figures": "repwam_core.report.page",
    "repwam_core.scores": "repwam_core.statistics",
    "repwam_core.sim.aloha.expert": "repwam_core.sim.aloha",
    "repwam_core.sim.aloha.task": "repwam_core.sim.aloha",
    "repwam_core.sim.baselines": "repwam_core.sim.evaluate",
    "repwam_core.sim.failures": "repwam_core.sim.results",
    "repwam_core.sim.metaworld.instructions": "repwam_core.sim.metaworld",
    "repwam_core.sim.metaworld.task": "repwam_core.sim.metaworld",
    "repwam_core.sim.rendering": "repwam_core.sim.mujoco",
    "repwam_core.sim.robotwin_results": "repwam_core.sim.robotwin",
    "repwam_core.training.banner": "repwam_core.training.metrics",
    "repwam_core.training.build": "repwam_core.training.parallel",
}


class _Moved(MetaPathFinder, Loader):
    """Asked after all other finders, so only for modules that are not there."""

    def find_spec(self, fullname: str, *_: Any) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        old, new = module.__name__, MOVED[module.__name__]
        warnings.warn(f"{old} is now {new}; the old name ends with version 0.3", DeprecationWarning, stacklevel=2)
        sys.modules[old] = import_module(new)  # what the import system hands out


def install() -> None:
    """Have the import system know the old names."""
    sys.meta_path.append(_Moved())
