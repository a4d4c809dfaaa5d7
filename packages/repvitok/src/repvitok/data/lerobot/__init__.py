"""The LeRobot format, versions 2.0, 2.1 and 3.0: read and written."""

import lazy_loader

# The names in __init__.pyi, imported when they are first used.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
