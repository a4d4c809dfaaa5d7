"""A policy or a baseline in closed loop on unseen seeds; what has ended is kept while the rest runs."""

from __future__ import annotations

import hashlib
import json
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from repvitok.data import LeRobotReader
from repvitok.runtime.documents import short_json
from repvitok.runtime.errors import UserError
from repvitok.runtime.files import kind_of, sole_writer
from repvitok.runtime.progress import progress

from repwam_core.interface import ActionChunk, BasePolicy, BatchedBasePolicy, CommandKind, Embodiment, Observation
from repwam_core.policy.execution import Execution, Handover, actions_to_execute
from repwam_core.sim.base import DEFAULT_SUITE, SimSettings, SimTask, TaskPool, find_suite, require_evaluation_seeds
from repwam_core.sim.results import EpisodeResult, film_key, load_films, load_results, save_films, save_results
from repwam_core.sim.workers import Progress, VectorEnv, Worker, WorkerDied, crash, default_workers, map_jobs

RESULTS_FILE, FILMS_FILE = "results.json", "films.npz"
UNFINISHED = "unfinished"
"""Folder of the parts that have ended, each a file of results and, where filmed, one of frames; gone at the end."""
WHEREABOUTS = ("policy", "demonstrations")
"""What is recorded and not compared: a policy is known by its digests, wherever it lies."""


class RolloutFolder:
    """Episodes of one rollout, kept part by part; a part is what runs together and is begun anew if it was cut off.

    Use it as a context: it holds the folder against a second writer.

    Args:
        folder: It is created if need be; None keeps nothing.
        about: JSON values that say what is run; stored with the results.
    """

    def __init__(self, folder: str | Path | None, about: Mapping[str, Any]) -> None:
        self._folder = None if folder is None else Path(folder)
        self._about: dict[str, Any] = json.loads(json.dumps(about))
        self._ended: dict[tuple[str, int], EpisodeResult] = {}
        self._exits = ExitStack()

    def __enter__(self) -> RolloutFolder:
        if self._folder is not None:
            if (kind := kind_of(self._folder)) is not None:
                raise UserError(f"{self._folder} holds {kind}; give a rollout a folder of its own")
            with ExitStack() as entered:
                entered.enter_context(sole_writer(self._folder))
                whole = self._folder / RESULTS_FILE
                parts = [whole] if whole.exists() else sorted((self._folder / UNFINISHED).glob("*.json"))
                for part in parts:
                    self._take(part, self._folder / FILMS_FILE if part == whole else part.with_suffix(".npz"))
                self._exits = entered.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._exits.close()

    def ended(self, planned: Sequence[EpisodeResult]) -> list[EpisodeResult] | None:
        """How these episodes ended, in their order; None if not all of them have."""
        found = [self._ended.get((episode.task, episode.seed)) for episode in planned]
        whole = [result for result in found if result is not None]
        if len(whole) < len(planned):
            return None
        if [result.instruction for result in whole] != [episode.instruction for episode in planned]:
            raise UserError(f"{self._folder}: these episodes ran under other instructions; name another folder")
        return whole

    def keep(self, part: Sequence[EpisodeResult]) -> None:
        """Note the episodes of a part that has ended, and write them."""
        if self._folder is not None:
            path = self._folder / UNFINISHED / f"{len(self._ended):06}.json"
            if any(result.frames is not None for result in part):
                save_films(path.with_suffix(".npz"), part)
            save_results(path, part, **self._about)  # last: a part is there when its results are
        self._ended |= {(result.task, result.seed): result for result in part}

    def finish(self, results: Sequence[EpisodeResult]) -> None:
        """Write the episodes of all parts as results.json, and films.npz where any were filmed."""
        if self._folder is None:
            return
        if not (self._folder / RESULTS_FILE).exists():
            if any(result.frames is not None for result in results):
                save_films(self._folder / FILMS_FILE, results)
            save_results(self._folder / RESULTS_FILE, results, **self._about)
        shutil.rmtree(self._folder / UNFINISHED, ignore_errors=True)

    def _take(self, results: Path, films: Path) -> None:
        """Read what an earlier run of this rollout has kept."""
        episodes, about = load_results(results)
        if "suite" in self._about:
            about = {"suite": DEFAULT_SUITE, **about}  # version 0.1 named none
        names = sorted({*about, *self._about} - set(WHEREABOUTS))
        pairs = [(name, about.get(name), self._about.get(name)) for name in names]
        if other := [f"{name} {short_json(was)}, not {short_json(now)}" for name, was, now in pairs if was != now]:
            raise UserError(f"{results}: these episodes ran with {'; '.join(other)}: name another folder")
        seen = load_films(films) if films.exists() else {}
        for episode in episodes:
            self._ended[episode.task, episode.seed] = replace(episode, frames=seen.get(film_key(episode)))


