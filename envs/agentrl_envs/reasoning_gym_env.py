"""`agentrl/ReasoningGym-v0`: one-step reasoning on the datasets of reasoning-gym (extra `reasoning-gym`)."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from agentrl.env import OneStepEnv, unknown
from agentrl.errors import ConfigError
from agentrl_envs import limited_calls
from agentrl_envs.math_answers import last_tagged
from agentrl_envs.reasoning_env import INSTRUCTIONS, TEXTS
from agentrl_envs.reasoning_gym_data import Dataset, checked_dataset

LARGEST = 1_000_000  # items of a split, and the distance between the seeds of two splits
SPLITS = ("train", "test")


class ReasoningGymEnv(OneStepEnv):
    """One-step items of a reasoning-gym dataset.

    The answer is the last <answer>…</answer> of the reply, else the entire reply. The dataset's own scorer
    judges it, in a separate process with a hard limit; if the scorer fails, the score is 0. An item is solved
    by a score of exactly 1; the reward is 1 for a solved item and else 0, unless `partial` is set. Train and
    test items have different seeds; a dataset with few possible items has some of them in both splits.

    Args:
        split: The split from which `reset` draws an item when it is given none.
        max_steps: The number of steps per episode, which is always 1.
        dataset: The name of the dataset.
        level: The level of the dataset's curriculum, from 1; None selects its default configuration.
        config: Other fields of the dataset's configuration.
        size: The number of items per split.
        seed: The seed of the items; a different seed gives different items under the same ids.
        text: "plain" appends the answer format to the question, "short" is the bare question.
        partial: Whether the reward is the dataset's score instead of 1 or 0.
        expert: Whether to add `info["expert"]`, the item's own answer, if the scorer accepts it.

    Raises:
        ConfigError: An argument is invalid, one fixed answer solves the dataset, or its items differ between
            processes unless Python is started with PYTHONHASHSEED=0.
    """

    instructions: ClassVar[str] = f"Solve a problem. {INSTRUCTIONS}"

    def __init__(
        self,
        split: str = "train",
        max_steps: int = 1,
        dataset: str = "chain_sum",
        level: int | None = None,
        config: Mapping[str, Any] | None = None,
        size: int = 10_000,
        seed: int = 0,
        text: str = "plain",
        partial: bool = False,
        expert: bool = False,
    ) -> None:
        for name, value, least, most in (
            ("size", size, 1, LARGEST),
            ("seed", seed, 0, 1_000),
            ("level", 1 if level is None else level, 1, 1_000),
        ):
            if type(value) is not int or not least <= value <= most:
                raise ConfigError(f"{name}: {value!r}, wanted a whole number from {least} to {most}")
        if text not in TEXTS:
            raise unknown("text", text, TEXTS)
        try:
            settings = json.dumps(dict(config or {}), sort_keys=True)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"config: {error}, wanted JSON values") from error
        self._datasets = {
            name: checked_dataset(dataset, level, settings, (len(SPLITS) * seed + place) * LARGEST, size)
            for place, name in enumerate(SPLITS)
        }
        self._partial = partial
        ending, wrap = (f"\n{INSTRUCTIONS}", "<answer>{}</answer>") if text == "plain" else ("", "{}")
        solvable = self._datasets["train"].solution(0) is not None

        def solve(task: Mapping[str, Any]) -> str | None:
            answer = self._datasets[task["split"]].solution(task["index"])
            return None if answer is None else wrap.format(answer)

        super().__init__(
            {name: _Items(name, opened, ending) for name, opened in self._datasets.items()},
            self._score,
            split=split,
            max_steps=max_steps,
            data=f"reasoning-gym {dataset}",
            solve=solve if solvable else None,
            expert=expert,
        )

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Start the task `options["task"]`, or one drawn from the split, and return (prompt, info)."""
        prompt, info = super().reset(seed=seed, options=options)
        return prompt, info | {"task_text": prompt.removesuffix(f"\n{INSTRUCTIONS}")}

    def _score(self, task: Mapping[str, Any], reply: str) -> float:
        limited_calls.calls.join(self)
        tagged = last_tagged(reply)
        answer = reply.strip() if tagged is None else tagged
        return self._datasets[task["split"]].score_reply(answer, task["index"])

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Score the reply; return observation, reward, terminated, truncated and info."""
        observation, reward, terminated, truncated, info = super().step(action)
        reward = reward if self._partial else float(info["success"])
        return observation, reward, terminated, truncated, info

    def close(self) -> None:
        """Release the shared processes."""
        limited_calls.calls.leave(self)


class _Items(Sequence[Mapping[str, Any]]):
    """Lazy view of a dataset's items as the tasks of `OneStepEnv`."""

    def __init__(self, split: str, dataset: Dataset, ending: str) -> None:
        self._split, self._dataset, self._ending = split, dataset, ending

    def __len__(self) -> int:
        return self._dataset.size

    def __getitem__(self, index: Any) -> Any:
        item = self._dataset.item(index)
        return {
            "prompt": item["question"] + self._ending,
            "answer": item["answer"],
            "task_type": self._dataset.name,
            "split": self._split,
            "index": index,
        }
