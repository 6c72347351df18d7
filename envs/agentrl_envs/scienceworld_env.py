"""`agentrl/ScienceWorld-v0`: thirty elementary-science tasks in text, on ScienceWorld's own simulator.

Needs the extra `scienceworld`, which includes a Java runtime for machines without one. Each environment runs
one JVM from its first `reset` to `close`; listing and hashing tasks does not start it.
"""

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any, ClassVar, Literal

import gymnasium
from gymnasium.error import ResetNeeded

from agentrl.env import TextSpace, unknown
from agentrl.env.numbers import MAX_STEPS, real_number, whole_number
from agentrl.errors import ConfigError
from agentrl_envs.scienceworld.expert import GoldExpert
from agentrl_envs.scienceworld.lexicon import Meaning, Reach, lexicon, numbers, same_action, valid_actions
from agentrl_envs.scienceworld.listing import SPLITS, listing
from agentrl_envs.scienceworld.simulator import HEAP, Reply, Simulator, check_heap, require

ELECTRICAL = ("power-component", "conductivity")  # name parts of the tasks that need electricity


class ScienceWorldEnv(gymnasium.Env[str, str]):
    """Elementary-science experiments such as boiling water, growing a fruit or testing conductivity.

    The episode terminates when the score reaches 100 or the agent focuses on the wrong object (score -100),
    and is truncated after `max_steps` actions. Only a score of exactly 100 is a success.

    Task ids are "split/name/variation". The ids of a split cycle through the names, ordered by the length of
    their solution (`agentrl_envs.scienceworld.listing.listing().solutions`), so the first 30 ids cover every
    name. The two mendelian-genetics tasks need about 130 actions, and seconds to compute their solution;
    those with an inclined plane need 50 to 750. To leave tasks out, list the others in `tasks`.

    All episodes of a task start with the same observation. Wherever it was tried, in all thirty tasks, the
    same actions gave the same episode, also in other JVMs and after other games (see
    `agentrl_envs.scienceworld.hashing`). The simulator does not guarantee this, and its solutions of
    test-conductivity vary, so `determinism` declares no more than the same task.

    Args:
        split: The split from which `reset` draws a task when it is given none: ScienceWorld's "train", "dev"
            or "test".
        max_steps: The number of actions per episode; the simulator's own limit is not used.
        tasks: One name or several, None for all thirty.
        simplification: "easy", "" for none, or some of ScienceWorld's five, separated by commas.
        reward: "gain" is the change of max(score, 0) / 100, so the return of an episode is its progress, and
            a wrong focus takes back what was gained. "terminal" is max(score, 0) / 100 at the end. With both,
            giving no answer is safer than a wrong one. "success" is 1 for solving the task, else 0.
        actions: The content of `info["actions"]`. None leaves it out; "lexicon" is a short list: the verbs
            that tasks need, times the objects within reach (at most 600; takes milliseconds); "valid" is the
            simulator's complete list (up to thousands; takes tens of milliseconds).
        expert: Whether to add `info["expert"]`, the next action of the simulator's own solution, which is
            computed at the first reset to a task, in 0.1 to 10 seconds.
        heap: The limit of the JVM's heap; None leaves it to the JVM, which may then take gigabytes.
        timeout: The seconds that the simulator may take to answer before it is killed and an error is raised.

    `info` holds success, score (0 to 1), valid (whether the simulator understood the action without asking
    back, or had offered it), task_type, raw_score, moves (the simulator's time, not steps), task_text at the
    reset, and on request actions and expert. There is no state_key: one observation does not identify the
    state.
    """

    splits = SPLITS
    determinism: ClassVar[Literal["episode", "instance"]] = "instance"
    thread_safe: ClassVar[bool] = True
    heavy: ClassVar[bool] = True
    instructions: ClassVar[str] = (
        "You are in a building with rooms such as a kitchen, a workshop and a greenhouse, and do an "
        "experiment in it by short commands. A command is a verb and the names of things you can see: "
        "look around | look at X | open X | go to ROOM | teleport to ROOM | pick up X | put down X | move "
        "X to Y | pour X into Y | use X on Y | activate X | deactivate X | connect X to Y | mix X | eat X "
        "| read X | inventory | wait1. focus on X says that X is what the task asks for; do so only when "
        "it is, since a wrong one ends the task. Where a name is ambiguous, answer with the number of the "
        "one you mean."
    )

    def __init__(
        self,
        split: str = "train",
        max_steps: int = 30,
        tasks: str | Sequence[str] | None = None,
        simplification: str = "easy",
        reward: str = "gain",
        actions: str | None = None,
        expert: bool = False,
        heap: str | None = HEAP,
        timeout: float = 300.0,
    ) -> None:
        for name, value, choices in (
            ("split", split, SPLITS),
            ("reward", reward, ("gain", "terminal", "success")),
            ("actions", actions, (None, "lexicon", "valid")),
        ):
            if value not in choices:
                raise unknown(name, value, map(str, choices))
        whole_number("max_steps", max_steps, 1, MAX_STEPS)
        real_number("timeout", timeout, 0, 1_000_000)
        self._heap = check_heap(heap)
        require()
        self._listing = listing()
        self._names = _chosen(tasks, tuple(self._listing.variations))
        self._simplification = _simplification(simplification, self._listing.simplifications, self._names)
        self.split = split
        self.max_steps = max_steps
        self._reward = reward
        self._offer = actions
        self._with_expert = expert
        self._timeout = timeout
        self._ids: dict[str, tuple[str, ...]] = {}
        self._solutions: dict[str, list[str]] = {}
        self._simulator: Simulator | None = None
        self._reach: Reach | None = None
        self._expert: GoldExpert | None = None
        self._running = False
        self._name = ""
        self._steps = 0
        self._reply = Reply("", 0, False, 0)
        self._offered: Mapping[str, Meaning] = {}
        self._suggestion: str | None = None
        self._warned = False
        self.observation_space = TextSpace()
        self.action_space = TextSpace()

    def tasks(self, split: str) -> Sequence[str]:
        """Return the task ids of a split, such as "train/boil/0"."""
        if split not in SPLITS:
            raise unknown("split", split, SPLITS)
        if split not in self._ids:
            rows = [
                [f"{split}/{name}/{variation}" for variation in self._listing.variations[name][split]]
                for name in self._names
            ]
            self._ids[split] = tuple(id for round in zip_longest(*rows) for id in round if id is not None)
        return self._ids[split]

    def task_hash(self, task: str) -> str:
        """Hash what defines the task: ScienceWorld's version, the task, its variation, the simplification."""
        name, variation = self._parsed(task)
        content = ["scienceworld", self._listing.version, name, variation, self._simplification]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def reset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Start the task `options["task"]`, or a random one of the split; return its observation and info."""
        super().reset(seed=seed)
        task = (options or {}).get("task")
        if task is None:
            tasks = self.tasks(self.split)
            task = tasks[int(self.np_random.integers(len(tasks)))]
        self._name, variation = self._parsed(task)
        self._running = False
        try:
            if self._simulator is None:
                self._simulator = Simulator(self._heap, self._timeout)
            return self._begin(self._simulator, task, variation)
        except BaseException:
            self.close()
            raise

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Run an action; return observation, reward, terminated, truncated and info."""
        simulator = self._simulator
        if simulator is None or not self._running:
            raise ResetNeeded("the episode is over or has not begun: call reset first")
        before, offered = self._reply, self._offered
        action = action.strip()
        try:
            reply = self._reply = simulator.step(action)
            self._steps += 1
            terminated = reply.completed or reply.score < 0 or reply.score == 100
            truncated = not terminated and self._steps >= self.max_steps
            self._running = not (terminated or truncated)
            if self._expert is not None:
                self._expert.observe(action == self._suggestion, reply.observation, reply.asking)
            info = self._info(simulator)
            # The simulator offers some actions that it then questions or rejects; those count as valid.
            info["valid"] |= action in offered
        except BaseException:
            self.close()  # after any error, since an answer of the simulator may still arrive
            raise
        return reply.observation, self._step_reward(before, reply), terminated, truncated, info

    def _step_reward(self, before: Reply, reply: Reply) -> float:
        if self._reward == "gain":
            return (max(reply.score, 0) - max(before.score, 0)) / 100
        if self._reward == "success":
            return float(reply.score == 100)
        return 0.0 if self._running else max(reply.score, 0) / 100

    def expert(self) -> str | None:
        """Return the expert's next action; None after the end of the episode.

        Raises:
            ConfigError: The environment was made without `expert=True`.
        """
        if not self._with_expert:
            raise ConfigError("expert: the environment was made without expert=True")
        if self._expert is None:
            raise ResetNeeded("the episode has not begun: call reset first")
        return self._suggestion

    @property
    def java_pid(self) -> int | None:
        """Return the process id of the JVM, None while none runs."""
        return None if self._simulator is None else self._simulator.gateway.pid

    def close(self) -> None:
        """Kill the JVM; the next `reset` starts a new one."""
        simulator, self._simulator = self._simulator, None
        self._running = False
        self._reach = self._expert = None
        if simulator is not None:
            simulator.close()

    def _begin(self, simulator: Simulator, task: str, variation: int) -> tuple[str, dict[str, Any]]:
        if self._reach is not None:
            self._reach.release()
            self._reach = None
        unsolved = self._with_expert and task not in self._solutions
        simulator.load(self._name, variation, self._simplification, gold=unsolved)
        if unsolved:
            self._solutions[task] = simulator.gold()
        self._reply = simulator.step("look around")
        self._steps = 0
        self._running = True
        if self._offer is not None:
            self._reach = Reach(simulator, self._electrical)
        if self._with_expert:
            self._expert = self._follow(task)
        task_text = simulator.describe()
        info = self._info(simulator) | {"task_text": task_text}
        return f"{task_text}\n\n{self._reply.observation}", info

    def _follow(self, task: str) -> GoldExpert:
        room = self._reply.observation.partition("This room is called the ")[2].partition(".")[0]
        expert = GoldExpert(self._solutions[task], room, self._has("teleportAction"))
        if len(expert.plan) > self.max_steps and not self._warned:
            self._warned = True
            warnings.warn(
                f"the solution of {task} takes {len(expert.plan)} actions, max_steps is {self.max_steps}: "
                "the expert cannot solve such tasks (this warning is shown once)",
                stacklevel=4,
            )
        return expert

    def _info(self, simulator: Simulator) -> dict[str, Any]:
        reply = self._reply
        info: dict[str, Any] = {
            "success": reply.score == 100,
            "score": max(reply.score, 0) / 100,
            "valid": reply.valid,
            "task_type": self._name,
            "raw_score": reply.score,
            "moves": reply.moves,
        }
        offered = self._offered = self._admissible(simulator) if self._running else {}
        if self._offer is not None:
            info["actions"] = list(offered)
        if self._expert is not None:
            self._suggestion = self._suggested(self._expert, offered) if self._running else None
            info["expert"] = self._suggestion
        return info

    def _admissible(self, simulator: Simulator) -> dict[str, Meaning]:
        if self._reach is None:
            return {}
        if self._reply.asking:
            return numbers(self._reply.observation)
        if self._offer == "lexicon":
            teleports = self._has("teleportAction")
            return lexicon(self._reach.things(), self._reach.room(), teleports, self._electrical)
        if self._with_expert:
            return valid_actions(simulator)
        return dict.fromkeys(simulator.valid(), Meaning(""))

    def _suggested(self, expert: GoldExpert, offered: Mapping[str, Meaning]) -> str:
        wanted = expert.next()
        if self._reach is None:
            return wanted
        # "wait1" is always offered, and lets the solution continue after an action that cannot be expressed.
        return same_action(wanted, offered, self._reach) or "wait1"

    @property
    def _electrical(self) -> bool:
        return any(part in self._name for part in ELECTRICAL)

    def _has(self, simplification: str) -> bool:
        return simplification in self._simplification or self._simplification == "easy"

    def _parsed(self, task: object) -> tuple[str, int]:
        """Return the name and variation of an id, or raise the error for an unknown one."""
        parts = task.split("/") if isinstance(task, str) else []
        if len(parts) == 3 and parts[0] in SPLITS and parts[1] in self._names:
            split, name, variation = parts
            known = self._listing.variations[name][split]
            if (
                variation.isascii()
                and variation.isdigit()
                and int(variation) in known
                and variation == str(int(variation))
            ):
                return name, int(variation)
        raise unknown("task", task, self.tasks(self.split))


