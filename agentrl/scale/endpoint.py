"""A player that is a model on an OpenAI-compatible chat server."""

import asyncio
import logging
import os
import queue
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from agentrl.data.trajectory import StopReason, Turn
from agentrl.errors import AgentRLError, ConfigError, missing_extra
from agentrl.policy.dialogue import Wording
from agentrl.policy.engine import SamplingParams
from agentrl.policy.message_dialogue import Exchange, MessageDialogue, configured_messages
from agentrl.policy.prompt import Example, Observation
from agentrl.policy.settings import ENDPOINT, EngineConfig, PolicyConfig
from agentrl.rollout.play import ActionRequest, Reply, Stop
from agentrl.rollout.players import Answered
from agentrl.seeds import derive_seed

if TYPE_CHECKING:
    from agentrl.scale.chat_client import ChatAnswer, ChatClient

_log = logging.getLogger(__name__)

BASE_URL, API_KEY = "OPENAI_BASE_URL", "OPENAI_API_KEY"
_OPENAI = "https://api.openai.com/v1"
_CUT_OFF = ("length", "content_filter")  # the finish of a reply that the model has not ended itself
_LONGEST_POLL = 0.05  # seconds, after which the environments are looked after again

_Requested = Future[Any]  # of a ChatAnswer


class EndpointPlayer:
    """Player that sends each episode's dialogue to a chat server, many requests at a time.

    A server chooses its own tokens, so every reply is free text; a turn records neither tokens nor entropies.
    A request that fails for good aborts its episode, which then says nothing about the policy.

    Args:
        dialogue: The dialogue, which writes the messages and finds the command in a reply.
        client: The client of the server.
        temperature: The sampling temperature, which the turns record.
        max_aborted_share: The share of aborted episodes beyond which an evaluation stops.

    Attributes:
        cut_observations: The number of observations so far that were too long, and are cut.
    """

    def __init__(
        self,
        dialogue: MessageDialogue,
        client: "ChatClient",
        *,
        temperature: float = 1.0,
        max_aborted_share: float = 1.0,
    ) -> None:
        self.dialogue = dialogue
        self._client = client
        self._temperature = temperature
        self.max_aborted_share = max_aborted_share
        self.cut_observations = 0
        self._history: dict[str, list[Exchange]] = {}
        self._pending: dict[str, tuple[ActionRequest, _Requested]] = {}
        self._done: queue.SimpleQueue[tuple[str, _Requested]] = queue.SimpleQueue()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=_serve, args=(self._loop, client), name="endpoint", daemon=True).start()
        # The thread holds no reference to the player, and ends with it.
        weakref.finalize(self, self._loop.call_soon_threadsafe, self._loop.stop)

    @property
    def wording(self) -> Wording:
        """Return the fixed text of the messages."""
        return self.dialogue.wording

    @property
    def usage(self) -> dict[str, int]:
        """Return the number of requests, retries and tokens so far."""
        return asdict(self._client.usage)

    def check(self) -> None:
        """Send a first request, whose reply is not used.

        Raises:
            FailedRequestError: If the server cannot be reached or does not serve the model to this caller.
        """
        messages = self.dialogue.messages((), "This is a test. Reply with one word.")
        asyncio.run_coroutine_threadsafe(self._client.find_out(messages), self._loop).result()

    def submit(self, request: ActionRequest) -> None:
        """Send a request to the server."""
        history = self._history.setdefault(request.episode_id, [])
        self.cut_observations += self.dialogue.cuts(request.observation)
        seen = Observation(request.observation, request.actions, request.briefing)
        seed = derive_seed(request.seed, "turn", request.turn)
        reply = self._client.reply(self.dialogue.messages(history, seen), seed)
        future = asyncio.run_coroutine_threadsafe(reply, self._loop)
        self._pending[request.episode_id] = request, future
        future.add_done_callback(partial(_put, self._done, request.episode_id))

    def poll(self) -> Sequence[Answered]:
        """Return the replies that have arrived; wait a moment for the first of them."""
        answered: list[Answered] = []
        timeout = _LONGEST_POLL if self._pending else 0.0
        while True:
            try:
                episode_id, future = self._done.get(timeout=timeout) if timeout else self._done.get_nowait()
            except queue.Empty:
                return answered
            timeout = 0.0
            request, awaited = self._pending.get(episode_id, (None, None))
            if request is not None and awaited is future:  # else the episode was closed
                del self._pending[episode_id]
                answered.append((episode_id, self._answer(request, future)))

    def fork(self, child_id: str, parent_id: str, turns: Sequence[Turn], prefix_ids: tuple[int, ...]) -> None:
        """Start an episode after turns of its parent."""
        if prefix_ids:
            raise ValueError(f"{child_id!r} begins inside a reply, but a server gives complete replies")
        self._history[child_id] = self._history[parent_id][: len(turns)]

    def close(self, episode_id: str) -> None:
        """Discard all state of an episode, and its request."""
        self._history.pop(episode_id, None)
        _, future = self._pending.pop(episode_id, (None, None))
        if future is not None:
            future.cancel()

    def _answer(self, request: ActionRequest, future: _Requested) -> Reply | Stop:
        from agentrl.scale.chat_client import FailedRequestError

        try:
            answer: ChatAnswer = future.result()
        except FailedRequestError as failure:
            full = failure.context_full
            return Stop(StopReason.CONTEXT_LIMIT if full else StopReason.ENGINE_ERROR, str(failure))
        text = self.dialogue.with_reasoning(answer.text, answer.reasoning)
        complete = answer.finish not in _CUT_OFF
        parsed = self.dialogue.parse(text, complete=complete)
        self._history[request.episode_id].append(Exchange(request.observation, text, parsed.text))
        return Reply(
            parsed.text,
            valid=parsed.valid,
            finish="stop" if complete else "length",
            temperature=self._temperature,
        )


