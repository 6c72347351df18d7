"""`agentrl/Reasoning-v0`: one-step problems; the observation is a problem, and the reply answers it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from agentrl.env import OneStepEnv, unknown
from agentrl_envs import limited_calls
from agentrl_envs.math_answers import ROUNDED_DIGITS, checked_digits, judged_by
from agentrl_envs.problem_files import choose_problems
from agentrl_envs.problems import Check, Problem

TEXTS = ("plain", "short")
INSTRUCTIONS = "Give the answer as <answer>...</answer>."


class ReasoningEnv(OneStepEnv):
    r"""One-step problems with a checkable answer.

    The answer is the last \boxed{…} of the reply, else its last <answer>…</answer>, else the entire reply.
    The reward is 1 for the correct answer, else 0.

    Args:
        split: The split from which `reset` draws a problem when it is given none.
        max_steps: The number of steps per episode, which is always 1.
        kinds: The kinds of generated problems, one name or several, None for all; see `problems.KINDS`.
        level: The level of generated problems, 1 to 5, or the lowest and the highest; None is 2.
        data: The file of problems to use instead of generated ones, or split -> file; see `problem_files`.
        test_share: The fraction of a single file's problems that forms the test split.
        check: How a file's answers are judged, "number" or "mathematics" (extra `math`); None selects
            "number" if all of them are plain numbers.
        rounded_digits: The number of significant digits, correctly rounded, from which a decimal counts as an
            answer that is a fraction or irrational: 0.333333 is 1/3, 0.333 is not. None accepts only exact
            values. If the correct answer is a decimal, a relative error of 1e-9 is always allowed.
        text: "plain" appends the answer format to the question, "short" is the bare question.
        expert: Whether to add `info["expert"]`, the correct answer.
    """

    thread_safe: ClassVar[bool] = True
    instructions: ClassVar[str] = f"Solve a problem. {INSTRUCTIONS}"

    def __init__(
        self,
        split: str = "train",
        max_steps: int = 1,
        kinds: str | Sequence[str] | None = None,
        level: int | Sequence[int] | None = None,
        data: str | Path | Mapping[str, str] | None = None,
        test_share: float = 0.1,
        check: Check | None = None,
        rounded_digits: int | None = ROUNDED_DIGITS,
        text: str = "plain",
        expert: bool = False,
    ) -> None:
        problems, label = choose_problems(kinds, level, data, test_share, check)
        if text not in TEXTS:
            raise unknown("text", text, TEXTS)
        self._rounded_digits = checked_digits(rounded_digits)
        ending = f"\n{INSTRUCTIONS}" if text == "plain" else ""
        wrap = "<answer>{}</answer>" if text == "plain" else "{}"
        super().__init__(
            {name: _Prompts(rows, ending, rounded_digits) for name, rows in problems.items()},
            self._score,
            split=split,
            max_steps=max_steps,
            data=label,
            solve=lambda task: wrap.format(task["problem"]["answer"]),
            expert=expert,
        )

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Start the task `options["task"]`, or one drawn from the split, and return (prompt, info)."""
        prompt, info = super().reset(seed=seed, options=options)
        return prompt, info | {"task_text": prompt.removesuffix(f"\n{INSTRUCTIONS}")}

    def _score(self, task: Mapping[str, Any], reply: str) -> float:
        problem = Problem(**task["problem"])
        limited_calls.calls.join(self)
        return float(problem.solved_by(reply, self._rounded_digits))

    def close(self) -> None:
        """Release the shared processes."""
        limited_calls.calls.leave(self)


class _Prompts(Sequence[Mapping[str, Any]]):
    """Lazy view of problems as the tasks of `OneStepEnv`."""

    def __init__(self, problems: Sequence[Problem], ending: str, rounded_digits: int | None) -> None:
        self._problems, self._ending = problems, ending
        self._judged = judged_by(rounded_digits)

    def __len__(self) -> int:
        return len(self._problems)

    def __getitem__(self, index: Any) -> Any:
        problem = self._problems[index]
        return {
            "prompt": problem.question + self._ending,
            "task_type": problem.task_type,
            "problem": problem.content(),
            **self._judged,
        }
