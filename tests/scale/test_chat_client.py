"""Requests to a chat server that misbehaves in every way: what is tried again, and what is said at last."""

import asyncio
import gzip
import json
import logging
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from chat_servers import Behave, Call, chat_server

pytest.importorskip("openai")

from agentrl.policy.engine import SamplingParams
from agentrl.policy.settings import EndpointConfig
from agentrl.scale import chat_client
from agentrl.scale.chat_client import ChatAnswer, ChatClient, FailedRequestError, Usage

KEY = "sk-secret-of-the-test-0123456789"
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_client, "_FIRST_WAIT", 0.002)


def asked(
    behave: Behave, *, find_out: bool = False, timeout: float = 5.0, retries: int = 2, **config: Any
) -> tuple[ChatAnswer | FailedRequestError | None, Usage, list[Call]]:
    """Return what a request came to, what it cost, and the calls that the server got."""

    async def ask(url: str) -> tuple[ChatAnswer | FailedRequestError | None, Usage]:
        client = ChatClient(
            "some-model",
            base_url=url,
            api_key=KEY,
            sampling=SamplingParams(temperature=config.pop("temperature", 1.0), max_tokens=7),
            template_arguments=config.pop("template_arguments", None),
            config=EndpointConfig(timeout=timeout, retries=retries, **config),
        )
        found: ChatAnswer | FailedRequestError | None = None
        try:
            found = (await client.find_out(HELLO)) if find_out else (await client.reply(HELLO, seed=11))
        except FailedRequestError as failure:
            found = failure
        await client.close()
        return found, client.usage

    with chat_server(behave) as server:
        found, usage = asyncio.run(ask(server.url))
        assert usage.requests == len(server.calls)
        return found, usage, server.calls


def failed(behave: Behave, **config: Any) -> tuple[FailedRequestError, Usage]:
    found, usage, _ = asked(behave, **config)
    assert isinstance(found, FailedRequestError)
    return found, usage


def test_a_request_says_how_to_sample_and_its_tokens_are_counted() -> None:
    found, usage, (call,) = asked(lambda call: call.say("go north"), template_arguments={"thinking": False})
    assert found == ChatAnswer("go north", "", "stop")
    assert usage == Usage(requests=1, prompt_tokens=10, completion_tokens=2)
    assert call.headers["Authorization"] == f"Bearer {KEY}"
    assert call.path == "/v1/chat/completions"
    assert call.body == {
        "model": "some-model",
        "messages": HELLO,
        "temperature": 1.0,
        "top_p": 1.0,
        "max_tokens": 7,
        "seed": 11,
        "chat_template_kwargs": {"thinking": False},
    }


def test_reasoning_that_the_server_takes_out_is_kept_apart() -> None:
    found, _, _ = asked(lambda call: call.say("go", reasoning_content="hm"))
    assert found == ChatAnswer("go", "hm", "stop")


@pytest.mark.parametrize(
    ("behave", "reason"),
    [
        (lambda call: call.send("\x00\xff garbage"), "no chat completion"),
        (lambda call: call.send("<html>busy</html>"), "no chat completion"),
        (lambda call: call.send(b"\xff\xfe{"), "no chat completion"),
        (lambda call: call.send("[" * 100_000), "no chat completion"),
        (lambda call: call.send('data: {"choices": []}\n\n'), "no chat completion"),
        (lambda call: call.send('{"choices": []}'), "choices"),
        (lambda call: call.send('{"choices": [{}]}'), "choices.0.message"),
        (lambda call: call.send('{"choices": [{"message": {"content": 3}}]}'), "choices.0.message.content"),
        (lambda call: call.send("null"), "no chat completion"),
        (lambda call: call.break_off(), "connection failed"),
        (lambda call: call.refuse(500), "the server answered 500: no"),
        (lambda call: call.refuse(429, "slow down"), "the server answered 429: slow down"),
        (lambda call: call.send("", 503), "the server answered 503"),
    ],
)
def test_what_may_pass_is_tried_again_and_then_named(behave: Behave, reason: str) -> None:
    failure, usage = failed(behave)
    assert reason in str(failure)
    assert str(failure).endswith("(3 requests)")
    assert (usage.requests, usage.retries) == (3, 2)
    assert not failure.context_full


@pytest.mark.parametrize("behave", [Call.hang, Call.drip])
def test_a_request_has_a_deadline_even_where_bytes_keep_coming(behave: Behave) -> None:
    failure, usage = failed(behave, timeout=0.1, retries=1)
    assert str(failure) == "no complete answer within 0.1 s (engine.endpoint.timeout) (2 requests)"
    assert usage == Usage(requests=2, retries=1)


@pytest.mark.parametrize(
    ("behave", "reason"),
    [
        (lambda call: call.send(b" " * (chat_client.MAX_BODY_BYTES + 1)), "exceeds 4,194,304 bytes"),
        (lambda call: call.send("x" * (chat_client.MAX_BODY_BYTES + 1), 500), "exceeds 4,194,304 bytes"),
        (lambda call: call.send(gzip.compress(b" " * 10**7), Content_Encoding="gzip"), "compressed"),
        (lambda call: call.refuse(400, "bad"), "the server answered 400: bad"),
        (lambda call: call.refuse(401, f"wrong key {KEY}"), "the server answered 401: wrong key [key]"),
        (lambda call: call.send('{"detail": "Not Found"}', 404), "the server answered 404"),
        (lambda call: call.send("", 307, Location="http://127.0.0.1:9/v1"), "the server answered 307"),
    ],
)
def test_what_will_not_pass_is_not_tried_again(behave: Behave, reason: str) -> None:
    failure, usage = failed(behave)
    assert reason in str(failure)
    assert KEY not in str(failure)
    assert (usage.requests, usage.retries) == (1, 0)


