"""Measure whether the replies of a policy depend on their prompts, or collapse to a template (RAGEN-2)."""

import logging
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import log
from pathlib import Path
from typing import Any

import numpy as np

from agentrl.data.trajectory import Episode
from agentrl.errors import CheckpointError
from agentrl.evaluation.diagnostics.findings import FOLDER, write_findings
from agentrl.evaluation.diagnostics.information import prompt_information
from agentrl.evaluation.diagnostics.stored import episodes_near, stored_policies
from agentrl.evaluation.diagnostics.tables import template_collapse_findings
from agentrl.evaluation.diagnostics.teacher_forcing import prompts_of, score_texts
from agentrl.policy.context import context_length
from agentrl.policy.thinking import EndingMatcher, Thinking
from agentrl.run.folder import Run, open_run
from agentrl.run.policies import Policy, open_saved
from agentrl.run.trust import drop_caller_only_values
from agentrl.seeds import derive_seed

_log = logging.getLogger(__name__)

NAME = "template_collapse"


@dataclass(frozen=True)
class Pair:
    """A prompt and what the policy said after it, as token ids.

    Args:
        prompt: The prompt.
        said: The thoughts of the reply, or the whole reply if it has none.
        thought: Whether they are thoughts.
    """

    prompt: tuple[int, ...]
    said: tuple[int, ...]
    thought: bool


def measure_template_collapse(
    run: Run | str | Path, *, pairs: int = 64, seed: int = 0, checkpoint: str | None = None
) -> dict[str, Any]:
    """Measure the mutual information of prompts and replies for each checkpoint of a run.

    Each policy scores the replies of the stored rollout of the nearest step after every prompt of the sample,
    by teacher forcing. The numbers are written to RUN/diagnostics.

    Args:
        run: The run, its folder or name.
        pairs: The number N of prompts with their replies; N x N texts are scored.
        seed: The seed of the choice of turns.
        checkpoint: The name or training step of one checkpoint; None measures all that there are.

    Raises:
        CheckpointError: If the run has no policy, or no episodes.
    """
    opened = run if isinstance(run, Run) else open_run(run)
    config = drop_caller_only_values(opened.config)
    found = []
    for stored in stored_policies(opened, checkpoint):
        source, episodes = episodes_near(opened, stored.step)
        policy = open_saved(stored.saved, config)
        sample = draw_pairs(policy, episodes, pairs, seed)
        if len(sample) < 2:
            raise CheckpointError(
                f"{opened.folder / 'episodes' / source}: {len(sample)} turns with a reply of the policy, "
                "wanted at least 2"
            )
        _log.info("%s scores %d replies after each of their prompts", stored.name, len(sample))
        head = {"checkpoint": stored.name, "step": stored.step, "episodes": source}
        found.append(head | score_pairs(policy, sample))
    numbers = {"run": opened.folder.resolve().name, "seed": seed, "policies": found}
    from agentrl.evaluation.diagnostics.drawing import draw_template_collapse

    findings = template_collapse_findings(numbers)
    write_findings(opened.folder / FOLDER, NAME, numbers, findings, draw_template_collapse)
    return numbers


def draw_pairs(policy: Policy, episodes: Sequence[Episode], count: int, seed: int) -> list[Pair]:
    """Draw turns that the policy decided; prompts that have no room for the longest reply are left out."""
    thinking: Thinking | None = getattr(policy.dialogue, "thinking", None)
    turns = [
        (prompt, turn.action_ids)
        for episode in episodes
        for prompt, turn in zip(prompts_of(episode), episode.turns, strict=True)
        if prompt and turn.trainable and any(turn.action_mask)
    ]
    random.Random(derive_seed(seed, NAME)).shuffle(turns)
    drawn = [
        Pair(prompt, thoughts or reply, bool(thoughts))
        for prompt, reply in turns[:count]
        for thoughts in [thoughts_of(reply, thinking)]
    ]
    longest = max((len(pair.said) for pair in drawn), default=0)
    room = context_length(policy.served, None) - longest
    return [pair for pair in drawn if len(pair.prompt) <= room]


def thoughts_of(reply: Sequence[int], thinking: Thinking | None) -> tuple[int, ...]:
    """Return the tokens of a reply up to the end of its thoughts; empty if it has none."""
    if thinking is None:
        return ()
    matcher = EndingMatcher(thinking.ending)
    end = next((place for place, token in enumerate(reply, start=1) if matcher.take(token) is not None), 0)
    return tuple(reply[:end])


def score_pairs(policy: Policy, pairs: Sequence[Pair]) -> dict[str, Any]:
    """Score every reply after every prompt, and return the information as JSON values."""
    prompts = list(dict.fromkeys(pair.prompt for pair in pairs))
    # Identical prompts have identical columns, which are scored once.
    texts = ((prompt, pair.said) for pair in pairs for prompt in prompts)
    scored = [sum(score.logprobs) for score in score_texts(policy.served, texts)]
    columns = np.array(scored).reshape(len(pairs), len(prompts))
    owners = [prompts.index(pair.prompt) for pair in pairs]
    found = prompt_information(columns[:, owners], [len(pair.said) for pair in pairs], owners)
    return {
        "pairs": len(pairs),
        "prompts": len(prompts),
        "with_thoughts": sum(pair.thought for pair in pairs),
        "most": log(len(pairs)),
        **asdict(found),
    }
