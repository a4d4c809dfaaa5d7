"""A policy in RoboTwin 2.0's two-armed tasks, and what its evaluation has filed as the paper's Table 1. No torch.

RoboTwin drives what a folder in its `policy/` gives it. `integrations/robotwin` is such a folder, three functions over
`RoboTwinPolicy`; XPolicyLab's and vla-evaluation-harness's adapters beside it are others. All three hand in every
observation and ask for one action each, so no frame is missed and none is seen twice: the tokenizer's stream wants each
of them once. RoboTwin's simulator waits for the policy, so nothing overlaps. The policy runs behind `repwam serve`, or
in this process where torch may be.

RoboTwin files the share of solved episodes of one task under
`eval_result/<task>/<policy>/<task config>/<name>/<time>/_result.txt`, and not how many episodes there were (100, unless
its script was changed) nor which seed. A group's rate is the mean over its tasks, as in the paper; its interval is
Wilson's over all episodes of these tasks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from repvitok.runtime.documents import Above0, Positive, Seed, Side, load_yaml, parse
from repvitok.runtime.errors import UserError

from repwam_core.interface import BasePolicy, Embodiment, Observation, two_arm_names
from repwam_core.policy.runner import Runner

EASY, HARD = "demo_clean", "demo_randomized"
"""Task configs of the two published settings."""
CAMERAS = ("head_camera", "left_camera", "right_camera")
"""RoboTwin's cameras; in `demo_clean` and `demo_randomized` all give pictures of 240 x 320."""
ALIASES = {"cam_high": "head_camera", "cam_left_wrist": "left_camera", "cam_right_wrist": "right_camera"}
"""What data sets converted for ALOHA call the same cameras."""
EPISODES_PER_SEED = 100_000
"""RoboTwin numbers layouts from 100,000 * (1 + seed); the policy's draws are numbered alike."""


@runtime_checkable
class TaskEnv(Protocol):
    """What is used of RoboTwin's environment."""

    def get_instruction(self) -> str:
        """What to do, in words."""
        ...

    def take_action(self, action: np.ndarray, action_type: str = "qpos") -> None:
        """Move to joint positions and grippers (C,)."""
        ...


@dataclass(frozen=True, kw_only=True)
class RoboTwinSettings:
    """What a file like `deploy_policy.yml` says of the policy, beside the benchmark's own keys.

    Attributes:
        server: address of `repwam serve`, such as "ws://127.0.0.1:8000"; None where the policy runs in this process.
        policy: policy folder for this process; None where a server has it.
        device: of a policy in this process.
        api_key_file: file with the server's key.
        timeout_s: the longest wait for an answer of the server.
        execute: actions carried out before planning again; None: the whole chunk.
        cameras: the policy's cameras -> RoboTwin's, where names do not tell.
        picture_size: height and width that all pictures must have; None: not checked.
        seed: of the evaluation; episode i's draws have the seed 100,000 * (1 + seed) + i.
        left_arm_dim, right_arm_dim: joints of the arms, which RoboTwin fills in.
    """

    server: str | None = None
    policy: str | None = None
    device: str = "cpu"
    api_key_file: str | None = None
    timeout_s: Above0 = 60.0
    execute: Positive | None = None
    cameras: dict[str, str] | None = None
    picture_size: tuple[Side, Side] | None = None
    seed: Seed = 0
    left_arm_dim: Positive = 6
    right_arm_dim: Positive = 6

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> RoboTwinSettings:
        """Those keys of RoboTwin's `usr_args` that are ours; a value that does not fit is a UserError."""
        names = [field.name for field in fields(cls)]
        settings = parse({name: given[name] for name in names if name in given}, cls, "the policy's settings")
        if (settings.server is None) == (settings.policy is None):
            raise UserError(
                "the policy's settings: expected either server (the address of `repwam serve`) or policy (a folder, "
                f"where torch is installed), got server {settings.server!r} and policy {settings.policy!r}"
            )
        return settings

    def connect(self) -> Callable[[], BasePolicy]:
        """What makes the policy, and makes it again after a failure: a new client, or the loaded folder's."""
        if self.server is not None:
            return self._client
        from repwam_core.policy.folder import LoadedPolicy
        from repwam_core.policy.policy import Policy

        assert self.policy is not None
        parts = LoadedPolicy.load(self.policy, self.device)
        return lambda: Policy(parts)

    def _client(self) -> BasePolicy:
        from repwam_core.policy.serving.client import PolicyClient, PolicyServerError

        assert self.server is not None
        key = None if self.api_key_file is None else Path(self.api_key_file).read_text(encoding="utf-8").strip()
        try:
            return PolicyClient(self.server, None, api_key=key, timeout_s=self.timeout_s)
        except (OSError, PolicyServerError) as error:
            raise UserError(
                f"no policy at {self.server} ({error}); start `repwam serve --policy FOLDER` there"
            ) from error


