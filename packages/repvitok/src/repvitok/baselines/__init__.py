"""What the tokenizer is compared with or measured by: Wan2.2's VAE, frozen features of images, I3D."""

import lazy_loader

# The names in __init__.pyi, imported when they are first used.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
