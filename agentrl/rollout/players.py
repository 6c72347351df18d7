"""Players, which reply to requests: random, expert, human and language model players, and demonstrations."""

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, Protocol

from agentrl.data.trajectory import StopReason, Turn
from agentrl.env.spaces import TextSpace
from agentrl.errors import ConfigError
from agentrl.policy.engine import Engine, Generation, GenerationRequest, SamplingParams
from agentrl.policy.prompt import Observation
from agentrl.policy.thinking import Thinking
from agentrl.policy.trie import admissible_replies, token_trie
from agentrl.rollout.menus import Menu, build_menu
from agentrl.rollout.play import ActionRequest, Reply, Stop
from agentrl.seeds import derive_seed

if TYPE_CHECKING:
    from agentrl.policy.dialogue import Dialogue, Wording

Answered = tuple[str, Reply | Stop]
ChooseSampling = Callable[[ActionRequest, SamplingParams], SamplingParams]


class Player(Protocol):
    """Player that replies to several requests at a time, in any order."""

    def submit(self, request: ActionRequest) -> None:
        """Accept a request; an episode has at most one at a time."""
        ...

    def poll(self) -> Sequence[Answered]:
        """Do one unit of work and return the finished replies, if any, with the ids of their episodes."""
        ...

    def fork(self, child_id: str, parent_id: str, turns: Sequence[Turn], prefix_ids: tuple[int, ...]) -> None:
        """Start an episode after `turns` of its parent, before its first request.

        An episode that is its own parent goes back to that state.

        Args:
            child_id: The id of the episode.
            parent_id: The id of its parent.
            turns: The turns that both share.
            prefix_ids: The tokens with which the child's first reply begins.
        """
        ...

    def close(self, episode_id: str) -> None:
        """Discard all state of an episode."""
        ...


class _ImmediatePlayer(ABC):
    """Player that computes each reply by itself."""

    def __init__(self) -> None:
        self._requests: list[ActionRequest] = []

    def submit(self, request: ActionRequest) -> None:
        """Queue a request."""
        self._requests.append(request)

    def poll(self) -> Sequence[Answered]:
        """Reply to all queued requests."""
        requests, self._requests = self._requests, []
        return [(request.episode_id, self.reply(request)) for request in requests]

    def fork(self, child_id: str, parent_id: str, turns: Sequence[Turn], prefix_ids: tuple[int, ...]) -> None:
        """Do nothing: a reply depends on its request alone."""
        return

    def close(self, episode_id: str) -> None:
        """Remove the request of an episode, if any."""
        self._requests = [request for request in self._requests if request.episode_id != episode_id]

    @abstractmethod
    def reply(self, request: ActionRequest) -> Reply | Stop:
        """Return the reply to a request."""


class RandomPlayer(_ImmediatePlayer):
    """Player that draws uniformly from the admissible actions, or random text if the environment names none.

    The draw depends on `request.seed` and `request.turn` alone.
    """

    def reply(self, request: ActionRequest) -> Reply | Stop:
        """Return a random action."""
        draw = derive_seed("random", request.seed, request.turn)
        if request.actions is None:
            return Reply(TextSpace(seed=draw % 2**32).sample())
        if not request.actions:
            return Stop(StopReason.ENGINE_ERROR, "a random player has no choice: info['actions'] is empty")
        return Reply(request.actions[draw % len(request.actions)])


class ExpertPlayer(_ImmediatePlayer):
    """Player that takes the action of the environment's expert, `info['expert']`."""

    def reply(self, request: ActionRequest) -> Reply | Stop:
        """Return the expert's action."""
        action = _expert_action(request)
        return action if isinstance(action, Stop) else Reply(action)


def scripted_player(name: str) -> Player:
    """Return the player named `random` or `expert`."""
    if name == "random":
        return RandomPlayer()
    if name == "expert":
        return ExpertPlayer()
    raise ConfigError(f"policy is {name!r}, wanted random or expert")


