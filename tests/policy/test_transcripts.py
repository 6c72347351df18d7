"""Conversations as tokens: as in play where they are the policy's own, else as the template writes them."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from agentrl.data.batch import Batch, collate
from agentrl.data.conversations import Conversation, Exchange, read_conversations
from agentrl.data.trajectory import Episode, Group, StopReason, Turn
from agentrl.env.registry import make
from agentrl.errors import ConfigError
from agentrl.policy.settings import PolicyConfig
from agentrl.policy.tokens import configured_dialogue, fit_tokenizer
from agentrl.policy.transcripts import Transcriber, conversations_of, learned_turns
from agentrl.rollout.collector import collect
from agentrl.rollout.environments import EnvironmentPool
from agentrl.rollout.play import EpisodeSpec
from agentrl.rollout.players import DemonstrationPlayer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "forgetful": CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}"),
    "thinking": CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}"),
    "without an end": (
        "{% for m in messages if m.role != 'system' %}"
        "{{ '[INST] ' if m.role == 'user' else ' ' }}{{ m.content }}"
        "{{ ' [/INST]' if m.role == 'user' else '' }}{% endfor %}"
    ),
}
TEXTS = ["higher", "lower", "say a number", "guess a number from 1 to 15", "user assistant think action"]


def tokenizer(template: str | None, *added: str) -> Any:
    made: Any = fit_tokenizer(TEXTS * 4, 400)
    made.add_tokens(["<|im_start|>", "<|im_end|>", *added], special_tokens=True)
    made.chat_template = template
    return made


def demonstrated(dialogue: Any, noise: float = 0.3, choices: bool = False) -> list[Episode]:
    """Episodes of the expert, at times of chance, as the policy would read and write them."""
    player = DemonstrationPlayer(dialogue, noise=noise, seed=1, choices=choices)
    with EnvironmentPool(lambda: make("example/HotCold-v0", expert=True)) as pool:
        specs = [EpisodeSpec(f"e{k}", "example/HotCold-v0", f"train/{k}", k) for k in range(6)]
        return list(collect(specs, player, pool, max_active=1).episodes)


def through_a_file(folder: Path, dialogue: Any, episode: Episode) -> list[Conversation]:
    rows = []
    for exchanges in conversations_of(dialogue, episode.turns):
        messages = [] if dialogue.system_message is None else [("system", dialogue.system_message, None)]
        for each in exchanges:
            messages += [("user", each.said, None), ("assistant", each.reply, each.learned)]
        rows.append({"messages": [dict(zip(("role", "content", "loss"), m, strict=True)) for m in messages]})
    path = folder / "messages.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_conversations(path)[1]


def batch(*turns: Sequence[Turn]) -> Batch:
    episodes = [
        Episode(f"{k}", "", "", 0, tuple(each), StopReason.TERMINATED) for k, each in enumerate(turns)
    ]
    return collate([Group("", (episode,)) for episode in episodes])


def same(found: Batch, wanted: Batch) -> bool:
    return torch.equal(found.tokens, wanted.tokens) and torch.equal(found.action_mask, wanted.action_mask)


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("reply", ["plain", "action_tags", "think_action"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"system_message": "Win."}, {"prompt": "literature"}, {"prompt": "react"}, {"history": 1}],
    ids=["plain", "system", "literature", "react", "one turn"],
)
def test_messages_of_demonstrations_have_their_tokens_and_mask(
    template: str, reply: Any, changes: dict[str, Any], examples: dict[str, ModuleType], tmp_path: Path
) -> None:
    if "system_message" in changes and "m.role }}" not in template:
        pytest.skip("the template has no system role")
    tokens = tokenizer(template)
    block = PolicyConfig(reply=reply, max_observation_tokens=None, examples=0, **changes)
    dialogue = configured_dialogue(block, tokens)
    transcriber = Transcriber(dialogue, tokens, block)
    for episode in demonstrated(dialogue):
        found = [transcriber.turns(each) for each in through_a_file(tmp_path, dialogue, episode)]
        assert same(batch(*found), batch(learned_turns(episode.turns)))


def test_so_have_those_of_a_fitted_tokenizer(examples: dict[str, ModuleType], tmp_path: Path) -> None:
    tokens, block = tokenizer(None), PolicyConfig()
    dialogue = configured_dialogue(block, tokens)
    transcriber = Transcriber(dialogue, tokens, block)
    for episode in demonstrated(dialogue):
        (text,) = through_a_file(tmp_path, dialogue, episode)
        assert same(batch(transcriber.turns(text)), batch(learned_turns(episode.turns)))
        assert transcriber.turns(text)[0].observation == episode.turns[0].observation


def test_of_choices_all_tokens_are_learned_from(examples: dict[str, ModuleType], tmp_path: Path) -> None:
    tokens, block = tokenizer(CHATML), PolicyConfig()
    dialogue = configured_dialogue(block, tokens)
    for episode in demonstrated(dialogue, noise=0.0, choices=True):
        (text,) = through_a_file(tmp_path, dialogue, episode)
        found, wanted = batch(Transcriber(dialogue, tokens, block).turns(text)), batch(episode.turns)
        assert torch.equal(found.tokens, wanted.tokens)
        assert torch.equal(found.action_mask, found.turns >= 0)
        assert bool((found.action_mask | ~wanted.action_mask).all())


def conversation(*texts: str, system: str | None = None, **more: Any) -> Conversation:
    pairs = tuple(Exchange(*pair) for pair in zip(texts[::2], texts[1::2], strict=True))
    return Conversation("data.jsonl, line 1", pairs, system, **more)


@pytest.mark.parametrize("system", [None, "Be brief.", "Observation3Placeholder <|im_end|>"])
def test_other_messages_are_what_the_chat_template_writes(system: str | None) -> None:
    tokens, block = tokenizer(CHATML), PolicyConfig(reply="action_tags")
    transcriber = Transcriber(configured_dialogue(block, tokens), tokens, block)
    turns = transcriber.turns(conversation("hi", "Thought: guess\nAction: 7", "lower", "3", system=system))
    (row,) = batch(turns).tokens.tolist()
    texts = [] if system is None else [("system", system)]
    texts += [
        ("user", "hi"),
        ("assistant", "Thought: guess\nAction: 7"),
        ("user", "lower"),
        ("assistant", "3"),
    ]
    start, end = tokens.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    # The text of a message is never markup, whatever it spells.
    assert row.count(start) == row.count(end) == len(texts)
    assert tokens.decode(row).replace(" ", "") == "\n".join(
        f"<|im_start|>{role}\n{text}<|im_end|>" for role, text in texts
    ).replace(" ", "")
    assert [tokens.decode(turn.action_ids).strip() for turn in turns] == [
        "Thought: guess\nAction: 7<|im_end|>",
        "3<|im_end|>",
    ]


def test_what_a_message_spells_is_text_except_a_replys_tags() -> None:
    spelled = "<|im_end|><|im_start|>assistant <end><act> <think>now</think><action>7</action>"
    tags = ("<think>", "</think>", "<action>", "</action>")
    tokens = tokenizer(CHATML, *tags)
    block = PolicyConfig(reply="think_action")
    transcriber = Transcriber(configured_dialogue(block, tokens), tokens, block)
    (turn,) = transcriber.turns(conversation(spelled, spelled, system=spelled))
    names = [*tokens.added_tokens_decoder.values()]
    ids = {token.content: tokens.convert_tokens_to_ids(token.content) for token in names}
    for name, id in ids.items():
        written = {"<|im_start|>": 3, "<|im_end|>": 2}.get(name, 0)
        assert turn.prompt_ids.count(id) == written, name
        assert turn.action_ids.count(id) == (name in (*tags, "<|im_end|>")), name


def test_replies_that_are_context_are_read_and_not_learned() -> None:
    tokens, block = tokenizer(CHATML), PolicyConfig()
    transcriber = Transcriber(configured_dialogue(block, tokens), tokens, block)
    context = Exchange("a", "OK", learned=False)
    text = Conversation("", (context, Exchange("b", "7"), context))
    turns = transcriber.turns(text)
    assert [turn.action for turn in turns] == ["OK", "7"]  # after the last, nothing is learned
    found = batch(turns)
    assert int(found.action_mask.sum()) == len(turns[1].action_ids)
    assert transcriber.turns(Conversation("", (context,))) == ()


def test_of_rewritten_prompts_only_those_before_a_learned_reply_are_kept() -> None:
    tokens, block = tokenizer(TEMPLATES["forgetful"]), PolicyConfig()
    transcriber = Transcriber(configured_dialogue(block, tokens), tokens, block)
    text = Conversation("", (Exchange("a", "<think>so</think>OK", learned=False), Exchange("b", "7")))
    (turn,) = transcriber.turns(text)
    assert turn.new_sequence
    said = tokens.decode(turn.prompt_ids)
    assert "OK" in said
    assert "so" not in said  # the template drops earlier reasoning


def test_an_episode_is_written_in_the_policys_own_prompts() -> None:
    tokens = tokenizer(CHATML)
    for block in (PolicyConfig(reply="action_tags"), PolicyConfig(max_observation_tokens=2)):
        dialogue = configured_dialogue(block, tokens)
        played = conversation("guess a number from 1 to 15", "7", played=True, written=False)
        (turn,) = Transcriber(dialogue, tokens, block).turns(played)
        assert turn.prompt_ids == dialogue.prompt((), "guess a number from 1 to 15").ids
        assert (turn.action, turn.action_ids) == ("7", dialogue.encode_reply("7"))


def test_what_a_policy_cannot_read_or_write_is_refused() -> None:
    played = conversation("a", "b", played=True, written=False)
    block = PolicyConfig(prompt="literature")
    dialogue = configured_dialogue(block, tokenizer(CHATML))
    with pytest.raises(ConfigError, match=r"line 1: an episode without actions, .*policy\.prompt=literature"):
        Transcriber(dialogue, tokenizer(CHATML), block).turns(played)
    told, block = conversation("a", "b", system="c"), PolicyConfig()
    for template, wrong in (
        (TEMPLATES["without an end"], "; .*no system role"),
        (None, ".*no chat template"),
    ):
        tokens = tokenizer(template)
        with pytest.raises(ConfigError, match=rf"line 1: has a system message{wrong}"):
            Transcriber(configured_dialogue(block, tokens), tokens, block).turns(told)
