import math
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from agentrl.algorithms.algorithm import Algorithm
from agentrl.algorithms.credit import compute_advantages, prepare
from agentrl.algorithms.hooks import Context, MiniBatch, Outputs
from agentrl.algorithms.methods.clip_cov import covariance_clip, covariance_metrics
from agentrl.algorithms.methods.dapo import DAPO
from agentrl.algorithms.methods.dr_bot import DrBot, fault, keep_most_varied
from agentrl.algorithms.methods.gigpo import GiGPO
from agentrl.algorithms.methods.grpo import GRPO, DrGRPO
from agentrl.algorithms.methods.gspo import GSPO
from agentrl.algorithms.methods.rloo import RLOO
from agentrl.algorithms.methods.spear import Spear
from agentrl.algorithms.named_features import with_mini_batch_features
from agentrl.algorithms.recipe import build_recipe, recipe_tree
from agentrl.algorithms.tool_reward import tool_bonus
from agentrl.data import Episode, Group, StopReason, Turn
from agentrl.data.batch import Layout, collate
from agentrl.errors import ConfigError, RequirementError
from agentrl.learn.forward import Forward
from agentrl.learn.learner import Learner
from agentrl.learn.objective import build_objective
from agentrl.learn.settings import LearnerConfig
from agentrl.schedule import cosine_warmup

PLAIN = {"tool_reward": 0.0, "covariance_share": 0.0, "coefficient": 0.0}


def episode(name: str, rewards: Sequence[float], length: int = 2, **turn) -> Episode:
    """One turn per reward; replies of `length` tokens."""
    made = [
        Turn(
            "o",
            "a",
            prompt_ids=(1,),
            action_ids=tuple(2 + (number + place) % 5 for place in range(length)),
            logprobs=(-0.4,) * length,
            entropies=(0.6,) * length,
            reward=reward,
            new_sequence=number == 0,
        )
        for number, reward in enumerate(rewards)
    ]
    turns = tuple(replace(item, **turn) for item in made)
    return Episode(name, "env", "task", 0, turns, StopReason.TERMINATED)


def group(name: str, *returns: float) -> Group:
    return Group(name, tuple(episode(f"{name}.{i}", (value,)) for i, value in enumerate(returns)))


def hand_made(
    advantages: Sequence[float], logprobs: Sequence[Sequence[float]], ratios: Sequence[Sequence[float]]
) -> tuple[MiniBatch, Outputs]:
    """A row per list after one prompt token, in float64, and what the policy says."""
    members = tuple(episode(str(row), (0.0,), len(values)) for row, values in enumerate(logprobs))
    batch = collate([Group("t", members)])
    said = torch.zeros(batch.tokens.shape, dtype=torch.float64)
    old = said.clone()
    for row, (values, quotients) in enumerate(zip(logprobs, ratios, strict=True)):
        place = slice(1, 1 + len(values))
        said[row, place] = torch.tensor(values, dtype=torch.float64)
        old[row, place] = said[row, place] - torch.tensor(quotients, dtype=torch.float64).log()
    column = torch.tensor(advantages, dtype=torch.float64)[batch.trajectory][:, None]
    outputs = Outputs(said, torch.zeros_like(said))
    batch = replace(batch, logprobs=old, old_logprobs=old, old_entropies=torch.zeros_like(old))
    return MiniBatch(batch, torch.where(batch.action_mask, column, 0.0), outputs), outputs


@pytest.mark.vector("S-1")
@pytest.mark.parametrize(
    ("step", "wanted"),
    [(0, 0.0), (50, 0.1464466094), (100, 0.5), (150, 0.8535533906), (200, 1.0), (201, 1.0)],
)
def test_the_replay_rises_while_the_tool_reward_falls(step, wanted):
    context = Context(step)
    assert cosine_warmup(context.step, 200) == pytest.approx(wanted, abs=5e-11)
    (bonus,) = tool_bonus(episode("e", (0.0,), info={"tool": "calc"}), context, most=10.0, steps=200)
    assert bonus == pytest.approx(1 - wanted, abs=5e-11)
    assert Spear(coefficient=0.7, warmup=0).replay_coefficient(context) == 0.7


