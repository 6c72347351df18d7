"""Scores of given texts after given prompts, by a policy that does not generate."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from agentrl.data.trajectory import Episode
from agentrl.learn.fused import token_statistics
from agentrl.policy.packed import hidden_states, output_weight

Ids = Sequence[int]

_TOKENS = 1 << 14  # of a forward pass, unless one text alone has more


@dataclass(frozen=True, slots=True)
class TextScore:
    """Log-probability and entropy of each token of a text, in nats, over the whole vocabulary."""

    logprobs: tuple[float, ...]
    entropies: tuple[float, ...]


def score_texts(
    model: PreTrainedModel, pairs: Iterable[tuple[Ids, Ids]], tokens: int = _TOKENS
) -> Iterator[TextScore]:
    """Yield the score of each text, at temperature 1.

    Args:
        model: The policy's model.
        pairs: Prompts with the texts after them, as token ids; neither is empty.
        tokens: The largest number of tokens in a forward pass.
    """
    waiting: list[tuple[Ids, Ids]] = []
    held = 0
    for pair in pairs:
        size = len(pair[0]) + len(pair[1])
        if waiting and held + size > tokens:
            yield from _score(model, waiting)
            waiting, held = [], 0
        waiting.append(pair)
        held += size
    if waiting:
        yield from _score(model, waiting)


def prompts_of(episode: Episode) -> list[tuple[int, ...]]:
    """Return for each turn of an episode the token ids that the policy read before its reply."""
    prompts, ids = [], list[int]()
    for turn in episode.turns:
        if turn.new_sequence:
            ids = []
        ids += turn.prompt_ids
        prompts.append(tuple(ids))
        ids += turn.action_ids
    return prompts


@torch.no_grad()
def _score(model: PreTrainedModel, pairs: Sequence[tuple[Ids, Ids]]) -> list[TextScore]:
    weight = output_weight(model)
    device = next(cast(nn.Module, model).parameters()).device
    rows = [[*prompt, *text] for prompt, text in pairs]
    lengths = [len(row) for row in rows]
    hidden = hidden_states(
        model, torch.tensor([id for row in rows for id in row], device=device), torch.tensor(lengths)
    )
    states, start = [], 0
    for (prompt, _), length in zip(pairs, lengths, strict=True):
        states.append(hidden[start + len(prompt) - 1 : start + length - 1])  # each predicts the next token
        start += length
    targets = torch.tensor([id for _, text in pairs for id in text], device=device)
    logprobs, entropies = token_statistics(torch.cat(states), weight, targets)
    sizes = [len(text) for _, text in pairs]
    return [
        TextScore(tuple(of_text.tolist()), tuple(own.tolist()))
        for of_text, own in zip(torch.split(logprobs, sizes), torch.split(entropies, sizes), strict=True)
    ]
