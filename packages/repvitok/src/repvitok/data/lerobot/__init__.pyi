from .format import EpisodeInfo as EpisodeInfo
from .reader import LeRobotReader as LeRobotReader
from .writer import LeRobotWriter as LeRobotWriter
