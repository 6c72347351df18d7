"""Replies assembled from the tokens that vLLM samples, tested without vLLM."""

import json
from dataclasses import replace

import pytest
import torch

from agentrl.policy.engine import Generation, GenerationRequest, SamplingParams
from agentrl.policy.thinking import Ending, Thinking
from agentrl.scale.vllm_decisions import Decisions, row
from agentrl.scale.vllm_replies import PendingReply, Sequences, sampling_arguments

MENU = ((2, 3, 9), (2, 4, 5, 6, 9), (2, 4, 5, 7, 9))


def sequences() -> Sequences:
    return Sequences(stop_ids=[9], vocabulary=20, max_context=12)


def asked(name: str = "a", prompt: tuple[int, ...] = (1, 1), **more: object) -> GenerationRequest:
    given = {"new_sequence": True, "choices": None, "seed": 0, "sampling": SamplingParams(1.0, 3)} | more
    return GenerationRequest(name, prompt, **given)  # type: ignore[arg-type]


def begun(held: Sequences, request: GenerationRequest, version: int = 0) -> PendingReply:
    reply = held.begin(request, version)
    assert isinstance(reply, PendingReply)
    return reply


def test_forced_tokens_are_added_here_and_skipped_when_vllm_samples_them_too() -> None:
    held = sequences()
    reply = begun(held, asked(choices=MENU))
    assert (reply.prompt, reply.max_tokens) == ([1, 1, 2], 4)
    reply.take(4, -0.5, 0.6, 0)
    reply.take(5, 0.0, 0.0, 0)
    assert not reply.done
    reply.take(7, -0.7, 0.69, 0)
    assert reply.done
    assert held.end(reply) == Generation(
        "a",
        (2, 4, 5, 7, 9),
        (0.0, -0.5, 0.0, -0.7, 0.0),
        (0.0, 0.6, 0.0, 0.69, 0.0),
        ((2,), (3, 4), (5,), (6, 7), (9,)),
    )


def test_a_menu_of_one_needs_no_draw() -> None:
    held = sequences()
    reply = begun(held, asked(choices=MENU[:1]), version=3)
    assert reply.done
    assert held.end(reply) == Generation(
        "a", (2, 3, 9), (0.0,) * 3, (0.0,) * 3, ((2,), (3,), (9,)), "stop", 3
    )


def test_a_free_reply_ends_at_a_stop_id_or_at_its_limit() -> None:
    held = sequences()
    stopped, cut = begun(held, asked("a")), begun(held, asked("b"))
    for token in (5, 9, 6):
        stopped.take(token, -1.0, 1.0, 0)
        cut.take(5, -1.0, 1.0, 0)
    one, other = held.end(stopped), held.end(cut)
    assert (one.token_ids, one.finish, one.allowed) == ((5, 9), "stop", None)
    assert (other.token_ids, other.finish) == ((5, 5, 5), "length")


def test_the_limit_shrinks_to_what_the_context_has_room_for() -> None:
    reply = begun(sequences(), asked(prompt=(1,) * 10, sampling=SamplingParams(1.0, 64)))
    assert reply.max_tokens == 2


def test_a_sequence_holds_its_prompts_and_replies() -> None:
    held = sequences()
    reply = begun(held, asked(choices=MENU[:1]))
    held.end(reply)
    assert begun(held, asked(prompt=(7,), new_sequence=False)).prompt == [1, 1, 2, 3, 9, 7]


def test_every_token_has_the_version_of_the_weights_that_drew_it() -> None:
    held = sequences()
    reply = begun(held, asked(), version=1)
    for version in (1, 2, 2):
        reply.take(5, -1.0, 1.0, version)
    found = held.end(reply)
    assert (found.policy_version, found.policy_versions) == (1, (1, 2, 2))


