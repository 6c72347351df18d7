"""Replies put together from the tokens that vLLM samples, without vLLM."""

import pytest

from agentrl.policy.engine import Generation, GenerationRequest, SamplingParams
from agentrl.scale.vllm_replies import PendingReply, Sequences, sampling_arguments

MENU = ((2, 3, 9), (2, 4, 5, 6, 9), (2, 4, 5, 7, 9))


def sequences() -> Sequences:
    return Sequences(stop_ids=[9], vocabulary=20, max_context=12)


def asked(name: str = "a", prompt: tuple[int, ...] = (1, 1), **more: object) -> GenerationRequest:
    given = {"fresh": True, "choices": None, "seed": 0, "sampling": SamplingParams(1.0, 3)} | more
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
    assert begun(held, asked(prompt=(7,), fresh=False)).prompt == [1, 1, 2, 3, 9, 7]


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
        (asked(fresh=False), "is unknown or released"),
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
