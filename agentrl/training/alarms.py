"""Warn of what looks like progress and is none."""

import warnings
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from agentrl.data.trajectory import StopReason
from agentrl.learn.learner import Learner
from agentrl.policy.chat_dialogue import ChatDialogue
from agentrl.policy.model import context_limit
from agentrl.run.logger import Row, RunLogger
from agentrl.run.tasks import tasks_by_environment
from agentrl.training.setup import Session

_IDLE_STEPS = 10  # steps without an update before the warning
_MIN_MOVED_SHARE = 0.2  # of the weights with a gradient; below, updates are lost to rounding
_MAX_FULL_CONTEXTS = 0.1  # share of episodes that end by a full context before the warning
_TASKS_READ = 20  # training tasks whose first observation is measured


class Alarms:
    """The warnings of a run, which go to the log.

    Args:
        session: What the run works with.
        logger: Shows the warnings.
        quiet: Whether the logger shows nothing.
    """

    def __init__(self, session: Session, logger: RunLogger, *, quiet: bool) -> None:
        self._session, self._logger, self._quiet = session, logger, quiet
        self._idle_steps = 0
        self._warned_of_rounding = self._warned_of_full_contexts = False
        self._stops: Counter[str] = Counter()  # of the run's own policy

    def warn(self, text: str) -> None:
        """Log a warning, and raise a RuntimeWarning where the log is not shown."""
        if self._quiet:
            warnings.warn(text, RuntimeWarning, stacklevel=2)
        self._say(text)

    def check_start(self) -> None:
        """Warn of settings that cannot teach what they are meant to."""
        if self._session.other_prompts is not None and self._session.ranks.first:
            self.warn(self._session.other_prompts)
        self._check_first_observations()
        self._check_thoughts()
        self._check_group_size()

    def check_step(self, *, learned: bool, stops: Mapping[str, int]) -> None:
        """Warn when steps teach nothing, or when contexts are full.

        Args:
            learned: Whether the step made an update.
            stops: How many of its episodes ended for which reason.
        """
        self._idle_steps = 0 if learned else self._idle_steps + 1
        if self._idle_steps == _IDLE_STEPS:
            algorithm, block = self._session.algorithm, self._session.config.rollout
            self._say(
                f"nothing was learned in {_IDLE_STEPS} steps: no group of "
                f"{algorithm.rollout.episodes or block.group_size} had episodes of different returns"
            )
        self.check_contexts(stops)

    def check_rounding(self, stage: str, step: int, metrics: Row, learner: Learner) -> None:
        """Warn once when updates are smaller than the last digit of most weights."""
        moved = metrics.get(f"{stage}/learner/weights_moved", 1.0)
        if self._warned_of_rounding or moved >= _MIN_MOVED_SHARE:
            return
        self._warned_of_rounding = True
        rate = metrics[f"{stage}/learner/learning_rate"]
        block = "warm_start.learner" if stage == "warm_start" else "learner"
        matrices = " and .matrix_learning_rate" if learner.config.optimizer == "muon" else ""
        self._say(
            f"{stage} step {step} moved {moved:.1%} of the weights that had a gradient, at a learning rate "
            f"of {rate:.3g}: the rest of the update was smaller than the last digit of a float32; "
            f"raise {block}.learning_rate{matrices}"
        )

    def check_contexts(self, stops: Mapping[str, int]) -> None:
        """Warn once when many episodes ended by a full context, and so count as failures."""
        self._stops.update(stops)
        full, total = self._stops[StopReason.CONTEXT_LIMIT], self._stops.total()
        if self._warned_of_full_contexts or full / total <= _MAX_FULL_CONTEXTS:
            return
        self._warned_of_full_contexts = True
        block, limit = self._session.config.policy, context_limit(self._session.policy.model)
        most = ", which is all that the model can do" if block.max_context == limit else ""
        self._say(
            f"{full} of {total} episodes ended by context_limit and count as failures: a sequence holds "
            f"policy.max_context={block.max_context} tokens{most}, and one observation takes "
            + (
                "as many as it has"
                if block.max_observation_tokens is None
                else f"up to policy.max_observation_tokens={block.max_observation_tokens}"
            )
        )

    def _say(self, text: str) -> None:
        self._logger.say(f"warning: {text}")

    def _check_first_observations(self) -> None:
        """Warn of tasks that the policy cannot read to their end."""
        session = self._session
        limit, cut = session.config.policy.max_observation_tokens, 0
        if limit is None:
            return
        tasks = [
            own[index]
            for own in tasks_by_environment(session.tasks)
            for index in range(min(_TASKS_READ, len(own)))
        ]
        for task in tasks:
            environments, known = session.environments.find(task)
            with suppress(Exception), environments.borrow() as environment:  # an episode records it
                text, _ = environment.reset(seed=0, options={"task": known})
                cut += len(session.policy.tokenizer.encode(text, add_special_tokens=False)) > limit
        if cut:
            self._say(
                f"policy.max_observation_tokens={limit} cuts the first observation of {cut} in {len(tasks)} "
                "training tasks; the policy never reads the rest"
            )

    def _check_thoughts(self) -> None:
        """Warn of a policy that is asked to think, and cannot."""
        session, config = self._session, self._session.config
        dialogue, most = session.policy.dialogue, config.engine.max_tokens
        if config.policy.reply != "think_action" or not isinstance(dialogue, ChatDialogue):
            return
        if dialogue.thinking is None:
            self._say(
                "policy.reply=think_action, but the chat template's prompt has a closed think block already: "
                "replies hold the command alone, and no thoughts"
            )
            return
        if not config.rollout.constrained:
            return
        for own in tasks_by_environment(session.tasks):
            environments, known = session.environments.find(own[0])
            choices: list[Any] = []
            with suppress(Exception), environments.borrow() as environment:  # an episode records it
                _, info = environment.reset(seed=0, options={"task": known})
                choices = [dialogue.encode_choice(action) for action in info.get("actions") or ()]
            room = dialogue.thinking.room(most, choices) if choices else most
            if room < 1:
                self._say(
                    f"engine.max_tokens={most} leaves no room to think before the first task's commands, "
                    f"wanted at least {most - room + 1}; until then replies hold no thoughts"
                )

    def _check_group_size(self) -> None:
        """Warn of an algorithm that compares episodes, and gets one of each task."""
        config, algorithm = self._session.config, self._session.algorithm
        size = algorithm.rollout.episodes or config.rollout.group_size
        if size == 1 and algorithm.compares and config.trainer.steps:
            self._say(
                f"rollout.group_size is 1, but algorithm.name={config.algorithm.name} compares the episodes "
                "of a group, and one alone teaches it little or nothing; wanted at least 2"
            )
