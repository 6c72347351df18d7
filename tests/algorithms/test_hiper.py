"""HiPER: segments, the advantages of switch, subgoal and action, and what they are laid on."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from agentrl.algorithms.credit import compute_advantages, prepare, with_targets
from agentrl.algorithms.features import turns_to_tokens
from agentrl.algorithms.functional import Hierarchical, hierarchical_gae, whiten
from agentrl.algorithms.hooks import Context, MiniBatch
from agentrl.algorithms.plans import part_tokens, plan_estimates
from agentrl.algorithms.recipe import build_recipe, recipe_tree
from agentrl.algorithms.value_estimates import turn_gae
from agentrl.data import Episode, Group, StopReason, Turn
from agentrl.data.batch import Batch
from agentrl.errors import ConfigError
from agentrl.learn.objective import build_objective
from agentrl.policy.reply_parts import reply_parts

CONTEXT = Context()
PIECES = [
    "<switch>",
    "KEEP",
    "</switch>",
    "<subgoal>",
    "find it",
    "</subgoal>",
    "<action>",
    "go",
    "</action>",
]


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


@pytest.mark.vector("HIPER-1")
def test_the_three_advantages_of_three_turns_in_two_segments() -> None:
    found = hierarchical_gae(
        row(0, 0, 1),
        # The value of a subgoal counts where a segment begins alone.
        Hierarchical(row(0.2, 0.5, 0.6), row(0.3, 99.0, 0.7), row(0.25, 0.35, 0.6)),
        torch.ones(1, 3, dtype=torch.bool),
        torch.tensor([[True, False, True]]),
        gamma=1.0,
        lam=1.0,
        lam_segment=0.95,
    )
    assert found.action[0].tolist() == pytest.approx([0.5, 0.2, 0.4])
    assert found.subgoal[0].tolist() == pytest.approx([0.685, 0.0, 0.3])
    assert found.switch[0].tolist() == pytest.approx([0.45, 0.35, 0.4])


def by_definition(
    rewards: list[float], low: list[float], high: list[float], starts: list[int], gamma: float, last: float
) -> tuple[list[float], list[float], list[float]]:
    """The three advantages by sums, with lambdas of 0.9 and 0.8."""
    ends = [*starts[1:], len(rewards)]
    actions, switches, subgoals = [], [], []
    deltas = []
    for start, end in zip(starts, ends, strict=True):
        ahead = high[end] if end < len(rewards) else last
        values = [*low[start:end], ahead]
        steps = [rewards[start + k] + gamma * values[k + 1] - values[k] for k in range(end - start)]
        for k in range(end - start):
            actions.append(sum((gamma * 0.9) ** j * step for j, step in enumerate(steps[k:])))
            gained = sum(gamma**j * reward for j, reward in enumerate(rewards[start + k : end]))
            switches.append(gained + gamma ** (end - start - k) * ahead - high[start + k])
        deltas.append(switches[start])
    for k in range(len(starts)):
        total, factor = 0.0, 1.0
        for j in range(k, len(starts)):
            total += factor * deltas[j]
            factor *= gamma ** (ends[j] - starts[j]) * 0.8
        subgoals.append(total)
    return actions, subgoals, switches


def test_discounts_truncation_and_absent_turns_are_as_defined() -> None:
    draw = torch.Generator().manual_seed(3)
    rewards, low, high = (torch.rand(7, generator=draw, dtype=torch.float64) for _ in range(3))
    starts = [0, 1, 4]
    wanted = by_definition(rewards.tolist(), low.tolist(), high.tolist(), starts, 0.7, 0.4)
    boundary = torch.zeros(9, dtype=torch.bool)
    places = [0, 1, 3, 4, 5, 7, 8]  # turns 2 and 6 have no decision
    boundary[[places[start] for start in starts[1:]]] = True

    def spread(values: Tensor) -> Tensor:
        out = torch.full((1, 9), 5.0, dtype=torch.float64)
        out[0, places] = values
        return out

    present = spread(torch.zeros(7, dtype=torch.float64)) == 0
    found = hierarchical_gae(
        spread(rewards),
        Hierarchical(spread(low), spread(high), spread(high)),
        present,
        boundary[None],
        gamma=0.7,
        lam=0.9,
        lam_segment=0.8,
        last_values=torch.tensor([0.4]).double(),
    )
    assert found.action[0, places].tolist() == pytest.approx(wanted[0])
    assert found.switch[0, places].tolist() == pytest.approx(wanted[2])
    assert found.subgoal[0, [places[start] for start in starts]].tolist() == pytest.approx(wanted[1])
    for values in (found.action, found.subgoal, found.switch):
        assert not values[~present].any()


def test_the_parts_of_a_reply_are_found_by_token() -> None:
    def parts(*pieces: str) -> Any:
        return reply_parts(range(len(pieces)), lambda ids: "".join(pieces[id] for id in ids))

    whole = {"switched": False, "switch": [0, 3], "subgoal": [3, 6], "goal": "find it", "action": [6, 10]}
    assert parts(*PIECES, "\n") == whole
    joined = ["<switch>SWITCH</", "switch><sub", "goal>x</subgoal>", " <action>go</action>"]
    # A token belongs to the part in which it begins.
    assert parts(*joined) == {
        "switched": True,
        "switch": [0, 2],
        "subgoal": [2, 3],
        "goal": "x",
        "action": [3, 4],
    }
    assert parts("go", " on") == {"switched": False, "action": [0, 2]}
    assert parts("<switch>PERHAPS</switch>", "<action>", "a") == {"switched": False, "action": [1, 3]}
    assert parts("<subgoal>", "x", "<action>", "a</action>") == {"switched": False, "action": [2, 4]}
    assert parts() == {"switched": False, "action": [0, 0]}


def a_turn(switch: bool | None, reward: float = 0.0, goal: str = "g", *, first: bool = False) -> Turn:
    """A planned reply of seven tokens: two of the switch, two of the subgoal, three of the action."""
    parts = {"switched": bool(switch), "switch": [0, 2], "subgoal": [2, 4], "goal": goal, "action": [4, 7]}
    return Turn(
        "o",
        "a",
        prompt_ids=(1,),
        action_ids=(2,) * 7,
        logprobs=(-0.5,) * 7,
        entropies=(0.5,) * 7,
        # The first token of the switch is given, and so is the first one of the action.
        allowed=((2,), None, None, None, (2,), (2, 3), (2, 3)),
        reward=reward,
        new_sequence=first,
        info={} if switch is None else {"parts": parts},
    )


def an_episode(*turns: Turn, id: str = "e", stop: StopReason = StopReason.TERMINATED) -> Episode:
    return Episode(id, "env", "t", 0, turns, stop)


def three_turns() -> Episode:
    return an_episode(a_turn(False, first=True), a_turn(False), a_turn(True, reward=1.0))


def valued(episode: Episode, opening: list[float], acting: list[float], layout: str = "trajectory") -> Batch:
    """A batch of an episode with these values before a reply's first decision, and before its action's."""
    batch = prepare(build_recipe("hiper").build(), [Group("t", (episode,))], CONTEXT, layout=layout)
    values = torch.full(batch.tokens.shape, 77.0, dtype=torch.float64)
    made = [
        [(int(r), int(c)) for r, c in (batch.action_mask & (batch.turns == turn)).nonzero()]
        for turn in range(len(episode.turns))
    ]
    for turn, places in enumerate(made):
        values[places[3]] = acting[turn]  # of the decisions 1, 2, 3, 5, 6 of the reply, the fourth acts
        values[places[0]] = opening[turn]
    return replace(batch, values=values, logprobs=batch.logprobs.double())


@pytest.mark.vector("HIPER-1")
@pytest.mark.parametrize("layout", ["trajectory", "turn"])
def test_each_part_has_its_own_advantage_whitened_over_its_turns(build, layout: str) -> None:
    # One head stands for V_subgoal and V_switch at once, so the values before a reply are those of switches
    # except where a segment begins.
    batch = valued(three_turns(), [0.3, 0.35, 0.7], [0.2, 0.5, 0.6], layout)
    algorithm = build("hiper")
    found = compute_advantages(algorithm, batch, CONTEXT)
    said = [found[batch.action_mask & (batch.turns == turn)].tolist() for turn in range(3)]
    action = whiten(row(0.5, 0.2, 0.4), torch.ones(1, 3, dtype=torch.bool))[0].tolist()
    subgoal = whiten(row(0.685, 0.3), torch.ones(1, 2, dtype=torch.bool))[0].tolist()
    switch = whiten(row(0.4, 0.35, 0.3), torch.ones(1, 3, dtype=torch.bool))[0].tolist()
    goals = [subgoal[0], 0.0, subgoal[1]]
    for turn in range(3):
        wanted = [switch[turn], goals[turn], goals[turn], action[turn], action[turn]]
        assert said[turn] == pytest.approx(wanted, abs=1e-6)


def test_a_value_learns_where_it_is_read_and_its_loss_is_the_mean_there() -> None:
    batch = valued(three_turns(), [0.3, 0.35, 0.7], [0.2, 0.5, 0.6])
    algorithm = build_recipe("hiper").build()
    batch = with_targets(algorithm, batch, CONTEXT)
    assert batch.targets is not None
    said = [batch.targets[batch.action_mask & (batch.turns == turn)].tolist() for turn in range(3)]
    # A_subgoal + V, A_switch + V and A_subgoal + V; A_action + V.
    firsts, acts = [0.685 + 0.3, 0.7, 1.0], [0.7, 0.7, 1.0]
    for turn in range(3):
        assert said[turn] == pytest.approx([firsts[turn], 0, 0, acts[turn], 0])
    mini = MiniBatch(replace(batch, old_logprobs=batch.logprobs), torch.zeros_like(batch.logprobs))
    objective = build_objective(mini, algorithm, CONTEXT)
    ((_, factors),) = [pair for pair in objective.terms if pair[0].name == "value"]
    assert sorted(factors[factors != 0].tolist()) == pytest.approx([1 / 6] * 6)


def test_tokens_of_a_kept_subgoal_are_not_learned_from() -> None:
    batch = valued(three_turns(), [0.0] * 3, [0.0] * 3)
    algorithm = build_recipe("hiper").build()
    mask = algorithm.masks[0](MiniBatch(batch, batch.logprobs), CONTEXT)
    learned = [mask[batch.action_mask & (batch.turns == turn)].tolist() for turn in range(3)]
    assert learned == [[True] * 5, [True, False, False, True, True], [True] * 5]
    assert part_tokens(batch, "subgoal").sum() == 6


def test_replies_without_parts_are_actions_as_a_whole() -> None:
    turns = (a_turn(None, first=True), a_turn(None), a_turn(None, reward=1.0))
    batch = valued(an_episode(*turns), [0.2, 0.5, 0.6], [9.0] * 3)
    found, _ = plan_estimates(batch, gamma=1.0, lam=0.9, lam_segment=0.95, bootstrap=False)
    # GAE over turns: deltas .3, .1 and .4.
    assert found.action[0].tolist() == pytest.approx([0.3 + 0.9 * (0.1 + 0.9 * 0.4), 0.1 + 0.9 * 0.4, 0.4])
    mask = build_recipe("hiper").build().masks[0](MiniBatch(batch, batch.logprobs), CONTEXT)
    assert mask.equal(batch.action_mask)


def test_an_action_without_a_decision_is_valued_at_the_last_decision_of_its_reply() -> None:
    forced = replace(
        a_turn(False, first=True), allowed=((2,), None, None, None, (2,), (2,), (2,)), reward=1.0
    )
    batch = prepare(build_recipe("hiper").build(), [Group("t", (an_episode(forced),))], CONTEXT)
    values = torch.zeros(batch.tokens.shape, dtype=torch.float64)
    values[0, 2:5] = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    found, targets = plan_estimates(
        replace(batch, values=values), gamma=1.0, lam=1.0, lam_segment=1.0, bootstrap=False
    )
    assert found.action.tolist() == [[pytest.approx(0.7)]]
    assert targets[0, 2:5].tolist() == pytest.approx([1.0, 0.0, 1.0])


def test_a_truncated_episode_ends_with_its_last_value_if_asked() -> None:
    episode = replace(three_turns(), stop=StopReason.TRUNCATED)
    batch = valued(episode, [0.0] * 3, [0.0] * 3)
    batch = replace(batch, last_values=torch.tensor([0.5]))
    for bootstrap, wanted in ((False, 1.0), (True, 1.5)):
        found, _ = plan_estimates(batch, gamma=1.0, lam=1.0, lam_segment=1.0, bootstrap=bootstrap)
        assert found.action[0, 2].item() == pytest.approx(wanted)
    assert "last_values" in build_recipe("hiper", {"bootstrap_truncated": True}).build().requires


def test_if_every_reply_keeps_its_subgoal_actions_have_the_estimates_of_turns() -> None:
    draw = torch.Generator().manual_seed(1)
    long = an_episode(*(a_turn(None, reward=float(k), first=k == 0) for k in range(4)), id="long")
    short = an_episode(a_turn(False, reward=0.5, first=True), a_turn(None, reward=1.0), id="short")
    batch = prepare(build_recipe("hiper").build(), [Group("t", (long, short))], CONTEXT)
    values = torch.rand(batch.tokens.shape, generator=draw, dtype=torch.float64)
    # Without parts, the value of an action is that of its reply.
    plain = replace(
        batch,
        values=values,
        episodes=tuple(
            replace(each, turns=tuple(replace(turn, info={}) for turn in each.turns))
            for each in batch.episodes
        ),
    )
    found, _ = plan_estimates(plain, gamma=0.9, lam=0.8, lam_segment=0.3, bootstrap=False)
    wanted, _ = turn_gae(plain, gamma=0.9, lam=0.8, bootstrap=False)
    torch.testing.assert_close(turns_to_tokens(found.action, plain), wanted, rtol=0, atol=1e-12)


def charged(*turns: Turn, **prices: float) -> list[float]:
    (shape,) = build_recipe("hiper", prices).build().shape_reward
    return list(shape(an_episode(*turns), CONTEXT))


def test_keeping_and_changing_a_subgoal_have_a_price() -> None:
    turns = (
        a_turn(False),
        a_turn(False),
        a_turn(False, goal="other"),
        a_turn(True, reward=1.0, goal="third"),
    )
    assert charged(*turns, keep_penalty=0.3) == pytest.approx([0, -0.3, -0.3, 1])
    assert charged(*turns, change_penalty=0.3) == pytest.approx([0, 0, -0.3, 1])
    assert charged(*turns, keep_share_penalty=3.0) == pytest.approx([0, 0, 0, -1])
    assert charged(a_turn(False), keep_share_penalty=3.0) == [0.0]
    assert charged(a_turn(None), a_turn(None), keep_penalty=1.0, keep_share_penalty=1.0) == [0.0, 0.0]
    assert charged(keep_penalty=0.3) == []
    assert build_recipe("hiper").build().shape_reward == ()


def test_what_is_logged_of_the_plans() -> None:
    metrics = build_recipe("hiper").build().diagnostics[-1]
    batch = valued(three_turns(), [0.0] * 3, [0.0] * 3)
    assert metrics(MiniBatch(batch, batch.logprobs), CONTEXT) == {
        "hiper/planned": 1.0,
        "hiper/segment_turns": 1.5,
        "hiper/switched": 0.5,
    }
    empty = prepare(build_recipe("hiper").build(), [], CONTEXT)
    assert metrics(MiniBatch(empty, empty.logprobs), CONTEXT) == {}


def test_an_empty_batch_and_an_aborted_episode_have_no_advantage() -> None:
    algorithm = build_recipe("hiper").build()
    lost = replace(three_turns(), stop=StopReason.ENV_ERROR, error="crash")
    for groups in ([], [Group("t", (lost,))]):
        batch = prepare(algorithm, groups, CONTEXT)
        batch = replace(batch, values=torch.zeros_like(batch.logprobs))
        assert not compute_advantages(algorithm, batch, CONTEXT).any()
        assert not with_targets(algorithm, batch, CONTEXT).targets.any()


def test_a_configuration_is_read_and_written_back() -> None:
    made = build_recipe("hiper", {"preset": "released", "lam": 0.9})
    tree = recipe_tree(made)
    assert build_recipe(tree.pop("name"), tree) == made


@pytest.mark.parametrize("name", ["gamma", "lam", "lam_segment"])
def test_a_share_is_within_its_bounds(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name}: wrong value \(got 1.5"):
        build_recipe("hiper", {name: 1.5})
