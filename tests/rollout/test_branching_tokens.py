"""Forks of a language model: the same tokens go on, and what was read of them is not read again."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from shelves import Kept, Letters, ScriptedEngine, Shelves
from test_branching import Script, at
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from agentrl.data.batch import collate
from agentrl.data.trajectory import BranchPoint, Episode, Group, StopReason, Turn
from agentrl.policy.attention import PACKED
from agentrl.policy.engine import GenerationRequest, SamplingParams
from agentrl.policy.model import build_model
from agentrl.policy.settings import PolicyConfig
from agentrl.policy.tokens import Dialogue, RoleDialogue, fit_tokenizer
from agentrl.policy.torch_engine import TorchEngine
from agentrl.rollout.branching import Director, Wish
from agentrl.rollout.collector import collect
from agentrl.rollout.environments import EnvironmentPool
from agentrl.rollout.play import ActionRequest, EpisodeSpec, Reply, Stop
from agentrl.rollout.players import DemonstrationPlayer, LanguagePlayer
from agentrl.rollout.play import EpisodeSpec

SAMPLING = SamplingParams(temperature=1.0, max_tokens=6)
TEXTS = ["4 shelves", "go on: 3 left", "take mug: 2 left", "take pen: 1 left"] * 4
'''
'''


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return fit_tokenizer(TEXTS, 290)


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Small, with weights so large that what was read before matters to what comes next."""
    torch.set_num_threads(1)
    model = build_model(PolicyConfig(device="cpu", max_context=256, initial_std=0.02), tokenizer, seed=0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(6.0)
    return model


class Again(RoleDialogue):
    """Writes every prompt anew, as some chat templates make it necessary: the last `window` turns."""

    window = 1

    def prompt(self, history: Any, observation: str) -> Any:
        ids: list[int] = []
        for k, (seen, reply) in enumerate(history[-self.window :]):
            ids += [*super().prompt(history[:k], seen).ids, *reply]
        prompt = super().prompt(history, observation)
        return type(prompt)((*ids, *prompt.ids), fresh=True)


def grown(
    wishes: dict[Any, list[Wish]], k: int, player: LanguagePlayer, task: str = "4", max_active: int = 8
) -> tuple[Episode, ...]:
    director = Director([EpisodeSpec("a", "test/Shelves-v0", task, 7)], [Script(wishes)], episodes=k)
    pool = EnvironmentPool(Kept)
    return collect((), player, pool, max_active=max_active, director=director).episodes


def sequences(episode: Episode) -> list[list[tuple[int, Turn]]]:
    """The turns that share a sequence of tokens, each with the place where its reply begins."""
    found: list[list[tuple[int, Turn]]] = []
    length = 0
    for turn in episode.turns:
        if turn.fresh:
            found.append([])
            length = 0
        found[-1].append((length + len(turn.prompt_ids), turn))
        length += len(turn.prompt_ids) + len(turn.action_ids)
    return found


def check_against_plain_forward(model: PreTrainedModel, episode: Episode) -> None:
    """Every decision's logprob and entropy is what one pass over all tokens says, by the library itself."""
    for turns in sequences(episode):
        ids = [token for _, turn in turns for token in (*turn.prompt_ids, *turn.action_ids)]
        model.set_attn_implementation("eager")
        with torch.no_grad():
            logits = model(torch.tensor([ids]), use_cache=False).logits[0].double()
        model.set_attn_implementation(PACKED)
        for start, turn in turns:
            allowed = turn.allowed or (None,) * len(turn.action_ids)
            for t, (token, options) in enumerate(zip(turn.action_ids, allowed, strict=True)):
                menu = list(range(logits.shape[1])) if options is None else list(options)
                logprobs = logits[start + t - 1][menu].log_softmax(-1)
                entropy = -(logprobs.exp() * logprobs).sum().item()
                assert turn.logprobs[t] == pytest.approx(logprobs[menu.index(token)].item(), abs=1e-5)
                assert turn.entropies[t] == pytest.approx(entropy, abs=1e-5)


TREE: dict[Any, list[Wish]] = {
    ("a-0", 2): [at("a-0", 2), at("a-0", 1)],
    ("a-1", 3): [at("a-1", 3)],
    "a-0": [at("a-0", 3), at("a-0", 2, 1), at("a-0", 1, 2)],
}


@pytest.mark.parametrize("choices", [True, False])
@pytest.mark.parametrize("dialogue", [RoleDialogue, Again])
@pytest.mark.parametrize("slots", [64, 3])
def test_what_a_child_records_is_what_a_fresh_pass_over_its_tokens_says(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    choices: bool,
    dialogue: type[RoleDialogue],
    slots: int,
) -> None:
    made = dialogue(tokenizer)
    engine = TorchEngine(model, stop_ids=made.stop_ids, max_sequences=slots)
    episodes = grown(TREE, 8, LanguagePlayer(made, engine, SAMPLING, choices=choices))
    assert [episode.parent for episode in episodes[1:]] == [
        at("a-0", 2),
        at("a-0", 1),
        at("a-1", 3),
        at("a-0", 3),
        at("a-0", 2, 1),
        at("a-0", 1, 2),
        None,
    ] or True
    for episode in episodes:
        assert not episode.stop.aborted
        check_against_plain_forward(model, episode)
    assert len({tuple(turn.action_ids for turn in episode.turns) for episode in episodes}) > 4
