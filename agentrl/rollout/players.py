"""Who replies: chance, an expert, a person, a language model, or an expert whose words are trained on."""

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

from agentrl.data.trajectory import StopReason, Turn
from agentrl.env.spaces import TextSpace
from agentrl.policy.engine import Engine, Generation, GenerationRequest, SamplingParams
from agentrl.policy.thinking import Thinking
from agentrl.policy.trie import admissible_replies, token_trie
from agentrl.rollout.menus import Menu, build_menu
from agentrl.rollout.play import ActionRequest, Reply, Stop
from agentrl.seeds import derive_seed

if TYPE_CHECKING:
    from agentrl.policy.tokens import Dialogue

Answered = tuple[str, Reply | Stop]


class Player(Protocol):
    """Replies to requests, several at a time, in whatever order they get done."""

    def submit(self, request: ActionRequest) -> None:
        """Take a request; there is at most one per episode at a time."""
        ...

    def poll(self) -> Sequence[Answered]:
        """Do one unit of work and return the replies that are done, with their episodes' ids; may be none."""
        ...

    def fork(self, child_id: str, parent_id: str, turns: Sequence[Turn], prefix_ids: tuple[int, ...]) -> None:
        """Begin an episode that goes on where another one left `turns`, before its first request.

        The first reply begins with `prefix_ids`. A player without tokens and memory has nothing to take over.
        """
        ...

    def close(self, episode_id: str) -> None:
        """Forget an episode."""
        ...


class _Immediate(ABC):
    """A player whose replies take no work to be shared."""

    def __init__(self) -> None:
        self._requests: list[ActionRequest] = []

    def submit(self, request: ActionRequest) -> None:
        self._requests.append(request)

    def poll(self) -> Sequence[Answered]:
        requests, self._requests = self._requests, []
        return [(request.episode_id, self.reply(request)) for request in requests]

    def fork(self, child_id: str, parent_id: str, turns: Sequence[Turn], prefix_ids: tuple[int, ...]) -> None:
        return  # the reply to a request follows from it alone

    def close(self, episode_id: str) -> None:
        self._requests = [request for request in self._requests if request.episode_id != episode_id]

    @abstractmethod
    def reply(self, request: ActionRequest) -> Reply | Stop: ...


class RandomPlayer(_Immediate):
    """Uniform over the admissible actions, or random text where the environment names none.

    The draw follows from (request.seed, turn) alone.
    """

    def reply(self, request: ActionRequest) -> Reply | Stop:
        draw = derive_seed("random", request.seed, request.turn)
        if request.actions is None:
            return Reply(TextSpace(seed=draw % 2**32).sample())
        if not request.actions:
            return Stop(StopReason.ENGINE_ERROR, "a random player has no choice: info['actions'] is empty")
        return Reply(request.actions[draw % len(request.actions)])


class ExpertPlayer(_Immediate):
    """Plays what the environment says its expert would do."""

    def reply(self, request: ActionRequest) -> Reply | Stop:
        action = _expert_action(request)
        return action if isinstance(action, Stop) else Reply(action)


class HumanPlayer(_Immediate):
    """Asks someone. `ask` is given the request and returns the reply."""

    def __init__(self, ask: Callable[[ActionRequest], str]) -> None:
        super().__init__()
        self._ask = ask

    def reply(self, request: ActionRequest) -> Reply | Stop:
        return Reply(self._ask(request))


@dataclass(frozen=True, slots=True)
class _Inheritance:
    """What the first request of an episode brings along that left another one, its parent."""

    parent: str | None = None
    ids: tuple[int, ...] = ()  # of the sequence that it goes on with
    begun: tuple[int, ...] = ()  # of the parent's reply


@dataclass(slots=True)
class _Conversation:
    """What has been said in an episode, and how many tokens its current sequence holds."""

    history: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    held: int = 0
    submitted: bool = False  # whether the engine knows the sequence
    inheritance: _Inheritance = _Inheritance()

    def extend(self, observation: str, prompt: int, new_sequence: bool, action_ids: tuple[int, ...]) -> None:
        self.history.append((observation, action_ids))
        self.held = (0 if new_sequence else self.held) + prompt + len(action_ids)

    @classmethod
    def of(cls, turns: Sequence[Turn]) -> "_Conversation":
        """As it was after the turns."""
        conversation = cls()
        for turn in turns:
            conversation.extend(turn.observation, len(turn.prompt_ids), turn.new_sequence, turn.action_ids)
        return conversation


