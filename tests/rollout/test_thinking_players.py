"""Episodes of a policy that thinks before it chooses, and forks anywhere in its replies."""

from typing import Any

import pytest
import torch
from shelves import SnapshotShelves
from test_branching import Script, at
from test_branching_tokens import ACTIONS, Shop, check_against_plain_forward
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from agentrl.algorithms.hooks import Context
from agentrl.algorithms.methods.aepo import AEPO
from agentrl.algorithms.methods.fr3e import FR3E
from agentrl.algorithms.recipe import build_recipe
from agentrl.data.trajectory import Episode, Outcome, StopReason, Turn
from agentrl.policy.chat_dialogue import ChatDialogue
from agentrl.policy.engine import SamplingParams
from agentrl.policy.model import build_model
from agentrl.policy.settings import PolicyConfig
from agentrl.policy.tokens import fit_tokenizer
from agentrl.policy.torch_engine import TorchEngine
from agentrl.rollout.branching import BranchScheduler
from agentrl.rollout.collector import collect
from agentrl.rollout.environments import EnvironmentPool
from agentrl.rollout.play import EpisodeSpec
from agentrl.rollout.players import DemonstrationPlayer, LanguagePlayer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\nBEGUN{% endif %}"
)
FORGETFUL = CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
TEMPLATES = {
    "appending": CHATML.replace("BEGUN", ""),
    "opened": CHATML.replace("BEGUN", "<think>\n"),
    "rewriting": FORGETFUL.replace("BEGUN", ""),
    "rewriting, opened": FORGETFUL.replace("BEGUN", "<think>\n"),
}
MOST = 48  # tokens of a reply


def chat(template: str) -> PreTrainedTokenizerFast:
    """One token ends thoughts, and some of what is read begins it."""
    made: Any = fit_tokenizer([*ACTIONS, "4 shelves", "3 left", "2 left", "1 left", "</ think"] * 4, 300)
    made.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    made.add_tokens(["</think>"])
    made.chat_template = template
    return made


@pytest.fixture(scope="module", params=list(TEMPLATES))
def table(request: pytest.FixtureRequest) -> "Table":
    return Table(TEMPLATES[request.param])


class Table:
    """A policy with its player and engine."""

    def __init__(self, template: str) -> None:
        torch.set_num_threads(1)
        self.tokenizer = chat(template)
        self.dialogue = ChatDialogue(self.tokenizer, reply="think_action", instructions="")
        config = PolicyConfig(device="cpu", max_context=1024, initial_std=0.02)
        self.model: PreTrainedModel = build_model(config, self.tokenizer, seed=0)
        with torch.no_grad():
            for weight in self.model.parameters():
                if weight.ndim == 2:
                    weight.mul_(4.0)
        self.engine = TorchEngine(self.model, stop_ids=self.dialogue.stop_ids)
        self.player = LanguagePlayer(self.dialogue, self.engine, SamplingParams(1.0, MOST))

    def play_branches(self, requests: dict[Any, list[Any]], k: int) -> tuple[Episode, ...]:
        scheduler = BranchScheduler(
            [EpisodeSpec("a", "test/Shelves-v0", "4", 7)], [Script(requests)], episodes=k
        )
        return collect((), self.player, EnvironmentPool(Shop), max_active=8, scheduler=scheduler).episodes

    def thoughts(self, turn: Turn) -> tuple[int, ...]:
        return tuple(
            token for token, ids in zip(turn.action_ids, turn.allowed or (), strict=True) if ids is None
        )

    def check(self, turn: Turn) -> None:
        """The reply says the command that was played, and holds what its format wants in its order."""
        assert turn.action in ACTIONS
        assert turn.valid
        assert self.dialogue.parse(turn.action_ids).text == turn.action
        assert turn.action_ids[
            -len(self.dialogue.encode_choice(turn.action)) :
        ] == self.dialogue.encode_choice(turn.action)
        assert len(turn.action_ids) <= MOST
        text = self.tokenizer.decode(list(turn.action_ids))
        assert text.count("</think>") == 1
        thinking = self.dialogue.thinking
        assert thinking is not None
        assert turn.action_ids[: len(thinking.opening)] == thinking.opening


def test_every_turn_thinks_for_itself_and_ends_in_an_admissible_command(table: Table) -> None:
    episodes = table.play_branches({}, 6)
    turns = [turn for episode in episodes for turn in episode.turns]
    assert {episode.outcome for episode in episodes} == {Outcome.SUCCESS}
    assert len(turns) == 24
    for turn in turns:
        table.check(turn)
    assert len({table.thoughts(turn) for turn in turns}) == len(turns)
    assert len({turn.action for turn in turns}) > 2
    for episode in episodes[:2]:
        check_against_plain_forward(table.model, episode)
    opened = table.tokenizer.decode(list(turns[0].prompt_ids)).count("<think>")
    assert opened + table.tokenizer.decode(list(turns[0].action_ids)).count("<think>") >= 1


