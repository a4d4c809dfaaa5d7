"""Modules of version 0.1 under the names they had, for the class paths in recipes and the imports of programs.

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
    "repvitok.callbacks": "repvitok.runtime.callbacks",
    "repvitok.convnet_teacher": "repvitok.baselines.convnet_teacher",
    "repvitok.data.lerobot_writer": "repvitok.data.lerobot.writer",
    "repvitok.errors": "repvitok.runtime.errors",
    "repvitok.export": "repvitok.training.export",
    "repvitok.features": "repvitok.training.features",
    "repvitok.losses": "repvitok.training.losses",
    "repvitok.metrics": "repvitok.training.metrics",
    "repvitok.optim": "repvitok.runtime.optim",
    "repvitok.streaming": "repvitok.model",
    "repvitok.teacher": "repvitok.training.teacher",
    "repvitok.teacher_cache": "repvitok.training.teacher",
    "latent_action.losses": "latent_action.model",
    "repwam_core.planning": "repwam_core.sampling",
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