def _chosen(tasks: str | Sequence[str] | None, known: tuple[str, ...]) -> tuple[str, ...]:
    if tasks is None:
        return known
    chosen = dict.fromkeys((tasks,) if isinstance(tasks, str) else tasks)
    for name in chosen:
        if name not in known:
            raise unknown("tasks", name, known)
    if not chosen:
        raise ConfigError("tasks: empty, wanted at least one name, or None for all")
    return tuple(chosen)


def _simplification(text: str, known: Sequence[str], tasks: Sequence[str]) -> str:
    """Return the simplifications in sorted order, as the simulator expects them."""
    if not isinstance(text, str):
        raise ConfigError(f"simplification: {text!r}, wanted names separated by commas")
    chosen = [name for name in text.replace(" ", "").split(",") if name]
    for name in chosen:
        if name not in (*known, "easy"):
            raise unknown("simplification", name, (*known, "easy"))
    if "easy" in chosen and len(set(chosen)) > 1:
        raise ConfigError(f"simplification: {text!r}, wanted 'easy' alone: it is a combination of the others")
    refusing = [task for task in tasks if any(part in task for part in ELECTRICAL)]
    if "noElectricalAction" in chosen and refusing:
        raise ConfigError(
            f"simplification: noElectricalAction makes {', '.join(refusing)} impossible; remove it, "
            "or choose other tasks"
        )
    return ",".join(sorted(set(chosen)))