@pytest.mark.vector("S-1")
@pytest.mark.parametrize(("calls", "step", "wanted"), [(3, 50, 0.2560660172), (15, 100, 0.5)])
def test_each_call_earns_a_tenth_up_to_all_of_it(calls, step, wanted):
    algorithm = Spear(tool_reward=1.0, tool_steps=200).build()
    groups = [Group("t", (episode("long", [0.0] * calls), replace(episode("short", [1.0]), success=True)))]
    batch = prepare(algorithm, groups, Context(step))
    assert batch.returns[0].item() == pytest.approx(wanted, abs=5e-11)
    assert batch.episodes[0].turns[-1].reward == batch.returns[0].item()


def test_calls_are_turns_that_named_a_tool_where_the_environment_names_them():
    tools = ("calc", None, "calc", "answer")
    turns = [
        replace(turn, info={"tool": tool})
        for turn, tool in zip(episode("e", [0.0] * 4).turns, tools, strict=True)
    ]
    one = replace(episode("e", []), turns=tuple(turns))
    assert tool_bonus(one, Context(0), most=1.0, steps=9)[-1] == 0.2
    assert tool_bonus(replace(one, turns=()), Context(0), most=1.0, steps=9) == []
    assert Spear(require_tool_call=True).build().replay._episode_filter(one)
    assert (
        not Spear(require_tool_call=True)
        .build()
        .replay._episode_filter(replace(one, turns=tuple(turns[1:2])))
    )


def test_groups_are_selected_with_the_tool_reward_and_learned_from_with_it_once():
    busy = Group("busy", (episode("a", [0.0] * 8), episode("b", [0.0])))
    idle = group("idle", 0.0, 0.0)
    groups = [idle, busy]
    algorithm = Spear(base=GRPO(invalid_penalty=0.1), tool_reward=1.0).build()
    assert [item.task for item in algorithm.select(groups, Context(0))] == ["busy"]
    assert algorithm.select(groups, Context(0))[0] == busy
    assert algorithm.select(groups, Context(99)) == []
    assert prepare(algorithm, groups, Context(0)).returns.tolist() == pytest.approx([0.8, 0.1])


@pytest.mark.vector("S-5")
def test_three_quarters_of_the_groups_stay_those_that_vary_most():
    returns = [[1, 1, 1, 1], [1, 0, 1, 0], [1, 0, 0, 0], [0.6, 0.4, 0.5, 0.5]]
    groups = [group(f"g{number}", *values) for number, values in enumerate(returns)]
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]):
        kept = DrBot().build().select([groups[index] for index in order], Context())
        assert [item.task for item in kept] == [f"g{index}" for index in order if index != 0]


def test_of_groups_that_vary_alike_the_earlier_ones_stay_and_the_count_is_rounded_up():
    groups = [group(f"g{number}", 0.1 * number, 0.1 * number + 1) for number in range(5)]
    assert [item.task for item in keep_most_varied(groups, Context(), share=0.5)] == ["g0", "g1", "g2"]
    crashed = tuple(replace(item, stop=StopReason.ENV_ERROR) for item in groups[0].episodes)
    aborted = replace(groups[0], episodes=crashed)
    odd = (*groups[0].episodes, replace(episode("odd", [9.0]), stop=StopReason.ENV_ERROR))
    one_aborted = replace(groups[0], episodes=odd)
    wider = group("wider", 0.0, 1.1)
    assert keep_most_varied([one_aborted, wider], Context(), share=0.5) == [wider]
    assert [item.task for item in keep_most_varied([aborted, *groups[1:3]], Context(), share=0.5)] == ["g1"]


def test_how_much_groups_vary_is_a_matter_of_shaped_returns():
    varied = Group("varied", (episode("a", [1.0], valid=False), episode("b", [1.0])))
    groups = [group("same", 1.0, 1.0), varied]
    for penalty, wanted in ((0.5, "varied"), (0.0, "same")):
        algorithm = DrBot(base=GRPO(invalid_penalty=penalty), keep_groups=0.5).build()
        assert [item.task for item in algorithm.select(groups, Context())] == [wanted]


def reply(*ids: int, **fields) -> Turn:
    return Turn("o", **({"action": "a"} | fields), action_ids=ids)


def test_a_reply_is_at_fault_for_the_first_reason_there_is():
    circle, odd = tuple(range(20)) * 10, tuple(range(20)) * 9 + tuple(range(19))
    assert fault(reply(*circle)) == "repetitive"
    assert fault(reply(*odd)) is None
    assert fault(reply(*(7,) * 29)) == "repetitive"
    assert fault(reply(*(7,) * 28)) is None
    assert fault(reply(1, action="go \ufffd")) == "unreadable"
    assert fault(reply(1, action="go \ufffd", valid=False)) == "incomplete"
    assert fault(reply(*circle, finish="length", valid=False)) == "overlong"
    assert fault(reply(1, 2)) is None