class RoboTwinPolicy:
    """Drives RoboTwin's two arms by absolute joint positions, step by step.

    Call `reset` before each episode, then `act` or `step` with every observation, the first one of the episode first.

    Args:
        connect: makes the policy; called again after one has failed.
        arms: joints of the left and the right arm.
        cameras: the policy's cameras -> RoboTwin's; None: by their names, `observation.images.head_camera` or
            `observation.images.cam_high` and so on.
        picture_size: height and width that all pictures must have; None: not checked, but that they stay the same.
        execute: actions carried out before planning again; None: the whole chunk.
        seed: of the evaluation.
    """

    def __init__(
        self,
        connect: Callable[[], BasePolicy],
        *,
        arms: tuple[int, int] = (6, 6),
        cameras: Mapping[str, str] | None = None,
        picture_size: tuple[int, int] | None = None,
        execute: int | None = None,
        seed: int = 0,
    ) -> None:
        self.names = two_arm_names(arms)
        self.picture_size, self.seed = picture_size, seed
        self.episode = -1
        self._connect, self._execute, self._given_cameras = connect, execute, cameras
        self._begun: bool | None = None  # None: no reset yet; False: reset, no observation yet
        self._failed = False
        self._runner = self._make_runner()

    @classmethod
    def from_settings(cls, given: Mapping[str, Any], connect: Callable[[], BasePolicy] | None = None) -> RoboTwinPolicy:
        """The policy that RoboTwin's `usr_args` name, see `RoboTwinSettings`; `connect` in place of theirs."""
        settings = RoboTwinSettings.of(given)
        return cls(
            settings.connect() if connect is None else connect,
            arms=(settings.left_arm_dim, settings.right_arm_dim),
            cameras=settings.cameras,
            picture_size=settings.picture_size,
            execute=settings.execute,
            seed=settings.seed,
        )

    @property
    def embodiment(self) -> Embodiment:
        """The robot that the policy drives."""
        return self._runner.embodiment

    def reset(self, seed: int | None = None) -> None:
        """Begin the next episode; `seed` fixes the policy's draws in it, None counts on from the evaluation's.

        A second call before the episode's first observation begins the same episode.

        Raises:
            UserError: if the policy failed and cannot be made again, as when its server is gone: an evaluation stops
                here, before it counts episodes that nobody drives.
        """
        self.episode += self._begun is not False
        self._seed = EPISODES_PER_SEED * (1 + self.seed) + self.episode if seed is None else seed
        if self._failed:
            self.close()
            self._runner, self._failed = self._make_runner(), False
        self._begun = False

    def act(
        self, images: Mapping[str, np.ndarray], joints: Sequence[float] | np.ndarray, instruction: str | None
    ) -> np.ndarray:
        """The action for one observation, float64 (C,): joint positions in radians and grippers, in RoboTwin's order.

        Args:
            images: RoboTwin's camera -> uint8 RGB (H, W, 3).
            joints: `/joint_action/vector`, (C,).
            instruction: what to do, read at the episode's first observation.
        """
        with self._one_step():
            observation = self._observation(images, joints)
            if not self._begun:
                self._runner.reset(instruction, self._seed)
                self._begun = True
            action = self._runner.step(observation)
        return action[self._to_robot].astype(np.float64)

    def step(self, task_env: TaskEnv, observation: Mapping[str, Any]) -> None:
        """Carry out one action in RoboTwin's environment, for the observation that `get_obs` gave."""
        with self._one_step():
            images, joints = _read(observation, sorted(self._cameras.values()))
        action = self.act(images, joints, task_env.get_instruction())
        task_env.take_action(action, action_type="qpos")

    def close(self) -> None:
        """End the policy's session, if it has one."""
        self._runner.close()
        close = getattr(self._runner.policy, "close", None)
        if close is not None:
            close()

    @contextmanager
    def _one_step(self) -> Iterator[None]:
        """After an error in the block no action is given until `reset`: a frame is missing."""
        if self._begun is None:
            raise UserError("call reset_model before eval: no episode has begun")
        if self._failed:
            raise UserError(f"RoboTwin, episode {self.episode} has failed; call reset_model to begin another one")
        try:
            yield
        except UserError as error:
            self._failed = True
            raise UserError(f"RoboTwin, episode {self.episode}: {error}") from error

    def _make_runner(self) -> Runner:
        policy = self._connect()
        runner = Runner(policy, execution="wait", execute=self._execute, executor=_AtOnce())
        robot = runner.embodiment
        if runner.kind != "absolute":
            raise UserError(
                f"expected a policy whose actions are joint positions, those of {robot.name!r} are changes: train with "
                "data.action_kind absolute or from_state"
            )
        if set(robot.action_names) != set(self.names) or not set(robot.state_channels) <= set(self.names):
            raise UserError(
                f"expected a policy of the {len(self.names)} channels {', '.join(self.names)}, in any order, got "
                f"{robot.name!r} with {len(robot.action_names)} actions ({', '.join(robot.action_names)}) and "
                f"{len(robot.state_channels)} states ({', '.join(robot.state_channels)})"
            )
        self._cameras = _matched(robot.cameras, self._given_cameras)
        self._to_robot = [robot.action_names.index(name) for name in self.names]
        self._to_policy = [self.names.index(name) for name in robot.state_channels]
        return runner

    def _observation(self, images: Mapping[str, np.ndarray], joints: Sequence[float] | np.ndarray) -> Observation:
        if missing := sorted(set(self._cameras.values()) - set(images)):
            raise UserError(
                f"expected pictures of {sorted(self._cameras.values())}, got {sorted(images)}: no {missing}"
            )
        pictures = {camera: np.asarray(images[source]) for camera, source in self._cameras.items()}
        for camera, source in self._cameras.items():
            size = pictures[camera].shape[:2]
            if self.picture_size is not None and size != tuple(self.picture_size):
                raise UserError(
                    f"{source}: expected pictures of {self.picture_size[0]} x {self.picture_size[1]}, got "
                    f"{' x '.join(map(str, size))}; are cameras exchanged, or is it another camera type than D435?"
                )
        state = np.asarray(joints, np.float32)
        if state.shape != (len(self.names),):
            raise UserError(
                f"expected {len(self.names)} joint positions ({', '.join(self.names)}), got shape {state.shape}"
            )
        if not np.isfinite(state).all():
            name = self.names[int(np.argmin(np.isfinite(state)))]
            raise UserError(f"expected finite joint positions, got {name} {state[~np.isfinite(state)][0]}")
        return Observation(pictures, state[self._to_policy] if self._to_policy else None)


