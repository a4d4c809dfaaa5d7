"""The LeRobot format, versions 2.0, 2.1 and 3.0: read and written."""

from typing import TYPE_CHECKING

from repvitok.runtime.lazy import lazy_exports

if TYPE_CHECKING:
    from repvitok.data.lerobot.format import EpisodeInfo
    from repvitok.data.lerobot.reader import LeRobotReader
    from repvitok.data.lerobot.writer import LeRobotWriter

__all__ = ["EpisodeInfo", "LeRobotReader", "LeRobotWriter"]

__getattr__, __dir__ = lazy_exports(
    __name__, {"EpisodeInfo": "format", "LeRobotReader": "reader", "LeRobotWriter": "writer"}
)
