from .config import RepViTokConfig as RepViTokConfig
from .model import RepViTok as RepViTok
from .model import StreamState as StreamState
from .model import TokenizerStream as TokenizerStream
from .runtime.errors import UserError as UserError
from .runtime.pretrained import PretrainedModel as PretrainedModel

__version__: str