class _AtOnce(Executor):
    """Runs what it is given before it returns: a simulator that waits needs no thread."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def _matched(cameras: Sequence[str], given: Mapping[str, str] | None) -> dict[str, str]:
    """The policy's cameras -> RoboTwin's, each of which stands for one."""
    last = {camera: camera.rpartition(".")[2] for camera in cameras}
    matched = {camera: ALIASES.get(name, name) for camera, name in last.items()} if given is None else dict(given)
    if set(matched) != set(cameras):
        raise UserError(f"cameras: expected a RoboTwin camera for each of {list(cameras)}, got {matched}")
    if not set(matched.values()) <= set(CAMERAS) or len(set(matched.values())) != len(matched):
        raise UserError(
            f"cameras: expected each of the policy's to be another of RoboTwin's {', '.join(CAMERAS)}, got {matched}; "
            "say which is which (cameras)"
        )
    return {camera: matched[camera] for camera in cameras}


def _read(observation: Mapping[str, Any], cameras: Sequence[str]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Pictures and joint positions of what RoboTwin's `get_obs` returns."""
    seen = observation.get("observation", {})
    pictured = {name: entry["rgb"] for name, entry in seen.items() if "rgb" in entry}
    if missing := [camera for camera in cameras if camera not in pictured]:
        raise UserError(
            f"RoboTwin gave no pictures of {missing}, only of {sorted(pictured)}: its task config needs data_type rgb, "
            "collect_head_camera and collect_wrist_camera"
        )
    joints = observation.get("joint_action", {}).get("vector")
    if joints is None:
        raise UserError("RoboTwin gave no joint_action vector: its task config needs data_type qpos")
    return {camera: pictured[camera] for camera in cameras}, joints


