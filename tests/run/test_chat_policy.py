"""A Hugging Face folder with a chat template through the whole of a run, constrained and free."""

from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import agentrl
from agentrl.data.storage import read_episodes
from agentrl.policy.model import build_model, save_policy
from agentrl.policy.settings import PolicyConfig
from agentrl.policy.tokens import fit_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Reasoning is dropped from every earlier reply, so no prompt extends the one before.
FORGETFUL = CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")


def chat_folder(folder: Path, template: str) -> Path:
    texts = ["higher", "lower", "say a number", "guess a number from 1 to 15", "user assistant think action"]
    tokenizer: Any = fit_tokenizer(texts * 4, 400)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.chat_template = template
    model = build_model(replace(PolicyConfig(device="cpu"), hidden_size=32, heads=1), tokenizer, seed=0)
    save_policy(model, tokenizer, folder)
    return folder


@pytest.mark.parametrize("template", [CHATML, FORGETFUL], ids=["appending", "rewriting"])
@pytest.mark.parametrize("reply", ["plain", "action_tags", "think_action"])
@pytest.mark.parametrize("constrained", [True, False])
def test_a_chat_model_trains(
    template: str, reply: str, constrained: bool, examples: dict[str, ModuleType], tmp_path: Path
) -> None:
    config = agentrl.load_config(
        None,
        "env.id=example/HotCold-v0",
        f"policy.path={chat_folder(tmp_path / 'chat', template)}",
        f"policy.reply={reply}",
        "engine.max_tokens=24",
        f"rollout.constrained={str(constrained).lower()}",
        "rollout.groups_per_step=2",
        "rollout.group_size=2",
        "algorithm.drop_equal_groups=false",
        "warm_start.steps=2",
        "warm_start.demonstrations=24",
        "trainer.steps=1",
        "trainer.save_episodes_every=1",
        "evaluation.split=test",
        "evaluation.tasks=2",
        "evaluation.baselines=[cloned]",
        f"run.folder={tmp_path}",
        "run.name=chat-run",
    )
    run = agentrl.train(config, quiet=True)
    episodes = read_episodes(run.folder / "episodes" / "train-000001.parquet")
    later = [turn for episode in episodes for turn in episode.turns[1:]]
    assert {turn.fresh for turn in later} == {template == FORGETFUL}
    if constrained:
        assert all(turn.valid for turn in later)
    assert agentrl.evaluate(run, temperature=0.0).to_dict()["aborted"] == 0
