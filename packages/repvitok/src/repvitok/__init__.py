"""A semantic video tokenizer: video to representation-aligned latents, and back to pixels."""

from importlib.metadata import version

import lazy_loader

from repvitok.runtime import moved

__version__ = version("repvitok")
moved.install()
# The names in __init__.pyi, imported when they are first used: importing the package imports no torch.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
