"""Dialogues in the format of any tokenizer's chat template."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import lru_cache, partial
from itertools import chain
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from agentrl.env.briefing import Briefing
from agentrl.env.tools import Tool, act_tool, call_of
from agentrl.errors import ConfigError
from agentrl.policy.chat import (
    END_THINK,
    SYSTEM_SLOT,
    THINK,
    Message,
    begun_reply,
    check_arguments,
    check_system_role,
    messages,
    slot,
    split_slots,
    think_block,
)
from agentrl.policy.dialogue import History, ParsedReply, Prompt, Wording, sha256_of, without_end
from agentrl.policy.earlier_replies import ReplySplitter
from agentrl.policy.encoding import (
    ObservationEncoder,
    decoder,
    markup_ids,
    plain_encoder,
    special_ids,
)
from agentrl.policy.prompt import Piece, PromptTemplate, task_of
from agentrl.policy.reply_formats import (
    AFTER_THOUGHTS,
    PLAN_TAGS,
    REPLY_FORMATS,
    REPLY_TAGS,
    TOOL_CALL,
    ReplyFormat,
)
from agentrl.policy.reply_parts import reply_parts
from agentrl.policy.text_cache import TextCache
from agentrl.policy.thinking import Ending, Thinking, pieces_of
from agentrl.policy.tool_calls import ToolCallFormat, tool_call_format

_log = logging.getLogger(__name__)
_TOOL_SETS = 32  # whose dialogues are kept


class ChatDialogue:
    """Dialogue in the format of any tokenizer's chat template.

    The template's text around a turn is found once and appended as ids, so sampled ids are never rendered and
    encoded again. Where a template rewrites earlier turns (drops their reasoning, numbers them), every prompt
    renders the whole dialogue and starts a new sequence: of a reply, the template sees the white space, the
    tags of its reasoning, and placeholders that are then replaced by the sampled ids.
    No text from outside becomes a markup token, see `plain_encoder`. Where the tokenizer has tokens for the
    tags of the reply format, only the format itself writes them.

    Args:
        tokenizer: A tokenizer with a chat template.
        reply: The format of replies: plain is the command itself; action_tags and think_action have it in
            tags. What the prompt already writes of a reply is not repeated: a think block that it opens is
            closed, and where it holds a whole one, think_action goes straight to the command. With tool_call,
            a reply is a call in the template's own form, later observations are the results of calls, and
            the dialogue grows whatever the template does to earlier reasoning.
        max_observation_tokens: The number of tokens after which an observation is cut; None cuts none.
        instructions: The text before the first observation; None takes that of the reply format.
        stop_ids: Further ids that end a reply.
        template_arguments: The arguments passed to the template whenever it is rendered.
        prompt: The template of the user's messages; None writes the instructions, then the observations
            alone. Of its text, only the tags of the reply format become tokens of their own.
        system_message: The text of a system message; None leaves it to the chat template.
        tools: The tools of tool_call; None takes a single one, whose argument is the action.

    Attributes:
        appends: Whether prompts extend the sequence.
        thinking: How a reply reasons before its choice; None where it does not.
        instructions: The text before the first observation; empty where a template writes the messages.
        system_message: The text of the system message.
        tools: The tools that replies call; None where replies are no calls.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        reply: str = "plain",
        max_observation_tokens: int | None = 96,
        instructions: str | None = None,
        stop_ids: Collection[int] = (),
        template_arguments: Mapping[str, Any] | None = None,
        prompt: PromptTemplate | None = None,
        system_message: str | None = None,
        tools: tuple[Tool, ...] | None = None,
    ) -> None:
        if reply not in (*REPLY_FORMATS, TOOL_CALL):
            known = ", ".join((*REPLY_FORMATS, TOOL_CALL))
            raise ConfigError(f"policy.reply is {reply!r}, wanted one of {known}")
        self._tokenizer = tokenizer
        self._arguments = dict(template_arguments or {})
        if self._arguments:
            template = cast(Any, tokenizer).get_chat_template()
            check_arguments(template, self._arguments, tokenizer.SPECIAL_TOKENS_ATTRIBUTES)
        self._system: str | None = None
        self.tools: tuple[Tool, ...] | None = None
        self._calls: ToolCallFormat | None = None
        if reply == TOOL_CALL:
            again = partial(
                ChatDialogue,
                tokenizer,
                reply=reply,
                max_observation_tokens=max_observation_tokens,
                instructions=instructions,
                stop_ids=stop_ids,
                template_arguments=template_arguments,
                prompt=prompt,
                system_message=system_message,
            )
            self._with_tools = lru_cache(_TOOL_SETS)(again)
            self._calls = self._choose_calls(tools)
            system_message = self._calls.system_message(system_message)
        if system_message is not None:
            self._system = slot(SYSTEM_SLOT)
            check_system_role(self._render)
        self._format: ReplyFormat | ToolCallFormat = self._calls or REPLY_FORMATS[reply]
        if self._format.thinks and END_THINK in begun_reply(self._render):
            self._format = AFTER_THOUGHTS
        self._encode = plain_encoder(tokenizer)
        self.cache = TextCache()
        self._encode_observation = ObservationEncoder(
            tokenizer, self._encode, max_observation_tokens, self.cache
        )
        self._markup = self.cache.memoize(self._encode_markup)
        self._tags = {
            token.content: id
            for id, token in tokenizer.added_tokens_decoder.items()
            if token.content in REPLY_TAGS or self._writes(token.content)
        }
        names = sorted({*REPLY_TAGS, *self._tags}, key=len, reverse=True)
        self._tag = re.compile(f"({'|'.join(map(re.escape, names))})")
        markup = markup_ids(tokenizer) - {*self._tags.values()}
        self._prompt = prompt
        if prompt is not None:
            prompt.check(self._format.words)
            instructions = ""
        if instructions is None:
            instructions = self._format.instructions
        self.instructions, self.system_message = instructions, system_message
        self._before_first = f"{instructions}\n\n" if instructions else ""
        self._texts: dict[int, tuple[int, ...]] = {}
        if system_message is not None:
            self._system, self._texts = self._prepare_system_message(system_message, markup)
        pieces = self._format.probe(self._render)
        self._extends, self._opens_thinking, self._reply_prefix = (
            pieces.appends,
            pieces.opens,
            pieces.reply_prefix,
        )
        self.appends = pieces.appends and (prompt is None or prompt.history is None)
        self._lead = pieces.lead
        self._opening = self._fill_slots(pieces.opening, self._texts)
        self._before_reply, self._between = self._markup(pieces.before_reply), self._markup(pieces.between)
        later = pieces.before_reply if pieces.before_later is None else pieces.before_later
        self._before_later = self._markup(later)
        self._rendered_opening = pieces.opening
        around_turns = [self._begin_first(), self._before_reply, self._between]
        if self._calls is not None:
            around_turns.append(self._before_later)
        self.wording = Wording(
            pieces.opening.replace(slot(SYSTEM_SLOT), system_message or "") + self._before_first,
            pieces.before_reply,
            pieces.between,
            sha256_of(around_turns) if prompt is None else _prompt_sha256(around_turns, prompt),
            _template_sha256(tokenizer.chat_template),
            *(() if prompt is None else (prompt.source, prompt.history, prompt.examples)),
        )
        around = markup.intersection(chain(*around_turns))
        self._control = special_ids(tokenizer) - {*self._tags.values()} | around
        self._decode = decoder(tokenizer, self._control)
        self._end_of_turn = self._find_end_of_turn(markup)
        self._after_end = self._without_end_of_turn(self._between)
        ends = [self._end_of_turn, tokenizer.eos_token_id, *sorted(stop_ids)]
        self.stop_ids: frozenset[int] = frozenset(id for id in ends if id is not None)
        if not self.stop_ids:
            raise ConfigError(
                "the tokenizer has no eos_token and its chat template ends a reply with no token of its own"
            )
        self._stop = next(id for id in ends if id is not None)
        self._begun = pieces.begun if self._opens_thinking else ""
        self._before, self.thinking = self._build_thinking(pieces.begun)
        self.encode_reply = self.cache.memoize(self._encode_reply)
        self.encode_choice = self.cache.memoize(self._encode_choice)
        self._cached_parse = self.cache.memoize(self._parse)
        splitter = ReplySplitter(
            encode=self._encode,
            decode=self._decode,
            added=tokenizer.added_tokens_decoder,
            control=self._control,
            stop_ids=self.stop_ids,
            reasons=END_THINK in str(tokenizer.chat_template),
        )
        self._split_reply = self.cache.memoize(splitter.split)

    def prompt(self, history: History, observation: str) -> Prompt:
        """Return the ids to append after `history`, or a whole prompt where turns are written anew."""
        shown = self._as_result(history, self._fault(history) + observation)
        cut = self._encode_observation.note_cut(shown)
        seen = self._encode_message(history, observation)
        if not self.appends:
            earlier = history if self._prompt is None or self._prompt.history is None else ()
            said = [self._encode_message(history[:turn], text) for turn, (text, _) in enumerate(earlier)]
            replies = [reply for _, reply in earlier]
            return Prompt(self._encode_whole([*said, seen], replies), new_sequence=True, cut=cut)
        if not history:
            return Prompt((*self._opening, *seen, *self._before_reply), new_sequence=True, cut=cut)
        return Prompt(
            (*self._after_reply(history[-1][1]), *seen, *self._before_later), new_sequence=False, cut=cut
        )

    def _after_reply(self, reply: tuple[int, ...]) -> tuple[int, ...]:
        """Return the ids between a reply and the next observation."""
        between = self._between
        if self._calls is not None:
            between = self._markup(self._calls.between(self.parse(reply).text))
        # A complete reply has sampled its end of turn; one that was cut off or ended otherwise lacks it.
        ended = self._end_of_turn is not None and reply[-1:] == (self._end_of_turn,)
        return self._without_end_of_turn(between) if ended else between

    def _without_end_of_turn(self, between: tuple[int, ...]) -> tuple[int, ...]:
        """Return the ids after the end of turn in those between a reply and the next observation."""
        return between if self._end_of_turn is None else between[between.index(self._end_of_turn) + 1 :]

    def for_episode(self, briefing: Briefing) -> ChatDialogue:
        """Return the dialogue of an episode, which knows the tools of its environment."""
        if self.tools is None:
            return self
        tools = briefing.tools or (act_tool(briefing.instructions),)
        return self if tools == self.tools else self._with_tools(tools=tools)

    def unsaid(self, actions: Iterable[str]) -> str | None:
        """Return the first of some actions that no tool has a call for; None if there is none."""
        if self.tools is None:
            return None
        return next((action for action in actions if call_of(self.tools, action) is None), None)

    def parse(self, ids: Sequence[int]) -> ParsedReply:
        """Return the command in a reply."""
        return self._cached_parse(tuple(ids))

    @property
    def starts_anew(self) -> bool:
        """Return whether every prompt begins a conversation of its own, which shows a few turns."""
        return self._prompt is not None and self._prompt.history is not None

    @property
    def shown(self) -> frozenset[str]:
        """Return the names of what a prompt template shows; empty without one."""
        return frozenset() if self._prompt is None else self._prompt.used

    def with_system(self, text: str) -> ChatDialogue:
        """Return this dialogue after another system message; whatever it spells is text.

        Raises:
            ConfigError: The chat template has no system role.
        """
        other = copy.copy(self)
        other._system, other.system_message = slot(SYSTEM_SLOT), text
        check_system_role(other._render)
        other._texts = self._texts | {SYSTEM_SLOT: self._encode(text)}
        other._rendered_opening = self._format.probe(other._render).opening
        other._opening = other._fill_slots(other._rendered_opening, other._texts)
        return other

    def encode_written(self, text: str) -> tuple[int, ...]:
        """Return the ids of a reply that is given as it is written, with its stop id.

        A command in nothing but the reply format gets the ids of `encode_reply`. The tags of reply formats
        become tokens where the tokenizer has them; whatever else the reply spells is text.
        """
        said = text.strip()
        thoughts, end, rest = said.partition(END_THINK)
        silent = self._opens_thinking and not self._format.thinks
        found = self._format.read((rest if end else thoughts).strip() if silent else said, True)
        if found is not None and found.valid:
            ids = self.encode_reply(found.text)
            if self.reply_text(ids) in (said, self._begun + said):
                return ids
        if silent and not end:
            return (*self._silent, *self._encode_pieces([(text, True)]), self._stop)
        for begun in (self._begun, THINK) if self._opens_thinking else ():
            text = text.removeprefix(begun)
        return (*self._encode_pieces([(self._lead + text, True)]), self._stop)

    def reply_text(self, ids: Sequence[int]) -> str:
        """Return a reply as it is written, with the think tag that its prompt has opened."""
        return self._begun + self._decode(without_end(tuple(ids), self.stop_ids)).strip()

    def user_message(self, prompt: Prompt, observation: str, *, first: bool) -> str:
        """Return the text of the user's message that a prompt ends with, cuts included.

        Args:
            prompt: The prompt of a turn.
            observation: The observation of the turn.
            first: Whether it is the first turn.

        Raises:
            ConfigError: The message cannot be found in the prompt, and a template has written it.
        """
        ids = self._message_ids(prompt, first=first)
        if self._prompt is None:
            before = self._before_first if first else ""
            if ids is None:
                return before + self._encode_observation.shorten(observation)
            uncut = self._encode_pieces([(before, True), (observation, False)])
            return before + observation if ids == uncut else self._decode(ids)
        if ids is None:
            raise ConfigError("a prompt is not what this chat template and policy.prompt write")
        return self._decode(ids)

    def _message_ids(self, prompt: Prompt, *, first: bool) -> tuple[int, ...] | None:
        """Return the ids of the last message of the user in a prompt; None if they cannot be found."""
        ids, end = prompt.ids, len(prompt.ids) - len(self._before_reply)
        if ids[end:] != self._before_reply:
            return None
        if first or self.starts_anew:
            begins = [self._opening]
        elif not prompt.new_sequence:
            begins = [self._between, self._after_end]
        else:  # the whole dialogue is written anew; no text from outside holds the markup between its turns
            size = len(self._after_end)
            places = (k for k in range(end - size, 0, -1) if ids[k : k + size] == self._after_end)
            place = next(places, None) if size else None
            return None if place is None else ids[place + size : end]
        return next((ids[len(each) : end] for each in begins if ids[: len(each)] == each), None)

    def _encode_reply(self, text: str) -> tuple[int, ...]:
        return (*self._before, *self._encode_choice(text))

    def _encode_choice(self, text: str) -> tuple[int, ...]:
        """Return the part of a reply after its reasoning."""
        before, written, after = self._format.around(text)
        if self.thinking is not None:
            return (*self._encode(written), *self._markup(after), self._stop)
        lead = "" if self._before else self._lead
        return (*self._encode_tagged(lead + before, written, after), self._stop)

    def _writes(self, name: str) -> bool:
        """Return whether the format of calls writes this name of a token."""
        return self._calls is not None and bool(name.strip()) and name in self._calls.written

    def _build_thinking(self, begun: str) -> tuple[tuple[int, ...], Thinking | None]:
        """Return the ids before the choice in a reply without reasoning, and how a reply reasons."""
        plan = isinstance(self._format, ReplyFormat) and self._format.plan
        if not (self._opens_thinking or self._format.thinks):
            return self._build_plan((), self._lead, plan) if plan else ((), None)
        silenced = partial(self._render, enable_thinking=False)
        block = think_block(partial(self._render, add_generation_prompt=False), silenced)
        opening, empty = (
            ("", block.closing + block.gap) if self._opens_thinking else (block.opening, block.empty)
        )
        if self._opens_thinking and block.empty.startswith(begun):
            empty = block.empty.removeprefix(begun)
        if not self._format.thinks:
            self._silent = self._markup(empty)
            return self._build_plan(self._silent, "", plan) if plan else (self._silent, None)
        tag = self._format.words.before
        ending, leads = self._end_of_free_part(END_THINK, block.gap)
        thinking = Thinking(self._markup(self._lead + opening), ending, self._markup(block.closing), leads)
        return self._markup(self._lead + empty + tag), thinking

    def _build_plan(
        self, silent: tuple[int, ...], lead: str, plan: str
    ) -> tuple[tuple[int, ...], Thinking | None]:
        """Return the ids before the choice in a reply with the plan of its format, and how a reply plans."""
        start, *_, end = PLAN_TAGS
        ending, leads = self._end_of_free_part(end, "")
        opening = (*silent, *self._encode_tagged(lead + start))
        before = (*silent, *self._encode_tagged(lead + plan + self._format.words.before))
        return before, Thinking(opening, ending, self._encode_tagged(end), leads)

    def _end_of_free_part(self, end: str, gap: str) -> tuple[Ending, dict[str, tuple[int, ...]]]:
        """Return the text that ends the free part of a reply, and the ids from there to the choice."""
        tag = self._format.words.before
        ending = Ending(end, pieces_of(end, _texts_of_parts(self._tokenizer, end)))
        leads = {"": self._markup(gap + tag)}
        for beyond in ending.overhangs - {""}:
            said = beyond.lstrip()
            if tag.startswith(said):
                leads[beyond] = self._markup(tag.removeprefix(said))
        return ending, leads

    def parts(self, ids: tuple[int, ...]) -> Mapping[str, Any]:
        """Return the parts of a reply that plans, see `reply_parts`; empty in other formats."""
        plans = isinstance(self._format, ReplyFormat) and self._format.plan
        return reply_parts(ids, self._decode) if plans else {}

    def _parse(self, ids: tuple[int, ...]) -> ParsedReply:
        written = without_end(ids, self.stop_ids)
        text = self._decode(written).strip()
        said, thought_over = text, True
        if self._opens_thinking and not self._format.thinks:
            thoughts, end, rest = text.partition(END_THINK)
            said, thought_over = (rest.strip() if end else thoughts), bool(end)
        ended = thought_over and len(written) < len(ids)
        return self._format.read(said, ended) or ParsedReply(text, valid=False)

    def _encode_message(self, history: History, observation: str) -> tuple[int, ...]:
        """Return the ids of the user's message of a turn."""
        if self._prompt is None:
            if history:
                return self._encode_observation(self._as_result(history, self._fault(history) + observation))
            said = self._encode_observation.shorten_around(observation, task_of(observation))
            return self._encode_pieces([(self._before_first, True), (said, False)])
        past = [(text, self.parse(reply).text) for text, reply in history]
        shorten = self._encode_observation.shorten
        pieces = self._prompt.write(past, observation, self._format.words, shorten)
        pieces = ((self._fault(history), False), *pieces)
        return self._encode_pieces((self._as_result(history, text), own) for text, own in pieces)

    def _as_result(self, history: History, text: str) -> str:
        """Return the text of a turn as the template writes it: after the first, as the result of a call."""
        return text if self._calls is None or not history or not self.appends else self._calls.result(text)

    def _fault(self, history: History) -> str:
        """Return what was wrong with the last call, for its result; "" if it was valid."""
        if self._calls is None or not history or not self.appends:
            return ""
        said = self.parse(history[-1][1])
        return "" if said.valid else f"{said.text}\n"

    def _encode_whole(
        self, said: Sequence[tuple[int, ...]], given: Sequence[tuple[int, ...]]
    ) -> tuple[int, ...]:
        """Return the ids of a dialogue, from those of the user's messages and of the replies."""
        texts = self._texts | dict(enumerate(said))
        replies = []
        for reply in given:
            (first, *shown), words = self._split_reply(tuple(reply))
            numbers = range(len(texts), len(texts) + len(words))
            texts |= zip(numbers, words, strict=True)
            rest = "".join(map("".join, zip(map(slot, numbers), shown, strict=True)))
            replies.append(self._reply_prefix + first + rest)
        slots = list(map(slot, range(len(said))))
        rendered = self._render(messages(slots, replies, ""))
        if not given:
            self._warn_if_opening_changed(rendered)
        return self._fill_slots(rendered, texts)

    def _warn_if_opening_changed(self, rendered: str) -> None:
        """Warn when the template's opening has changed, as at midnight where it writes the date."""
        opening = rendered.partition(slot(0))[0]
        if opening != self._rendered_opening:
            warnings.warn(
                "the chat template's opening has changed: "
                f"{self._rendered_opening!r} before, {opening!r} now",
                RuntimeWarning,
                stacklevel=3,
            )
            self._rendered_opening = opening

    def _fill_slots(self, rendered: str, texts: Mapping[int, tuple[int, ...]]) -> tuple[int, ...]:
        """Return the ids of rendered text, with the ids of texts from outside in place of their slots."""
        ids: list[int] = []
        for markup, number in split_slots(rendered):
            ids.extend(self._markup(markup))
            if number is not None:
                ids.extend(texts[number])
        return tuple(ids)

    def _prepare_system_message(
        self, text: str, markup: Collection[int]
    ) -> tuple[str, dict[int, tuple[int, ...]]]:
        """Return the message to render; one that spells markup becomes a slot, returned with its ids."""
        spelled = any(id in markup for id in self._markup(text))
        if not spelled and len(split_slots(text)) == 1:
            return text, {}
        return slot(SYSTEM_SLOT), {SYSTEM_SLOT: self._encode_tagged(text)}

    def _begin_first(self) -> tuple[int, ...]:
        """Return the ids before the first observation, which depend on how it begins: here with a word."""
        if not self._before_first:
            return self._opening
        word = self._encode_pieces([("word", True)])
        return (*self._opening, *self._encode_pieces([(f"{self._before_first}word", True)])[: -len(word)])

    def _encode_tagged(self, before: str, text: str = "", after: str = "") -> tuple[int, ...]:
        """Encode text with the reply format's tags around it; only the format's tags become tag tokens."""
        return self._encode_pieces(((before, True), (text, False), (after, True)))

    def _encode_pieces(self, pieces: Iterable[Piece]) -> tuple[int, ...]:
        """Encode pieces of text as one; only in our own pieces, tags become tag tokens."""
        runs: list[str | int] = [""]
        for part, own in pieces:
            for piece in self._tag.split(part) if own else [part]:
                if own and piece in self._tags:
                    runs += [self._tags[piece], ""]
                else:
                    runs[-1] = cast(str, runs[-1]) + piece
        ids: list[int] = []
        for run in runs:
            ids += (run,) if isinstance(run, int) else self._encode(run)
        return tuple(ids)

    def _render(self, dialogue: list[Message], **arguments: Any) -> str:
        given = {"add_generation_prompt": True} | self._arguments | arguments
        if self._system is not None:
            dialogue = [{"role": "system", "content": self._system}, *dialogue]
        return cast(str, self._tokenizer.apply_chat_template(dialogue, tokenize=False, **given))

    def _encode_markup(self, text: str) -> tuple[int, ...]:
        call = cast(Callable[..., Any], self._tokenizer)
        return tuple(call(text, add_special_tokens=False)["input_ids"]) if text else ()

    def _choose_calls(self, tools: tuple[Tool, ...] | None) -> ToolCallFormat:
        """Return the format of calls, and pass the template its declarations."""
        self.tools = tools or (act_tool(),)
        markup = markup_ids(self._tokenizer)
        calls = tool_call_format(
            self._render, self.tools, lambda text: not markup.isdisjoint(self._encode_markup(text))
        )
        self._arguments |= calls.arguments
        if calls.reason is not None and tools is None:
            _log.warning(
                "policy.reply=tool_call: the chat template %s; they are declared in the system message, and "
                "calls and results are written, in the form of Hermes",
                calls.reason,
            )
        return calls

    def _find_end_of_turn(self, markup: Collection[int]) -> int | None:
        """Return the markup token with which the template ends a reply, if any."""
        for token in self._between:
            if token in markup:
                return token
            if self._decode((token,)).strip():
                break
        return None


def _template_sha256(template: Any) -> str:
    text = template if isinstance(template, str) else json.dumps(template)  # a dict of named templates
    return hashlib.sha256(text.encode()).hexdigest()


def _prompt_sha256(ids: Sequence[Sequence[int]], prompt: PromptTemplate) -> str:
    """Return the hash of the text around turns, and of all else that decides what a prompt says."""
    examples = [[each.task, each.turns, *([each.env] if each.env else [])] for each in prompt.examples]
    content = [list(map(list, ids)), prompt.source, prompt.history, examples]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _texts_of_parts(tokenizer: PreTrainedTokenizerBase, end: str) -> dict[int, str]:
    """Return the texts of the tokens that might hold a part of `end`."""
    # Some decoders drop a leading space, so each token is decoded after another one.
    call = cast(Callable[..., Any], tokenizer)
    read = partial(tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    before = call("a", add_special_tokens=False)["input_ids"][-1:]
    known = cast(str, read(before))
    edges = (end[0], end[-1])
    return {
        id: cast(str, read([*before, id])).removeprefix(known)
        for token, id in tokenizer.get_vocab().items()
        if token in end or any(edge in token for edge in edges)
    }
