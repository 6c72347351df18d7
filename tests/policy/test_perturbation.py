"""Changed observations of real episodes: neither the task nor the admissible actions are ever touched."""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from agentrl.data import Episode, StopReason, Turn
from agentrl.env.registry import make
from agentrl.policy.perturbation import ObservationPerturbation, PromptView, squeeze
from agentrl.policy.prompt import load_prompt
from agentrl.policy.tokens import fit_tokenizer, make_dialogue
from agentrl.rollout.collector import collect
from agentrl.rollout.environments import EnvironmentPool
from agentrl.rollout.play import EpisodeSpec
from agentrl.rollout.players import DemonstrationPlayer
from agentrl.rollout.recording import RecordedEpisode, RecordingPlayer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXTS = ["You see a mug 1, a desk 1.", "take mug 1 from desk 1", "Your task is to: put", "closed nothing"] * 4
# Name -> whether there is a chat template, the prompt, and the environment's text.
PROMPTS = {
    "roles": (False, "plain", "compact"),
    "chat": (True, "plain", "raw"),
    "literature": (True, "literature", "raw"),
    "literature, compact": (True, "literature", "compact"),
    "react": (True, "react", "raw"),
}
KINDS = ("noise", "tokens", "items", "paraphrase")


@cache
def tokenizer(chat: bool) -> Any:
    made: Any = fit_tokenizer(TEXTS, 400)
    if chat:
        made.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
        made.chat_template = CHATML
    return made


@cache
def played(name: str) -> tuple[RecordedEpisode, ...]:
    """Episodes of ALFWorld's expert, at times of chance."""
    chat, prompt, text = PROMPTS[name]
    dialogue = make_dialogue(tokenizer(chat), max_observation_tokens=None, prompt=load_prompt(prompt))
    player = RecordingPlayer(DemonstrationPlayer(dialogue, noise=0.3, seed=1))
    id = "agentrl/ALFWorld-v0"
    with EnvironmentPool(lambda: make(id, text=text, expert=True, paraphrase=True)) as pool:
        specs = [EpisodeSpec(f"e{k}", id, f"train/{k}", k) for k in range(4)]
        found = collect(specs, player, pool, max_active=1, max_turns=12).episodes
    assert not any(episode.stop.aborted for episode in found), [episode.error for episode in found]
    return tuple(map(player.recorded, found))


def text_of(chat: bool, ids: tuple[int, ...]) -> str:
    return squeeze("".join(tokenizer(chat).decode([id]) for id in ids))


def without_changes(shown: PromptView, turn: Turn) -> bool:
    return shown.ids == turn.prompt_ids and not shown.noisy


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PROMPTS)
def test_what_surrounds_an_observation_and_the_task_in_it_stay(name: str, kind: str) -> None:
    chat = PROMPTS[name][0]
    perturb = ObservationPerturbation(tokenizer(chat), kind, 0.5, seed=3)
    changed = turns = listed = 0
    for episode in played(name):
        task = squeeze(str(episode.turns[0].info["task_text"]))
        assert squeeze(episode.turns[0].observation).count(task) == 1
        for index, (turn, request) in enumerate(zip(episode.turns, episode.requests, strict=True)):
            shown, before = perturb(episode, index), text_of(chat, turn.prompt_ids)
            turns += 1
            assert shown.changed is not without_changes(shown, turn)
            if not shown.changed:
                continue
            changed += 1
            said = squeeze(turn.observation)
            assert before.count(said) == 1
            start, end = before.partition(said)[0], before.partition(said)[2]
            after = text_of(chat, shown.ids)
            assert after.startswith(start)
            assert after.endswith(end)
            middle = after[len(start) : len(after) - len(end)]
            assert after.count(task) == before.count(task)
            # Outside of the observation nothing has changed: the list of actions is there.
            actions = "".join("-" + squeeze(action) for action in request.actions or ())
            listed += actions in end
            if kind == "noise":
                assert shown.ids == turn.prompt_ids
                noisy = "".join(text_of(chat, turn.prompt_ids[place : place + 1]) for place in shown.noisy)
                assert is_subsequence(noisy, said)
                assert task not in noisy
                assert index == 0 or noisy == said
            elif kind == "paraphrase":
                assert middle == squeeze(turn.info["paraphrase"])
            else:
                assert len(middle) < len(said)
                assert is_subsequence(middle, said)
    assert changed > turns / 4, (changed, turns)
    assert listed == (changed if name.startswith("literature") else 0)