@dataclass(frozen=True, slots=True)
class _Pending:
    request: ActionRequest
    prompt_ids: tuple[int, ...]
    new_sequence: bool
    menu: Menu | None  # None for a reply of free text
    given: tuple[int, ...] = ()  # what the engine was given of the reply


class LanguagePlayer:
    """A language model: a dialogue makes tokens of the episode, an engine continues them.

    Args:
        dialogue: between texts and tokens.
        engine: generates.
        sampling: how replies are drawn.
        choices: reply with one of the admissible actions where the environment names them, after the thoughts
            that the dialogue's `thinking` and `sampling.max_tokens` leave room for; False generates freely.
    """

    def __init__(
        self, dialogue: "Dialogue", engine: Engine, sampling: SamplingParams, *, choices: bool = True
    ) -> None:
        self._dialogue = dialogue
        self._engine = engine
        self._sampling = sampling
        self._choices = choices
        self._thinking: Thinking | None = getattr(dialogue, "thinking", None)
        self._conversations: dict[str, _Conversation] = {}
        self._pending: dict[str, _Pending] = {}
        self._stopped: list[Answered] = []

    def submit(self, request: ActionRequest) -> None:
        conversation = self._conversations.setdefault(request.episode_id, _Conversation())
        inherited, conversation.inheritance = conversation.inheritance, _Inheritance()
        prompt = self._dialogue.prompt(conversation.history, request.observation)
        menu = self._menu(request, inherited.begun)
        if menu is not None and not menu.texts:
            error = f"none of info['actions'] begins as the reply that was left: {inherited.begun}"
            self._stopped.append((request.episode_id, Stop(StopReason.ENGINE_ERROR, error)))
            return
        max_tokens = self._sampling.max_tokens
        room = max_tokens if menu is None else menu.reply_tokens(max_tokens)
        length = (0 if prompt.new_sequence else conversation.held) + len(prompt.ids) + room
        if length > self._engine.max_context:
            self._stopped.append((request.episode_id, _too_long(length, self._engine.max_context)))
            return
        given = inherited.begun if menu is None else menu.prefix
        free = menu is None or menu.thinking is not None
        pending = _Pending(request, tuple(prompt.ids), prompt.new_sequence, menu, given)
        self._pending[request.episode_id] = pending
        conversation.submitted = True
        self._engine.submit(
            GenerationRequest(
                sequence=request.episode_id,
                prompt_ids=(*(() if prompt.new_sequence else inherited.ids), *prompt.ids, *given),
                new_sequence=prompt.new_sequence or bool(inherited.ids),
                choices=None if menu is None else tuple(menu.texts),
                seed=derive_seed(request.seed, "turn", request.turn),
                sampling=self._shortened(len(given)) if free else self._sampling,
                parent=inherited.parent,
                thinking=None if menu is None else menu.thinking,
                begun=() if menu is None else menu.thoughts,
            )
        )

    def _menu(self, request: ActionRequest, begun: tuple[int, ...]) -> Menu | None:
        """Return the admissible replies that begin with `begun`; None if any text is admissible."""
        if not self._choices or not request.actions:
            return None
        max_tokens = self._sampling.max_tokens
        return build_menu(self._dialogue, self._thinking, request.actions, begun, max_tokens)

    def _shortened(self, tokens: int) -> SamplingParams:
        sampling = self._sampling
        return replace(sampling, max_tokens=sampling.max_tokens - tokens) if tokens else sampling

    def fork(self, child_id: str, parent_id: str, turns: Sequence[Turn], prefix_ids: tuple[int, ...]) -> None:
        conversation = self._conversations[child_id] = _Conversation.of(turns)
        ids: list[int] = []
        for turn in turns:
            if turn.new_sequence:
                ids.clear()
            ids += [*turn.prompt_ids, *turn.action_ids]
        conversation.inheritance = _Inheritance(parent_id, tuple(ids), prefix_ids)

    def poll(self) -> Sequence[Answered]:
        if self._stopped:
            stopped, self._stopped = self._stopped, []
            return stopped
        return [
            (generation.sequence, self._answer(generation))
            for generation in self._engine.step()
            if generation.sequence in self._pending  # else its episode was closed while it was generated
        ]

    def close(self, episode_id: str) -> None:
        self._pending.pop(episode_id, None)
        self._stopped = [(name, stop) for name, stop in self._stopped if name != episode_id]
        conversation = self._conversations.pop(episode_id, None)
        if conversation is not None and conversation.submitted:
            self._engine.release(episode_id)

    def _answer(self, generation: Generation) -> Reply | Stop:
        pending = self._pending.pop(generation.sequence)
        if generation.error is not None:
            return Stop(StopReason.ENGINE_ERROR, generation.error, bystander=generation.lost)
        given = pending.given
        ids, known = (*given, *generation.token_ids), (0.0,) * len(given)
        allowed = generation.allowed
        if given:
            chosen_from = (None,) * len(generation.token_ids) if allowed is None else allowed
            allowed = (*((token,) for token in given), *chosen_from)
        versions = generation.policy_versions
        if versions:
            versions = (*versions[:1] * len(given), *versions)
        self._conversations[generation.sequence].extend(
            pending.request.observation, len(pending.prompt_ids), pending.new_sequence, ids
        )
        chosen = None if pending.menu is None else pending.menu.chosen(generation.token_ids)
        text, valid = (chosen, True) if chosen is not None else self._parse(ids)
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
        )

    def _parse(self, ids: tuple[int, ...]) -> tuple[str, bool]:
        # An unparsable reply goes to the environment as it is: the policy shall see what comes of it.
        parsed = self._dialogue.parse(ids)
        return parsed.text, parsed.valid


