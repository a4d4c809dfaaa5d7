from .features import FeatureTokenizer as FeatureTokenizer
from .features import FeatureTokenizerConfig as FeatureTokenizerConfig
from .wan import WanVae as WanVae
