"""Players: their replies and tokens."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from shelves import Letters, ScriptedEngine, Shelves, specs

from agentrl.data.trajectory import Episode, Outcome, StopReason
from agentrl.policy.engine import Generation, SamplingParams
from agentrl.rollout.collector import collect
from agentrl.rollout.environments import EnvironmentPool
from agentrl.rollout.play import ActionRequest, Reply, Stop
from agentrl.rollout.players import (
    DemonstrationPlayer,
    ExpertPlayer,
    HumanPlayer,
    LanguagePlayer,
    Player,
    RandomPlayer,
)

SAMPLING = SamplingParams(temperature=0.7, max_tokens=20)


def play_all(player: Player, tasks: Sequence[int], max_active: int = 2, **env: Any) -> tuple[Episode, ...]:
    return collect(
        specs(tasks), player, EnvironmentPool(lambda: Shelves(**env)), max_active=max_active
    ).episodes


def request(
    turn: int = 0, seed: int = 1, actions: Sequence[str] | None = ("a", "b"), **info: Any
) -> ActionRequest:
    return ActionRequest("e", turn, "seen", None if actions is None else tuple(actions), info, seed)


def only_reply(player: Player, asked: ActionRequest) -> Reply | Stop:
    player.submit(asked)
    ((name, reply),) = player.poll()
    assert name == "e"
    assert player.poll() == []
    return reply


# Players without tokens.


def test_random_replies_follow_from_seed_and_turn_and_are_uniform() -> None:
    player = RandomPlayer()
    drawn = [only_reply(player, request(turn, seed, "abc")) for seed in range(300) for turn in range(10)]
    assert drawn == [
        only_reply(RandomPlayer(), request(turn, seed, "abc")) for seed in range(300) for turn in range(10)
    ]
    counts = Counter(reply.text for reply in drawn if isinstance(reply, Reply))
    # 1000 of each are expected; the standard deviation is sqrt(3000 * 1/3 * 2/3) = 26.
    assert all(abs(counts[action] - 1000) < 4 * 26 for action in "abc")


def test_a_random_player_has_no_choice_among_no_actions() -> None:
    reply = only_reply(RandomPlayer(), request(actions=()))
    assert isinstance(reply, Stop)
    assert (reply.reason, "info['actions']" in (reply.error or "")) == (StopReason.ENGINE_ERROR, True)


def test_a_random_player_writes_random_text_where_no_actions_are_named() -> None:
    one, again, other = (only_reply(RandomPlayer(), request(actions=None, seed=seed)) for seed in (1, 1, 2))
    assert isinstance(one, Reply)
    assert one == again != other
    assert one.text.isprintable() or one.text.isascii()


def test_the_expert_is_followed_word_for_word() -> None:
    episodes = play_all(ExpertPlayer(), [2, 3], expert=True)
    assert [[turn.action for turn in episode.turns] for episode in episodes] == [["go on"] * 2, ["go on"] * 3]
    assert all(episode.outcome == Outcome.SUCCESS for episode in episodes)


def test_an_environment_made_without_its_expert_says_how_to_get_one() -> None:
    (episode,) = play_all(ExpertPlayer(), [2])
    assert episode.outcome == Outcome.ABORTED
    assert "expert=True" in (episode.error or "")


def test_an_expert_that_gives_up_has_failed_and_is_not_left_out_of_its_score() -> None:
    class Lost(Shelves):
        def info(self) -> dict[str, Any]:
            return super().info() | {"expert": None if self.left < 2 else "go on"}

    (episode,) = collect(specs([4]), ExpertPlayer(), EnvironmentPool(Lost), max_active=1).episodes
    assert (episode.outcome, episode.error) == (Outcome.FAILURE, "the expert knows no next action")
    assert len(episode.turns) == 3


def test_a_person_is_shown_the_request_and_asked_for_the_reply() -> None:
    shown: list[str] = []

    def ask(asked: ActionRequest) -> str:
        shown.append(asked.observation)
        return f"answer {asked.turn}"

    (episode,) = play_all(HumanPlayer(ask), [2])
    assert shown == ["2 shelves", "answer 0: 1 left"]
    assert [turn.action for turn in episode.turns] == ["answer 0", "answer 1"]


def test_a_closed_episode_gets_no_reply() -> None:
    player = RandomPlayer()
    player.submit(request())
    player.close("e")
    assert player.poll() == []


# A language model.


def test_a_constrained_reply_is_an_admissible_action_word_for_word() -> None:
    engine = ScriptedEngine()
    episodes = play_all(LanguagePlayer(Letters(), engine, SAMPLING, choices=True), [3, 2])
    expected = tuple(Letters().encode_reply(action) for action in ("go on", "take mug", "take pen"))
    assert all(asked.choices == expected for asked in engine.requests)
    assert all(asked.sampling is SAMPLING for asked in engine.requests)
    taken = {turn.action for episode in episodes for turn in episode.turns}
    assert taken <= {"go on", "take mug", "take pen"}
    assert len(taken) > 1
    assert all(turn.valid for episode in episodes for turn in episode.turns)


def test_a_constrained_reply_is_not_parsed_again() -> None:
    class Shouting(Shelves):
        def info(self) -> dict[str, Any]:
            return super().info() | {"actions": ["  SPACES  "]}

    player = LanguagePlayer(Letters(), ScriptedEngine(), SAMPLING, choices=True)
    (episode,) = collect(specs([1]), player, EnvironmentPool(Shouting), max_active=1).episodes
    assert (episode.turns[0].action, episode.turns[0].valid) == ("  SPACES  ", True)


def test_of_actions_with_the_same_tokens_the_first_is_sent_and_an_expert_sends_its_own() -> None:
    class Accents(Shelves):
        def info(self) -> dict[str, Any]:
            return super().info() | {"actions": ["Go", "go"], "expert": "go"}

    class Lower(Letters):
        def encode_reply(self, text: str) -> tuple[int, ...]:
            return super().encode_reply(text.lower())

    engine = ScriptedEngine()
    player = LanguagePlayer(Lower(), engine, SAMPLING, choices=True)
    with pytest.warns(RuntimeWarning, match="'Go'.*'go'"):
        (episode,) = collect(specs([1]), player, EnvironmentPool(Accents), max_active=1).episodes
    assert engine.requests[0].choices == (Lower().encode_reply("go"),)
    assert episode.turns[0].action == "Go"
    with pytest.warns(RuntimeWarning, match="'Go'.*'go'"):
        (shown,) = collect(
            specs([1]), DemonstrationPlayer(Lower()), EnvironmentPool(Accents), max_active=1
        ).episodes
    assert shown.turns[0].action == "go"
    assert shown.turns[0].allowed == ((103,), (111,), (0,))


def test_without_choices_a_model_writes_freely_and_what_it_wrote_is_parsed() -> None:
    engine = ScriptedEngine(["go on", "take all"])
    (episode,) = play_all(LanguagePlayer(Letters(), engine, SAMPLING, choices=False), [2])
    assert [asked.choices for asked in engine.requests] == [None, None]
    assert [(turn.action, turn.valid) for turn in episode.turns] == [("go on", True), ("take all", True)]


@pytest.mark.parametrize("actions", [None, []])
def test_where_no_actions_are_told_a_model_writes_freely(actions: list[str] | None) -> None:
    class Silent(Shelves):
        def info(self) -> dict[str, Any]:
            return super().info() | {"actions": actions}

    engine = ScriptedEngine(["go on"])
    player = LanguagePlayer(Letters(), engine, SAMPLING, choices=True)
    collect(specs([1]), player, EnvironmentPool(Silent), max_active=1)
    assert engine.requests[0].choices is None


def test_an_unparsable_reply_goes_to_the_environment_as_it_is_and_is_an_invalid_turn() -> None:
    engine = ScriptedEngine(["<hmm>", "go on"])
    (episode,) = play_all(LanguagePlayer(Letters(), engine, SAMPLING, choices=False), [2])
    assert [(turn.action, turn.valid) for turn in episode.turns] == [("<hmm>", False), ("go on", True)]
    assert episode.turns[1].observation == "<hmm>: 1 left"
    assert episode.outcome == Outcome.SUCCESS


def test_what_was_generated_is_stored_token_by_token() -> None:
    generation = Generation(
        "e0", (103, 111, 0), (-0.5, 0.0, -0.1), (0.7, 0.0, 0.3), ((103, 116), (111,), None), "length", 7
    )
    (episode,) = play_all(
        LanguagePlayer(Letters(), ScriptedEngine([generation]), SAMPLING, choices=False), [1]
    )
    (turn,) = episode.turns
    assert turn.prompt_ids == tuple(map(ord, "1 shelves"))
    assert (turn.action_ids, turn.logprobs, turn.entropies) == (
        (103, 111, 0),
        (-0.5, 0.0, -0.1),
        (0.7, 0.0, 0.3),
    )
    assert (turn.allowed, turn.finish, turn.policy_version) == (((103, 116), (111,), None), "length", 7)
    assert (turn.new_sequence, turn.trainable) == (True, True)


def test_each_turn_appends_to_the_sequence_and_its_prompt_is_made_from_the_sampled_ids() -> None:
    dialogue, engine = Letters(), ScriptedEngine(["go on", "take mug", "go on"])
    play_all(LanguagePlayer(dialogue, engine, SAMPLING, choices=False), [3])
    assert [asked.new_sequence for asked in engine.requests] == [True, False, False]
    assert ["".join(map(chr, asked.prompt_ids)) for asked in engine.requests] == [
        "3 shelves",
        "go on: 2 left",
        "take mug: 1 left",
    ]
    assert dialogue.histories[2] == [
        ("3 shelves", dialogue.encode_reply("go on")),
        ("go on: 2 left", dialogue.encode_reply("take mug")),
    ]
    assert {asked.sequence for asked in engine.requests} == {"e0"}


def test_every_draw_has_its_own_seed_that_does_not_depend_on_the_others() -> None:
    def seeds(tasks: Sequence[int], max_active: int) -> dict[tuple[str, str], int]:
        engine = ScriptedEngine()
        play_all(LanguagePlayer(Letters(), engine, SAMPLING), tasks, max_active=max_active)
        return {
            (asked.sequence, "".join(map(chr, asked.prompt_ids))): asked.seed for asked in engine.requests
        }

    alone, crowded = seeds([4], 1), seeds([4, 5, 6], 3)
    assert len(set(crowded.values())) == 15
    assert alone == {key: seed for key, seed in crowded.items() if key[0] == "e0"}


def test_requests_are_batched_and_ended_episodes_are_in_no_batch() -> None:
    engine = ScriptedEngine()
    play_all(LanguagePlayer(Letters(), engine, SAMPLING), [4, 1, 2, 2], max_active=2)
    assert engine.batches == [2, 2, 2, 2, 1]
    assert len(engine.requests) == 4 + 1 + 2 + 2


def test_the_engine_forgets_an_episode_when_it_ends() -> None:
    engine = ScriptedEngine()
    play_all(LanguagePlayer(Letters(), engine, SAMPLING), [3, 1], max_active=2)
    assert engine.released == ["e1", "e0"]


@pytest.mark.parametrize(
    ("max_context", "turns"), [(8 + 20, 0), (9 + 20, 1), (9 + 6 + 13 + 19, 1), (9 + 6 + 13 + 20, 2)]
)
def test_a_turn_that_does_not_fit_the_context_ends_the_episode(max_context: int, turns: int) -> None:
    # "9 shelves" is 9 tokens, "go on" and its end 6, "go on: 8 left" 13; a free reply takes up to 20.
    engine = ScriptedEngine(["go on", "go on"], max_context=max_context)
    (episode,) = play_all(LanguagePlayer(Letters(), engine, SAMPLING, choices=False), [9])
    assert (episode.stop, episode.outcome) == (StopReason.CONTEXT_LIMIT, Outcome.FAILURE)
    assert len(episode.turns) == len(engine.requests) == turns
    assert f"the context holds {max_context}" in (episode.error or "")


def test_a_constrained_turn_needs_room_for_the_longest_choice_only() -> None:
    # 9 tokens of prompt, and "take mug" with its end is 9.
    for max_context, fits in ((18, True), (17, False)):
        engine = ScriptedEngine(max_context=max_context)
        play_all(LanguagePlayer(Letters(), engine, SAMPLING), [9])
        assert bool(engine.requests) is fits


def test_a_new_sequence_begins_with_an_empty_context() -> None:
    engine = ScriptedEngine(["go on"] * 9, max_context=40)
    (episode,) = play_all(LanguagePlayer(Letters(window=0), engine, SAMPLING, choices=False), [9])
    assert (episode.outcome, len(episode.turns)) == (Outcome.SUCCESS, 9)
    assert all(turn.new_sequence for turn in episode.turns)


def test_a_sequence_that_began_anew_is_counted_from_there() -> None:
    class Restarting(Letters):
        def prompt(self, history: Any, observation: str) -> Any:
            made = super().prompt(history, observation)
            return type(made)(made.ids, new_sequence=len(history) % 2 == 0)

    # Every second turn begins anew: a sequence holds 13 + 6 and 13 tokens, and a reply of up to 20.
    engine = ScriptedEngine(["go on"] * 9, max_context=13 + 6 + 13 + 20)
    (episode,) = play_all(LanguagePlayer(Restarting(), engine, SAMPLING, choices=False), [9])
    assert (episode.outcome, len(episode.turns)) == (Outcome.SUCCESS, 9)


def test_a_failed_generation_aborts_its_episode_and_no_other() -> None:
    engine = ScriptedEngine([Generation("e0", error="logits are not finite"), "go on", "go on"])
    episodes = play_all(LanguagePlayer(Letters(), engine, SAMPLING, choices=False), [2, 2])
    assert [(episode.stop, episode.error) for episode in episodes] == [
        (StopReason.ENGINE_ERROR, "logits are not finite"),
        (StopReason.TERMINATED, None),
    ]
    assert episodes[0].turns == ()


def test_a_reply_to_an_episode_that_was_closed_meanwhile_is_dropped() -> None:
    engine = ScriptedEngine()
    player = LanguagePlayer(Letters(), engine, SAMPLING)
    player.submit(request())
    player.close("e")
    assert player.poll() == []


def test_an_episode_that_never_reached_the_engine_is_not_released_there() -> None:
    engine = ScriptedEngine(max_context=3)
    play_all(LanguagePlayer(Letters(), engine, SAMPLING), [1])
    assert engine.released == []


# Demonstrations.


def test_a_demonstration_looks_as_if_the_policy_had_written_it() -> None:
    engine = ScriptedEngine(["go on"] * 3)
    (sampled,) = play_all(LanguagePlayer(Letters(), engine, SAMPLING, choices=False), [3])
    (shown,) = play_all(DemonstrationPlayer(Letters(), choices=False), [3], expert=True)
    for mine, theirs in zip(shown.turns, sampled.turns, strict=True):
        assert (mine.prompt_ids, mine.action_ids, mine.new_sequence) == (
            theirs.prompt_ids,
            theirs.action_ids,
            theirs.new_sequence,
        )
        assert mine.action == theirs.action == "go on"
        assert mine.logprobs == mine.entropies == (0.0,) * 6
        assert (mine.allowed, mine.trainable, mine.valid) == (None, True, True)


def test_a_demonstration_records_what_could_have_been_chosen_at_each_token() -> None:
    (episode,) = play_all(DemonstrationPlayer(Letters()), [1], expert=True)
    # "go on" against "take mug" and "take pen": only the first letter is a decision.
    (turn,) = episode.turns
    assert turn.allowed == ((ord("g"), ord("t")), (ord("o"),), (ord(" "),), (ord("o"),), (ord("n"),), (0,))
    assert turn.action_mask == (True, False, False, False, False, False)


def test_noise_disturbs_its_share_of_turns_and_is_not_to_be_imitated() -> None:
    player = DemonstrationPlayer(Letters(), noise=0.2, seed=3, noise_prefers="take ")
    turns = [turn for episode in play_all(player, [50] * 40, expert=True) for turn in episode.turns]
    disturbed = [turn for turn in turns if not turn.trainable]
    # 2000 turns at 0.2: 400 expected, standard deviation sqrt(2000 * 0.2 * 0.8) = 18.
    assert len(turns) == 2000
    assert abs(len(disturbed) - 400) < 4 * 18
    assert all(turn.action == "go on" for turn in turns if turn.trainable)
    # 60 % are a "take ", and of the 40 % drawn from all three actions again two thirds: .6 + .4 * 2/3 = .867.
    takes = sum(turn.action.startswith("take ") for turn in disturbed) / len(disturbed)
    assert abs(takes - 0.867) < 4 * 0.017
    assert not any(any(turn.action_mask) for turn in disturbed)
    assert all(len(turn.action_ids) == len(turn.allowed or ()) for turn in disturbed)


def test_noise_is_the_same_for_the_same_seed_and_another_for_another() -> None:
    def actions(seed: int) -> list[str]:
        player = DemonstrationPlayer(Letters(), noise=0.5, seed=seed)
        return [turn.action for episode in play_all(player, [20] * 3, expert=True) for turn in episode.turns]

    assert actions(1) == actions(1)
    assert actions(1) != actions(2)


def test_without_noise_nothing_is_disturbed_and_with_full_noise_everything() -> None:
    for noise, trainable in ((0.0, True), (1.0, False)):
        (episode,) = play_all(DemonstrationPlayer(Letters(), noise=noise), [30], expert=True)
        assert {turn.trainable for turn in episode.turns} == {trainable}


def test_noise_without_a_preferred_action_is_uniform_over_all() -> None:
    player = DemonstrationPlayer(Letters(), noise=1.0, noise_prefers="fly ")
    (episode,) = play_all(player, [90], expert=True)
    counts = Counter(turn.action for turn in episode.turns)
    # 30 of each are expected, with a standard deviation of 4.5.
    assert all(abs(counts[action] - 30) < 4 * 4.5 for action in ("go on", "take mug", "take pen"))


def test_an_expert_that_says_what_is_not_admissible_is_a_breach_of_contract() -> None:
    class Boasting(Shelves):
        def info(self) -> dict[str, Any]:
            return super().info() | {"expert": "fly home"}

    (episode,) = collect(
        specs([1]), DemonstrationPlayer(Letters()), EnvironmentPool(Boasting), max_active=1
    ).episodes
    assert (episode.stop, "'fly home'" in (episode.error or "")) == (StopReason.CONTRACT, True)


@pytest.mark.parametrize(("max_context", "turns"), [(15 + 19 + 18, 2), (15 + 19 + 19, 3)])
def test_a_demonstration_that_outgrows_the_context_ends_before_the_turn_that_does(
    max_context: int, turns: int
) -> None:
    # Turn 0 holds 9 + 6 tokens, each further one 13 + 6.
    player = DemonstrationPlayer(Letters(), max_context=max_context)
    (episode,) = play_all(player, [9], expert=True)
    assert (episode.stop, len(episode.turns)) == (StopReason.CONTEXT_LIMIT, turns)


def test_demonstrations_need_an_expert() -> None:
    (episode,) = play_all(DemonstrationPlayer(Letters()), [2])
    assert "expert=True" in (episode.error or "")
