"""The engine against a plain forward of the library over the tokens that it returned."""

import math
import random
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from agentrl.policy.attention import PACKED, KVCache
from agentrl.policy.engine import Generation, GenerationRequest, SamplingParams
from agentrl.policy.torch_engine import TorchEngine

STOP = 4
MENU = ((20, 21, 22, STOP), (20, 21, 23, 24, STOP), (20, 30, STOP), (40, 41, STOP))


def _engine(model: PreTrainedModel, **kwargs: int) -> TorchEngine:
    return TorchEngine(model, stop_ids={STOP}, **kwargs)


def _request(
    sequence: str,
    prompt: Sequence[int],
    *,
    new_sequence: bool = True,
    choices: tuple[tuple[int, ...], ...] | None = None,
    seed: int = 0,
    temperature: float = 1.0,
    max_tokens: int = 12,
    parent: str | None = None,
    next_temperature: Callable[[float], float] | None = None,
) -> GenerationRequest:
    sampling = SamplingParams(temperature, max_tokens, next_temperature)
    return GenerationRequest(sequence, tuple(prompt), new_sequence, choices, seed, sampling, parent)


def _finish(engine: TorchEngine, *requests: GenerationRequest) -> dict[str, Generation]:
    for request in requests:
        engine.submit(request)
    done: dict[str, Generation] = {}
    for _ in range(300):
        done.update((generation.sequence, generation) for generation in engine.step())
        if len(done) == len(requests):
            return done
    raise AssertionError(f"only {sorted(done)} finished")


