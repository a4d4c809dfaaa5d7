"""Teachers that are convolutional: the feature map of one stage of any timm network, on the tokenizer's grid."""

from __future__ import annotations

from typing import Any

from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from repvitok.runtime.errors import UserError
from repvitok.training.teacher import (
    Teacher,
    normalised,
    register_normalisation,
    require_one_source,
    resized,
    timm_network,
)


class ConvNetTeacher(Teacher):
    """One stage of a timm network with feature maps, every token's vector of length one.

    For where no Perception Encoder can be had but some trained network can: NOT the paper's teacher. A frame is resized
    so that the stage's map falls on the tokenizer's grid: a stage of reduction 16 sees frames as they are, one of
    reduction 32 at twice their size. Maps of different networks differ in scale, hence the unit length, which makes
    the alignment weight mean the same for all of them.
    """

    def __init__(
        self,
        name: str,
        stage: int = -1,
        weights_path: str | None = None,
        hub: bool = False,
        random_weights_for_tests: bool = False,
    ) -> None:
        """Builds the network with exactly one source of weights.

        Args:
            name: timm's model name, e.g. "tf_efficientnet_lite0".
            stage: index into the network's stages (timm's `feature_info`); -1 for the last.
            weights_path: its weights, a local .safetensors file.
            hub: take timm's weights from the Hugging Face hub, or from its local cache.
            random_weights_for_tests: random weights; nothing is learned from such a teacher.
        """
        super().__init__()
        require_one_source(name, weights_path=weights_path, hub=hub, random_weights_for_tests=random_weights_for_tests)
        self.network: Any = timm_network(name, weights_path, hub)
        stages = getattr(self.network, "feature_info", None)
        if not stages or not hasattr(self.network, "forward_intermediates"):
            raise UserError(f"timm's {name!r} has no feature maps; for a vision transformer use TimmTeacher")
        if not -len(stages) <= stage < len(stages):
            raise UserError(f"timm's {name!r} has stages 0 to {len(stages) - 1}, got stage {stage}")
        self.stage = stage % len(stages)
        self.dim = int(stages[self.stage]["num_chs"])
        self.reduction = int(stages[self.stage]["reduction"])
        random = " (random weights for tests)" if random_weights_for_tests else ""
        self.name = f"{name} stage {self.stage}{random} (stand-in, not Perception Encoder)"
        register_normalisation(self, self.network.pretrained_cfg["mean"], self.network.pretrained_cfg["std"])
        self._freeze()

    def frame_features(self, frames: Float[Tensor, "n 3 H W"], grid: tuple[int, int]) -> Float[Tensor, "n h w c"]:
        """The stage's map, every vector of length one."""
        size = (grid[0] * self.reduction, grid[1] * self.reduction)
        maps = self.network.forward_intermediates(
            normalised(self, resized(frames, size)), indices=[self.stage], intermediates_only=True
        )
        return F.normalize(rearrange(resized(maps[0], grid), "n c h w -> n h w c"), dim=-1, eps=1e-6)
