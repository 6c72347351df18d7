"""Prompts that list actions and are written anew, on branching episodes and in the torch engine."""

from collections.abc import Sequence
from typing import Any

import pytest
from shelves import ScriptedEngine
from test_branching_tokens import ACTIONS, SAMPLING, TREE, play_branches
from transformers import PreTrainedTokenizerFast

from agentrl.env.briefing import Briefing
from agentrl.policy.chat_dialogue import ChatDialogue
from agentrl.policy.engine import GenerationRequest, SamplingParams
from agentrl.policy.model import build_model
from agentrl.policy.prompt import Observation, load_prompt
from agentrl.policy.settings import PolicyConfig
from agentrl.policy.tokens import fit_tokenizer
from agentrl.policy.torch_engine import TorchEngine
from agentrl.rollout.players import LanguagePlayer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
COUNTING = CHATML.replace("{{ m.role }}", "{{ m.role }} of {{ messages | length }}")


@pytest.fixture
def tokenizer() -> Any:
    made: Any = fit_tokenizer([*ACTIONS, "You can do one of the following", "4 shelves"] * 4, 400)
    made.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    made.chat_template = CHATML
    return made


@pytest.mark.parametrize(("template", "history"), [(CHATML, 1), (CHATML, "full"), (COUNTING, "full")])
def test_a_branch_reads_what_its_parent_read(
    tokenizer: PreTrainedTokenizerFast, template: str, history: Any
) -> None:
    tokenizer.chat_template = template
    dialogue = ChatDialogue(tokenizer, prompt=load_prompt("literature", history))
    episodes = play_branches(TREE, 8, LanguagePlayer(dialogue, ScriptedEngine(), SAMPLING))
    by_id = {episode.id: episode for episode in episodes}
    branched = 0
    for episode in episodes:
        anew = template is COUNTING or history == 1
        assert [turn.new_sequence for turn in episode.turns[1:]] == [anew] * 3
        # Of an earlier message that is written again, the list of actions is as complete as it was.
        listed = tokenizer.decode(list(episode.turns[-1].prompt_ids)).count("can do one of")
        assert listed == (4 if template is COUNTING else 1)
        if episode.parent is not None:
            mine, its = (each.turns[episode.parent.turn] for each in (episode, by_id[episode.parent.parent]))
            assert mine.prompt_ids == its.prompt_ids
            branched += 1
    assert branched == 6


def test_what_prompts_of_a_window_have_in_common_is_read_once(tokenizer: PreTrainedTokenizerFast) -> None:
    dialogue = ChatDialogue(tokenizer, prompt=load_prompt("literature", 1))
    model = build_model(PolicyConfig(device="cpu", max_context=2048), tokenizer, seed=0)
    engine = TorchEngine(model, stop_ids=dialogue.stop_ids)
    briefing = Briefing("take pen 2", "You can take mug 1, mug 2, pen 1 or pen 2. " * 4)
    history: list[tuple[str, tuple[int, ...]]] = []
    before: Sequence[int] = ()
    forwarded = []
    for text in ("4 shelves", "3 left", "2 left"):
        observation = Observation(text, ("go on", "go up"), briefing)
        prompt = dialogue.prompt(history, observation)
        assert prompt.new_sequence
        common = next(
            k for k, token in enumerate(prompt.ids) if token != [*before, None][min(k, len(before))]
        )
        start = engine.tokens_forwarded
        engine.submit(GenerationRequest("e", prompt.ids, True, None, 0, SamplingParams(1.0, 1)))
        (reply,) = engine.step()
        forwarded.append((engine.tokens_forwarded - start, len(prompt.ids) - common))
        before = (*prompt.ids, *reply.token_ids)
        history.append((observation, dialogue.encode_reply("go on")))
    assert all(found == wanted for found, wanted in forwarded)
    assert forwarded[0][0] > forwarded[1][0]
    assert len(prompt.ids) - forwarded[2][0] > 90  # the instructions and the task