class HumanPlayer(_ImmediatePlayer):
    """Player that asks a person.

    Args:
        ask: A function of the request that returns the reply.
    """

    def __init__(self, ask: Callable[[ActionRequest], str]) -> None:
        super().__init__()
        self._ask = ask

    def reply(self, request: ActionRequest) -> Reply | Stop:
        """Return the person's reply."""
        return Reply(self._ask(request))


@dataclass(frozen=True, slots=True)
class _Inheritance:
    """The tokens that the first request of a child takes over from its parent.

    Args:
        parent: The id of the parent.
        ids: The tokens of the parent's current sequence, which the child continues.
        begun: The first tokens of the parent's next reply, with which the child's reply begins.
    """

    parent: str | None = None
    ids: tuple[int, ...] = ()
    begun: tuple[int, ...] = ()


@dataclass(slots=True)
class _Conversation:
    """The turns of an episode so far.

    Args:
        history: The observation and the reply tokens of each turn.
        length: The number of tokens in its current sequence.
        submitted: Whether the engine knows the sequence.
        inheritance: What the next request takes over from a parent.
    """

    history: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    length: int = 0
    submitted: bool = False
    inheritance: _Inheritance = _Inheritance()

    def extend(self, observation: str, prompt: int, new_sequence: bool, action_ids: tuple[int, ...]) -> None:
        """Add a turn whose prompt has `prompt` tokens."""
        self.history.append((observation, action_ids))
        self.length = (0 if new_sequence else self.length) + prompt + len(action_ids)

    @classmethod
    def from_turns(cls, turns: Sequence[Turn], parent: "_Conversation | None" = None) -> "_Conversation":
        """Return the conversation after some turns, which are those of `parent` if that is known."""
        conversation = cls()
        seen = [text for text, _ in parent.history] if parent is not None else []
        for turn, text in zip_longest(turns, seen[: len(turns)]):
            # What the parent was shown says more than the text that the turn keeps.
            said = turn.observation if text is None else text
            conversation.extend(said, len(turn.prompt_ids), turn.new_sequence, turn.action_ids)
        return conversation


@dataclass(frozen=True, slots=True)
class _Pending:
    """A request that the engine is generating a reply for."""

    request: ActionRequest
    prompt_ids: tuple[int, ...]
    new_sequence: bool
    sampling: SamplingParams
    menu: Menu | None  # None for a reply of free text
    prefix: tuple[int, ...] = ()  # the first tokens of the reply, which the engine was given


