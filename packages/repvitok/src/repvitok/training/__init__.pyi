from .module import RepViTokTraining as RepViTokTraining
