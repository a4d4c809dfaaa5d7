"""Every option of every verb, and every number of a recipe, meets bad values: refused in one line, or good."""

from __future__ import annotations

import argparse
import inspect
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import latent_action.cli
import pytest
import repvitok.cli
import repwam_core.cli
from latent_action.baselines.lapa import LapaConfig
from latent_action.baselines.lapa_training import FramePairData, LapaTraining
from latent_action.config import LatentActionConfig
from latent_action.datamodule import LatentActionData
from latent_action.training import LatentActionTraining
from repvitok.config import RepViTokConfig
from repvitok.data.datamodule import ClipDataModule, ClipKind
from repvitok.runtime.callbacks import SaveLast, StageProgress
from repvitok.runtime.commands import Command, RawCommand, command_parser, run_commands
from repvitok.runtime.errors import UserError, run_cli
from repvitok.runtime.training import OptimizerSettings
from repvitok.training.losses import AdversarySettings, LossWeights
from repvitok.training.module import RepViTokTraining
from repwam_core.data.datamodule import EncodingSettings, WAMDataModule
from repwam_core.data.packing import DataSetSettings, PackingSettings
from repwam_core.sampling import SamplingConfig
from repwam_core.training.losses import LossSettings
from repwam_core.training.module import WAMTraining
from repwam_core.training.tuning import TuneTokenizer

PROGRAMS: dict[str, Sequence[Command | RawCommand]] = {
    "repvitok": repvitok.cli.COMMANDS,
    "latent-action": latent_action.cli.COMMANDS,
    "latent-action lapa": latent_action.cli.LAPA_COMMANDS,
    "repwam": repwam_core.cli.COMMANDS,
}
BAD = ["-1", "0", "1000000000", "1e9", "inf", "-inf", "nan", "1e400", "", " ", "x", "9" * 5000, "1\0", "\udcff"]
GOOD = ["x", "0/2", "64", "16", "1", "0.5", "{}"]
"""One of these is a value that any option takes."""
FREE_TEXT = {"instruction"}
"""Options for which nothing is something, too."""


def _options() -> Iterator[Any]:
    for program, commands in PROGRAMS.items():
        verbs: Any = next(
            action for action in command_parser(program, "repvitok", "", commands)._actions if action.dest == "verb"
        )
        for command in commands:
            if isinstance(command, Command):
                parser = verbs.choices[command.name]
                for option in parser._actions:
                    if option.option_strings and option.nargs != 0 and option.dest not in FREE_TEXT:
                        name = option.option_strings[-1]
                        yield pytest.param(program, command, parser, option, id=f"{program} {command.name} {name}")


def _given(option: argparse.Action, value: str) -> list[str]:
    count = option.nargs if isinstance(option.nargs, int) else 1
    if option.nargs is None:
        return [f"{option.option_strings[-1]}={value}"]
    return [option.option_strings[-1], *[value] * count]


def _example(option: argparse.Action) -> str:
    if option.choices:
        return str(next(iter(option.choices)))
    kind: Any = option.type
    for value in GOOD:
        try:
            kind(value)
        except argparse.ArgumentTypeError:
            continue
        return value
    raise AssertionError(f"none of {GOOD} is good for {option.option_strings}")


def _others(parser: Any, option: argparse.Action) -> list[str]:
    """What the verb needs besides the option that is looked at."""
    needed = [other for other in parser._actions if other.required]
    for group in parser._mutually_exclusive_groups:
        if group.required and option not in group._group_actions:
            needed.append(group._group_actions[0])
    return list(itertools.chain.from_iterable(_given(o, _example(o)) for o in needed if o is not option))