def _logits(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    """Return logits [T, V] of the library's own forward pass, in which row t predicts token t."""
    with torch.no_grad():
        return torch.cat([torch.zeros(1, 1), torch.zeros(0, 1)]) if not ids else _shifted(model, ids)


def _shifted(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    model.set_attn_implementation("eager")
    logits = model(torch.tensor([ids]), use_cache=False).logits[0].double()
    model.set_attn_implementation(PACKED)
    return torch.cat([torch.zeros_like(logits[:1]), logits[:-1]])


def _check_against_plain_forward(
    model: PreTrainedModel, before: Sequence[int], generation: Generation, temperature: float = 1.0
) -> None:
    used = torch.tensor(generation.temperatures or [temperature] * len(generation.token_ids))
    logits = _logits(model, [*before, *generation.token_ids])[len(before) :] / used.double()[:, None]
    for t, token in enumerate(generation.token_ids):
        allowed = generation.allowed[t] if generation.allowed is not None else range(logits.shape[1])
        logprobs = logits[t][list(allowed)].log_softmax(-1)
        entropy = -(logprobs.exp() * logprobs).sum().item()
        assert generation.logprobs[t] == pytest.approx(logprobs[list(allowed).index(token)].item(), abs=1e-5)
        assert generation.entropies[t] == pytest.approx(entropy, abs=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_free_replies_carry_the_logprobs_and_entropies_of_a_plain_forward(
    model: PreTrainedModel, temperature: float
) -> None:
    prompts = {"a": (1, 9, 10), "b": (1, 11), "c": (1, 12, 13, 14, 15, 16)}
    done = _finish(
        _engine(model),
        *(_request(name, ids, temperature=temperature, seed=3) for name, ids in prompts.items()),
    )
    for name, ids in prompts.items():
        assert done[name].allowed is None
        _check_against_plain_forward(model, ids, done[name], temperature)


@pytest.mark.parametrize("choices", [None, MENU])
def test_a_temperature_follows_from_the_entropy_of_the_decision_before(
    model: PreTrainedModel, choices: tuple[tuple[int, ...], ...] | None
) -> None:
    prompts = {"a": (1, 9, 10), "b": (1, 11), "c": (1, 12, 13, 14, 15, 16)}

    def follow(entropy: float) -> float:
        return 0.5 + entropy / 4

    asked = [
        _request(name, ids, choices=choices, temperature=0.7, seed=3, next_temperature=follow)
        for name, ids in prompts.items()
    ]
    done = _finish(_engine(model), *asked)
    changed = 0
    for name, ids in prompts.items():
        reply = done[name]
        _check_against_plain_forward(model, ids, reply, 0.7)
        allowed = reply.allowed or (None,) * len(reply.token_ids)
        decided = [t for t, menu in enumerate(allowed) if menu is None or len(menu) > 1]
        used = [(reply.temperatures or (0.7,) * len(reply.token_ids))[t] for t in decided]
        assert used == [0.7, *(follow(reply.entropies[t]) for t in decided[:-1])]
        changed += len(set(used)) - 1
    assert changed > 0


def test_a_temperature_that_cannot_be_sampled_at_is_the_error_of_the_reply(model: PreTrainedModel) -> None:
    (failed,) = _finish(_engine(model), _request("a", (1, 9), next_temperature=lambda entropy: 0.0)).values()
    assert failed.error is not None
    assert "is 0.0, wanted a number above 0" in failed.error


def test_constrained_replies_are_choices_with_logprobs_over_the_allowed_ids(model: PreTrainedModel) -> None:
    prompts = {str(k): (1, 9 + k, 10) for k in range(12)}
    done = _finish(
        _engine(model), *(_request(name, ids, choices=MENU, seed=int(name)) for name, ids in prompts.items())
    )
    assert len({generation.token_ids for generation in done.values()}) > 1
    for name, ids in prompts.items():
        assert done[name].token_ids in MENU
        _check_against_plain_forward(model, ids, done[name])


def test_a_token_with_one_allowed_id_is_certain_and_costs_no_forward(model: PreTrainedModel) -> None:
    engine = _engine(model)
    done = _finish(engine, _request("a", (1, 9), choices=((20, 21, 22, STOP), (20, 21, 23, 24, STOP))))["a"]
    assert engine.forwards == 1  # one decision
    assert engine.tokens_forwarded == 4  # the prompt and the forced 20, 21
    assert done.allowed is not None
    assert [len(ids) for ids in done.allowed if ids is not None][:3] == [1, 1, 2]
    assert [value for t, value in enumerate(done.logprobs) if t != 2] == [0.0] * (len(done.token_ids) - 1)
    assert [value for t, value in enumerate(done.entropies) if t != 2] == [0.0] * (len(done.token_ids) - 1)


def test_a_single_choice_needs_no_forward_at_all(model: PreTrainedModel) -> None:
    engine = _engine(model)
    done = _finish(engine, _request("a", (1, 9), choices=((20, 21, STOP),)))["a"]
    assert (done.token_ids, done.logprobs, engine.forwards) == ((20, 21, STOP), (0.0, 0.0, 0.0), 0)


def _play(
    engine: TorchEngine, names: Sequence[str], turns: int
) -> dict[str, list[tuple[list[int], Generation]]]:
    """Return, by sequence and turn, the tokens before the reply and the reply; even names are constrained."""
    held: dict[str, list[int]] = {name: [] for name in names}
    log: dict[str, list[tuple[list[int], Generation]]] = {name: [] for name in names}
    for turn in range(turns):
        requests = []
        for name in names:
            prompt = [2, *range(50, 50 + 1 + (int(name) * 7 + turn * 3) % 11), 3]
            menu = MENU if int(name) % 2 == 0 else None
            requests.append(
                _request(
                    name,
                    prompt,
                    new_sequence=turn == 0,
                    choices=menu,
                    seed=turn * 100 + int(name),
                    max_tokens=5,
                )
            )
            held[name] += prompt
        for name, generation in _finish(engine, *requests).items():
            log[name].append((list(held[name]), generation))
            held[name] += generation.token_ids
    return log


def test_every_turn_of_a_kept_sequence_equals_a_plain_forward_over_all_of_it(model: PreTrainedModel) -> None:
    engine = _engine(model)
    for turns in _play(engine, ["0", "1", "2", "3"], 4).values():
        for before, generation in turns:
            _check_against_plain_forward(model, before, generation)


def test_a_grouped_query_llama_gives_the_logprobs_of_a_plain_forward() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=80,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.1,
    )
    model = LlamaForCausalLM(config).eval()
    model.set_attn_implementation(PACKED)
    for turns in _play(_engine(model), ["0", "1", "2"], 3).values():
        for before, generation in turns:
            _check_against_plain_forward(model, before, generation)


def test_no_token_of_a_trajectory_is_forwarded_twice(model: PreTrainedModel) -> None:
    engine = _engine(model)
    log = _play(engine, ["0", "1", "2"], 5)
    held = sum(len(turns[-1][0]) + len(turns[-1][1].token_ids) for turns in log.values())
    # The end of the last reply waits for a next turn: its last decision and the forced tokens after it.
    waiting = sum(_waiting(turns[-1][1]) for turns in log.values())
    assert engine.tokens_forwarded == held - waiting


def _waiting(generation: Generation) -> int:
    if generation.allowed is None:
        return 1
    return len(generation.token_ids) - max(
        t for t, ids in enumerate(generation.allowed) if ids and len(ids) > 1
    )


@pytest.mark.parametrize("max_step_tokens", [1000, 8])
def test_sequences_that_start_alike_share_the_pass_and_nothing_else(
    model: PreTrainedModel, max_step_tokens: int
) -> None:
    prompt = (1, *range(9, 20))
    engine = _engine(model, max_step_tokens=max_step_tokens)
    requests = [_request(str(k), prompt, seed=k, choices=MENU) for k in range(6)]
    done = _finish(engine, *requests)
    for request in requests:
        _check_against_plain_forward(model, prompt, done[request.sequence])
        alone = _finish(_engine(model), request)[request.sequence]
        assert done[request.sequence].token_ids == alone.token_ids
    if max_step_tokens == 1000:
        replies = sum(len(generation.token_ids) for generation in done.values())
        assert engine.tokens_forwarded < len(prompt) + replies
    again = _finish(engine, *(_request(str(k), (2, 12 + k, 3), new_sequence=False, seed=k) for k in range(6)))
    for name, generation in again.items():
        before = [*prompt, *done[name].token_ids, 2, 12 + int(name), 3]
        _check_against_plain_forward(model, before, generation)


def test_a_prompt_written_anew_is_read_from_where_it_differs(model: PreTrainedModel) -> None:
    engine = _engine(model)
    first = _finish(engine, _request("a", (1, 9, 10, 11, 12), seed=1, choices=MENU))["a"]
    forwarded = engine.tokens_forwarded
    prompt = (1, 9, 10, 40, 41, 42, 3)
    second = _finish(engine, _request("a", prompt, seed=2, max_tokens=1))["a"]
    assert first.error is None
    assert engine.tokens_forwarded - forwarded == 4  # 40 41 42 3
    _check_against_plain_forward(model, prompt, second)
    _check_against_plain_forward(model, prompt[:3], _finish(engine, _request("a", prompt[:3]))["a"])


def test_a_kept_sequence_draws_what_a_fresh_one_with_the_same_tokens_draws(model: PreTrainedModel) -> None:
    before, last = _play(_engine(model), ["1"], 4)["1"][-1]
    again = _finish(_engine(model), _request("x", before, seed=301, max_tokens=5))["x"]
    assert again.token_ids == last.token_ids
    assert again.logprobs == pytest.approx(last.logprobs, abs=1e-5)


def test_a_request_draws_the_same_alone_and_in_a_crowd(model: PreTrainedModel) -> None:
    alone = _play(_engine(model), ["5"], 3)["5"] + _play(_engine(model), ["6"], 3)["6"]
    crowd = _play(_engine(model), [str(k) for k in range(20)], 3)
    for (_, one), (_, other) in zip(alone, crowd["5"] + crowd["6"], strict=True):
        assert one.token_ids == other.token_ids
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


def test_a_seed_fixes_the_draw_and_another_changes_it(model: PreTrainedModel) -> None:
    engine = _engine(model)
    done = _finish(engine, *(_request(str(k), (1, 9), seed=k // 2, max_tokens=8) for k in range(8)))
    assert all(done[str(k)].token_ids == done[str(k + 1)].token_ids for k in range(0, 8, 2))
    assert len({generation.token_ids for generation in done.values()}) == 4


def test_draws_follow_the_distribution(model: PreTrainedModel) -> None:
    menu = ((20, STOP), (21, STOP), (22, STOP))
    done = _finish(
        _engine(model, max_sequences=3000),
        *(_request(str(k), (1, 9), choices=menu, seed=k) for k in range(3000)),
    )
    share = sum(generation.token_ids[0] == 20 for generation in done.values()) / 3000
    expected = _logits(model, (1, 9, 20))[2][[20, 21, 22]].softmax(-1)[0].item()
    assert share == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / 3000))


def test_temperature_0_takes_the_most_likely_token_whatever_the_seed(model: PreTrainedModel) -> None:
    first, second = (
        _finish(_engine(model), _request("a", (1, 9), temperature=0.0, seed=seed))["a"] for seed in (1, 2)
    )
    assert first.token_ids == second.token_ids
    logits = _logits(model, [1, 9, *first.token_ids])[2:]
    assert tuple(logits.argmax(-1).tolist()) == first.token_ids
    _check_against_plain_forward(model, (1, 9), first)  # at temperature 1


def test_a_reply_ends_at_its_limit_or_where_the_context_is_full(model: PreTrainedModel) -> None:
    with torch.no_grad():
        model.get_output_embeddings().weight[STOP] = 0.0  # so that other ids are more likely
    done = _finish(
        _engine(model, max_context=10),
        _request("limit", (1, 9), max_tokens=3, temperature=0.0),
        _request("full", (1, 9, 10, 11), max_tokens=50, temperature=0.0),
    )
    assert (len(done["limit"].token_ids), done["limit"].finish) == (3, "length")
    assert (len(done["full"].token_ids), done["full"].finish) == (6, "length")


def test_after_a_refresh_the_history_is_read_by_the_new_weights(model: PreTrainedModel) -> None:
    engine = _engine(model)
    first = _finish(engine, _request("a", (1, 9, 10), seed=1, max_tokens=4))["a"]
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.05)
    engine.refresh(7)
    second = _finish(engine, _request("a", (2, 12, 3), new_sequence=False, seed=2, max_tokens=4))["a"]
    assert (first.policy_version, second.policy_version) == (0, 7)
    _check_against_plain_forward(model, [1, 9, 10, *first.token_ids, 2, 12, 3], second)


def test_a_reply_goes_on_with_new_weights_and_says_which_token_is_whose(model: PreTrainedModel) -> None:
    engine = _engine(model)
    with torch.no_grad():
        model.get_output_embeddings().weight[STOP] = 0.0  # so that other ids are more likely
    engine.submit(_request("a", (1, 9, 10), seed=1, max_tokens=6, temperature=0.0))
    assert [list(engine.step()) for _ in range(2)] == [[], []]
    early = _logits(model, [1, 9, 10, 0])[3].log_softmax(-1).max()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.05)
    engine.refresh(4)
    engine.refresh(5)
    done: list[Generation] = []
    while not done:
        done += engine.step()
    [reply] = done
    assert (reply.policy_version, reply.policy_versions) == (0, (0, 0, 5, 5, 5, 5))
    assert reply.logprobs[0] == pytest.approx(float(early), abs=1e-5)
    late = _logits(model, [1, 9, 10, *reply.token_ids]).log_softmax(-1)[5:]
    assert reply.logprobs[2:] == pytest.approx(
        [float(row[token]) for row, token in zip(late, reply.token_ids[2:], strict=False)], abs=1e-5
    )


def _parent(engine: TorchEngine) -> list[int]:
    """Play a turn of sequence "a"; return all its tokens, of which the last is not in the cache."""
    prompt = (1, 9, 10, 11)
    return [*prompt, *_finish(engine, _request("a", prompt, seed=1, max_tokens=4))["a"].token_ids]


@pytest.mark.parametrize(
    ("tail", "read"),
    [
        ((), 1),  # what the first new token follows from is read in any case
        ((12, 13), 3),  # the end of the parent's reply waits to be read
        ((12,) * 20, 21),
    ],
)
def test_a_sequence_reads_what_its_parent_has_not_read(
    model: PreTrainedModel, tail: tuple[int, ...], read: int
) -> None:
    engine = _engine(model)
    prompt = (*_parent(engine), *tail)
    before = engine.tokens_forwarded
    child = _finish(engine, _request("b", prompt, seed=2, max_tokens=1, parent="a"))["b"]
    assert engine.tokens_forwarded - before == read
    _check_against_plain_forward(model, prompt, child)
    # Both go on by themselves.
    one, other = (
        _finish(engine, _request(name, (14, 15), new_sequence=False, seed=3, max_tokens=3))[name]
        for name in "ab"
    )
    _check_against_plain_forward(model, (*prompt[: len(prompt) - len(tail)], 14, 15), one)
    _check_against_plain_forward(model, (*prompt, *child.token_ids, 14, 15), other)


def test_a_sequence_reads_from_where_it_differs_from_its_parent(model: PreTrainedModel) -> None:
    engine = _engine(model)
    first, *_ = _parent(engine)
    for prompt, read in (((first, 9, 10, 50, 51), 2), ((50, 51, 52), 3)):
        before = engine.tokens_forwarded
        child = _finish(engine, _request(f"b{read}", prompt, max_tokens=1, parent="a"))[f"b{read}"]
        assert engine.tokens_forwarded - before == read
        _check_against_plain_forward(model, prompt, child)


def test_a_sequence_can_have_a_parent_that_is_being_extended(model: PreTrainedModel) -> None:
    engine = _engine(model)
    held = _parent(engine)
    engine.submit(_request("a", (20, 21), new_sequence=False, seed=4, max_tokens=6))
    engine.step()
    engine.step()
    before = engine.tokens_forwarded
    engine.submit(_request("b", (*held, 20, 22), seed=5, max_tokens=1, parent="a"))
    done = {generation.sequence: generation for _ in range(9) for generation in engine.step()}
    _check_against_plain_forward(model, (*held, 20, 21), done["a"])
    _check_against_plain_forward(model, (*held, 20, 22), done["b"])
    assert engine.tokens_forwarded - before == 1 + len(done["a"].token_ids) - 2  # 22, and the rest of "a"


@pytest.mark.parametrize("why", ["unknown", "released", "refreshed", "full"])
def test_without_a_parents_cache_a_sequence_reads_all(model: PreTrainedModel, why: str) -> None:
    engine = _engine(model, max_sequences=1 if why == "full" else 8)
    prompt = (*_parent(engine), 12)
    if why == "released":
        engine.release("a")
    if why == "refreshed":
        engine.refresh(1)
    before = engine.tokens_forwarded
    parent = "nobody" if why == "unknown" else "a"
    child = _finish(engine, _request("b", prompt, seed=2, max_tokens=1, parent=parent))["b"]
    assert engine.tokens_forwarded - before == len(prompt)
    _check_against_plain_forward(model, prompt, child)


def test_a_copy_takes_nobodys_place(model: PreTrainedModel) -> None:
    engine = _engine(model, max_sequences=2)
    prompt = (*_parent(engine), 12)
    engine.submit(_request("busy", (1, 30), seed=3, max_tokens=5))
    engine.step()
    before = engine.tokens_forwarded
    engine.submit(_request("b", prompt, seed=2, max_tokens=1, parent="a"))
    done = {generation.sequence: generation for _ in range(9) for generation in engine.step()}
    assert engine.tokens_forwarded - before == len(prompt) + len(done["busy"].token_ids) - 1
    _check_against_plain_forward(model, prompt, done["b"])


def test_copies_survive_growth_and_moves_of_the_cache(model: PreTrainedModel) -> None:
    engine = _engine(model)
    prompt = tuple(_parent(engine))
    children = [f"b{k}" for k in range(40)]
    for k, name in enumerate(children):
        engine.submit(_request(name, (*prompt, 12 + k % 5), seed=k, max_tokens=2, parent="a"))
    done = {generation.sequence: generation for _ in range(6) for generation in engine.step()}
    engine.release("a")
    for name in children[:30]:
        engine.release(name)
    before = engine.tokens_forwarded
    again = _finish(
        engine, *(_request(name, (14,), new_sequence=False, seed=7, max_tokens=1) for name in children[30:])
    )
    assert engine.tokens_forwarded - before == 2 * 10
    for k, name in list(enumerate(children))[30:]:
        held = (*prompt, 12 + k % 5)
        _check_against_plain_forward(model, held, done[name])
        _check_against_plain_forward(model, (*held, *done[name].token_ids, 14), again[name])


def test_a_fresh_request_forgets_the_sequence(model: PreTrainedModel) -> None:
    engine = _engine(model)
    _finish(engine, _request("a", (1, 30, 31, 32), max_tokens=3))
    again = _finish(engine, _request("a", (1, 9), seed=5))["a"]
    _check_against_plain_forward(model, (1, 9), again)


def test_requests_beyond_the_cap_wait_for_a_release(model: PreTrainedModel) -> None:
    engine = _engine(model, max_sequences=2)
    requests = [_request(str(k), (1, 9 + k), seed=k, max_tokens=4) for k in range(5)]
    for request in requests:
        engine.submit(request)
    done: dict[str, Generation] = {}
    for _ in range(60):
        assert len([row for row in engine._slots if row is not None]) <= 2
        for generation in engine.step():
            done[generation.sequence] = generation
            engine.release(generation.sequence)
    expected = _finish(_engine(model), *requests)
    assert {name: one.token_ids for name, one in done.items()} == {
        name: one.token_ids for name, one in expected.items()
    }


def test_a_full_house_of_idle_sequences_makes_room_and_reads_them_again_later(model: PreTrainedModel) -> None:
    small, large = _engine(model, max_sequences=2), _engine(model)
    names = ["0", "1", "2", "3", "4"]
    expected = _play(large, names, 3)
    assert _replies(_play(small, names, 3)) == _replies(expected)
    assert small.tokens_forwarded > large.tokens_forwarded


def _replies(log: dict[str, list[tuple[list[int], Generation]]]) -> dict[str, list[tuple[int, ...]]]:
    return {name: [generation.token_ids for _, generation in turns] for name, turns in log.items()}


def test_released_slots_are_filled_and_moved_without_harm(model: PreTrainedModel) -> None:
    draw = random.Random(0)
    engine = _engine(model)
    held: dict[str, list[int]] = {}
    for turn in range(12):
        for name in [name for name in held if draw.random() < 0.4]:
            engine.release(name)
            del held[name]
        new = [f"{turn}.{k}" for k in range(draw.randint(0, 6))]
        requests = []
        for name in [*held, *new]:
            prompt = [draw.randint(5, 60) for _ in range(draw.randint(1, 8))]
            requests.append(
                _request(
                    name,
                    prompt,
                    new_sequence=name in new,
                    seed=draw.randint(0, 999),
                    choices=draw.choice((MENU, None)),
                    max_tokens=4,
                )
            )
            held.setdefault(name, []).extend(prompt)
        for name, generation in _finish(engine, *requests).items():
            _check_against_plain_forward(model, held[name], generation)
            held[name] += generation.token_ids


def test_long_prompts_are_fed_in_pieces(model: PreTrainedModel) -> None:
    requests = [_request(str(k), (1, *range(5, 30 + k)), seed=k, max_tokens=3) for k in range(4)]
    pieces, whole = _engine(model, max_step_tokens=16), _engine(model)
    cut = _finish(pieces, *requests)
    assert {name: one.token_ids for name, one in cut.items()} == {
        name: one.token_ids for name, one in _finish(whole, *requests).items()
    }
    assert pieces.tokens_forwarded == whole.tokens_forwarded
    assert pieces.forwards > whole.forwards


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (_request("bad", (1,), choices=()), "choices is empty"),
        (_request("bad", (1,), choices=((20, 21),)), "does not end in a stop id but in 21"),
        (_request("bad", (1,), choices=((20, STOP), (20, STOP, 5, STOP))), "is a prefix of the choice"),
        (_request("bad", (1,), choices=((9999, STOP),)), "outside the model's vocabulary"),
        (_request("bad", (1, 9999)), "outside the model's vocabulary"),
        (_request("bad", ()), "empty"),
        (_request("bad", (1,), new_sequence=False), "needs new_sequence=True"),
        (_request("bad", (1,), max_tokens=0), "max_tokens is 0"),
        (_request("bad", (1,), temperature=-1.0), "temperature is -1.0"),
        (_request("bad", (1,) * 256), "context overflow: 256 tokens and a reply of 1 exceed max_context=256"),
        (_request("bad", (1,) * 252, choices=MENU), "context overflow: 252 tokens and a reply of 5"),
        (_request("busy", (1, 9)), "in flight"),
    ],
)
def test_a_bad_request_ends_in_its_own_error_and_harms_no_other(
    model: PreTrainedModel, request_: GenerationRequest, words: str
) -> None:
    engine = _engine(model)
    engine.submit(_request("busy", (1, 9, 10), seed=1, max_tokens=6))
    engine.submit(request_)
    done = [generation for _ in range(10) for generation in engine.step()]
    (failed,) = [generation for generation in done if generation.error is not None]
    (good,) = [generation for generation in done if generation.error is None]
    assert failed.sequence == request_.sequence
    assert words in failed.error
    assert failed.token_ids == ()
    assert good == _finish(_engine(model), _request("busy", (1, 9, 10), seed=1, max_tokens=6))["busy"]


