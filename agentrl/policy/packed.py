"""Forward passes of a model over packed sequences, and its output layer."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from agentrl.errors import RequirementError
from agentrl.policy.attention import AttentionLayout, packed_layout
from agentrl.policy.context import context_limit


def hidden_states(model: PreTrainedModel, tokens: Tensor, lengths: Tensor) -> Tensor:
    """Return the last hidden state of every token of packed sequences; differentiable.

    Args:
        model: A model from `build_model` or `load_policy`.
        tokens: [N] int64, the concatenated sequences.
        lengths: [B] int64, the lengths of the sequences, summing to N. Sequences do not see each other.

    Returns:
        [N, d]; the product with `output_weight` gives the logits of the next token.
    """
    if int(lengths.sum()) != tokens.shape[0]:
        raise ValueError(
            f"lengths sum to {int(lengths.sum())}, wanted {tokens.shape[0]}, the number of tokens"
        )
    return packed_forward(model, tokens, packed_layout(lengths, tokens.device))


def packed_forward(model: PreTrainedModel, tokens: Tensor, layout: AttentionLayout) -> Tensor:
    """Run the decoder without its output layer over tokens [N] in any layout; return [N, d].

    Raises:
        RequirementError: If a sequence is longer than the model's limit.
    """
    if layout.longest > (limit := context_limit(model)):
        raise RequirementError(
            f"a sequence of {layout.longest} tokens is longer than {type(model).__name__} can hold; "
            f"set policy.max_context to {limit} or less"
        )
    # transformers uses a mask with four dimensions as it is, and so builds none.
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
    """Return the output weight [V, d]: logits are hidden @ weight.T, as `check_packed_forward` verifies."""
    return cast(Tensor, output_layer(model).weight)


def embedding(model: PreTrainedModel) -> nn.Module:
    """Return the module that embeds tokens: ids [...] -> [..., d]."""
    return cast(nn.Module, cast(Any, model).get_input_embeddings())


def output_layer(model: PreTrainedModel) -> Any:
    """Return the output layer; None in a model without one."""
    return cast(Any, model).get_output_embeddings()