@pytest.mark.parametrize(("program", "command", "parser", "option"), list(_options()))
def test_bad_values_are_one_line_or_make_sense(
    program: str, command: Command, parser: Any, option: argparse.Action, capsys: pytest.CaptureFixture[str]
) -> None:
    assert option.type not in (int, float, str, Path), "use a type of repvitok.runtime.commands: it knows the range"
    assert option.type is not None or option.choices, "use text_argument or path_argument: they refuse nothing"
    seen: list[argparse.Namespace] = []
    quiet = [replace(command, run=lambda parsed: seen.append(parsed))]
    main = run_cli(lambda argv: run_commands(program, "repvitok", "", quiet, argv))
    assert main([command.name, *_others(parser, option), *_given(option, _example(option))]) == 0
    for value in BAD:
        seen.clear()
        code = main([command.name, *_others(parser, option), *_given(option, value)])
        told = capsys.readouterr().err
        if code:
            assert (code, told.count("\n"), told.startswith("error: ")) == (2, 1, True), (value, told)
            continue
        taken = getattr(seen[0], option.dest)
        for one in taken if isinstance(taken, list | tuple) else [taken]:
            assert not isinstance(one, str | Path) or str(one).strip(), f"{value!r} is nothing"
            assert not isinstance(one, int | float) or (math.isfinite(one) and one >= 0), f"{value!r} became {one}"


def test_debug_shows_the_traceback_of_any_verb(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["--debug", "merge", "--out", "/nowhere"], ["merge", "--out", "/nowhere", "--debug"]):
        assert repvitok.cli.main(argv) == 2
        told = capsys.readouterr().err
        assert "Traceback" in told
        assert told.splitlines()[-1].startswith("error: /nowhere: no such folder")
    assert latent_action.cli.main(["fit", "--debug", "--trainer.max_steps=x"]) == 2
    assert "Traceback" in capsys.readouterr().err
    assert repvitok.cli.main(["merge", "--out", "/nowhere"]) == 2
    assert "Traceback" not in capsys.readouterr().err


SECTIONS: list[tuple[Any, dict[str, Any]]] = [
    (ClipDataModule, {"folders": ["x"], "size": (32, 32)}),
    (ClipKind, {}),
    (
        RepViTokTraining,
        {
            "tokenizer": RepViTokConfig(width=16, depth=1, heads=1),
            "weights": LossWeights(perceptual=0.0, gan=0.0, align=0.0),
        },
    ),
    (LossWeights, {}),
    (OptimizerSettings, {}),
    (AdversarySettings, {}),
    (LatentActionData, {"latents": "x"}),
    (LatentActionTraining, {"lat": LatentActionConfig(latent_dim=2, hidden=4)}),
    (FramePairData, {"latents": "x", "dataset": "x"}),
    (LapaTraining, {"lapa": LapaConfig(width=8, heads=1)}),
    (WAMDataModule, {"latents": "x"}),
    (WAMTraining, {}),
    (PackingSettings, {}),
    (DataSetSettings, {"latents": "x"}),
    (EncodingSettings, {"tokenizer": "x", "size": (32, 32)}),
    (LossSettings, {}),
    (TuneTokenizer, {"tokenizer": "x", "dataset": "x"}),
    (SamplingConfig, {}),
    (SaveLast, {}),
    (StageProgress, {}),
]
"""What a recipe's sections become, each with what it needs."""
DATA_DEPENDENT = ("held_out", "episodes")
"""Numbers of episodes, which are compared with those that there are."""


def _wrong_numbers(kind: Any) -> Iterator[Any]:
    """Numbers outside of any range, in the form of an annotation: a number, a pair or a list of one."""
    wrong = {int: (-1, 10**20), float: (-1.0, math.nan, math.inf, -math.inf)}
    for arm in get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,):
        item = get_args(arm)[0] if get_origin(arm) in (tuple, list) else arm
        for bad in wrong.get(item, ()):
            yield bad if item is arm else (bad, bad) if get_origin(arm) is tuple else [bad]


@pytest.mark.parametrize(("section", "needed"), SECTIONS, ids=[section.__name__ for section, _ in SECTIONS])
def test_every_number_of_a_recipe_has_a_range(section: Any, needed: dict[str, Any]) -> None:
    section(**needed)
    hints = get_type_hints(section.__init__)
    names = [name for name in inspect.signature(section).parameters if name not in DATA_DEPENDENT]
    cases = [(name, bad) for name in names for bad in _wrong_numbers(hints[name])]
    assert cases, "no number was found"
    for name, bad in cases:
        with pytest.raises(UserError, match=name.replace("_", ".")):
            section(**needed | {name: bad})