def test_weights_that_are_not_finite_are_an_error_of_the_generation(model: PreTrainedModel) -> None:
    with torch.no_grad():
        model.base_model.norm.weight[0] = math.nan
    done = _finish(_engine(model), _request("a", (1, 9)), _request("b", (1, 9), choices=MENU))
    assert all("not finite" in (generation.error or "") for generation in done.values())


def test_a_released_sequence_stops_generating(model: PreTrainedModel) -> None:
    engine = _engine(model)
    engine.submit(_request("a", (1, 9), max_tokens=50))
    engine.step()
    engine.release("a")
    forwards = engine.forwards
    assert engine.step() == []
    assert engine.forwards == forwards


def test_a_failing_forward_ends_its_replies_in_an_error_and_the_engine_goes_on(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, untouched = _engine(model), _engine(model)
    request = _request("a", (5, 6, 7))
    (expected,) = _finish(untouched, request).values()
    forward = engine._forward

    def out_of_memory(*args: object) -> Tensor:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine, "_forward", out_of_memory)
    failed = _finish(engine, request, _request("b", (5, 8)))
    assert {name: done.error for name, done in failed.items()} == dict.fromkeys(
        "ab", "RuntimeError: out of memory"
    )
    monkeypatch.setattr(engine, "_forward", forward)
    assert _finish(engine, request)["a"].token_ids == expected.token_ids


@pytest.mark.parametrize("length", [3, 4])
def test_a_sequence_is_copied_even_where_it_fills_the_cache(length: int) -> None:
    cache = KVCache()
    cache.reserve(3, 4)
    for states in cache.layer(0, torch.zeros(1, 2, 1, 5), torch.zeros(1, 2, 1, 5)):
        states[2] = 7.0
    cache.copy(2, [0, 1], length)
    for states in cache.layer(0, torch.zeros(1, 2, 1, 5), torch.zeros(1, 2, 1, 5)):
        assert (states[:2, :length] == 7.0).all()
        assert (states[:2, length:] == 0.0).all()