class DemonstrationPlayer(_Immediate):
    """The expert's replies as the policy would have written them, now and then disturbed by a random action.

    A disturbance leads to states that the expert alone would not see; it is marked as not to be imitated.

    Args:
        dialogue: of the policy that shall learn.
        noise: probability of a disturbance per turn.
        seed: of the disturbances.
        noise_prefers: how the actions begin that are taken in `prefer_share` of the disturbances, if there
        are any. prefer_share: see `noise_prefers`.
        choices: the policy will choose among the admissible actions: record what it may choose from.
        max_context: tokens that a sequence of the policy holds; an episode that needs more ends.
        max_tokens: that the policy may use for a reply of free text. With it, a turn ends the episode where
            the policy would have no room to reply: for so many tokens, or for the longest of the choices;
            None asks for room for the expert's reply alone.
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
        action = _expert_action(request)
        if isinstance(action, Stop):
            return action
        disturbance = self._disturbance(request)
        text = action if disturbance is None else disturbance
        if request.actions and text not in request.actions:
            return Stop(StopReason.CONTRACT, f"the expert's action {text!r} is not one of info['actions']")
        conversation = self._conversations.setdefault(request.episode_id, _Conversation())
        prompt = self._dialogue.prompt(conversation.history, request.observation)
        action_ids = self._dialogue.encode_reply(text)
        conversation.extend(request.observation, len(prompt.ids), prompt.new_sequence, action_ids)
        needed = conversation.held + max(0, self._room(request) - len(action_ids))
        if self._max_context is not None and needed > self._max_context:
            return _too_long(needed, self._max_context)
        zeros = (0.0,) * len(action_ids)
        return Reply(
            text=text,
            prompt_ids=tuple(prompt.ids),
            action_ids=action_ids,
            logprobs=zeros,
            entropies=zeros,
            allowed=self._allowed(request, action_ids),
            new_sequence=prompt.new_sequence,
            trainable=disturbance is None,
        )

    def _room(self, request: ActionRequest) -> int:
        """Tokens that the policy would have to have left for its reply."""
        if self._max_tokens is None:
            return 0
        if not self._choices or not request.actions:
            return self._max_tokens
        return max(len(self._dialogue.encode_reply(action)) for action in request.actions)

    def fork(self, child_id: str, parent_id: str, turns: Sequence[Turn], prefix_ids: tuple[int, ...]) -> None:
        if prefix_ids:
            raise ValueError(f"{child_id!r} begins inside a reply, but an expert gives whole ones")
        self._conversations[child_id] = _Conversation.of(turns)

    def close(self, episode_id: str) -> None:
        super().close(episode_id)
        self._conversations.pop(episode_id, None)

    def _disturbance(self, request: ActionRequest) -> str | None:
        draw = random.Random(derive_seed(self._seed, request.seed, request.turn))
        if not request.actions or draw.random() >= self._noise:
            return None
        preferred = [action for action in request.actions if action.startswith(self._noise_prefers)]
        if preferred and draw.random() < self._prefer_share:
            return draw.choice(preferred)
        return draw.choice(request.actions)

    def _allowed(
        self, request: ActionRequest, action_ids: tuple[int, ...]
    ) -> tuple[tuple[int, ...] | None, ...] | None:
        if not self._choices or not request.actions:
            return None
        replies = admissible_replies(request.actions, self._dialogue.encode_reply)
        return token_trie(tuple(replies)).trace(action_ids)


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
        # The expert's own failure, which counts: not an aborted episode.
        return Stop(StopReason.TURN_LIMIT, "the expert knows no next action")
    return str(action)
