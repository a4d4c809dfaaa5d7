"""A causal world action model over semantic visual and action tokens, and the policy that drives a robot with it."""

from importlib.metadata import version

import lazy_loader
import repvitok  # noqa: F401  # knows the old names of our modules, too

__version__ = version("repwam-core")
# The names in __init__.pyi, imported when they are first used: importing the package imports no torch.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