class LanguagePlayer:
    """Player with a language model: a dialogue encodes the episode, and an engine generates the replies.

    Args:
        dialogue: The dialogue, which converts between texts and tokens.
        engine: The engine that generates.
        sampling: The sampling parameters of replies.
        choices: Whether to reply with one of the admissible actions where the environment names them, after
            the thoughts that the dialogue's `thinking` and `sampling.max_tokens` allow; False generates
            freely.
        choose_sampling: Maps a request and `sampling` to the parameters of the reply, which must have the
            same `max_tokens`; None takes `sampling`.

    Attributes:
        cut_observations: The number of observations so far that were too long, and are cut.
    """

    def __init__(
        self,
        dialogue: "Dialogue",
        engine: Engine,
        sampling: SamplingParams,
        *,
        choices: bool = True,
        choose_sampling: ChooseSampling | None = None,
    ) -> None:
        self._dialogue = dialogue
        self._engine = engine
        self._sampling = sampling
        self._choices = choices
        self._choose_sampling = choose_sampling
        self._thinking: Thinking | None = getattr(dialogue, "thinking", None)
        self.cut_observations = 0
        self._conversations: dict[str, _Conversation] = {}
        self._pending: dict[str, _Pending] = {}
        self._stopped: list[Answered] = []

    @property
    def wording(self) -> "Wording":
        """Return the fixed text of the dialogue's prompts."""
        return self._dialogue.wording

    def submit(self, request: ActionRequest) -> None:
        """Encode a request and pass it to the engine; one that exceeds the context ends its episode."""
        conversation = self._conversations.setdefault(request.episode_id, _Conversation())
        inherited, conversation.inheritance = conversation.inheritance, _Inheritance()
        dialogue = self._dialogue.for_episode(request.briefing)
        prompt = dialogue.prompt(conversation.history, _observation(request))
        self.cut_observations += prompt.cut and not request.attempt
        if fault := _unsaid(dialogue, request.actions or () if self._choices else ()):
            self._stopped.append((request.episode_id, fault))
            return
        menu = self._menu(dialogue, request, inherited.begun)
        if menu is not None and not menu.texts:
            error = f"none of info['actions'] begins with the tokens of the parent's reply: {inherited.begun}"
            self._stopped.append((request.episode_id, Stop(StopReason.ENGINE_ERROR, error)))
            return
        max_tokens = self._sampling.max_tokens
        room = max_tokens if menu is None else menu.reply_tokens(max_tokens)
        length = (0 if prompt.new_sequence else conversation.length) + len(prompt.ids) + room
        if length > self._engine.max_context:
            self._stopped.append((request.episode_id, _too_long(length, self._engine.max_context)))
            return
        prefix = inherited.begun if menu is None else menu.prefix
        free = menu is None or menu.thinking is not None
        sampling = self._sampling
        if self._choose_sampling is not None:
            sampling = self._choose_sampling(request, sampling)
        pending = _Pending(request, tuple(prompt.ids), prompt.new_sequence, sampling, menu, prefix)
        self._pending[request.episode_id] = pending
        conversation.submitted = True
        self._engine.submit(
            GenerationRequest(
                sequence=request.episode_id,
                prompt_ids=(*(() if prompt.new_sequence else inherited.ids), *prompt.ids, *prefix),
                # A child is a sequence of its own; the engine copies what it has read of the parent's.
                new_sequence=prompt.new_sequence or bool(inherited.ids),
                choices=None if menu is None else tuple(menu.texts),
                seed=derive_seed(request.seed, "turn", request.turn, *filter(None, (request.attempt,))),
                sampling=_shortened(sampling, len(prefix)) if free else sampling,
                parent=inherited.parent,
                thinking=None if menu is None else menu.thinking,
                begun=() if menu is None else menu.thoughts,
            )
        )

    def _menu(self, dialogue: "Dialogue", request: ActionRequest, begun: tuple[int, ...]) -> Menu | None:
        """Return the admissible replies that begin with `begun`; None if any text is admissible."""
        if not self._choices or not request.actions:
            return None
        max_tokens = self._sampling.max_tokens
        return build_menu(dialogue, self._thinking, request.actions, begun, max_tokens)

    def fork(self, child_id: str, parent_id: str, turns: Sequence[Turn], prefix_ids: tuple[int, ...]) -> None:
        """Start an episode with the tokens of its parent, which the engine need not read again."""
        parent, known = self._conversations.get(parent_id), self._conversations.get(child_id)
        conversation = self._conversations[child_id] = _Conversation.from_turns(turns, parent)
        conversation.submitted = known is not None and known.submitted
        ids: list[int] = []
        for turn in turns:
            if turn.new_sequence:
                ids.clear()
            ids += [*turn.prompt_ids, *turn.action_ids]
        conversation.inheritance = _Inheritance(parent_id, tuple(ids), prefix_ids)

    def poll(self) -> Sequence[Answered]:
        """Let the engine do one step, and return the replies that it has finished."""
        if self._stopped:
            stopped, self._stopped = self._stopped, []
            return stopped
        return [
            (generation.sequence, self._answer(generation))
            for generation in self._engine.step()
            if generation.sequence in self._pending  # else the episode was closed during the generation
        ]

    def close(self, episode_id: str) -> None:
        """Discard the state of an episode, in the engine as well."""
        self._pending.pop(episode_id, None)
        self._stopped = [(name, stop) for name, stop in self._stopped if name != episode_id]
        conversation = self._conversations.pop(episode_id, None)
        if conversation is not None and conversation.submitted:
            self._engine.release(episode_id)

    def _answer(self, generation: Generation) -> Reply | Stop:
        pending = self._pending.pop(generation.sequence)
        if generation.error is not None:
            return Stop(StopReason.ENGINE_ERROR, generation.error, bystander=generation.lost)
        prefix = pending.prefix
        # The given tokens had no alternative: log probability and entropy 0, and one allowed id.
        ids, known = (*prefix, *generation.token_ids), (0.0,) * len(prefix)
        allowed = generation.allowed
        if prefix:
            chosen_from = (None,) * len(generation.token_ids) if allowed is None else allowed
            allowed = (*((token,) for token in prefix), *chosen_from)
        versions, temperatures = (
            (*values[:1] * len(prefix), *values)
            for values in (generation.policy_versions, generation.temperatures)
        )
        self._conversations[generation.sequence].extend(
            _observation(pending.request), len(pending.prompt_ids), pending.new_sequence, ids
        )
        chosen = None if pending.menu is None else pending.menu.chosen(generation.token_ids)
        text, valid = (chosen, True) if chosen is not None else self._parse(pending.request, ids)
        return Reply(
            text=text,
            prompt_ids=pending.prompt_ids,
            action_ids=ids,
            logprobs=(*known, *generation.logprobs),
            entropies=(*known, *generation.entropies),
            allowed=allowed,
            new_sequence=pending.new_sequence,
            valid=valid,
            finish=generation.finish,
            policy_version=generation.policy_version,
            policy_versions=versions,
            temperature=pending.sampling.temperature,
            temperatures=temperatures,
            parts=_parts(self._dialogue, ids),
            confidences=(*known, *generation.confidences) if generation.confidences else (),
            intervened=generation.intervened,
        )

    def _parse(self, request: ActionRequest, ids: tuple[int, ...]) -> tuple[str, bool]:
        # An unparsable reply goes to the environment as well, so that the policy sees its effect.
        parsed = self._dialogue.for_episode(request.briefing).parse(ids)
        return parsed.text, parsed.valid


