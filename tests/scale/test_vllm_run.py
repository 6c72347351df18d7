"""A training run that vLLM generates for: `make test-vllm` runs it."""

import json
from pathlib import Path

import pytest
import torch.distributed as dist
from vllm_cases import needs_vllm

import agentrl
from agentrl.data.storage import read_episodes
from agentrl.policy.engine import Adapter

pytestmark = [needs_vllm, pytest.mark.timeout(300)]

TINY = (
    "warm_start.steps=60",
    "warm_start.demonstrations=240",
    "trainer.steps=2",
    "trainer.save_episodes_every=1",
    "rollout.groups_per_step=4",
    "rollout.group_size=8",
    "rollout.placement=inline",
    "evaluation.tasks=4",
    "evaluation.baselines=[untrained]",
    "evaluation.instruction_check=false",
    "policy.tokenizer_episodes=8",
    "engine.name=vllm",
    "engine.vllm.cpu_cache_gib=0.25",
)
# Free text scores nothing yet, and of equal returns only an algorithm with values learns.
FREE = (
    "rollout.constrained=false",
    "env.kwargs.max_steps=4",
    "engine.max_tokens=8",
    "algorithm.name=ppo",
)
ADAPTERS = ("learner.lora={rank: 4, alpha: 8.0}",)
TWO_STAGES = (
    *ADAPTERS,
    "warm_start.steps=3",
    "warm_start.demonstrations=36",
    "warm_start.learner.lora={rank: 12, alpha: 12.0, targets: [q_proj, up_proj]}",
    "rollout.groups_per_step=2",
)


@pytest.mark.parametrize("more", [(), FREE, ADAPTERS], ids=["constrained", "free", "adapters"])
def test_two_steps_of_the_quickstart_learn_from_what_vllm_drew(tmp_path: Path, more: tuple[str, ...]) -> None:
    overrides = (*TINY, *more, f"run.folder={tmp_path}", "run.name=tiny")
    run = agentrl.train(agentrl.load_config("configs/quickstart.yaml", *overrides), quiet=True)
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if row["stage"] == "train"]
    assert [row["step"] for row in trained] == [1, 2]
    drifts = [row["train/algorithm/mismatch/max"] for row in trained]
    print(f"largest drift between vLLM and the learner, per step: {drifts}")
    assert max(drifts) < 1e-3
    for step in (1, 2):
        episodes = read_episodes(run.folder / f"episodes/train-{step:06d}.parquet")
        turns = [turn for episode in episodes for turn in episode.turns]
        assert len(episodes) == 32
        assert {turn.policy_version for turn in turns} == {step - 1}
        decisions = [
            entropy
            for turn in turns
            for entropy, decided in zip(turn.entropies, turn.action_mask, strict=True)
            if decided
        ]
        assert decisions
        assert min(decisions) > 0
    assert not dist.is_initialized()


def test_adapters_are_sent_alone_but_for_the_base_of_a_new_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from agentrl.scale.vllm_engine import VllmEngine

    sent: list[tuple[int, int | None]] = []  # (version, rank of the adapter)
    learned: list[bool] = []
    refresh = VllmEngine.refresh

    def noted(engine: VllmEngine, version: int, adapter: Adapter | None = None) -> None:
        sent.append((version, None if adapter is None else adapter.rank))
        learned.append(adapter is not None and all(value.any() for value in adapter.weights.values()))
        refresh(engine, version, adapter)

    monkeypatch.setattr(VllmEngine, "refresh", noted)
    overrides = (*TINY, *TWO_STAGES, f"run.folder={tmp_path}", "run.name=tiny")
    agentrl.train(agentrl.load_config("configs/quickstart.yaml", *overrides), quiet=True)
    assert sent == [(0, 12), (3, 12), (0, None), (0, 4), (1, 4), (2, 4)]
    assert learned[:4] == [False, True, False, False]
