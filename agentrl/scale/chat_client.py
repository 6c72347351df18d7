"""Requests to an OpenAI-compatible chat server: deadlines, retries, bounded answers, counted tokens.

Needs the extra `openai`. The server's address and the key are in no message of an error.
"""

import asyncio
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Annotated, Any, cast

import openai
from pydantic import BaseModel, Field, ValidationError

from agentrl.errors import AgentRLError
from agentrl.policy.chat import Message
from agentrl.policy.engine import SamplingParams
from agentrl.policy.settings import EndpointConfig

MAX_BODY_BYTES = 1 << 22  # a reply of thousands of tokens has some kilobytes
_TRY_LATER = (408, 409, 425, 429)
_FIRST_WAIT = 0.5  # seconds; doubles with every retry
_SHORTEST_SECRET = 8  # servers without keys are given words such as EMPTY
_MAX_ERROR_CHARS = 300
# What some servers refuse, and what a request can do without it: nothing is sent, or another name.
_DISPENSABLE = {"max_tokens": "max_completion_tokens", "seed": None, "top_p": None}


class FailedRequestError(AgentRLError):
    """A request got no usable answer.

    Args:
        message: What happened.
        status: The status of the answer, if there was one.
        context_full: Whether the prompt and the reply do not fit into the model's context.
        again: Whether the same request may succeed later.
        wait: The number of seconds that the server asks to wait before that.
        parameter: The parameter of the request that the server does not accept, if it names one.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        context_full: bool = False,
        again: bool = False,
        wait: float = 0.0,
        parameter: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.context_full, self.again = status, context_full, again
        self.wait, self.parameter = wait, parameter


@dataclass(frozen=True, slots=True)
class ChatAnswer:
    """A server's reply.

    Args:
        text: The text of the reply, without reasoning that the server has taken out of it.
        reasoning: That reasoning.
        finish: `stop` if the model ended its reply, else what the server says, such as `length`.
    """

    text: str
    reasoning: str
    finish: str


@dataclass(slots=True)
class Usage:
    """Numbers of requests and tokens.

    Args:
        requests: The number of requests sent, retries included.
        retries: The number of requests that were sent again.
        prompt_tokens: The number of tokens that the server has read, as it reports them.
        completion_tokens: The number of tokens that it has written.
        uncounted: The number of answers without a report of tokens.
    """

    requests: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    uncounted: int = 0


_Tokens = Annotated[int, Field(ge=0)]


class _Message(BaseModel):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _Tally(BaseModel):
    prompt_tokens: _Tokens
    completion_tokens: _Tokens


class _Completion(BaseModel):
    """The parts of an answer that are read; whatever else a server adds is ignored."""

    choices: Annotated[list[_Choice], Field(min_length=1)]
    usage: _Tally | None = None


class _BoundedHttpClient(openai.DefaultAsyncHttpxClient):
    """HTTP client that reads every answer to its end, and gives up on one that is too large."""

    async def send(self, request: Any, **arguments: Any) -> Any:
        """Send a request and return the answer with its body."""
        response = await super().send(request, **(arguments | {"stream": True}))
        body = bytearray()
        try:
            # A small compressed body can stand for a huge one; we ask for none.
            if (encoding := response.headers.get("content-encoding", "identity")) != "identity":
                raise FailedRequestError(f"the server compressed its answer ({encoding[:20]}), unasked")
            async for chunk in response.aiter_raw():
                body += chunk
                if len(body) > MAX_BODY_BYTES:
                    raise FailedRequestError(f"the server's answer exceeds {MAX_BODY_BYTES:,} bytes")
        finally:
            await response.aclose()
        read = type(response)
        return read(response.status_code, headers=response.headers, content=bytes(body), request=request)


class ChatClient:
    """Client of a chat server.

    Args:
        model: The name of the model on the server.
        base_url: The server's address, to which `/chat/completions` is added.
        api_key: The key; None for a server that wants none.
        sampling: The temperature and the length of replies.
        config: The deadline, and how often to try again.
        template_arguments: The arguments passed to the server's chat template, for servers that take them.

    Attributes:
        usage: What was sent and counted so far.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str,
        api_key: str | None,
        sampling: SamplingParams,
        config: EndpointConfig,
        template_arguments: Mapping[str, Any] | None = None,
    ) -> None:
        self._config = config
        self._secret = api_key if api_key and len(api_key) >= _SHORTEST_SECRET else None
        self._client = openai.AsyncOpenAI(
            base_url=base_url,
            api_key=api_key or "none",
            max_retries=0,  # retries are counted here, and malformed answers are among their reasons
            timeout=config.timeout,
            default_headers={"Accept-Encoding": "identity"},
            # A redirection would send the dialogue to a server that the caller has not named.
            http_client=_BoundedHttpClient(follow_redirects=False, timeout=config.timeout),
        )
        self._request: dict[str, Any] = {
            "model": model,
            "temperature": sampling.temperature,
            "top_p": 1.0,
            "max_tokens": sampling.max_tokens,
        }
        if template_arguments:
            self._request["extra_body"] = {"chat_template_kwargs": dict(template_arguments)}
        self._unsupported: set[str] = set()
        self._jitter = random.Random()
        self.usage = Usage()

    async def find_out(self, messages: Sequence[Message]) -> None:
        """Send a request, and again without each parameter that the server refuses and that can be spared.

        Raises:
            FailedRequestError: If the server refuses the request for another reason, or cannot be reached.
        """
        while True:
            try:
                await self.reply(messages, seed=0)
            except FailedRequestError as failure:
                name = failure.parameter
                spared = name in _DISPENSABLE or (name == "temperature" and self._request[name] == 1.0)
                if name is None or not spared or name in self._unsupported:
                    raise
                self._unsupported.add(name)
                if (other := _DISPENSABLE.get(name)) is not None:
                    self._request[other] = self._request[name]
                self._request.pop(name, None)
            else:
                return

    async def reply(self, messages: Sequence[Message], seed: int) -> ChatAnswer:
        """Return the reply to a dialogue.

        Raises:
            FailedRequestError: If there is none, after all retries.
        """
        retries = 0
        while True:
            try:
                return await self._ask(messages, seed)
            except FailedRequestError as failure:
                if not failure.again:
                    raise
                if retries >= self._config.retries:
                    failure.args = (f"{failure} ({retries + 1} requests)",)
                    raise
                if failure.wait > self._config.max_wait:
                    asks = (
                        f"asks to wait {failure.wait:g} s, engine.endpoint.max_wait={self._config.max_wait:g}"
                    )
                    failure.args = (f"{failure}; it {asks}",)
                    raise
                wait = min(self._config.max_wait, _FIRST_WAIT * 2.0 ** min(retries, 32))
                # Requests that failed together do not come back together.
                wait = max(failure.wait, wait / 2) + self._jitter.uniform(0, wait / 2)
            retries += 1
            self.usage.retries += 1
            await asyncio.sleep(wait)

    async def close(self) -> None:
        """Close all connections."""
        await self._client.close()

    async def _ask(self, messages: Sequence[Message], seed: int) -> ChatAnswer:
        """Send one request and return its reply."""
        self.usage.requests += 1
        arguments = self._request if "seed" in self._unsupported else self._request | {"seed": seed}
        with self._named_failures():
            async with asyncio.timeout(self._config.timeout):
                answer = await self._client.chat.completions.with_raw_response.create(
                    messages=cast(Any, list(messages)), **arguments
                )
        try:
            found = _Completion.model_validate_json(answer.content)
        except ValidationError as error:
            what = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, what["loc"]))
            raise FailedRequestError(
                f"the server's answer is no chat completion ({where + ': ' if where else ''}{what['msg']})"[
                    :_MAX_ERROR_CHARS
                ],
                again=True,
            ) from None
        if found.usage is None:
            self.usage.uncounted += 1
        else:
            self.usage.prompt_tokens += found.usage.prompt_tokens
            self.usage.completion_tokens += found.usage.completion_tokens
        choice = found.choices[0]
        message = choice.message
        reasoning = message.reasoning_content or message.reasoning or ""
        text = self._without_key(message.content or "")
        return ChatAnswer(text, self._without_key(reasoning), choice.finish_reason or "stop")

    @contextmanager
    def _named_failures(self) -> Iterator[None]:
        """Turn every failure of a request into a `FailedRequestError`.

        The original errors hold the request with its key, so they are not chained.
        """
        try:
            yield
        except (TimeoutError, openai.APITimeoutError):
            late = f"no complete answer within {self._config.timeout:g} s (engine.endpoint.timeout)"
            raise FailedRequestError(late, again=True) from None
        except openai.APIStatusError as error:
            raise self._refusal(error) from None
        except openai.APIConnectionError as error:
            cause = error.__cause__
            what = f"{type(cause).__name__}: {cause}".rstrip(": ")
            said = self._without_key(f"the connection failed ({what})"[:_MAX_ERROR_CHARS])
            raise FailedRequestError(said, again=True) from None
        except openai.OpenAIError as error:
            raise FailedRequestError(f"the request failed ({type(error).__name__})") from None

    def _refusal(self, error: openai.APIStatusError) -> FailedRequestError:
        body = error.body if isinstance(error.body, dict) else {}
        said = body.get("message") or body.get("detail") or error.response.text
        text = " ".join(self._without_key(str(said)).split())[:_MAX_ERROR_CHARS]
        code = error.status_code
        full = code == 400 and (error.code == "context_length_exceeded" or "context length" in text.lower())
        return FailedRequestError(
            f"the server answered {code}" + (f": {text}" if text else ""),
            status=code,
            context_full=full,
            again=code in _TRY_LATER or code >= 500,
            wait=_retry_after(error.response.headers),
            parameter=error.param if isinstance(error.param, str) and code in (400, 422) else None,
        )

    def _without_key(self, text: str) -> str:
        """Return a server's text; one that repeats the key does not get it into an episode or a log."""
        return text if self._secret is None else text.replace(self._secret, "[key]")


def _retry_after(headers: Mapping[str, str]) -> float:
    """Return the seconds to wait that a server asks for: a number, or until a date; 0 if it does not say.

    >>> _retry_after({"retry-after": "1.5"}), _retry_after({"retry-after": "soon"}), _retry_after({})
    (1.5, 0.0, 0.0)
    """
    said = headers.get("retry-after", "")
    try:
        seconds = float(said)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(said) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError):  # no date, or one without a time zone
            return 0.0
    return max(0.0, seconds) if seconds == seconds else 0.0
