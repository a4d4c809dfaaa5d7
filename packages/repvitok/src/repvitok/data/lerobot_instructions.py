"""What the robot was told in each episode of a LeRobot data set: one rule, wherever instructions are used."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from repvitok.data.latents import InstructionSource
from repvitok.data.lerobot_format import EpisodeInfo, number_ranges
from repvitok.data.lerobot_metadata import Metadata
from repvitok.data.lerobot_tables import EpisodeTables
from repvitok.errors import UserError

log = logging.getLogger(__name__)

_SHOWN = 3  # episodes that a warning quotes


class Instructions:
    """Episode number -> its instruction, looked up when it is first asked for (docs/decisions/050).

    The rows decide: the texts of the task table that `task_index` names, each once, in order of appearance, joined by
    "; ". Where a row has no number or one that the table lacks, or there is no table, it is the episode's own `tasks`,
    joined likewise; where it has none either, "". The first episode whose own `tasks` are others, whose numbers the
    table lacks, or that has no instruction, has all episodes looked at, and each kind told once.

    Args:
        metadata, tables: of the data set.
    """

    def __init__(self, metadata: Metadata, tables: EpisodeTables) -> None:
        self._metadata, self._tables = metadata, tables
        self._found: dict[int, str] = {}
        self._told = False

    @property
    def source(self) -> InstructionSource:
        """Where the instructions come from: the rows with the task table, the episodes' own `tasks`, or nowhere."""
        if self._metadata.tasks:
            return "task_index"
        return "tasks" if any(map(self._metadata.own_tasks, self._metadata.episodes)) else "none"

    def __getitem__(self, episode: int) -> str:
        if episode not in self._found:
            text, odd = self._find(episode)
            if odd and not self._told:
                self._told = True
                self._tell()
            self._found[episode] = text
        return self._found[episode]

    def _find(self, episode: int) -> tuple[str, str]:
        """An episode's instruction, and what is odd about it: "", "other", "unknown" or "none"."""
        own, table = self._metadata.own_tasks(episode), self._metadata.tasks
        if len(own) == 1 and set(own) == set(table.values()):
            return own[0], ""  # whatever the rows say: there is no other text
        numbers = self._tables.rows(episode).tasks if table else ()
        named = tuple(dict.fromkeys(table[number] for number in numbers if number in table))
        if numbers and all(number in table for number in numbers):
            return "; ".join(named), "other" if own and set(own) != set(named) else ""
        text = "; ".join(own or named)
        return text, "none" if not text else "unknown" if any(number >= 0 for number in numbers) else ""

    def _tell(self) -> None:
        """Looks at all episodes and warns of what is odd, with the first examples and the count."""
        odd: dict[str, list[tuple[int, str]]] = {"other": [], "unknown": [], "none": []}
        for episode in self._metadata.episodes:
            try:
                text, kind = self._find(episode)
            except (UserError, OSError):  # told when this episode itself is read
                continue
            if kind:
                odd[kind].append((episode, text))
        root, count = self._metadata.root, len(self._metadata.episodes)
        if found := odd["other"]:
            quoted = "; ".join(
                f"episode {episode}: rows {text!r}, its `tasks` {list(self._metadata.own_tasks(episode))}"
                for episode, text in found[:_SHOWN]
            )
            log.warning(
                "%s: in %d of %d episodes the rows' task_index names other tasks than the episode's `tasks`; the rows "
                "decide. %s", root, len(found), count, quoted,
            )  # fmt: skip
        if found := odd["unknown"]:
            quoted = "; ".join(f"episode {episode}: {text!r}" for episode, text in found[:_SHOWN])
            log.warning(
                "%s: in %d of %d episodes task_index names no task of the task table; the episode's `tasks` are taken. "
                "%s", root, len(found), count, quoted,
            )  # fmt: skip
        if found := odd["none"]:
            numbers = number_ranges(episode for episode, _ in found)
            log.warning("%s: %d of %d episodes have no instruction: %s", root, len(found), count, numbers)


class RecordedEpisode(EpisodeInfo):
    """An episode whose instruction is looked up when it is first asked for: its rows have to be read for it."""

    def __init__(self, index: int, length: int, metadata: Mapping[str, Any], instructions: Instructions) -> None:
        values = {"index": index, "length": length, "metadata": metadata, "_instructions": instructions}
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def task(self) -> str:  # type: ignore[override]  # a field of the base class
        """The instruction, in words ("" where the data set has none)."""
        return self._instructions[self.index]  # type: ignore[attr-defined]