@pytest.mark.parametrize(
    ("request_", "wanted"),
    [
        (asked(new_sequence=False), "is unknown or released"),
        (asked(sampling=SamplingParams(1.0, 3, float)), "samples a whole reply at one temperature"),
        (asked(prompt=()), "at least one prompt token"),
        (asked(prompt=(20,)), "outside the model's vocabulary of 20"),
        (asked(choices=()), "choices is empty"),
        (asked(choices=((2, 3),)), "does not end in a stop id but in 3"),
        (asked(prompt=(1,) * 12), "context overflow: 12 tokens and a reply of 1 exceed max_context=12"),
        (asked(prompt=(1,) * 8, choices=MENU), "a reply of 5 exceed"),
        (asked(sampling=SamplingParams(1.0, 0)), "max_tokens is 0"),
        (asked(sampling=SamplingParams(-1.0)), "temperature is -1.0"),
        (asked(sampling=SamplingParams(0.001)), r"temperature is 0.001, wanted 0 or within [0.01, 2.0]"),
        (asked(sampling=SamplingParams(3.0)), r"temperature is 3.0, wanted 0 or within [0.01, 2.0]"),
    ],
)
def test_requests_that_cannot_be_served_say_why(request_: GenerationRequest, wanted: str) -> None:
    found = sequences().begin(request_, 0)
    assert isinstance(found, str)
    assert wanted in found


def test_a_second_request_of_a_sequence_waits_for_the_first() -> None:
    held = sequences()
    begun(held, asked())
    assert "has a request in flight" in str(held.begin(asked(), 0))
    held.release("a")
    begun(held, asked())


def test_a_token_that_was_not_allowed_or_not_finite_is_an_error() -> None:
    held = sequences()
    with pytest.raises(ValueError, match=r"vLLM sampled 8, wanted one of \(3, 4\)"):
        begun(held, asked("a", choices=MENU)).take(8, -1.0, 1.0, 0)
    with pytest.raises(ValueError, match="not finite"):
        begun(held, asked("b")).take(8, -1.0, float("nan"), 0)


def test_vllm_is_told_the_rest_of_the_choices_and_never_to_stop_at_its_own_end_of_text() -> None:
    told = sampling_arguments(begun(sequences(), asked(choices=MENU, seed=5)))
    assert told["extra_args"]["agentrl"]["choices"] == [(3, 9), (4, 5, 6, 9), (4, 5, 7, 9)]
    assert told["ignore_eos"]
    assert (told["seed"], told["stop_token_ids"], told["max_tokens"]) == (5, [9], 4)


def test_a_stop_id_inside_a_choice_does_not_end_it() -> None:
    held = Sequences(stop_ids=[9, 8], vocabulary=20, max_context=12)
    reply = begun(held, asked(choices=((2, 9, 3, 8), (2, 4, 9))))
    assert sampling_arguments(reply)["stop_token_ids"] == [8]
    for token in (9, 3, 8):
        reply.take(token, -0.1, 0.1, 0)
    assert held.end(reply).token_ids == (2, 9, 3, 8)


# Replies that think first.

ENDING = Ending("</t>", {2: "</", 3: "t", 4: ">", 5: ">\n"})
THINKING = Thinking((1,), ENDING, (2, 3, 4), {"": (6, 7), "\n": (7,)})
CHOICES = ((8, 10, 9), (8, 11, 12, 9), (13, 9))


def thinker(name: str = "a", most: int = 14, seed: int = 0, **more: object) -> GenerationRequest:
    given = {"choices": CHOICES, "thinking": THINKING, "seed": seed, "sampling": SamplingParams(1.0, most)}
    return asked(name, (15, 1), **(given | more))


def roomy() -> Sequences:
    return Sequences(stop_ids=[9], vocabulary=20, max_context=64)


def test_thoughts_are_asked_for_first_and_the_choice_when_they_are_over() -> None:
    held = roomy()
    reply = begun(held, thinker(seed=5))
    key, told = reply.key, sampling_arguments(reply)
    # 14 tokens, less 3 that close, 2 that lead over and 4 of the longest choice
    assert (reply.prompt, told["max_tokens"], told["seed"], told["stop_token_ids"]) == ([15, 1], 5, 5, [9])
    assert told["extra_args"]["agentrl"] == {
        "key": key,
        "thoughts": {
            "end": "</t>",
            "pieces": [(2, "</"), (3, "t"), (4, ">"), (5, ">\n")],
            "begun": (),
            "stop": 9,
        },
    }
    for token in (14, 2, 3):
        reply.take(token, -1.0, 1.0, 0)
        assert reply.key == key
    reply.take(5, -1.5, 1.25, 0)
    assert not reply.done
    assert reply.key != key
    told = sampling_arguments(reply)
    assert reply.prompt == [15, 1, 14, 2, 3, 5, 7]
    assert told["seed"] != 5
    assert (told["max_tokens"], told["stop_token_ids"]) == (4, [9])
    assert told["extra_args"]["agentrl"] == {"key": reply.key, "choices": list(CHOICES)}
    reply.take(8, -0.5, 0.6, 1)
    reply.take(11, -0.7, 0.69, 1)
    assert reply.done
    assert held.end(reply) == Generation(
        "a",
        (14, 2, 3, 5, 7, 8, 11, 12, 9),
        (-1.0, -1.0, -1.0, -1.5, 0.0, -0.5, -0.7, 0.0, 0.0),
        (1.0, 1.0, 1.0, 1.25, 0.0, 0.6, 0.69, 0.0, 0.0),
        (None, None, None, None, (7,), (8, 13), (10, 11), (12,), (9,)),
        "stop",
        0,
        (0, 0, 0, 0, 0, 1, 1, 1, 1),
    )
    assert begun(held, asked(prompt=(7,), new_sequence=False)).prompt == [
        15,
        1,
        14,
        2,
        3,
        5,
        7,
        8,
        11,
        12,
        9,
        7,
    ]


