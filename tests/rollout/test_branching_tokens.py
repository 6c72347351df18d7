"""Forks of a language model: the tokens continue, and those that were read are not read again."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from shelves import Letters, ScriptedEngine, SnapshotShelves
from test_branching import Script, at
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from agentrl.data.batch import collate
from agentrl.data.storage import read_episodes, write_episodes
from agentrl.data.trajectory import Episode, Group, Outcome, StopReason, Turn
from agentrl.policy.attention import PACKED
from agentrl.policy.engine import GenerationRequest, SamplingParams
from agentrl.policy.model import build_model
from agentrl.policy.settings import PolicyConfig
from agentrl.policy.tokens import RoleDialogue, fit_tokenizer
from agentrl.policy.torch_engine import TorchEngine
from agentrl.rollout.branching import BranchRequest, BranchScheduler
from agentrl.rollout.collector import collect
from agentrl.rollout.environments import EnvironmentPool
from agentrl.rollout.play import ActionRequest, EpisodeSpec, Reply, Stop
from agentrl.rollout.players import DemonstrationPlayer, LanguagePlayer, Player

SAMPLING = SamplingParams(temperature=1.0, max_tokens=6)
ACTIONS = ["go on", "go up", "take mug 1", "take mug 2", "take pen 1", "take pen 2"]


class Shop(SnapshotShelves):
    """SnapshotShelves, with actions that begin alike."""

    def info(self) -> dict[str, Any]:
        return super().info() | {"actions": ACTIONS}


def play_branches(
    requests: dict[Any, list[BranchRequest]], k: int, player: Player, max_active: int = 8
) -> tuple[Episode, ...]:
    """Play one task of four turns, "a", with the requested branches."""
    scheduler = BranchScheduler([EpisodeSpec("a", "test/Shelves-v0", "4", 7)], [Script(requests)], episodes=k)
    pool = EnvironmentPool(Shop)
    return collect((), player, pool, max_active=max_active, scheduler=scheduler).episodes


# With a model.


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return fit_tokenizer([*ACTIONS, "4 shelves", "3 left", "2 left", "1 left"] * 4, 290)


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A small model with weights so large that the context matters to the next token."""
    torch.set_num_threads(1)
    model = build_model(PolicyConfig(device="cpu", max_context=256, initial_std=0.02), tokenizer, seed=0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(4.0)
    return model


class Anew(RoleDialogue):
    """Dialogue that writes every prompt anew, with the turn before, as a history window does."""

    def prompt(self, history: Any, observation: str) -> Any:
        prompt = super().prompt(history, observation)
        if not history:
            return prompt
        seen, reply = history[-1]
        return type(prompt)((*super().prompt(history[:-1], seen).ids, *reply, *prompt.ids), new_sequence=True)


@dataclass
class Table:
    """A policy with its player and engine."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    choices: bool = True
    slots: int = 64
    dialogue: type[RoleDialogue] = RoleDialogue

    def __post_init__(self) -> None:
        dialogue = self.dialogue(self.tokenizer)
        self.engine = TorchEngine(self.model, stop_ids=dialogue.stop_ids, max_sequences=self.slots)
        self.player = LanguagePlayer(dialogue, self.engine, SAMPLING, choices=self.choices)

    def play_branches(
        self, requests: dict[Any, list[BranchRequest]], k: int, **more: Any
    ) -> tuple[Episode, ...]:
        return play_branches(requests, k, self.player, **more)


def check_against_plain_forward(model: PreTrainedModel, episode: Episode) -> None:
    """Each reply's logprobs and entropies are what one pass of the library over all tokens says."""
    ids: list[int] = []
    for turn in episode.turns:
        ids = [*(() if turn.new_sequence else ids), *turn.prompt_ids, *turn.action_ids]
        model.set_attn_implementation("eager")
        with torch.no_grad():
            logits = model(torch.tensor([ids]), use_cache=False).logits[0].double()
        model.set_attn_implementation(PACKED)
        before = len(ids) - len(turn.action_ids) - 1
        allowed = turn.allowed or (None,) * len(turn.action_ids)
        for t, (token, options) in enumerate(zip(turn.action_ids, allowed, strict=True)):
            menu = list(range(logits.shape[1])) if options is None else list(options)
            logprobs = logits[before + t][menu].log_softmax(-1)
            entropy = -(logprobs.exp() * logprobs).sum().item()
            assert turn.logprobs[t] == pytest.approx(logprobs[menu.index(token)].item(), abs=1e-5)
            assert turn.entropies[t] == pytest.approx(entropy, abs=1e-5)


TREE: dict[Any, list[BranchRequest]] = {
    ("a-0", 2): [at("a-0", 2), at("a-0", 1)],
    ("a-1", 3): [at("a-1", 3)],
    "a-0": [at("a-0", 3), at("a-0", 2, 1), at("a-0", 0, 1)],
}


@pytest.mark.parametrize("choices", [True, False])
@pytest.mark.parametrize("dialogue", [RoleDialogue, Anew])
@pytest.mark.parametrize("slots", [64, 3])
def test_what_a_child_records_is_what_a_fresh_pass_over_its_tokens_says(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    choices: bool,
    dialogue: type[RoleDialogue],
    slots: int,
) -> None:
    episodes = Table(model, tokenizer, choices, slots, dialogue).play_branches(TREE, 8)
    named = {episode.id: episode for episode in episodes}
    forks = [episode for episode in episodes if episode.parent is not None]
    assert len(forks) == 6
    for episode in episodes:
        assert episode.outcome == Outcome.SUCCESS
        check_against_plain_forward(model, episode)
    for child in forks:
        assert child.parent is not None
        turn, parent = child.parent.turn, named[child.parent.parent]
        assert child.turns[:turn] == parent.turns[:turn]
        assert child.turns[turn].prompt_ids == parent.turns[turn].prompt_ids
        assert child.turns[turn].new_sequence == parent.turns[turn].new_sequence
        begun = parent.turns[turn].action_ids[: child.parent.token]
        assert child.turns[turn].action_ids[: child.parent.token] == begun
    assert len({tuple(turn.action_ids for turn in episode.turns) for episode in episodes}) > 3


def tokens(turns: Sequence[Turn]) -> int:
    return sum(len(turn.prompt_ids) + len(turn.action_ids) for turn in turns)


def unread(episode: Episode) -> int:
    """Return the number of final tokens read with the next turn: the last decision and the forced ones."""
    decided = episode.turns[-1].action_mask
    return len(decided) - max(t for t, choice in enumerate(decided) if choice)


@pytest.mark.parametrize("choices", [True, False])
@pytest.mark.parametrize("turn", [0, 1, 3])
def test_a_child_reads_what_its_ended_parent_has_read_only_in_the_last_token(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, choices: bool, turn: int
) -> None:
    table = Table(model, tokenizer, choices)
    token = 0 if turn else 1
    parent, *children = table.play_branches({"a-0": [at("a-0", turn, token)] * 3}, 4)
    # The prompt of the turn it leaves in, up to the token that the first new one follows from, is copied.
    given = 0 if choices else token
    copied = tokens(parent.turns[:turn]) + len(parent.turns[turn].prompt_ids) + given - 1
    assert table.engine.tokens_forwarded == tokens(parent.turns) - unread(parent) + sum(
        tokens(child.turns) - unread(child) - copied for child in children
    )


def test_a_child_of_a_parent_that_plays_on_reads_what_that_has_not_read_yet(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    table = Table(model, tokenizer, choices=False)
    parent, child = table.play_branches({("a-0", 2): [at("a-0", 2)]}, 2)
    copied = tokens(parent.turns[:2]) - 1  # the end of the last reply waits for the prompt
    assert table.engine.tokens_forwarded == tokens(parent.turns) - 1 + tokens(child.turns) - 1 - copied


def test_where_there_is_no_room_for_a_copy_all_is_read_again_and_the_same_comes_of_it(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    roomy, full = Table(model, tokenizer, choices=False), Table(model, tokenizer, choices=False, slots=1)
    requests: dict[Any, list[BranchRequest]] = {"a-0": [at("a-0", 3)]}
    episodes = roomy.play_branches(requests, 2)
    again = full.play_branches(requests, 2)
    assert [[turn.action_ids for turn in episode.turns] for episode in again] == [
        [turn.action_ids for turn in episode.turns] for episode in episodes
    ]
    assert full.engine.tokens_forwarded == sum(tokens(episode.turns) - 1 for episode in episodes)
    assert roomy.engine.tokens_forwarded < full.engine.tokens_forwarded


def test_nothing_is_left_in_the_engine_when_all_have_ended(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    table = Table(model, tokenizer)
    table.play_branches(TREE, 8)
    assert not table.engine._sequences
    assert set(table.engine._slots) <= {None}


@pytest.mark.parametrize("choices", [True, False])
def test_the_tokens_that_a_reply_was_begun_with_are_no_decisions(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, choices: bool
) -> None:
    table = Table(model, tokenizer, choices)
    parent, *children = table.play_branches({"a-0": [at("a-0", 1, 1)] * 20}, 21)
    first = parent.turns[1].action_ids[0]
    for child in children:
        turn = child.turns[1]
        assert turn.action_ids[0] == first
        assert (turn.logprobs[0], turn.entropies[0], turn.action_mask[0]) == (0.0, 0.0, False)
        assert (turn.allowed or ())[0] == (first,)
        assert len(turn.action_ids) <= SAMPLING.max_tokens or choices
    assert parent.turns[1].action_mask[0]
    assert len({child.turns[1].action_ids for child in children}) > 1
    if choices:
        assert {child.turns[1].action for child in children} <= {
            action for action in ACTIONS if action[0] == parent.turns[1].action[0]
        }


@pytest.mark.parametrize("choices", [True, False])
def test_a_batch_holds_the_parents_tokens_before_the_childs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, choices: bool, tmp_path: Any
) -> None:
    episodes = Table(model, tokenizer, choices).play_branches({"a-0": [at("a-0", 2, 1)]}, 2)
    batch = collate([Group("4", episodes)])
    parent, child = episodes
    shared = tokens(parent.turns[:2]) + len(parent.turns[2].prompt_ids)
    assert batch.tokens.shape[0] == 2
    assert torch.equal(batch.tokens[0, : shared + 1], batch.tokens[1, : shared + 1])
    assert torch.equal(batch.logprobs[0, :shared], batch.logprobs[1, :shared])
    assert [bool(batch.action_mask[row, shared]) for row in (0, 1)] == [True, False]
    assert int(batch.lengths[1]) == tokens(child.turns)
    rows = collate([Group("4", episodes)], layout="turn")
    assert int(rows.action_mask.sum()) == int(batch.action_mask.sum())
    write_episodes(tmp_path / "episodes.parquet", episodes)
    assert tuple(read_episodes(tmp_path / "episodes.parquet")) == episodes


# Requests to the engine.


def asked(engine: ScriptedEngine, sequence: str) -> list[GenerationRequest]:
    return [request for request in engine.requests if request.sequence == sequence]


def text(ids: Sequence[int]) -> str:
    return "".join(map(chr, ids)).replace("\0", "|")


def test_the_first_request_of_a_child_holds_all_its_tokens_and_names_the_parent() -> None:
    engine = ScriptedEngine(["go on", "take mug 1", "go on", "go on", "take pen 1", "go on"])
    player = LanguagePlayer(Letters(), engine, SAMPLING, choices=False)
    _, child = play_branches({"a-0": [at("a-0", 2)]}, 2, player)
    first, second = asked(engine, "a-1")
    assert text(first.prompt_ids) == "4 shelvesgo on|go on: 3 lefttake mug 1|take mug 1: 2 left"
    assert (first.new_sequence, first.parent) == (True, "a-0")
    assert (text(second.prompt_ids), second.new_sequence, second.parent) == (
        "take pen 1: 1 left",
        False,
        None,
    )
    assert text(child.turns[2].prompt_ids) == "take mug 1: 2 left"
    assert not child.turns[2].new_sequence
    assert first.seed != asked(engine, "a-0")[2].seed
    assert {request.parent for request in asked(engine, "a-0")} == {None}
    assert engine.released == ["a-0", "a-1"]


def test_the_dialogue_is_told_the_parents_turns() -> None:
    dialogue = Letters()
    engine = ScriptedEngine(["go on", "take mug 1", "go on", "go on", "take pen 1", "go on"])
    play_branches({"a-0": [at("a-0", 2)]}, 2, LanguagePlayer(dialogue, engine, SAMPLING, choices=False))
    assert dialogue.histories[4] == dialogue.histories[2]
    assert dialogue.histories[5] == [
        *dialogue.histories[2],
        ("take mug 1: 2 left", dialogue.encode_reply("take pen 1")),
    ]


def test_a_prompt_that_is_written_anew_needs_no_earlier_tokens() -> None:
    engine = ScriptedEngine(["go on"] * 6)
    player = LanguagePlayer(Letters(window=1), engine, SAMPLING, choices=False)
    _, child = play_branches({"a-0": [at("a-0", 2)]}, 2, player)
    first = asked(engine, "a-1")[0]
    assert (text(first.prompt_ids), first.new_sequence, first.parent) == ("go on: 2 left", True, "a-0")
    assert child.turns[2].new_sequence


def test_only_the_current_sequence_is_held() -> None:
    class Restarting(Letters):
        def prompt(self, history: Any, observation: str) -> Any:
            made = super().prompt(history, observation)
            return type(made)(made.ids, new_sequence=len(history) % 2 == 0)

    engine = ScriptedEngine(["go on"] * 5)
    player = LanguagePlayer(Restarting(), engine, SAMPLING, choices=False)
    play_branches({"a-0": [at("a-0", 3)]}, 2, player)
    assert text(asked(engine, "a-1")[0].prompt_ids) == "go on: 2 leftgo on|go on: 1 left"


def test_a_free_reply_goes_on_after_the_tokens_it_was_begun_with() -> None:
    engine = ScriptedEngine(["take mug 1", "go on", "go on", "go on", "pen 2", "go on", "go on", "go on"])
    sampling = SamplingParams(max_tokens=20)
    player = LanguagePlayer(Letters(), engine, sampling, choices=False)
    _, child = play_branches({"a-0": [at("a-0", 0, 5)]}, 2, player)
    first, second = asked(engine, "a-1")[:2]
    assert text(first.prompt_ids) == "4 shelvestake "
    assert (first.sampling.max_tokens, second.sampling.max_tokens) == (15, 20)
    turn = child.turns[0]
    assert (turn.action, text(turn.prompt_ids), text(turn.action_ids)) == (
        "take pen 2",
        "4 shelves",
        "take pen 2|",
    )
    assert turn.allowed == (*(((ord(c),)) for c in "take "), *[None] * 6)
    assert turn.logprobs == (*[0.0] * 5, *[-0.25] * 6)
    assert turn.entropies == (*[0.0] * 5, *[0.25] * 6)
    assert turn.action_mask == (*[False] * 5, *[True] * 6)


def test_a_constrained_reply_chooses_among_what_begins_alike() -> None:
    engine = ScriptedEngine(["take mug 1", "go on", "go on", "go on"])
    player = LanguagePlayer(Letters(), engine, SAMPLING)
    parent, child = play_branches({"a-0": [at("a-0", 0, 7)]}, 2, player)
    first, second = asked(engine, "a-1")[:2]
    assert [text(choice) for choice in first.choices or ()] == ["take mug 1|", "take mug 2|"]
    assert (text(first.prompt_ids), first.sampling) == ("4 shelves", SAMPLING)
    assert len(second.choices or ()) == 6
    assert child.turns[0].action.startswith("take mug")
    assert parent.turns[0].action == "take mug 1"


def test_a_reply_cannot_be_left_after_its_end() -> None:
    engine = ScriptedEngine(["go on"] * 12)
    player = LanguagePlayer(Letters(), engine, SAMPLING, choices=False)
    episodes = play_branches({"a-0": [at("a-0", 0, 5), at("a-0", 0, 6)]}, 3, player)
    assert [episode.parent for episode in episodes] == [None, at("a-0", 0, 5), at("a-0", 0)]


def test_what_a_child_inherits_counts_in_its_context() -> None:
    # 9 tokens of the task, 6 per "go on" and its end, 13 per "go on: 3 left": 47 before turn 2.
    for room, fits in ((47 + 20, True), (47 + 19, False)):
        engine = ScriptedEngine(["go on"] * 9)
        player = LanguagePlayer(Letters(), engine, SamplingParams(max_tokens=20), choices=False)
        player.fork("b", "a", _turns("go on", "go on"), ())
        engine.max_context = room
        player.submit(ActionRequest("b", 2, "go on: 2 left", None, {}, 1))
        ((_, reply),) = player.poll()
        assert isinstance(reply, Reply if fits else Stop)
        assert fits or reply.reason == StopReason.CONTEXT_LIMIT  # type: ignore[union-attr]


def test_where_no_action_begins_as_the_reply_did_the_episode_is_aborted() -> None:
    engine = ScriptedEngine()
    player = LanguagePlayer(Letters(), engine, SAMPLING)
    player.fork("b", "a", (), tuple(map(ord, "fly")))
    player.submit(ActionRequest("b", 0, "4 shelves", tuple(ACTIONS), {}, 1))
    ((_, stop),) = player.poll()
    assert isinstance(stop, Stop)
    assert (stop.reason, "none of info['actions'] begins" in (stop.error or "")) == (
        StopReason.ENGINE_ERROR,
        True,
    )
    assert engine.requests == []


def _turns(*actions: str) -> list[Turn]:
    made = Letters()
    left = 4
    turns = []
    seen = "4 shelves"
    for action in actions:
        turns.append(
            Turn(
                seen,
                action,
                tuple(map(ord, seen)),
                made.encode_reply(action),
                new_sequence=seen == "4 shelves",
            )
        )
        left -= 1
        seen = f"{action}: {left} left"
    return turns


def test_a_demonstration_goes_on_from_its_parents_turns() -> None:
    player = DemonstrationPlayer(Letters(), choices=False)
    player.fork("b", "a", _turns("take mug 1", "go on"), ())
    player.submit(ActionRequest("b", 2, "go on: 2 left", None, {"expert": "go on"}, 1))
    ((_, reply),) = player.poll()
    assert isinstance(reply, Reply)
    assert (text(reply.prompt_ids), reply.new_sequence) == ("go on: 2 left", False)
    with pytest.raises(ValueError, match="'c' begins inside a reply"):
        player.fork("c", "a", (), (1,))
