"""Runs whose policy replies with tool calls: cloning, then training, then evaluation."""

from pathlib import Path

import pytest
from chat_models import chat_model
from tool_templates import CHATML, HERMES

import agentrl
from agentrl.data.storage import read_episodes

pytestmark = pytest.mark.usefixtures("undrawn")

MATH = ("env.id=agentrl/MathTools-v0", "env.kwargs.tools=calculator", "env.kwargs.max_steps=3")
ALFWORLD = (
    "env.id=agentrl/ALFWorld-v0",
    "env.kwargs.max_receptacles=4",
    "env.kwargs.object_types=2",
    "env.kwargs.menu=task",
    "env.kwargs.max_steps=14",
)


@pytest.mark.parametrize(("env", "template"), [(MATH, HERMES), (ALFWORLD, CHATML)], ids=["math", "alfworld"])
def test_a_policy_that_calls_tools_is_cloned_trained_and_evaluated(
    env: tuple[str, ...], template: str, tmp_path: Path
) -> None:
    config = agentrl.load_config(
        None,
        *env,
        f"policy.path={chat_model(tmp_path / 'tiny', template=template)}",
        "policy.preset=scratch",
        "policy.reply=tool_call",
        "policy.max_context=4096",
        "engine.max_tokens=12",
        "rollout.groups_per_step=1",
        "rollout.group_size=2",
        "rollout.placement=inline",
        "algorithm.drop_equal_groups=false",
        "warm_start.steps=2",
        "warm_start.demonstrations=3",
        "warm_start.batch_size=1",
        "trainer.steps=2",
        "trainer.save_episodes_every=1",
        "evaluation.split=test" if env is MATH else "evaluation.split=valid_unseen",
        "evaluation.tasks=1",
        "evaluation.baselines=[]",
        "evaluation.instruction_check=false",
        f"run.folder={tmp_path}",
        "run.name=calls",
    )
    run = agentrl.train(config, quiet=True)
    episodes = read_episodes(run.folder / "episodes" / "train-000002.parquet")
    turns = [turn for episode in episodes for turn in episode.turns]
    assert len(episodes) == 2
    assert all(not episode.stop.aborted for episode in episodes)
    if env is ALFWORLD:  # a choice among calls
        assert all(turn.valid and turn.allowed for turn in turns)
    else:  # an untrained policy writes none, and each turn says so
        assert {turn.action for turn in turns} == {"invalid tool call: the reply has no call"}
        assert not any(turn.valid or turn.allowed for turn in turns)
    assert agentrl.evaluate(run, temperature=0.0).to_dict()["aborted"] == 0