@pytest.mark.parametrize("thoughts", [(14, 14, 14, 14, 14), (14, 9)], ids=["limit", "stop id"])
def test_thoughts_that_are_cut_short_are_closed_here(thoughts: tuple[int, ...]) -> None:
    reply = begun(roomy(), thinker())
    for token in thoughts:
        assert reply.thought is not None
        reply.take(token, -1.0, 1.0, 0)
    assert reply.thought is None
    assert reply.prompt == [15, 1, *thoughts, 2, 3, 4, 6, 7]


def test_without_room_for_thoughts_only_the_choice_is_asked_for() -> None:
    reply = begun(roomy(), thinker(most=9))
    assert (reply.thought, reply.prompt) == (None, [15, 1, 2, 3, 4, 6, 7])
    short = Sequences(stop_ids=[9], vocabulary=20, max_context=10)
    assert "a reply of 9 exceed max_context=10" in str(short.begin(thinker(), 0))


def test_a_menu_of_one_is_done_when_the_thoughts_are() -> None:
    held = roomy()
    reply = begun(held, thinker(choices=CHOICES[:1]))
    for token in (2, 3, 4):
        assert not reply.done
        reply.take(token, -1.0, 1.0, 0)
    assert reply.done
    assert held.end(reply).token_ids == (2, 3, 4, 6, 7, 8, 10, 9)


def test_what_vllm_samples_by_these_arguments_makes_whole_replies() -> None:
    """Stand-in for vLLM that masks with `Decisions`, samples, and stops at the given ids."""
    generator = torch.Generator().manual_seed(0)
    forms, ended = set(), 0
    for number in range(200):
        begun_by = ((), (14, 2), (2, 3))[number % 3]
        held = roomy()
        request = thinker(most=30, begun=begun_by)
        reply = begun(held, replace(request, prompt_ids=(15, 1, *begun_by)))
        asked_for = []
        while not reply.done:
            key, told, output = reply.key, sampling_arguments(reply), []
            asked_for.append(key)
            decisions = Decisions()
            own = row(json.loads(json.dumps(told["extra_args"])), told["temperature"], output)
            assert own is not None
            decisions.rows[0] = own
            while not reply.done and reply.key == key:
                assert len(output) < told["max_tokens"]
                logits = torch.randn(1, 20, generator=generator)
                logits[0, 2:6] += 2.0  # tokens of the ending
                probabilities = decisions.apply(logits).softmax(-1)[0]
                token = int(torch.multinomial(probabilities, 1, generator=generator))
                entropies = dict(decisions.take([key])[key])
                reply.take(token, float(probabilities[token].log()), entropies[len(output)], 0)
                output.append(token)
            if own.thoughts is not None and own.thoughts.over(output):
                # All that it may sample beyond the ending is the stop id, so that it stops there.
                assert torch.isfinite(decisions.apply(torch.zeros(1, 20))).nonzero().tolist() == [[0, 9]]
                ended += 1
        found = held.end(reply)
        assert len(asked_for) == len(set(asked_for)) == 2
        assert found.allowed is not None
        free = sum(ids is None for ids in found.allowed)
        rest = found.token_ids[free:]
        forms.add(next(form for form in ((6, 7), (7,), (2, 3, 4, 6, 7)) if rest[len(form) :] in CHOICES))
        for token, ids in zip(found.token_ids, found.allowed, strict=True):
            assert ids is None or token in ids
    assert forms == {(6, 7), (7,), (2, 3, 4, 6, 7)}
    assert ended > 10