InstructionOf = Callable[[str, int], str | None]
FilmedOutcomes = Literal["outcomes"]
TASKS_AT_ONCE = 10
"""Tasks whose episodes run side by side: a simulator's process keeps the models of a few only at hand for drawing."""


def evaluate(
    policy: BatchedBasePolicy | Callable[[], BasePolicy],
    tasks: Sequence[str],
    seeds: Sequence[int],
    *,
    settings: SimSettings | None = None,
    instruction_of: InstructionOf | None = None,
    execute: int | None = 4,
    execution: Execution = "wait",
    delay: int = 0,
    batch_size: int = 20,
    workers: int | None = None,
    filmed_per_task: int | FilmedOutcomes = 0,
    traced: bool = False,
    out: str | Path | None = None,
    about: dict[str, Any] | None = None,
) -> list[EpisodeResult]:
    """Let the policy drive every task at every seed.

    Episodes run `batch_size` at a time and in step: the policy plans for all of them at once, the simulators carry
    out `execute` actions of each chunk, rendering one frame per action, and an episode stops at its first success or
    when its steps are used up. A crash of a simulator is a failed episode, recorded as crashed. An error of the policy
    ends the evaluation.

    Args:
        policy: Plans for a batch; or a function that makes a policy for one episode, called once per place in a batch.
        tasks: Names of the suite's tasks.
        seeds: Evaluation seeds, see `evaluation_seeds`.
        settings: The suite, its cameras, size, rate and length; the ones of the demonstrations. None is Meta-World.
        instruction_of: (task, seed) -> what the policy is told, or None for nothing; by default the suite's own.
        execute: Actions carried out before planning again; None for whole chunks, of which the delay is left out unless
            the robot waits.
        execution: What the robot does in the steps in which a chunk is planned, see `policy.execution`.
        delay: Control steps that planning takes: so many pass in the simulator between what a policy saw and the first
            action that follows from it. The first chunk of an episode costs none.
        batch_size: Episodes in step.
        workers: Processes; None as many as there are cores.
        filmed_per_task: Episodes of each task, the first ones, of which all frames are kept; "outcomes" for the first
            success and the first failure of each.
        traced: Whether states and distances are kept, see `EpisodeResult.trace`.
        out: The folder for `results.json` and `films.npz`, in which batches that have ended are kept meanwhile: a
            killed evaluation goes on with the next batch, and its results are those of an uninterrupted one. None
            writes nothing.
        about: JSON values to store with the results, such as the policy's digests; a folder of other ones is refused.

    Returns:
        One result per episode, all tasks of the first seed, then of the next.
    """
    settings = settings or find_suite(DEFAULT_SUITE)()
    instruction_of = instruction_of or settings.instruction
    names, seeds = settings.task_names(tasks), list(seeds)
    require_evaluation_seeds(seeds)
    least_of = {"batch_size": (batch_size, 1), "execute": (execute, 1), "workers": (workers, 1), "delay": (delay, 0)}
    for name, (number, least) in least_of.items():
        if number is not None and number < least:
            raise UserError(f"{name} must be at least {least}, got {number}")
    driver = policy if isinstance(policy, BatchedBasePolicy) else OnePolicyEach(policy)
    in_order = [EpisodeResult(name, seed, instruction_of(name, seed), False, 0) for seed in seeds for name in names]
    planned = sorted(in_order, key=lambda episode: names.index(episode.task) // TASKS_AT_ONCE)
    filmed = [True] * len(planned) if filmed_per_task == "outcomes" else _filmed(planned, filmed_per_task)
    described = {
        "suite": settings.suite,
        "settings": settings.to_dict(),
        "tasks": list(names),
        "seeds": seeds,
        "execute": execute,
        "batch_size": batch_size,
        "filmed_per_task": filmed_per_task,
        **({"traced": True} if traced else {}),
        **(about or {}),
    }
    delayed = (execution, delay) != ("wait", 0)
    if delayed:
        described |= {"execution": execution, "delay": delay}
    results: list[EpisodeResult] = []
    places = min(workers or default_workers(), batch_size, max(1, len(planned)))
    with (
        RolloutFolder(out, described) as folder,
        progress(planned, "evaluate", unit="episode") as bar,
        _Simulators(settings, places) as simulators,
    ):
        for first in range(0, len(planned), batch_size):
            part = slice(first, first + batch_size)
            ended = folder.ended(planned[part])
            if ended is None:
                batch = _Batch(planned[part], filmed[part], settings, traced, bar.update)
                run = partial(batch.run_delayed, execution=execution, delay=delay) if delayed else batch.run
                ended = run(driver, simulators, execute)
                if filmed_per_task == "outcomes":
                    ended = _first_of_each_outcome(ended, results)
                folder.keep(ended)
            else:
                bar.update(len(ended))
            results += ended
            bar.set_postfix(success=f"{sum(result.success for result in results)}/{len(results)}")
        at = {(result.task, result.seed): result for result in results}
        results = [at[episode.task, episode.seed] for episode in in_order]
        folder.finish(results)
    return results


class OnePolicyEach(BatchedBasePolicy):
    """A batch of single policies, for policies that cannot plan for several episodes at once."""

    def __init__(self, make_policy: Callable[[], BasePolicy]) -> None:
        self._make_policy = make_policy
        self._policies: list[BasePolicy] = []

    def reset(self, instructions: Sequence[str | None], seeds: Sequence[int]) -> None:
        while len(self._policies) < len(instructions):
            self._policies.append(self._make_policy())
        del self._policies[len(instructions) :]
        for policy, told, seed in zip(self._policies, instructions, seeds, strict=True):
            policy.reset(told, seed)

    def record(self, actions_si: Sequence[np.ndarray]) -> None:
        for policy, actions in zip(self._policies, actions_si, strict=True):
            policy.record(actions)

    def commit(self, actions_si: Sequence[np.ndarray]) -> None:
        for policy, actions in zip(self._policies, actions_si, strict=True):
            policy.commit(actions)

    def act(self, observations: Sequence[Observation]) -> list[ActionChunk]:
        return [policy.act(seen) for policy, seen in zip(self._policies, observations, strict=True)]


class _Batch:
    """Episodes in step, from their first frame to the last one's end; `count_ended` hears how many a step has ended."""

    def __init__(
        self,
        episodes: Sequence[EpisodeResult],
        filmed: Sequence[bool],
        robot: SimSettings,
        traced: bool,
        count_ended: Callable[[int], object],
    ) -> None:
        self.episodes, self._robot = list(episodes), robot
        self._traces: list[dict[str, list[float]]] | None = [{} for _ in episodes] if traced else None
        self._films: dict[int, list[np.ndarray]] = {slot: [] for slot, film in enumerate(filmed) if film}
        self._count_ended = count_ended
        self._seen: dict[int, Observation] = {}
        self._live: set[int] = set()

    def run(self, policy: BatchedBasePolicy, simulators: _Simulators, execute: int | None) -> list[EpisodeResult]:
        """Drive all episodes to their ends; planning costs no step."""
        self._begin(policy, simulators)
        while self._live:
            chunks = policy.act([self._seen[slot] for slot in range(len(self.episodes))])
            actions = {slot: actions_to_execute(chunks[slot], execute) for slot in sorted(self._live)}
            count = max(len(rows) for rows in actions.values())
            self._take(simulators.execute(actions), count, actions)
        return self._filmed()

    def run_delayed(
        self, policy: BatchedBasePolicy, simulators: _Simulators, execute: int | None, execution: Execution, delay: int
    ) -> list[EpisodeResult]:
        """Drive all episodes to their ends; planning costs `delay` steps, spent as `execution` says."""
        self._begin(policy, simulators)
        handovers: list[Handover] = []
        rows: list[np.ndarray] = []  # of each episode what was carried out since the last request
        while self._live:
            if handovers:
                committed = [handover.request(delay) for handover in handovers]
                policy.record(rows)
                if execution == "regrounded" and delay:
                    policy.commit(committed)
            chunks = policy.act([self._seen[slot] for slot in range(len(self.episodes))])
            held = [np.zeros((0, chunk.actions.shape[1]), np.float32) for chunk in chunks]
            if not handovers:
                steps = execute or _whole(policy, len(chunks[0]), execution, delay)
                handovers = [Handover(execution, steps) for _ in self.episodes]
            elif execution == "wait":
                still = self._robot.embodiment.hold
                held = [np.repeat(still(done[-1], self._robot.action_kind)[None], delay, axis=0) for done in rows]
            rows = [handover.take(chunk, delay) for handover, chunk in zip(handovers, chunks, strict=True)]
            actions = {slot: np.concatenate([held[slot], rows[slot]]) for slot in sorted(self._live)}
            self._take(simulators.execute(actions), len(rows[0]), actions, unseen=len(held[0]))
        return self._filmed()

    def _begin(self, policy: BatchedBasePolicy, simulators: _Simulators) -> None:
        started = simulators.start({slot: (e.task, e.seed) for slot, e in enumerate(self.episodes)})
        self._live = set(started)
        self._take(started, 1)
        if self._live:
            any_seen = next(iter(self._seen.values()))
            for slot in range(len(self.episodes)):  # one that crashed before its first frame shows another one's
                self._seen.setdefault(slot, any_seen)
            policy.reset([e.instruction for e in self.episodes], [e.seed for e in self.episodes])

    def _filmed(self) -> list[EpisodeResult]:
        return [
            replace(
                result,
                frames=np.concatenate(self._films[slot]) if self._films.get(slot) else None,
                trace=None if self._traces is None else self._traces[slot],
            )
            for slot, result in enumerate(self.episodes)
        ]

    def _take(
        self,
        progress: dict[int, Progress],
        count: int,
        actions: Mapping[int, np.ndarray] | None = None,
        unseen: int = 0,
    ) -> None:
        """Note where every live episode stands; all show `count` frames, with their last one repeated if need be.

        `actions` of a slot led to its frames, one to each; those that an episode's end left over led to none.

        The first `unseen` frames, in which the robot waited for its policy, are not shown.
        """
        seen = {slot: _without_first(observation, observation.num_frames) for slot, observation in self._seen.items()}
        for slot, now in progress.items():
            ended = {name: getattr(now, name) for name in ("success", "steps", "crashed", "traceback")}
            self.episodes[slot] = replace(self.episodes[slot], **ended)
            if now.observation is not None:
                seen[slot] = _without_first(now.observation, unseen)
                if slot in self._films:
                    self._films[slot].append(_all_views(now.observation))
                if self._traces is not None:
                    _extend_trace(self._traces[slot], now, self._robot.embodiment, (actions or {}).get(slot))
            if now.done:
                self._live.discard(slot)
        self._count_ended(sum(now.done for now in progress.values()))
        self._seen = {slot: _with_frames(observation, count) for slot, observation in seen.items()}


class _Simulators:
    """Slots spread over worker processes. A process that dies takes its episodes with it, and is replaced."""

    def __init__(self, settings: SimSettings, workers: int) -> None:
        self._make = partial(VectorEnv, settings)
        self._workers = [Worker(self._make) for _ in range(workers)]

    def __enter__(self) -> _Simulators:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.close()

    def start(self, episodes: dict[int, tuple[str, int]]) -> dict[int, Progress]:
        return self._ask("start", episodes)

    def execute(self, actions: dict[int, np.ndarray]) -> dict[int, Progress]:
        return self._ask("execute", actions)

    def _ask(self, method: str, per_slot: dict[int, Any]) -> dict[int, Progress]:
        """Send every worker its slots (slot modulo workers), then gather; death is a crash of the slots asked about."""
        shares: dict[int, dict[int, Any]] = {}
        for slot, value in per_slot.items():
            shares.setdefault(slot % len(self._workers), {})[slot] = value
        answers: dict[int, Progress] = {}
        asked = {}
        for number, share in shares.items():
            try:
                self._workers[number].submit(method, share)
                asked[number] = share
            except WorkerDied as death:
                answers |= self._replaced(number, share, death)
        for number, share in asked.items():
            try:
                answers |= self._workers[number].result()
            except WorkerDied as death:
                answers |= self._replaced(number, share, death)
        return answers

    def _replaced(self, number: int, share: dict[int, Any], death: WorkerDied) -> dict[int, Progress]:
        self._workers[number].close()
        self._workers[number] = Worker(self._make)
        return {slot: Progress(None, done=True, crashed=str(death)) for slot in share}


def _extend_trace(trace: dict[str, list[float]], now: Progress, robot: Embodiment, actions: np.ndarray | None) -> None:
    """Append what was seen since the last request, and the actions that led to it, channel by channel."""
    states = None if now.observation is None else now.observation.states()
    columns = [] if states is None else states.T.tolist()
    channels: dict[str, list[float]] = dict(zip(robot.state_channels, columns, strict=False))
    for name in now.distances[0] if now.distances else ():
        channels[name] = [distances[name] for distances in now.distances]
    if actions is not None and now.observation is not None:
        carried_out = actions[: now.observation.num_frames].T.tolist()
        channels |= {f"action/{name}": rows for name, rows in zip(robot.action_names, carried_out, strict=True)}
    for name, values in channels.items():
        trace.setdefault(name, []).extend(round(value, 4) for value in values)


def _first_of_each_outcome(ended: Sequence[EpisodeResult], before: Sequence[EpisodeResult]) -> list[EpisodeResult]:
    """The episodes, with the frames of those alone that are their task's first success or first failure."""
    seen = {(result.task, result.success) for result in before}
    kept = []
    for result in ended:
        first = (result.task, result.success) not in seen
        seen.add((result.task, result.success))
        kept.append(result if first else replace(result, frames=None))
    return kept


def _all_views(observation: Observation) -> np.ndarray:
    """Frames `(n, H, W, 3)` of all cameras, side by side."""
    return np.concatenate([observation.frames(camera) for camera in observation.cameras], axis=2)


def _without_first(observation: Observation, count: int) -> Observation:
    """Without the first `count` frames, or its last one alone if there are no more."""
    left = max(1, observation.num_frames - count)
    if left == observation.num_frames:
        return observation
    images = {camera: observation.frames(camera)[-left:] for camera in observation.cameras}
    states = observation.states()
    return replace(observation, images=images, state=None if states is None else states[-left:])


def _whole(policy: BatchedBasePolicy, rows: int, execution: Execution, delay: int) -> int:
    """Actions of a chunk to execute: all, or all that the next delay leaves, in whole latent frames."""
    if execution == "wait":
        return rows
    per = int(getattr(policy, "frames_per_latent", 1))
    if (left := (rows - delay) // per * per) < 1:
        raise UserError(f"a delay of {delay} steps leaves nothing of a chunk of {rows} actions; plan longer chunks")
    return left


def _with_frames(observation: Observation, count: int) -> Observation:
    """At least `count` frames: the last one is repeated."""
    missing = count - observation.num_frames
    if missing <= 0:
        return observation
    images = {camera: _repeat_last(observation.frames(camera), missing) for camera in observation.cameras}
    states = observation.states()
    return replace(observation, images=images, state=None if states is None else _repeat_last(states, missing))


def _repeat_last(rows: np.ndarray, times: int) -> np.ndarray:
    return np.concatenate([rows, np.repeat(rows[-1:], times, axis=0)])


def _filmed(episodes: Sequence[EpisodeResult], per_task: int) -> list[bool]:
    seen: Counter[str] = Counter()
    filmed = []
    for episode in episodes:
        filmed.append(seen[episode.task] < per_task)
        seen[episode.task] += 1
    return filmed


Baseline = Literal["expert", "random", "replay"]


def run_baseline(
    baseline: Baseline,
    tasks: Sequence[str],
    seeds: Sequence[int],
    *,
    settings: SimSettings | None = None,
    demonstrations: str | Path | None = None,
    workers: int | None = None,
    filmed_per_task: int = 0,
    out: str | Path | None = None,
) -> list[EpisodeResult]:
    """Drive every task at every seed without a policy. A crash of a simulator is a failed episode, recorded as crashed.

    `expert` is the suite's scripted policy; `random` draws every action uniformly; `replay` carries out the
    actions of one demonstration of the task, drawn by the seed, whatever the layout, and then stands still.

    Args:
        baseline: Who drives.
        tasks: Names of the suite's tasks.
        seeds: The simulator's seeds.
        settings: As for the policy it is compared with (None is Meta-World); cameras and size matter to films alone.
        demonstrations: A data set made by `collect`, for `replay`.
        workers: Processes; None as many as there are cores, 1 this one.
        filmed_per_task: Episodes of each task, the first ones, of which all frames are kept.
        out: The folder for `results.json` and `films.npz`, in which episodes that have ended are kept meanwhile, as by
            `evaluate`.

    Returns:
        One result per episode, all tasks of the first seed, then of the next.
    """
    settings = settings or find_suite(DEFAULT_SUITE)()
    names = settings.task_names(tasks)
    if baseline not in ("expert", "random", "replay"):
        raise UserError(f"baseline must be 'expert', 'random' or 'replay', got {baseline!r}")
    actions: dict[str, list[np.ndarray]] = {}
    if baseline == "replay":
        if demonstrations is None:
            raise UserError("replaying needs a data set of demonstrations, got none")
        actions = demonstrated(demonstrations, names, "action")
    planned = [EpisodeResult(name, seed, None, False, 0) for seed in seeds for name in names]
    filmed = {(e.task, e.seed) for e, film in zip(planned, _filmed(planned, filmed_per_task), strict=True) if film}
    make = partial(BaselineRunner, baseline, settings, actions, filmed)
    described = {
        "baseline": baseline,
        "suite": settings.suite,
        "settings": settings.to_dict(),
        "tasks": list(names),
        "seeds": list(seeds),
        "demonstrations": None if demonstrations is None else str(demonstrations),
        "demonstrated_sha256": _digest(actions),
        **({"filmed_per_task": filmed_per_task} if filmed_per_task else {}),
    }

    def lost(job: tuple[str, int], death: WorkerDied) -> EpisodeResult:
        return EpisodeResult(*job, None, False, 0, str(death))

    with RolloutFolder(out, described) as folder, progress(planned, baseline, unit="episode") as bar:
        left = {(e.task, e.seed) for e in planned if folder.ended([e]) is None}
        jobs = sorted(left)  # a worker stays with a task while it can
        bar.update(len(planned) - len(jobs))
        for _, result in map_jobs(make, "run", jobs, workers or default_workers(), lost=lost):
            folder.keep([result])
            bar.update(1)
        results = folder.ended(planned) or []
        folder.finish(results)
    return results


def demonstrated(root: str | Path, tasks: Sequence[str], column: str) -> dict[str, list[np.ndarray]]:
    """Canonical task name -> a column of each of its demonstrations, such as the actions, float32 `(T, C)`."""
    reader = LeRobotReader(root)
    found: dict[str, list[np.ndarray]] = {task: [] for task in tasks}
    for episode in reader.episodes:
        name = episode.metadata.get("task_name")
        if name in found:
            recorded = reader.episode(episode.index, [column])[column]
            found[name].append(recorded.reshape(len(recorded), -1))  # of one channel, rows are read as numbers
    without = [name for name, rows in found.items() if not rows]
    if without:
        raise UserError(f"{root} holds no demonstrations of {', '.join(without)} made by `repwam collect`")
    return found


def _digest(actions: dict[str, list[np.ndarray]]) -> str:
    """SHA-256 (hex) of all that may be replayed."""
    sha = hashlib.sha256()
    for name, episodes in sorted(actions.items()):
        for episode in episodes:
            sha.update(f"{name} {episode.shape} {episode.dtype}".encode())
            sha.update(np.ascontiguousarray(episode).data)
    return sha.hexdigest()


class BaselineRunner:
    """Runs single episodes; lives in a worker process."""

    def __init__(
        self,
        baseline: Baseline,
        settings: SimSettings,
        actions: dict[str, list[np.ndarray]],
        filmed: Collection[tuple[str, int]] = (),
    ) -> None:
        """`filmed`: task and seed of each episode whose frames are kept."""
        self._baseline, self._actions, self._filmed = baseline, actions, filmed
        self._action_kind: CommandKind = settings.action_kind
        self._tasks = TaskPool(settings, keep=4)

    def run(self, name: str, seed: int) -> EpisodeResult:
        """One episode, until success or the last step."""
        rng = np.random.default_rng([seed, zlib.crc32(name.encode()), 2])
        replayed: np.ndarray | None = None
        if self._baseline == "replay":
            replayed = self._actions[name][int(rng.integers(len(self._actions[name])))]
        task: SimTask | None = None
        frames: list[np.ndarray] = []
        film = (name, seed) in self._filmed
        try:
            task = self._tasks.take(name)
            task.start(seed)
            while not task.done:
                frames += [_all_views(task.observe())] if film else []
                task.advance(self._action(task, rng, replayed))
            frames += [_all_views(task.observe())] if film else []
        except UserError:
            raise  # the user's to mend, such as demonstrations of another robot
        except Exception as error:
            steps = 0 if task is None else task.steps
            return EpisodeResult(name, seed, None, False, steps, **crash(task, error))
        self._tasks.give_back(task)
        film_of = np.concatenate(frames) if frames else None
        return EpisodeResult(name, seed, None, task.success, task.steps, frames=film_of)

    def close(self) -> None:
        """Close every simulator."""
        self._tasks.close()

    def _action(self, task: SimTask, rng: np.random.Generator, replayed: np.ndarray | None) -> np.ndarray:
        if self._baseline == "expert":
            return task.expert_action()
        if replayed is None:
            return task.random_action(rng)
        if task.steps < len(replayed):
            return replayed[task.steps]
        return task.embodiment.hold(replayed[-1], self._action_kind)
