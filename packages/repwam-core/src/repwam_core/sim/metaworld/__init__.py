"""Meta-World's 50 tasks (MuJoCo, a Sawyer arm): the one folder that knows them."""

from repwam_core.sim.metaworld.task import CAMERAS, SAME_SCENE_PAIR, MetaWorldSettings, MetaWorldTask

__all__ = ["CAMERAS", "SAME_SCENE_PAIR", "MetaWorldSettings", "MetaWorldTask"]
