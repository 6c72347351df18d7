"""Extensions that run inside vLLM's workers: the token trie's mask, and the entropies of sampled tokens.

To load them into a server: `vllm serve FOLDER
--logits-processors agentrl.scale.vllm_choices:TokenTrieProcessor
--worker-extension-cls agentrl.scale.vllm_choices.PolicyWorker`.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm import envs
from vllm.config import VllmConfig
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from agentrl.scale.vllm_decisions import Decisions, Row, row
from agentrl.scale.vllm_lora import NAME
from agentrl.scale.vllm_weights import shape_of


class TokenTrieProcessor(LogitsProcessor):  # type: ignore[misc]
    """Logits processor that restricts requests of agentrl to admissible ids; others are left unchanged."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self.decisions = Decisions()

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse invalid choices.

        Raises:
            ChoiceError: If a choice is empty or a prefix of another; see `TokenTrie`.
        """
        row(sampling_params.extra_args, sampling_params.temperature, ())

    def is_argmax_invariant(self) -> bool:
        """Return False: the mask can exclude the most likely id."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Add, move and remove the rows of a batch that changed."""
        process_dict_updates(self.decisions.rows, batch_update, _row)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Mask logits [R, V] in place; see `Decisions.apply`."""
        return self.decisions.apply(logits)


def _row(params: SamplingParams, _: list[int] | None, output_ids: list[int]) -> Row | None:
    return row(params.extra_args, params.temperature, output_ids)


class PolicyWorker:
    """Methods that vLLM adds to each of its workers, called by `collective_rpc`."""

    model_runner: Any
    model_config: Any
    lora_config: Any
    list_loras: Any
    add_lora: Any
    adapter_number: int  # by which vLLM knows our adapter

    def take_entropies(self, keys: list[str]) -> dict[str, list[tuple[int, float]]]:
        """Return and forget the entropies of some keys; empty on workers that do not sample."""
        found: dict[str, list[tuple[int, float]]] = {}
        for processor in self._processors():
            found |= processor.decisions.take(keys)
        return found

    def renew_head(self) -> None:
        """Repack the output layer, which vLLM's `reload_weights` can leave with old weights.

        On a CPU, a head that is tied to the embedding computes with a packed copy of it, which
        `reload_weights` does not renew (seen in vLLM 0.32).
        """
        for module in self.model_runner.get_model().modules():
            if hasattr(module, "cpu_linear") and module.weight.numel():
                module.quant_method.process_weights_after_loading(module)

    def replace_adapter(self, folder: str) -> None:
        """Load an adapter in place of the only one that vLLM holds, or held until weights were reloaded."""
        if held := self.list_loras():
            (self.adapter_number,) = held
        self.add_lora(LoRARequest(NAME, self.adapter_number, folder, load_inplace=True))

    def describe_policy(self) -> dict[str, Any]:
        """Return the served model's shape, dtype and limits, and how logprobs are computed."""
        return {
            "shape": dict(shape_of(self.model_config.hf_text_config)),
            "dtype": str(self.model_config.dtype).removeprefix("torch."),
            "logprobs_mode": self.model_config.logprobs_mode,
            "max_context": self.model_config.max_model_len,
            "masks": bool(self._processors()),
            "lora_rank": self.lora_config.max_lora_rank if self.lora_config else 0,
            "lora_slots": self.lora_config.max_cpu_loras if self.lora_config else 0,
            "lora_updates": envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING,
        }

    def _processors(self) -> list[TokenTrieProcessor]:
        found = self.model_runner.input_batch.logitsprocs.all
        return [processor for processor in found if isinstance(processor, TokenTrieProcessor)]