def test_an_unreachable_server_is_a_lost_connection() -> None:
    async def ask() -> None:
        nowhere = {"base_url": "http://127.0.0.1:9/v1", "api_key": None}
        config = EndpointConfig(retries=0)
        await ChatClient("m", **nowhere, sampling=SamplingParams(), config=config).reply(HELLO, 0)

    with pytest.raises(FailedRequestError, match="the connection failed") as caught:
        asyncio.run(ask())
    assert (caught.value.status, caught.value.__suppress_context__) == (None, True)


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 502, 529])
def test_a_server_that_recovers_is_answered(status: int) -> None:
    def behave(call: Call) -> None:
        call.say("yes") if call.number == 2 else call.refuse(status)

    found, usage, _ = asked(behave)
    assert found == ChatAnswer("yes", "", "stop")
    assert usage == Usage(requests=3, retries=2, prompt_tokens=10, completion_tokens=2)


def slept(behave: Behave, monkeypatch: pytest.MonkeyPatch, **config: Any) -> tuple[list[float], str]:
    """Return the waits before retries, which are not waited for, and what the request came to."""
    waits: list[float] = []

    class Clock:
        timeout = staticmethod(asyncio.timeout)

        @staticmethod
        async def sleep(seconds: float) -> None:
            waits.append(seconds)

    monkeypatch.setattr(chat_client, "asyncio", Clock)
    return waits, str(asked(behave, **config)[0])


def limited(said: str) -> Behave:
    return lambda call: call.say("ok") if call.number else call.send("", 429, Retry_After=said)


def test_retry_after_is_honoured_in_seconds_and_as_a_date(monkeypatch: pytest.MonkeyPatch) -> None:
    waits, _ = slept(limited("7"), monkeypatch)
    assert len(waits) == 1
    assert 7.0 <= waits[0] < 7.1
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    (wait,), _ = slept(limited(date), monkeypatch)
    assert 20.0 < wait < 31.0
    for said in ("soon", "-5", "nan", "Thu, 01 Jan 1970 00:00:00 GMT"):
        (wait,), _ = slept(limited(said), monkeypatch)
        assert 0 <= wait < 0.01


def test_a_server_that_asks_to_wait_too_long_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    for said in ("3600", "inf", "1e300"):
        waits, failure = slept(limited(said), monkeypatch)
        assert waits == []
        assert f"it asks to wait {float(said):g} s, engine.endpoint.max_wait=60" in failure


def test_waits_grow_up_to_a_limit_and_are_never_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_client, "_FIRST_WAIT", 1.0)
    waits, _ = slept(lambda call: call.refuse(500), monkeypatch, retries=12, max_wait=10.0)
    upper = [min(10.0, 2.0**k) for k in range(12)]
    assert all(limit / 2 <= wait <= limit for wait, limit in zip(waits, upper, strict=True))
    assert len(set(waits)) == 12


@pytest.mark.parametrize(
    "error",
    [
        {"message": "too long", "code": "context_length_exceeded"},
        {"message": "This model's maximum context length is 2048 tokens. You requested 2100 tokens."},
    ],
)
def test_a_full_context_is_told_apart_from_other_refusals(error: dict[str, Any]) -> None:
    assert failed(lambda call: call.refuse(400, **error))[0].context_full
    assert not failed(lambda call: call.refuse(400, "bad"))[0].context_full


@pytest.mark.parametrize(
    ("content", "finish", "text"), [(None, "length", ""), ("", "stop", ""), ("go", "length", "go")]
)
def test_an_answer_without_content_is_an_empty_reply(content: str | None, finish: str, text: str) -> None:
    assert asked(lambda call: call.say(content, finish))[0] == ChatAnswer(text, "", finish)


def test_an_answer_without_a_count_of_tokens_is_counted_as_such() -> None:
    answer = json.dumps({"choices": [{"message": {"content": "a"}}]})
    found, usage, _ = asked(lambda call: call.send(answer))
    assert found == ChatAnswer("a", "", "stop")
    assert usage == Usage(requests=1, uncounted=1)


def test_a_key_that_the_server_repeats_gets_into_no_reply() -> None:
    found, _, _ = asked(lambda call: call.say(f"the key is {KEY}", reasoning_content=KEY))
    assert found == ChatAnswer("the key is [key]", "[key]", "stop")


def test_parameters_that_a_server_refuses_and_that_can_be_spared_are_left_out() -> None:
    refused = ["max_tokens", "temperature", "seed", "top_p"]

    def behave(call: Call) -> None:
        wrong = next((name for name in refused if name in call.body), None)
        call.say("ok") if wrong is None else call.refuse(400, f"{wrong} is not supported", param=wrong)

    found, usage, calls = asked(behave, find_out=True)
    assert found is None
    assert calls[-1].body == {"model": "some-model", "messages": HELLO, "max_completion_tokens": 7}
    assert (usage.requests, usage.retries) == (5, 0)


def test_greedy_decoding_cannot_be_spared() -> None:
    found, usage, _ = asked(
        lambda call: call.refuse(400, "no", param="temperature"), find_out=True, temperature=0.0
    )
    assert isinstance(found, FailedRequestError)
    assert usage.requests == 1


def test_nothing_that_is_logged_holds_the_key(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    asked(lambda call: call.say("a") if call.number else call.refuse(500, KEY))
    assert "HTTP" in caplog.text
    assert KEY not in caplog.text