HORIZONS = Path(__file__).with_name("robotwin_horizons.yaml")
SETTINGS = {EASY: "Easy", HARD: "Hard"}
ALL = "all"
Repeats = Literal["refuse", "pool", "last"]
"""What several runs of one task and config are: a mistake, more episodes (other seeds), or old but for the last."""
_INSTRUCTION_TYPE = re.compile(r"Instruction Type:\s*(\S+)")


@dataclass(frozen=True)
class Run:
    """One evaluation of a task: of `episodes` episodes `successes` were solved."""

    task: str
    config: str
    successes: int
    episodes: int
    instruction_type: str
    file: str


@dataclass(frozen=True)
class GroupRate:
    """Mean success over the tasks of a group that were run; rates and bounds are shares.

    Attributes:
        tasks, of_tasks: how many were run, and how many the group has.
        rate: mean over these tasks.
        low, high: Wilson's 95 % interval over their episodes.
        successes, episodes: counted over these tasks.
    """

    tasks: int
    of_tasks: int
    rate: float
    low: float
    high: float
    successes: int
    episodes: int


def load_horizons(path: Path | None = None) -> dict[str, list[str]]:
    """Groups of tasks by name, from a YAML file; by default the paper's groups by horizon, of 30, 15 and 5 tasks."""
    source = path or HORIZONS
    groups = parse(load_yaml(source), dict[str | int, list[str]], str(source))
    tasks = [task for members in groups.values() for task in members]
    if twice := sorted({task for task in tasks if tasks.count(task) > 1}):
        raise UserError(f"{source}: expected every task in one group, got {twice} in several")
    return {str(name): members for name, members in groups.items()}


def read_results(
    root: Path, policy: str = "repwam", *, name: str | None = None, episodes: int = 100, repeats: Repeats = "refuse"
) -> list[Run]:
    """Read what RoboTwin has filed of a policy, one `Run` for each task and config.

    Args:
        root: RoboTwin's `eval_result`.
        policy: name of the folder in RoboTwin's `policy/`.
        name: what eval.sh was given as NAME; None where there is one only.
        episodes: in each run; RoboTwin's script has 100.
        repeats: what several runs of one task and config are.
    """
    filed: dict[str, list[Path]] = {}
    for path in sorted(root.glob(f"*/{policy}/*/**/_result.txt")):
        filed.setdefault("/".join(path.relative_to(root).parts[3:-2]), []).append(path)
    if not filed or (name is not None and name not in filed):
        asked = "any" if name is None else repr(name)
        raise UserError(f"{root}: expected results of {policy!r} under {asked} name, found names {sorted(filed)}")
    if name is None and len(filed) > 1:
        raise UserError(f"{root}: expected results of {policy!r} under one name, say which of {sorted(filed)}")
    runs: dict[tuple[str, str], list[Run]] = {}
    for path in filed[name] if name is not None else next(iter(filed.values())):
        task, _, config = path.relative_to(root).parts[:3]
        runs.setdefault((task, config), []).append(_read_result(path, task, config, episodes))
    if len(kinds := {run.instruction_type for repeated in runs.values() for run in repeated}) > 1:
        raise UserError(f"{root}: expected one kind of instruction in all runs, got {sorted(kinds)}")
    return [_one(repeated, repeats) for repeated in runs.values()]