@pytest.mark.parametrize("layout", ["trajectory", "turn"])
def test_a_reply_with_a_fault_leaves_the_loss_and_the_normaliser_but_not_the_baseline(layout: Layout):
    good = episode("good", [0.0, 1.0])
    half = episode("half", [0.0, 0.0])
    half = replace(half, turns=(half.turns[0], replace(half.turns[1], finish="length")))
    gone = episode("gone", [0.0, 0.5], valid=False)
    algorithm = DrBot(sequence_length=8).build()
    batch = prepare(algorithm, [Group("t", (good, half, gone))], Context(), layout=layout)
    batch = replace(batch, old_logprobs=batch.logprobs, old_entropies=batch.entropies)
    mini = MiniBatch(batch, compute_advantages(algorithm, batch, Context()))
    objective = build_objective(mini, algorithm, Context())
    rows, places = objective.mask.nonzero(as_tuple=True)
    kept = set(zip(batch.trajectory[rows].tolist(), batch.turns[rows, places].tolist(), strict=True))
    assert kept == {(0, 0), (0, 1), (1, 0)}
    outputs = Outputs(batch.logprobs, batch.entropies)
    loss, _ = objective.contribution(torch.arange(len(batch.lengths)), outputs)
    # Advantages .5 and -.5 (returns 1, 0, .5): 4 decisions and 2, over length 8, over the 2 that are left.
    assert loss.item() == pytest.approx(-(4 * 0.5 - 2 * 0.5) / 8 / 2)
    numbers = algorithm.diagnostics[-1](mini, Context())
    assert numbers == {
        "replies_overlong": 1 / 6,
        "replies_incomplete": 2 / 6,
        "replies_repetitive": 0.0,
        "replies_unreadable": 0.0,
    }


def test_dr_bot_over_another_base_keeps_its_advantage_terms_and_shaping():
    base = GRPO(entropy_coefficient=0.01, invalid_penalty=0.1, dual_clip=3.0).build()
    made = DrBot(base=GRPO(entropy_coefficient=0.01, invalid_penalty=0.1, dual_clip=3.0)).build()
    assert [term.name for term in made.terms] == ["entropy"]
    assert len(made.shape_reward) == 1
    mini, _ = hand_made([1.0], [[-0.1]], [[1.0]])
    bounds = made.clip(mini, Context())
    assert (bounds.lower, bounds.upper, bounds.dual) == (0.8, 1.28, None)
    batch = prepare(base, [group("g", 1.0, 0.0)], Context())
    assert torch.equal(base.advantage(batch, Context()), made.advantage(batch, Context()))


