"""Latent actions learned from video alone: a transition between two semantic states as four numbers.

The public names are imported on first use, so that `import latent_action` does not import torch.
"""

from importlib.metadata import version

import lazy_loader
import repvitok  # noqa: F401  # knows the old names of our modules, too

__version__ = version("latent-action")
# The names in __init__.pyi, imported when they are first used: importing the package imports no torch.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