def summarise(runs: Sequence[Run], horizons: Mapping[str, Sequence[str]]) -> dict[str, dict[str, GroupRate]]:
    """Config -> group -> its rate, with all tasks last; a group of which nothing was run is left out."""
    known = {task for members in horizons.values() for task in members}
    if unknown := sorted({run.task for run in runs} - known):
        raise UserError(f"expected tasks of the groups, got {unknown}; name them in a file for --horizons")
    table: dict[str, dict[str, GroupRate]] = {}
    for config in dict.fromkeys(run.config for run in runs):
        of_config = [run for run in runs if run.config == config]
        if len(counts := sorted({run.episodes for run in of_config})) > 1:
            raise UserError(f"{config}: expected as many episodes of every task, got {counts}")
        groups = {**{name: set(members) for name, members in horizons.items()}, ALL: known}
        chosen = {name: [run for run in of_config if run.task in members] for name, members in groups.items()}
        table[config] = {name: _rate(of_group, len(groups[name])) for name, of_group in chosen.items() if of_group}
    return table


def format_summary(table: Mapping[str, Mapping[str, GroupRate]], horizons: Mapping[str, Sequence[str]]) -> list[str]:
    """Lines of a table in percent, Easy beside Hard, groups below each other; what was not run says so."""
    configs = [*SETTINGS, *(config for config in table if config not in SETTINGS)]
    sizes = {**{name: len(members) for name, members in horizons.items()}}
    sizes[ALL] = sum(sizes.values())
    lines = [["horizon", "tasks", *(f"{SETTINGS.get(config, '')} {config}".strip() for config in configs)]]
    for name, size in sizes.items():
        cells = [_cell(table.get(config, {}).get(name)) for config in configs]
        lines.append([name, str(size), *cells])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def summary_to_dict(
    runs: Sequence[Run], table: Mapping[str, Mapping[str, GroupRate]], horizons: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    """A JSON-ready dictionary of groups, rates and runs."""
    return {
        "format": "repwam-robotwin-results",
        "format_version": 1,
        "horizons": {name: list(members) for name, members in horizons.items()},
        "rates": {config: {name: asdict(rate) for name, rate in groups.items()} for config, groups in table.items()},
        "runs": [asdict(run) for run in runs],
    }


def _read_result(path: Path, task: str, config: str, episodes: int) -> Run:
    text = path.read_text(encoding="utf-8", errors="replace")
    kind = _INSTRUCTION_TYPE.search(text)
    last = text.split()[-1] if text.split() else ""
    try:
        share = float(last)
    except ValueError:
        share = float("nan")
    if kind is None or not 0 <= share <= 1:
        raise UserError(f"{path}: expected RoboTwin's result, an instruction type and a share at the end, got {text!r}")
    successes = round(share * episodes)
    if abs(successes - share * episodes) > 1e-6:
        raise UserError(f"{path}: {share} is no share of {episodes} episodes; say how many there were (--test-num)")
    return Run(task, config, successes, episodes, kind[1], str(path))


def _one(repeated: Sequence[Run], repeats: Repeats) -> Run:
    """One of the runs of a task and config, in the order of their times, or their sum."""
    last = repeated[-1]
    if len(repeated) > 1 and repeats == "refuse":
        times = [Path(run.file).parent.name for run in repeated]
        raise UserError(
            f"{last.task}, {last.config}: expected one run, got those of {times}; --repeats pool adds them up (other "
            "seeds), --repeats last takes the last"
        )
    counted = repeated if repeats == "pool" else repeated[-1:]
    successes, episodes = sum(run.successes for run in counted), sum(run.episodes for run in counted)
    files = ", ".join(run.file for run in counted)
    return Run(last.task, last.config, successes, episodes, last.instruction_type, files)


def _rate(runs: Sequence[Run], of_tasks: int) -> GroupRate:
    # here, for who reads results: a robot's environment has less installed
    from repwam_core.sim.results import wilson_interval

    successes, episodes = sum(run.successes for run in runs), sum(run.episodes for run in runs)
    mean = sum(run.successes / run.episodes for run in runs) / len(runs)
    return GroupRate(len(runs), of_tasks, mean, *wilson_interval(successes, episodes), successes, episodes)


def _cell(rate: GroupRate | None) -> str:
    if rate is None:
        return "not run"
    told = f"{100 * rate.rate:.1f} ({100 * rate.low:.1f} to {100 * rate.high:.1f})"
    return told if rate.tasks == rate.of_tasks else f"{told}, {rate.tasks} of {rate.of_tasks} tasks"
