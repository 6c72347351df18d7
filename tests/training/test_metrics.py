"""What a step's episodes say, in numbers that can be redone by hand."""

import pytest

from agentrl.data import Episode, StopReason, Turn
from agentrl.training.metrics import rollout_metrics


def episode(kind: str, *turns: tuple[float, ...], stop: StopReason = StopReason.TERMINATED) -> Episode:
    made = tuple(
        Turn("o", "a", action_ids=(1,) * len(entropies), entropies=entropies, reward=1.0)
        for entropies in turns
    )
    return Episode("e", "env", "task", 0, made, stop, success=True, task_type=kind)


def test_entropy_is_told_at_three_levels_and_for_every_task_type() -> None:
    told = rollout_metrics(
        [
            episode("find", (0.2, 0.6, 1.0), (1.5, 0.1)),
            episode("look", (0.4,)),
            episode("look", (9.0,), stop=StopReason.ENV_ERROR),  # says nothing about the policy
        ]
    )
    assert told["rollout/entropy/token"] == pytest.approx(3.8 / 6)
    assert told["rollout/entropy/turn"] == pytest.approx(0.6)
    assert told["rollout/entropy/trajectory"] == pytest.approx(0.55)
    assert told["rollout/entropy/token/find"] == pytest.approx(3.4 / 5)
    assert told["rollout/entropy/turn/find"] == pytest.approx(0.7)
    assert told["rollout/entropy/trajectory/find"] == pytest.approx(0.7)
    assert told["rollout/entropy/token/look"] == pytest.approx(0.4)
    assert (told["rollout/action_tokens"], told["rollout/reply_tokens"], told["rollout/aborted_rate"]) == (
        6,
        6,
        pytest.approx(1 / 3),
    )
