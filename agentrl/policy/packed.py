"""A model over sequences that lie end to end: hidden states, and the head that reads them."""

from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from agentrl.errors import RequirementError
from agentrl.policy.attention import AttentionLayout, packed_layout
from agentrl.policy.context import context_limit


def hidden_states(model: PreTrainedModel, tokens: Tensor, lengths: Tensor) -> Tensor:
    """The last hidden state of every token of sequences that lie end to end; differentiable.

    Args:
        model: from `build_model` or `load_policy`.
        tokens: [N] int64, the sequences one after the other.
        lengths: [B] int64, summing to N. Sequences do not see each other.

    Returns:
        [N, d], on which `output_weight` gives the logits of the token that follows.
    """
    if int(lengths.sum()) != tokens.shape[0]:
        raise ValueError(
            f"lengths sum to {int(lengths.sum())}, wanted {tokens.shape[0]}, the number of tokens"
        )
    return packed_forward(model, tokens, packed_layout(lengths, tokens.device))


def packed_forward(model: PreTrainedModel, tokens: Tensor, layout: AttentionLayout) -> Tensor:
    """Run the decoder without its head over tokens [N] in any layout; [N, d].

    Raises:
        RequirementError: for a sequence that is longer than the model's limit.
    """
    if layout.longest > (limit := context_limit(model)):
        raise RequirementError(
            f"a sequence of {layout.longest} tokens is longer than {type(model).__name__} can hold; "
            f"set policy.max_context to {limit} or less"
        )
    # A mask with four dimensions is taken as finished: transformers then builds none.
    no_mask = tokens.new_empty(0, dtype=torch.bool).view(1, 1, 0, 0)
    out = model.base_model(
        input_ids=tokens.unsqueeze(0),
        position_ids=layout.positions.unsqueeze(0),
        attention_mask=no_mask,
        use_cache=False,
        layout=layout,
    )
    return cast(Tensor, out.last_hidden_state[0])


def output_weight(model: PreTrainedModel) -> Tensor:
    """The head [V, d]: logits are hidden @ weight.T, which `check_packed_forward` has made sure of."""
    return cast(Tensor, output_layer(model).weight)


def output_layer(model: PreTrainedModel) -> Any:
    """The module that holds the head; None in a model without one."""
    return cast(Any, model).get_output_embeddings()