@pytest.mark.vector("S-3")
def test_the_loss_on_recalled_rows_by_hand():
    algorithm = Spear(base=GRPO(clip_high=0.28, aggregation="token"), buffer_size=2, warmup=200).build()
    told = [[-0.5, -0.6, -0.7], [-0.8, -0.9]] * 2 + [[-1.0]] * 5
    mini, _ = hand_made([0.1] * 4 + [0.0] * 5, told, [[1.0] * len(values) for values in told])
    # Returns 1.5 and 1.2 against a median of 1: worth .5 and .2.
    returns = torch.tensor([1.5, 1.2, 1.5, 1.2, 1.0, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    batch = replace(mini.batch, returns=returns, groups=torch.arange(9))
    algorithm.replay.update(replace(mini, batch=batch), Context(49))
    state = algorithm.replay.state_dict()
    for seed in range(20):
        algorithm.replay.load_state_dict(state, Context())
        replayed = algorithm.replay.sample(Context(50, seed=seed))
        rows, lengths = replayed.batch, replayed.batch.lengths.tolist()
        if sorted(lengths) == [3, 4]:
            break
    moves = {4: [0.1, -0.3, 0.4], 3: [0.0, 0.2]}
    now = rows.old_logprobs.clone()
    for row, length in enumerate(lengths):
        now[row, 1:length] += torch.tensor(moves[length], dtype=torch.float64)
    now.requires_grad_()
    recalled = MiniBatch(rows, replayed.advantages, Outputs(now.detach(), torch.zeros_like(now)))
    objective = build_objective(recalled, replayed.algorithm(algorithm), Context(50))
    loss, _ = objective.contribution(torch.arange(2), Outputs(now, torch.zeros_like(now)))
    assert loss.item() == pytest.approx(-0.4014550242, abs=5e-11)
    assert replayed.coefficient * loss.item() == pytest.approx(-0.0587917271, abs=5e-11)
    loss.backward()
    wanted = {4: [-0.55258546, -0.37040911, 0.0], 3: [-0.2, -0.24428055]}
    for row, length in enumerate(lengths):
        gradient = [value * 5 for value in now.grad[row, 1:length].tolist()]
        assert gradient == pytest.approx(wanted[length], abs=5e-9)


LOGPROBS = [[-0.1, -3.0, -0.2], [-0.1, -2.0, -0.3]]
RATIOS = [[1.0, 1.0, 1.5], [1.0, 0.7, 1.0]]


@pytest.mark.vector("S-4")
def test_the_one_candidate_is_left_out_and_the_normaliser_is_not_touched():
    base = GRPO(clip_high=0.28, aggregation="token", dual_clip=3.0)
    algorithm = Spear(base=base, covariance_share=0.02, covariance_band=(1.0, 40.0)).build()
    mini, outputs = hand_made([2.0, -1.0], LOGPROBS, RATIOS)
    said = outputs.logprobs.clone().requires_grad_()
    loss, _ = build_objective(mini, algorithm, Context()).contribution(
        torch.arange(2), Outputs(said, outputs.entropies)
    )
    # Losses [[0, -2, -2.56], [1, .8, 1]] over 6 tokens
    assert loss.item() == pytest.approx(-0.2933333333, abs=5e-11)
    loss.backward()
    gradients = [[0, -1 / 3, 0], [1 / 6, 0, 1 / 6]]
    torch.testing.assert_close(said.grad[:, 1:], torch.tensor(gradients, dtype=torch.float64))
    padded = replace(algorithm, aggregation=lambda mask, *_: (mask.double() / 4, torch.ones(())))
    loss, _ = build_objective(mini, padded, Context()).contribution(torch.arange(2), outputs)
    assert loss.item() == pytest.approx(-0.44, abs=5e-11)


def test_clipping_by_covariance_takes_the_place_of_the_dual_clip():
    mini, outputs = hand_made([-1.0, -1.0], [[-0.1], [-0.1]], [[9.0], [1.0]])
    losses = []
    for share in (0.0, 0.1):
        base = GRPO(aggregation="token", dual_clip=3.0)
        algorithm = Spear(base=base, covariance_share=share, coefficient=0.0).build()
        losses.append(build_objective(mini, algorithm, Context()).contribution(torch.arange(2), outputs)[0])
    assert [loss.item() for loss in losses] == pytest.approx([(3 + 1) / 2, (9 + 1) / 2])


def noisy(rows: int = 6, length: int = 8, seed: int = 0) -> MiniBatch:
    draw = random.Random(seed)
    values = [[-draw.random() * 3 for _ in range(length)] for _ in range(rows)]
    return hand_made([draw.choice((-1.0, 1.0)) for _ in range(rows)], values, [[1.0] * length] * rows)[0]


def with_covariance(mini: MiniBatch) -> MiniBatch:
    return with_mini_batch_features(mini, ["covariance"])


def clip_some(mini: MiniBatch, context: Context, share: float) -> Tensor:
    """With the ratio, mask and bounds of the default loss."""
    filled = build_objective(mini, Algorithm(), context).mini
    return covariance_clip(with_covariance(filled), context, share=share, band=(0.1, 40.0))


def left_out(mini: MiniBatch, context: Context, share: float = 0.1) -> set[tuple[str, int, int]]:
    batch, weights = mini.batch, clip_some(mini, context, share=share)
    assert set(weights.unique().tolist()) <= {0.0, 1.0}
    return {
        (batch.episodes[int(batch.trajectory[row])].id, int(batch.turns[row, place]), int(place))
        for row, place in (weights == 0).nonzero()
    }


def test_a_share_of_the_decisions_is_left_out_and_at_least_one():
    mini = noisy()
    assert len(left_out(mini, Context(), share=0.1)) == 4  # of 48
    assert len(left_out(mini, Context(), share=0.001)) == 1
    found = set().union(*(left_out(mini, Context(step)) for step in range(60)))
    covariances = (mini.advantages - mini.advantages[mini.batch.action_mask].mean()) * (
        mini.current.logprobs - mini.current.logprobs[mini.batch.action_mask].mean()
    )
    candidates = ((covariances > 0.1) & mini.batch.action_mask).nonzero()
    assert len(left_out(mini, Context(), share=1.0)) == len(candidates) == len(found)


def test_each_candidate_has_the_same_chance():
    mini = noisy()
    candidates, rounds = len(left_out(mini, Context(), share=1.0)), 400
    counts: dict[tuple[str, int, int], int] = {}
    for step in range(rounds):
        for place in left_out(mini, Context(step)):
            counts[place] = counts.get(place, 0) + 1
    expected = rounds * 4 / candidates
    assert max(abs(count - expected) for count in counts.values()) < 4.5 * math.sqrt(expected)


def test_the_draw_depends_on_the_seed_and_step_but_not_on_rows_or_padding():
    mini = noisy()
    drawn = [left_out(mini, Context(step, seed=seed)) for step in range(3) for seed in range(3)]
    assert len(set(map(frozenset, drawn))) > 6
    turned = mini.select(torch.tensor([4, 2, 0, 5, 1, 3]))
    wide = collate([Group("t", (*mini.batch.episodes, episode("wide", (0.0,), 30)))])

    def padded(values: Tensor) -> Tensor:
        return torch.cat([values, torch.full((6, wide.tokens.shape[1] - values.shape[1]), math.nan)], 1)

    old = padded(mini.batch.old_logprobs)
    more = replace(wide.select(torch.arange(7)), old_logprobs=torch.cat([old, torch.zeros(1, old.shape[1])]))
    more = replace(more, action_mask=more.action_mask & (more.trajectory != 6)[:, None])
    advantages = torch.cat([padded(mini.advantages), torch.full((1, old.shape[1]), math.nan)])
    said = torch.cat([padded(mini.current.logprobs), torch.full((1, old.shape[1]), math.nan)])
    current = Outputs(said, said)
    for step in range(3):
        context = Context(step)
        assert left_out(turned, context) == left_out(mini, context)
        assert left_out(MiniBatch(more, advantages, current), context) == left_out(mini, context)


def test_both_layouts_leave_out_the_same_decisions():
    groups = [Group("t", tuple(episode(str(i), [0.0] * 3, 4) for i in range(4)))]
    found = []
    for layout in ("trajectory", "turn"):
        batch = collate(groups, layout=layout)
        rows, places = batch.action_mask.nonzero(as_tuple=True)
        said, advantages = torch.zeros(batch.tokens.shape), torch.zeros(batch.tokens.shape)
        for row, place in zip(rows.tolist(), places.tolist(), strict=True):
            owner = int(batch.trajectory[row])
            said[row, place] = -random.Random(100 * owner + place).random()
            advantages[row, place] = (-1.0) ** owner
        mini = MiniBatch(replace(batch, old_logprobs=said), advantages, Outputs(said, said))
        found.append([left_out(mini, Context(step), share=0.2) for step in range(5)])
    assert found[0] == found[1]
    assert len(set().union(*found[0])) > 9


def test_what_the_ratio_clips_already_and_what_is_outside_the_band_is_no_candidate():
    mini, _ = hand_made([2.0, -1.0], LOGPROBS, RATIOS)
    assert left_out(mini, Context(), share=1.0) == {("0", 0, 1)}
    unscored = replace(mini, batch=replace(mini.batch, old_logprobs=None))
    assert left_out(unscored, Context(), share=1.0) == {("0", 0, 1), ("0", 0, 3), ("1", 0, 2)}
    narrow = covariance_clip(with_covariance(mini), Context(), share=1.0, band=(1.3, 40.0))
    assert (narrow == 0).nonzero().tolist() == [[1, 2]]
    low = covariance_clip(with_covariance(mini), Context(), share=1.0, band=(1.0, 1.3))
    assert (low == 0).nonzero().tolist() == [[0, 1], [0, 3]]
    assert clip_some(replace(mini, advantages=mini.advantages * 0), Context(), share=0.5).min() == 1
    with pytest.raises(RequirementError, match="current is empty"):
        clip_some(replace(mini, current=None), Context(), share=0.5)


def test_a_reply_with_a_fault_is_no_decision_to_clipping_by_covariance():
    mini, _ = hand_made([2.0, -1.0], LOGPROBS, [[1.0] * 3] * 2)
    first, second = mini.batch.episodes
    cut_off = replace(first, turns=tuple(replace(turn, finish="length") for turn in first.turns))
    faulty = replace(mini, batch=replace(mini.batch, episodes=(cut_off, second)))
    algorithm = Spear(covariance_band=(0.1, 40.0), covariance_share=1.0).build()
    numbers = algorithm.diagnostics[-1]
    # Of the six, three are above .1; what is left of the faulty batch has one advantage and no covariance.
    whole = build_objective(mini, algorithm, Context())
    assert ((whole.factors == 0) & whole.mask).nonzero().tolist() == [[0, 1], [0, 3], [1, 2]]
    left = build_objective(faulty, algorithm, Context())
    assert (left.factors[left.mask] > 0).sum() == left.mask.sum() == 3
    assert numbers(whole.mini, Context())["covariance_clip_share"] == 0.5
    assert set(numbers(left.mini, Context()).values()) == {0.0}


def test_the_log_says_what_clipping_by_covariance_found():
    mini, _ = hand_made([2.0, -1.0], LOGPROBS, [[1.0] * 3] * 2)
    numbers = covariance_metrics(with_covariance(mini), Context(), share=0.4, band=(1.2, 40.0))
    # 1.275, -3.075, 1.125, -1.275, 1.575, -.975: two candidates, floor(.4 * 6) = 2 of them
    assert numbers["covariance_mean"] == pytest.approx(-1.35 / 6)
    assert numbers["covariance_max"] == pytest.approx(1.575)
    assert numbers["covariance_clip_share"] == pytest.approx(2 / 6)
    nothing = replace(mini, batch=replace(mini.batch, action_mask=torch.zeros_like(mini.batch.action_mask)))
    assert set(covariance_metrics(with_covariance(nothing), Context(), share=0.4, band=(1, 2)).values()) == {
        0.0
    }


class Bigram(nn.Module):
    """The next token depends on the last one only."""

    def __init__(self) -> None:
        super().__init__()
        seed = torch.Generator().manual_seed(0)
        self.embedding = nn.Embedding(8, 4, _weight=torch.randn(8, 4, generator=seed, dtype=torch.float64))


def learner(**settings) -> Learner:
    forward = Forward(
        lambda policy, tokens, lengths: policy.embedding(tokens), lambda policy: policy.embedding.weight
    )
    fixed = {"optimizer": "adamw", "learning_rate": 0.01, "schedule": "constant", "warmup_steps": 0}
    return Learner(Bigram(), LearnerConfig(**fixed, **settings), forward=forward)


def played(step: int) -> list[Group]:
    draw = random.Random(step)

    def member(name: str) -> Episode:
        rewards = [0.0] * draw.randint(0, 2) + [float(draw.random() < 0.5)]
        return episode(name, rewards, draw.randint(1, 4))

    return [
        Group(f"t{number}", tuple(member(f"{step}.{number}.{place}") for place in range(4)))
        for number in range(4)
    ]


def trained(algorithm: Algorithm, steps: int = 5, **settings) -> tuple[Tensor, list[dict[str, float]]]:
    student, logs = learner(**settings), []
    for step in range(steps):
        context = Context(step, steps, tokenizer="abc", vocabulary=8)
        logs.append(student.update(prepare(algorithm, played(step), context), algorithm, context))
    return student.policy.embedding.weight.detach(), logs


WIDE = {"clip_low": 0.2, "clip_high": 0.2}  # rows of earlier steps are far outside of GSPO's own bounds
BASES = [DrBot(), GRPO(dual_clip=3.0), DrGRPO(), DAPO(), GiGPO(), GSPO(**WIDE), RLOO()]


@pytest.mark.parametrize("base", BASES, ids=lambda base: base.name)
def test_without_replay_tool_reward_and_covariance_clipping_it_is_its_base(base):
    for settings in ({}, {"mini_batches": 2}):
        plain, _ = trained(base.build(), **settings)
        spear, logs = trained(Spear(base=base, **PLAIN).build(), **settings)
        torch.testing.assert_close(plain, spear, rtol=0, atol=1e-12)
        assert not any("algorithm/replay/size" in numbers for numbers in logs)


@pytest.mark.parametrize("base", BASES, ids=lambda base: base.name)
@pytest.mark.parametrize("mode", ["burst", "mixed"])
def test_replay_over_a_base_takes_part_in_learning(base, mode):
    plain, _ = trained(base.build())
    settings = {"tool_reward": 0.0, "covariance_share": 0.0, "buffer_size": 2, "warmup": 0}
    spear, logs = trained(Spear(base=base, mode=mode, **settings).build())
    assert sum(numbers["algorithm/replay/recalled"] for numbers in logs) > 4
    assert [numbers["learner/updates"] for numbers in logs] == [
        1 + (mode == "burst" and numbers["algorithm/replay/recalled"] > 0) for numbers in logs
    ]
    assert (plain - spear).abs().max() > 1e-4


@pytest.mark.parametrize("settings", [{}, {"mini_batches": 2, "micro_batch_tokens": 20}])
def test_before_the_replay_has_begun_to_rise_it_is_its_base(settings):
    plain, _ = trained(DrBot().build(), steps=1, **settings)
    kept = {"tool_reward": 0.0, "covariance_share": 0.0, "buffer_size": 1}
    spear, logs = trained(Spear(**kept).build(), steps=1, **settings)
    torch.testing.assert_close(plain, spear, rtol=0, atol=1e-12)
    assert logs[0]["algorithm/replay/coefficient"] == 0
    assert logs[0]["algorithm/replay/size"] > 0


def test_micro_batches_make_no_difference():
    recipe = Spear(buffer_size=2, warmup=0, covariance_share=0.2, covariance_band=(0.01, 9.0))
    whole, _ = trained(recipe.build(), mini_batches=2)
    parts, logs = trained(recipe.build(), mini_batches=2, micro_batch_tokens=8)
    torch.testing.assert_close(whole, parts, rtol=0, atol=1e-12)
    assert logs[-1]["algorithm/covariance_clip_share"] > 0


def test_an_interrupted_memory_goes_on_as_if_nothing_had_happened():
    make = Spear(buffer_size=2, warmup=4, mode="mixed").build
    straight, halves = make(), [make(), make()]
    weights = []
    for algorithms in ([straight] * 2, halves):
        student = learner()
        for step in range(6):
            context = Context(step, 6, tokenizer="abc", vocabulary=8)
            if step == 3 and algorithms[0] is not algorithms[1]:
                algorithms[1].replay.load_state_dict(algorithms[0].replay.state_dict(), context)
            current = algorithms[step >= 3]
            student.update(prepare(current, played(step), context), current, context)
        weights.append(student.policy.embedding.weight)
    assert torch.equal(*weights)


def test_recalled_rows_have_no_terms_but_the_entropy_bonus_as_released():
    base = GRPO(entropy_coefficient=0.01, kl_coefficient=0.1)
    found = {}
    for parity in ("paper", "official"):
        recipe = Spear(base=base, parity=parity)
        algorithm = recipe.build()
        loss = recipe.replay_loss(algorithm)
        found[parity] = [term.name for term in loss.terms], algorithm.replay._released
        assert "reference" not in loss.requires
    assert found == {"paper": ([], False), "official": (["entropy"], True)}


RELEASED = [{"parity": "official"}, {"preset": "released"}]


@pytest.mark.parametrize("released", RELEASED, ids=["parity", "preset"])
def test_the_released_schedules_count_steps_from_one(released):
    settings = {"base": DrBot(), "warmup": 4, "tool_steps": 4, "tool_reward": 1.0}
    ours, theirs = Spear(**settings).build(), Spear(**settings, **released).build()
    busy = [Group("t", (episode("a", [0.0] * 10), episode("b", [1.0] * 2)))]
    for step in range(6):
        context, later = Context(step), Context(step + 1)
        assert theirs.replay._coefficient(context) == ours.replay._coefficient(later)
        assert prepare(theirs, busy, context).returns.tolist() == prepare(ours, busy, later).returns.tolist()
    # At the first step: (1 - cos(pi / 4)) / 2, and of ten calls (1 + cos(pi / 4)) / 2
    assert theirs.replay._coefficient(Context(0)) == pytest.approx(0.1464466094)
    assert prepare(theirs, busy, Context(0)).returns[0].item() == pytest.approx(0.8535533906)


def filled(recipe: Spear, ages: Sequence[int]) -> Algorithm:
    """A memory with a row of return .5 from each of the given steps; every group's mean is .5."""
    algorithm = recipe.build()
    for step in ages:
        mini, _ = hand_made([0.4], [[-0.1]], [[1.0]])
        returns = torch.tensor([0.5], dtype=torch.float64)
        algorithm.replay.update(replace(mini, batch=replace(mini.batch, returns=returns)), Context(step))
    return algorithm


@pytest.mark.parametrize("released", RELEASED, ids=["parity", "preset"])
def test_with_a_decaying_advantage_every_released_row_counts_as_enough(released):
    settings = {"base": GRPO(), "buffer_size": 2, "warmup": 0, "covariance_share": 0.0}
    # Four returns at the baseline: none is above it.
    for decay, extra, rows in ((0.5, released, 2), (0.5, {}, 0), (None, released, 0)):
        algorithm = filled(Spear(**settings, advantage_decay=decay, **extra), [0] * 4)
        replayed = algorithm.replay.sample(Context(1))
        assert algorithm.replay.metrics()["recalled"] == rows
        if replayed is not None:
            assert replayed.advantages[:, 1].tolist() == pytest.approx([0.2, 0.2])


@pytest.mark.parametrize("released", RELEASED, ids=["parity", "preset"])
def test_released_rows_are_tolerated_for_ten_steps_at_most(released):
    settings = {"base": GRPO(), "tolerate_steps": 30, "covariance_share": 0.0}
    # At the last one, the newest before it is of step 12: of step 2 and later ones stay, and the last is new.
    algorithm = filled(Spear(**settings, **released), range(14))
    assert sorted(row["step"] for row in algorithm.replay.state_dict()["rows"]) == list(range(2, 14))
    assert len(filled(Spear(**settings), range(14)).replay.state_dict()["rows"]) == 14


def test_replies_with_a_fault_are_not_remembered():
    algorithm = Spear(buffer_size=1, warmup=0).build()
    groups = [
        Group(
            f"t{i}",
            (episode(f"good{i}", [1.0]), episode(f"bad{i}", [1.0], valid=False), episode(f"{i}", [0.0])),
        )
        for i in range(4)
    ]
    student, context = learner(), Context(0, tokenizer="abc", vocabulary=8)
    student.update(prepare(algorithm, groups, context), algorithm, context)
    kept = {row["episode"] for row in algorithm.replay.state_dict()["rows"]}
    assert kept == {"good0", "good1", "good2"}


def test_recalled_rows_are_learned_from_as_the_base_learns():
    recipe = Spear(base=GSPO(**WIDE), covariance_share=0.0, replay_covariance_share=0.0)
    for algorithm in (recipe.build(), Algorithm()):
        for slot in ("ratio", "clip", "surrogate", "aggregation"):
            assert getattr(recipe.replay_loss(algorithm), slot) is getattr(algorithm, slot) is not None


def test_recalled_rows_are_clipped_by_their_own_share_and_band():
    recipe = Spear(replay_covariance_share=0.5, replay_covariance_band=(2.0, 3.0))
    (hook,) = recipe.replay_loss(recipe.build()).weights
    assert (hook.keywords["share"], hook.keywords["band"]) == (0.5, (2.0, 3.0))
    plain = Spear(replay_covariance_share=0.0)
    assert plain.replay_loss(plain.build()).weights == ()


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_dual_clip_is_replaced_by_the_covariance_clip_of_its_own_rows(share):
    mini, _ = hand_made([-1.0], [[-0.1]], [[1.0]])
    recipe = Spear(base=GRPO(dual_clip=3.0), covariance_share=share, replay_covariance_share=0.5 - share)
    algorithm = recipe.build()
    duals = [each.clip(mini, Context()).dual for each in (algorithm, recipe.replay_loss(algorithm))]
    assert duals == ([None, 3.0] if share else [3.0, None])


def test_a_configuration_reads_back_what_it_says():
    settings = {"base": {"name": "grpo", "clip_high": 0.3}, "covariance_band": [1, 2], "mode": "mixed"}
    made = build_recipe("spear", settings)
    assert made == Spear(base=GRPO(clip_high=0.3), covariance_band=(1, 2), mode="mixed")
    tree = recipe_tree(made)
    assert build_recipe(tree.pop("name"), tree) == made


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"buffer_size": 0}, r"buffer_size: wrong value \(got 0"),
        ({"tolerate_steps": 0}, r"tolerate_steps: wrong value \(got 0"),
        ({"coefficient": -1.0}, r"coefficient: wrong value \(got -1.0"),
        ({"covariance_share": 1.5}, r"covariance_share: wrong value \(got 1.5"),
        ({"covariance_band": [5.0, 1.0]}, r"covariance_band is \[5.0, 1.0\], wanted the lower bound first"),
        ({"advantage_decay": 0.0}, r"advantage_decay: wrong value \(got 0.0"),
        ({"base": {"name": "spear"}}, "base is 'spear', wanted one without a replay of its own"),
        ({"base": {"name": "dr_bot", "keep_groups": 0.0}}, r"keep_groups: wrong value \(got 0.0"),
    ],
)
def test_contradictions_are_refused_with_the_reason(settings, reason):
    with pytest.raises(ConfigError, match=reason):
        build_recipe("spear", settings)