def test_a_fork_from_anywhere_in_a_reply_goes_on_as_the_reply_would(table: Table) -> None:
    (base,) = table.play_branches({}, 1)
    reply = base.turns[1]
    places = range(1, len(reply.action_ids))
    parent, *children = table.play_branches(
        {"a-0": [at("a-0", 1, place) for place in places]}, 1 + len(places)
    )
    assert parent.turns == base.turns
    assert [child.parent.token for child in children if child.parent is not None] == [*places]
    free = [place for place, ids in enumerate(reply.allowed or ()) if ids is None]
    for child, place in zip(children, places, strict=True):
        turn = child.turns[1]
        table.check(turn)
        assert turn.action_ids[:place] == reply.action_ids[:place]
        assert not any(turn.action_mask[:place])
        if place > free[-1]:  # the thoughts are the parent's
            assert turn.action_ids[: free[-1] + 1] == reply.action_ids[: free[-1] + 1]
            assert None not in (turn.allowed or ())
        if place % 3 == 0:
            check_against_plain_forward(table.model, child)
    within = [children[place - 1].turns[1].action_ids for place in places if free[0] < place <= free[-1]]
    assert len(set(within)) == len(within) > 3


class Short(Shop):
    """Ends after its first reply, with a list of commands of which one is much longer."""

    def info(self) -> dict[str, Any]:
        return super().info() | {"actions": ["go on", "go on " + "and on " * 12]}


def test_a_command_that_leaves_no_room_for_thoughts_is_written_without_any() -> None:
    table = Table(TEMPLATES["appending"])
    spec = EpisodeSpec("a", "test/Shelves-v0", "2", 7)
    (episode,) = collect([spec], table.player, EnvironmentPool(Short), max_active=1).episodes
    assert episode.outcome == Outcome.SUCCESS
    for turn in episode.turns:
        assert table.thoughts(turn) == ()
        assert table.dialogue.parse(turn.action_ids).valid
    # A fork in the middle of the reply continues from there.
    scheduler = BranchScheduler(
        [EpisodeSpec("a", "test/Shelves-v0", "2", 7)],
        [Script({"a-0": [at("a-0", 0, 3), at("a-0", 0, len(episode.turns[0].action_ids) - 2)]})],
        episodes=3,
    )
    parent, *children = collect(
        (), table.player, EnvironmentPool(Short), max_active=1, scheduler=scheduler
    ).episodes
    assert [child.turns[0].action_ids for child in children][1] == parent.turns[0].action_ids
    assert all(table.dialogue.parse(child.turns[0].action_ids).valid for child in children)


def test_an_episode_ends_where_its_next_reply_may_not_fit() -> None:
    table = Table(TEMPLATES["appending"])
    table.engine.max_context = 120
    (episode,) = table.play_branches({}, 1)
    assert episode.stop == StopReason.CONTEXT_LIMIT
    assert len(episode.turns) < 4
    held = sum(len(turn.prompt_ids) + len(turn.action_ids) for turn in episode.turns)
    assert held + MOST <= 120 + MOST


def test_what_an_expert_says_ends_in_the_tokens_that_the_policy_would_choose(table: Table) -> None:
    class Taught(SnapshotShelves):
        def info(self) -> dict[str, Any]:
            return super().info() | {"actions": ACTIONS, "expert": "take mug 2"}

    player = DemonstrationPlayer(table.dialogue)
    spec = EpisodeSpec("a", "test/Shelves-v0", "2", 7)
    (episode,) = collect([spec], player, EnvironmentPool(lambda: Taught(expert=True)), max_active=1).episodes
    for turn in episode.turns:
        assert table.dialogue.parse(turn.action_ids).text == turn.action == "take mug 2"
        choice = table.dialogue.encode_choice("take mug 2")
        assert turn.action_ids[-len(choice) :] == choice
        assert not any(turn.action_mask[: -len(choice)])  # an empty block holds nothing to learn
        assert any(turn.action_mask)


def test_methods_that_branch_at_tokens_leave_thoughts_and_commands(table: Table) -> None:
    def explored(branch_policy: Any, k: int) -> tuple[Episode, ...]:
        scheduler = BranchScheduler(
            [EpisodeSpec("a", "test/Shelves-v0", "4", 7)], [branch_policy], episodes=k
        )
        return collect((), table.player, EnvironmentPool(Shop), max_active=8, scheduler=scheduler).episodes

    context = Context(0, 1, {}, 0, 300)
    fr3e = FR3E(anchors=3, continuations=2, anchor="token").build()
    aepo = AEPO().build()
    cure, ettrl = (build_recipe(name).build() for name in ("cure", "ettrl"))
    for algorithm, k in ((fr3e, 9), (aepo, 6), (cure, 16), (ettrl, 10)):
        assert algorithm.rollout.branch_policy is not None
        episodes = explored(algorithm.rollout.branch_policy(k, 7, context), k)
        for episode in episodes:
            assert episode.outcome == Outcome.SUCCESS
            for turn in episode.turns:
                table.check(turn)
        assert len(episodes) == k
        if algorithm in (fr3e, cure):
            tokens = [episode.parent.token for episode in episodes if episode.parent is not None]
            assert max(tokens) > 0
