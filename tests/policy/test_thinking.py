"""Reasoning before a choice: where it ends, in any tokens, and how the engine generates it."""

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from agentrl.data.batch import collate
from agentrl.data.storage import read_episodes, write_episodes
from agentrl.data.trajectory import Episode, Group, StopReason, Turn
from agentrl.learn.forward import Forward
from agentrl.policy.attention import PACKED
from agentrl.policy.chat_dialogue import ChatDialogue
from agentrl.policy.engine import Generation, GenerationRequest, SamplingParams
from agentrl.policy.thinking import Ending, EndingMatcher, Thinking, Thought, pieces_of
from agentrl.policy.torch_engine import TorchEngine

STOP = 4
MENU = ((20, 21, 22, STOP), (20, 21, 23, 24, STOP), (20, 30, STOP), (20, 41, STOP))
# "!" ends thoughts, and a fifth of the ids say it; some say more.
ENDING = Ending("!", {**dict.fromkeys(range(100, 150), "!"), **dict.fromkeys(range(150, 165), "!\n")})
THINKING = Thinking((7,), ENDING, (100,), {"": (8, 9), "\n": (9,)})

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_level(words: Sequence[str], vocabulary: int, added: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """Build a tokenizer without a prefix space, and without tokens for think tags unless they are added."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([*words] * 8, trainer)
    chat = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    chat.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    chat.add_tokens(list(added))
    chat.chat_template = CHATML
    return chat


TAGGED = ("<think>a</think><action>b</action>", "x </think>\n\n<action>", "think thin ink the")


# Where thoughts end.


@pytest.mark.parametrize("added", [(), ("<think>", "</think>"), (" </think>\n",)])
def test_thoughts_end_where_the_text_of_their_tokens_does_however_it_is_cut(added: tuple[str, ...]) -> None:
    chat = byte_level(TAGGED, 300, added)
    ending = ChatDialogue(chat, reply="think_action").thinking.ending
    texts = {id: chat.decode([id]) for id in chat.get_vocab().values()}
    draw, found = random.Random(1), 0
    likely = [id for id, text in texts.items() if text and text in "x</think>\n<action>"]
    assert len(likely) > 20
    for _ in range(3000):
        ids = draw.choices(likely, k=8) if draw.random() < 0.5 else cut("a</think>\nb", likely, texts, draw)
        matcher, read = EndingMatcher(ending), ""
        for token in ids:
            beyond = matcher.take(token)
            read += texts[token]
            if beyond is None:
                assert "</think>" not in read
            else:
                found += 1
                assert read.partition("</think>")[2] == beyond
                break
    assert found > 1000


def cut(text: str, tokens: Sequence[int], texts: dict[int, str], draw: random.Random) -> list[int]:
    """One of the ways in which some tokens spell a text."""
    ids: list[int] = []
    while text:
        id = draw.choice([id for id in tokens if text.startswith(texts[id])] or [-1])
        if id < 0:  # a letter that is not among them
            text = text[1:]
            continue
        ids.append(id)
        text = text[len(texts[id]) :]
    return ids


def test_only_tokens_that_may_be_part_of_the_ending_are_looked_at() -> None:
    texts = {
        1: "<",
        2: "think",
        3: ">\n",
        4: "to",
        5: "<action",
        6: " think",
        7: "",
        8: "></",
        9: "x</think>y",
    }
    assert pieces_of("</think>", texts) == {1: "<", 2: "think", 3: ">\n", 8: "></", 9: "x</think>y"}
    assert Ending("</think>", pieces_of("</think>", texts)).overhangs == {"\n", "</", "y"}


def test_thoughts_that_have_begun_count_for_their_ending() -> None:
    pieces = {1: "<", 2: "/think", 3: ">"}
    ending = Ending("</think>", pieces)
    assert EndingMatcher(ending, (9, 9, 1, 2)).take(3) == ""
    assert EndingMatcher(ending, (1, 2, 9)).take(3) is None


def test_a_stop_id_and_the_limit_cut_thoughts_short() -> None:
    cut_short = (100, 8, 9)
    assert Thought(THINKING, 3, {STOP}).take(STOP) == cut_short
    thought = Thought(THINKING, 2, {STOP})
    assert [thought.take(50), thought.take(51)] == [None, cut_short]
    assert Thought(THINKING, 1, {STOP}).take(120) == (8, 9)  # it ends by itself just in time
    assert Thought(THINKING, 9, {STOP}).take(160) == (9,)
    assert Thought(replace(THINKING, ending=Ending("!", {100: "!?"})), 9, {STOP}).take(100) == (8, 9)


# In the engine.


def asked(
    sequence: str,
    prompt: Sequence[int] = (1, 9, 7),
    seed: int = 0,
    most: int = 30,
    temperature: float = 1.0,
    **more: object,
) -> GenerationRequest:
    given = {"thinking": THINKING, "choices": MENU, "new_sequence": True} | more
    return GenerationRequest(
        sequence,
        tuple(prompt),
        seed=seed,
        sampling=SamplingParams(temperature, most),
        **given,  # type: ignore[arg-type]
    )


def finish(engine: TorchEngine, *requests: GenerationRequest) -> dict[str, Generation]:
    for request in requests:
        engine.submit(request)
    done: dict[str, Generation] = {}
    for _ in range(300):
        done.update((generation.sequence, generation) for generation in engine.step())
        if len(done) == len(requests):
            return done
    raise AssertionError(f"only {sorted(done)} finished")


def free_tokens(generation: Generation) -> int:
    assert generation.allowed is not None
    return sum(ids is None for ids in generation.allowed)


def check(model: PreTrainedModel, before: Sequence[int], generation: Generation) -> None:
    """Check that free tokens have the vocabulary's logprobs and the others those of their allowed ids."""
    ids = [*before, *generation.token_ids]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        logits = model(torch.tensor([ids]), use_cache=False).logits[0].double()[len(before) - 1 : -1]
    model.set_attn_implementation(PACKED)
    assert generation.allowed is not None
    for row, token, options, logprob, entropy in zip(
        logits,
        generation.token_ids,
        generation.allowed,
        generation.logprobs,
        generation.entropies,
        strict=True,
    ):
        menu = list(range(len(row))) if options is None else list(options)
        logprobs = row[menu].log_softmax(-1)
        assert logprob == pytest.approx(logprobs[menu.index(token)].item(), abs=1e-5)
        assert entropy == pytest.approx(-(logprobs.exp() * logprobs).sum().item(), abs=1e-5)


def parts(generation: Generation, most: int = 30) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Split a reply into reasoning, forced ids and choice; check that they follow from each other."""
    free = free_tokens(generation)
    thoughts, rest = generation.token_ids[:free], generation.token_ids[free:]
    ended = [token in ENDING.pieces for token in thoughts]
    assert not any(ended[:-1])
    assert STOP not in thoughts[:-1]
    if thoughts and ended[-1]:
        written = (9,) if thoughts[-1] >= 150 else (8, 9)
    else:
        # opening 1, closing 1, lead 2, choice 5: but the opening was in the prompt
        assert thoughts[-1:] == (STOP,) or free == most - 8
        written = (100, 8, 9)
    assert rest[: len(written)] == written
    choice = rest[len(written) :]
    assert choice in MENU
    return thoughts, written, choice


def test_thoughts_are_free_and_what_follows_is_one_of_the_choices(model: PreTrainedModel) -> None:
    engine = TorchEngine(model, stop_ids={STOP})
    done = finish(engine, *(asked(str(seed), (1, 9 + seed % 3, 7), seed, 16) for seed in range(40)))
    kinds, lengths = set(), set()
    for name, generation in done.items():
        thoughts, written, _ = parts(generation, 16)
        kinds.add(written)
        lengths.add(len(thoughts))
        check(model, (1, 9 + int(name) % 3, 7), generation)
    assert kinds == {(8, 9), (9,), (100, 8, 9)}
    assert len({generation.token_ids for generation in done.values()}) == 40  # all think something else
    assert len(lengths) > 5
    assert {parts(generation, 16)[2] for generation in done.values()} == set(MENU)


def test_a_draw_does_not_depend_on_the_batch_and_a_sequence_goes_on_after_it(model: PreTrainedModel) -> None:
    together = finish(
        TorchEngine(model, stop_ids={STOP}), *(asked(str(k), (1, 9 + k, 7), k) for k in range(6))
    )
    engine = TorchEngine(model, stop_ids={STOP})
    for k in range(6):
        alone = finish(engine, asked(str(k), (1, 9 + k, 7), k))[str(k)]
        assert (alone.token_ids, alone.allowed) == (together[str(k)].token_ids, together[str(k)].allowed)
        again = finish(engine, asked(str(k), (12, 7), k + 50, new_sequence=False))[str(k)]
        check(model, (1, 9 + k, 7, *alone.token_ids, 12, 7), again)
    assert engine.tokens_forwarded < sum(3 + len(each.token_ids) for each in together.values()) + 6 * 40


@pytest.mark.parametrize("most", [9, 10, 14])
def test_thoughts_get_what_the_longest_choice_leaves_of_the_limit(model: PreTrainedModel, most: int) -> None:
    engine = TorchEngine(model, stop_ids={STOP})
    done = finish(engine, *(asked(str(seed), seed=seed, most=most) for seed in range(20)))
    assert max(map(free_tokens, done.values())) == most - 8
    assert all(len(generation.token_ids) <= most for generation in done.values())
    for generation in done.values():
        parts(generation, most)


@pytest.mark.parametrize("most", [1, 8])
def test_without_room_for_thoughts_a_choice_is_made_all_the_same(model: PreTrainedModel, most: int) -> None:
    generation = finish(TorchEngine(model, stop_ids={STOP}), asked("a", most=most))["a"]
    assert free_tokens(generation) == 0
    assert generation.token_ids[:4] == (100, 8, 9, 20)
    assert generation.token_ids[3:] in MENU
    check(model, (1, 9, 7), generation)


def test_the_context_leaves_room_for_the_choice_and_a_smaller_one_is_refused(model: PreTrainedModel) -> None:
    tight = TorchEngine(model, stop_ids={STOP}, max_context=14)
    for seed in range(12):
        generation = finish(tight, asked(str(seed), seed=seed))[str(seed)]
        assert len(generation.token_ids) <= 11
        assert free_tokens(generation) <= 3
        assert generation.error is None
    small = TorchEngine(model, stop_ids={STOP}, max_context=10)
    error = finish(small, asked("a"))["a"].error
    assert error == "context overflow: 3 tokens and a reply of 8 exceed max_context=10"


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (asked("a", choices=None), "thinking is set, but choices is None"),
        (asked("a", thinking=replace(THINKING, closing=(999,))), "around the reasoning include one outside"),
    ],
)
def test_a_request_that_cannot_think_says_why(
    model: PreTrainedModel, request_: GenerationRequest, words: str
) -> None:
    assert words in (finish(TorchEngine(model, stop_ids={STOP}), request_)["a"].error or "")


def test_a_menu_of_one_is_written_as_soon_as_the_thoughts_are_over(model: PreTrainedModel) -> None:
    engine = TorchEngine(model, stop_ids={STOP})
    generation = finish(engine, asked("a", choices=MENU[:1]))["a"]
    assert generation.token_ids[-4:] == MENU[0]
    assert engine.forwards == free_tokens(generation)
    check(model, (1, 9, 7), generation)


def test_new_weights_are_taken_up_in_the_middle_of_a_thought(model: PreTrainedModel) -> None:
    engine = TorchEngine(model, stop_ids={STOP})
    engine.submit(asked("a", seed=next(seed for seed in range(99) if length_of(model, seed) > 6)))
    engine.step()
    engine.step()
    engine.refresh(3)
    done: list[Generation] = []
    while not done:
        done += engine.step()
    assert done[0].policy_versions[:3] == (0, 0, 3)
    check(model, (1, 9, 7), done[0])


def length_of(model: PreTrainedModel, seed: int) -> int:
    return free_tokens(finish(TorchEngine(model, stop_ids={STOP}), asked("a", seed=seed))["a"])


# In batches, on disk and in the learner.


def played(model: PreTrainedModel, turns: int = 2, temperature: float = 1.0) -> list[Episode]:
    engine = TorchEngine(model, stop_ids={STOP})
    episodes = []
    for seed in range(6):
        written = []
        for turn in range(turns):
            prompt = (1, 9 + seed) if turn == 0 else (12, 13)
            request = asked(
                str(seed), (*prompt, 7), 10 * seed + turn, 30, temperature, new_sequence=turn == 0
            )
            generation = finish(engine, request)[str(seed)]
            # The opening is part of the reply, as a player has it.
            written.append(
                Turn(
                    "seen",
                    "done",
                    prompt,
                    (7, *generation.token_ids),
                    (0.0, *generation.logprobs),
                    (0.0, *generation.entropies),
                    ((7,), *(generation.allowed or ())),
                    reward=1.0,
                    new_sequence=turn == 0,
                    temperature=temperature,
                )
            )
        episodes.append(
            Episode(str(seed), "e", "t", seed, tuple(written), StopReason.TERMINATED, success=True)
        )
    return episodes


def test_partly_free_turns_come_back_from_disk_as_they_were(model: PreTrainedModel, tmp_path) -> None:
    episodes = played(model)
    write_episodes(tmp_path / "episodes.parquet", episodes)
    assert read_episodes(tmp_path / "episodes.parquet") == episodes


def test_free_tokens_are_decisions_without_a_list_of_choices(model: PreTrainedModel) -> None:
    episodes = played(model)
    batch = collate([Group("t", tuple(episodes))])
    turns = [turn for episode in episodes for turn in episode.turns]
    free = sum(ids is None for turn in turns for ids in turn.allowed or ())
    chosen = sum(ids is not None and len(ids) > 1 for turn in turns for ids in turn.allowed or ())
    assert free > 20
    assert int(batch.action_mask.sum()) == free + chosen
    assert batch.allowed is not None
    assert len(batch.allowed.rows) == chosen


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("layout", ["trajectory", "turn"])
def test_the_learner_gives_free_and_chosen_tokens_the_engines_numbers(
    model: PreTrainedModel, temperature: float, layout: str
) -> None:
    batch = collate([Group("t", tuple(played(model, temperature=temperature)))], layout=layout)  # type: ignore[arg-type]
    batch = batch.select([3, 1, 5, 0])  # also of a part of it, in another order
    with torch.no_grad():
        found = Forward().score(model, batch)
    assert batch.action_mask.any(dim=1).all()
    torch.testing.assert_close(
        found.logprobs[batch.action_mask], batch.logprobs[batch.action_mask], atol=1e-5, rtol=0
    )
    torch.testing.assert_close(
        found.entropies[batch.action_mask], batch.entropies[batch.action_mask], atol=1e-5, rtol=0
    )