def is_subsequence(part: str, text: str) -> bool:
    letters = iter(text)
    return all(letter in letters for letter in part)


def episode_of(tokens: Any, observation: str, task: str | None, prompt: str | None = None) -> Episode:
    ids = tuple(tokens.encode(observation if prompt is None else prompt, add_special_tokens=False))
    info = {} if task is None else {"task_text": task}
    turn = Turn(observation, "a", ids, (1,), new_sequence=True, info=info)
    return Episode("e", "env", "t", 0, (turn,), StopReason.TERMINATED)


def test_items_of_the_task_stay_and_the_others_go() -> None:
    tokens = tokenizer(False)
    text = "On the desk 1, you see a mug 1, a pen 2. Your task is to: put a mug in desk."
    perturb = ObservationPerturbation(tokens, "items", 1.0, seed=0)
    shown = perturb(episode_of(tokens, text, "put a mug in desk"), 0)
    assert text_of(False, shown.ids) == squeeze(
        "On the desk 1, you see a mug 1, Your task is to: put a mug in desk."
    )


def test_draws_follow_seed_episode_and_turn_alone() -> None:
    (first, other, *_), kinds = played("chat"), ("tokens", "items")
    for kind in kinds:
        one, same, seeded = (ObservationPerturbation(tokenizer(True), kind, 0.5, seed) for seed in (0, 0, 1))
        turns = range(1, len(first.turns))
        forward = [one(first, index) for index in turns]
        assert [same(first, index) for index in reversed(turns)] == forward[::-1]
        assert [seeded(first, index) for index in turns] != forward
    noise = ObservationPerturbation(tokenizer(True), "noise", 0.5, 0)
    seeds = {noise(each, index).seed for each in (first, other) for index in range(2)}
    assert len(seeds) == 4


def test_what_cannot_be_told_apart_stays() -> None:
    tokens = tokenizer(False)
    perturb = ObservationPerturbation(tokens, "tokens", 1.0, seed=0)
    for episode in (
        episode_of(tokens, "closed", "x", prompt="closed or closed"),  # twice
        episode_of(tokens, "a long observation", "x", prompt="a long"),  # cut
        episode_of(tokens, "put mug in desk", None),  # the task, as far as is known
        episode_of(tokens, "", "x", prompt="nothing"),
        episode_of(tokens, "put mug in desk", "put mug in desk"),  # the task alone
    ):
        assert without_changes(perturb(episode, 0), episode.turns[0]), episode
        assert not perturb(episode, 0).changed


def test_a_paraphrase_that_loses_the_task_or_is_none_is_not_used() -> None:
    tokens = tokenizer(False)
    perturb = ObservationPerturbation(tokens, "paraphrase", 1.0, seed=0)
    episode = episode_of(tokens, "put mug in desk: drawer 1", "put mug in desk")
    for given in ({}, {"paraphrase": None}, {"paraphrase": "drawer 1"}):
        turn = replace(episode.turns[0], info={**episode.turns[0].info, **given})
        assert not perturb(replace(episode, turns=(turn,)), 0).changed
    turn = replace(
        episode.turns[0], info={**episode.turns[0].info, "paraphrase": "put mug in desk: a drawer"}
    )
    shown = perturb(replace(episode, turns=(turn,)), 0)
    assert text_of(False, shown.ids) == squeeze("put mug in desk: a drawer")
