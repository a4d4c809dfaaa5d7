"""RepWAM policies as a LeRobot plug-in: LeRobot imports this package, which registers the policy type `repwam`."""

from .configuration_repwam import RepWAMConfig
from .modeling_repwam import RepWAMPolicy
from .processor_repwam import make_repwam_pre_post_processors

__all__ = ["RepWAMConfig", "RepWAMPolicy", "make_repwam_pre_post_processors"]