def _parts(dialogue: "Dialogue", ids: tuple[int, ...]) -> Mapping[str, Any]:
    """Return the parts of a reply, where the dialogue has a format with parts."""
    find = getattr(dialogue, "parts", None)
    return {} if find is None else find(ids)


def _shortened(sampling: SamplingParams, tokens: int) -> SamplingParams:
    """Return the sampling parameters with `tokens` fewer tokens to generate."""
    return replace(sampling, max_tokens=sampling.max_tokens - tokens) if tokens else sampling


class DemonstrationPlayer(_ImmediatePlayer):
    """Player that records the expert's replies in the policy's tokens, at times replaced by a random action.

    The random actions lead to states that the expert alone would not visit. They are recorded as not
    trainable.

    Args:
        dialogue: The dialogue of the policy that learns from the demonstrations.
        noise: The probability of a random action per turn.
        seed: The seed of the random actions.
        noise_prefers: The prefix of the actions that are drawn in `prefer_share` of the cases, if there are
            any.
        prefer_share: The share of random actions that begin with `noise_prefers`.
        choices: Whether the policy chooses among the admissible actions; if so, they are recorded.
        max_context: The number of tokens that a sequence of the policy can hold; an episode ends if it needs
            more.
        max_tokens: The maximum number of tokens of a free reply of the policy. An episode ends at a turn at
            which the policy would have no room for as many tokens, or for the longest of the choices; None
            requires room for the expert's reply only.
    """

    def __init__(
        self,
        dialogue: "Dialogue",
        noise: float = 0.0,
        seed: int = 0,
        *,
        noise_prefers: str = "take ",
        prefer_share: float = 0.6,
        choices: bool = True,
        max_context: int | None = None,
        max_tokens: int | None = None,
    ) -> None:
        super().__init__()
        self._dialogue = dialogue
        self._noise = noise
        self._seed = seed
        self._noise_prefers = noise_prefers
        self._prefer_share = prefer_share
        self._choices = choices
        self._max_context, self._max_tokens = max_context, max_tokens
        self._conversations: dict[str, _Conversation] = {}

    def reply(self, request: ActionRequest) -> Reply | Stop:
        """Return the expert's action, or a random one, as a reply in tokens."""
        action = _expert_action(request)
        if isinstance(action, Stop):
            return action
        random_action = self._random_action(request)
        text = action if random_action is None else random_action
        if request.actions and text not in request.actions:
            return Stop(StopReason.CONTRACT, f"the expert's action {text!r} is not one of info['actions']")
        dialogue = self._dialogue.for_episode(request.briefing)
        if fault := _unsaid(dialogue, (text, *(request.actions or () if self._choices else ()))):
            return fault
        conversation = self._conversations.setdefault(request.episode_id, _Conversation())
        observation = _observation(request)
        prompt = dialogue.prompt(conversation.history, observation)
        action_ids = dialogue.encode_reply(text)
        conversation.extend(observation, len(prompt.ids), prompt.new_sequence, action_ids)
        needed = conversation.length + max(0, self._room(dialogue, request) - len(action_ids))
        if self._max_context is not None and needed > self._max_context:
            return _too_long(needed, self._max_context)
        zeros = (0.0,) * len(action_ids)
        return Reply(
            text=text,
            prompt_ids=tuple(prompt.ids),
            action_ids=action_ids,
            logprobs=zeros,
            entropies=zeros,
            allowed=self._allowed(dialogue, request, action_ids),
            new_sequence=prompt.new_sequence,
            trainable=random_action is None,
        )

    def _room(self, dialogue: "Dialogue", request: ActionRequest) -> int:
        """Return the number of tokens that the policy needs for its own reply."""
        if self._max_tokens is None:
            return 0
        if not self._choices or not request.actions:
            return self._max_tokens
        return max(len(dialogue.encode_reply(action)) for action in request.actions)

    def fork(self, child_id: str, parent_id: str, turns: Sequence[Turn], prefix_ids: tuple[int, ...]) -> None:
        """Start an episode after turns of its parent."""
        if prefix_ids:
            raise ValueError(f"{child_id!r} begins inside a reply, but an expert gives complete replies")
        parent = self._conversations.get(parent_id)
        self._conversations[child_id] = _Conversation.from_turns(turns, parent)

    def close(self, episode_id: str) -> None:
        """Discard all state of an episode."""
        super().close(episode_id)
        self._conversations.pop(episode_id, None)

    def _random_action(self, request: ActionRequest) -> str | None:
        draw = random.Random(derive_seed(self._seed, request.seed, request.turn))
        if not request.actions or draw.random() >= self._noise:
            return None
        preferred = [action for action in request.actions if action.startswith(self._noise_prefers)]
        if preferred and draw.random() < self._prefer_share:
            return draw.choice(preferred)
        return draw.choice(request.actions)

    def _allowed(
        self, dialogue: "Dialogue", request: ActionRequest, action_ids: tuple[int, ...]
    ) -> tuple[tuple[int, ...] | None, ...] | None:
        if not self._choices or not request.actions:
            return None
        replies = admissible_replies(request.actions, dialogue.encode_reply)
        return token_trie(tuple(replies)).trace(action_ids)


def _observation(request: ActionRequest) -> Observation:
    return Observation(request.observation, request.actions, request.briefing)


def _unsaid(dialogue: "Dialogue", actions: Sequence[str]) -> Stop | None:
    """Return why a policy cannot say one of the actions; None if it can say all of them."""
    action = dialogue.unsaid(actions)
    if action is None:
        return None
    return Stop(StopReason.CONTRACT, f"the action {action!r} is no call of a tool in action_tools")


def _too_long(length: int, limit: int) -> Stop:
    return Stop(
        StopReason.CONTEXT_LIMIT,
        f"the next turn needs {length} tokens with its reply, the context holds {limit}",
    )


def _expert_action(request: ActionRequest) -> str | Stop:
    if "expert" not in request.info:
        reason = "an expert player needs info['expert']: construct the environment with expert=True"
        return Stop(StopReason.ENGINE_ERROR, reason)
    action = request.info["expert"]
    if action is None:
        # This is a failure of the expert, so the episode counts and is not aborted.
        return Stop(StopReason.TURN_LIMIT, "the expert knows no next action")
    return str(action)