def _serve(loop: asyncio.AbstractEventLoop, client: "ChatClient") -> None:
    """Send requests until the loop is stopped, then drop those in flight."""
    asyncio.set_event_loop(loop)
    loop.run_forever()
    left = asyncio.all_tasks(loop)
    for task in left:
        task.cancel()
    loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
    loop.run_until_complete(client.close())
    loop.close()


def _put(done: "queue.SimpleQueue[tuple[str, _Requested]]", episode_id: str, future: _Requested) -> None:
    done.put((episode_id, future))


def open_endpoint(
    name: str,
    policy: PolicyConfig,
    engine: EngineConfig,
    *,
    temperature: float,
    base_url: str | None = None,
    examples: Sequence[Example] = (),
    max_aborted_share: float = 1.0,
) -> EndpointPlayer:
    """Open a player for a model on a chat server, and check with one request that it answers.

    Args:
        name: `openai:MODEL`.
        policy: The prompts and the reply format.
        engine: The length of replies, the deadline and the retries.
        temperature: The sampling temperature; 0 is greedy.
        base_url: The server's address; None takes it from OPENAI_BASE_URL, and with a key in OPENAI_API_KEY
            that of OpenAI.
        examples: The solved examples that the prompt shows.
        max_aborted_share: The share of aborted episodes beyond which an evaluation stops.

    Raises:
        ConfigError: If there is no address, a setting needs a tokenizer on this machine, or the server
            refuses the request.
        AgentRLError: If the server gives no usable answer.
        MissingDependencyError: Without the extra `openai`.
    """
    if find_spec("openai") is None:
        raise missing_extra(f"{name} needs the openai client", "openai")
    from agentrl.scale.chat_client import ChatClient, FailedRequestError

    model = name.removeprefix(ENDPOINT)
    if not model:
        raise ConfigError(f"policy is {name!r}, wanted {ENDPOINT}MODEL with the model's name on the server")
    for name_of in ("revision", "chat_template"):
        if (value := getattr(policy, name_of)) is not None:
            raise ConfigError(
                f"policy.{name_of} is {value!r}, but the server of {name} decides it; wanted null"
            )
    key = os.environ.get(API_KEY, "").strip() or None
    if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
        raise ConfigError(f"{API_KEY} holds a character that no HTTP header may hold")
    url = base_url or os.environ.get(BASE_URL, "").strip() or (_OPENAI if key else None)
    if url is None:
        raise ConfigError(f"{name} names no server: give --base-url, or set {BASE_URL} (and {API_KEY})")
    server = _checked_server(url, "--base-url" if base_url else BASE_URL)
    if policy.max_observation_tokens is not None:
        _log.info("%s: tokens cannot be counted here; an observation is cut at 4 characters for each", name)
    dialogue = configured_messages(policy, examples)
    client = ChatClient(
        model,
        base_url=url,
        api_key=key,
        sampling=SamplingParams(temperature=temperature, max_tokens=engine.max_tokens),
        config=engine.endpoint,
        template_arguments=policy.template_arguments,
    )
    player = EndpointPlayer(dialogue, client, temperature=temperature, max_aborted_share=max_aborted_share)
    try:
        player.check()
    except FailedRequestError as failure:
        if failure.status in (None, 408, 409, 425, 429) or failure.status >= 500:
            raise AgentRLError(f"{name} at {server}: {failure}") from None
        hint = {
            401: f"; is {API_KEY} right?",
            403: f"; is {API_KEY} right?",
            404: "; wanted the model's name on the server, and a base URL that often ends in /v1",
        }.get(failure.status, "")
        raise ConfigError(f"{name} at {server}: {failure}{hint}") from None
    return player


def _checked_server(url: str, where: str) -> str:
    """Return the server that an address names, without its path.

    Raises:
        ConfigError: If it is no address, or holds a password; the message does not repeat it.
    """
    try:
        parts = urlsplit(url)
        port = "" if parts.port is None else f":{parts.port}"
    except ValueError:
        raise ConfigError(f"{where} is no URL; wanted http://HOST:PORT/v1 or the like") from None
    if "@" in parts.netloc:
        raise ConfigError(f"{where} holds a user name or a password; wanted a key in {API_KEY}")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ConfigError(f"{where} is no address of a server; wanted http://HOST:PORT/v1 or the like")
    return f"{parts.scheme}://{parts.hostname}{port}"
