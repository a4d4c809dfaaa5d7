"""A policy behind a websocket, in openpi's protocol: what is said, who says it, who answers. No torch."""

import lazy_loader

# The names in __init__.pyi, imported when they are first used.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
