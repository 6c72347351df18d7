"""A model whose context is shorter than what was asked for: every stage keeps to it, and it is told."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from test_chat_policy import CHATML, chat_folder
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GraniteConfig, LlamaConfig, Phi3Config

import agentrl
from agentrl.data.storage import read_episodes
from agentrl.data.trajectory import StopReason
from agentrl.errors import ConfigError, RequirementError
from agentrl.learn.learner import Learner
from agentrl.planning.plan import plan
from agentrl.policy.model import load_policy
from agentrl.run.logger import RunLogger
from agentrl.run.policies import open_player

pytestmark = pytest.mark.usefixtures("undrawn")

SHORT = 190
TINY = (
    "env.id=example/HotCold-v0",
    "policy.max_context=2048",
    "policy.device=cpu",
    "engine.max_tokens=16",
    "rollout.groups_per_step=2",
    "rollout.group_size=4",
    "rollout.placement=inline",
    "algorithm.drop_equal_groups=false",
    "warm_start.steps=2",
    "warm_start.batch_size=4",
    "warm_start.demonstrations=24",
    "trainer.steps=2",
    "trainer.save_episodes_every=1",
    "evaluation.split=test",
    "evaluation.tasks=6",
    "evaluation.baselines=[]",
    "run.name=tiny",
)


def folder_of(folder: Path, kind: Any, **sizes: Any) -> Path:
    """A chat folder as `chat_folder` makes it, with another model."""
    chat_folder(folder, CHATML)
    known = AutoConfig.from_pretrained(folder)
    ends = {name: getattr(known, name) for name in ("vocab_size", "pad_token_id", "eos_token_id")}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(kind(**ends, bos_token_id=None, **sizes)).save_pretrained(folder)
    return folder


GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": SHORT}
WIDTHS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
LONGROPE: dict[str, Any] = {
    **WIDTHS,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": SHORT,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
        "original_max_position_embeddings": SHORT,
    },
}


def config(folder: Path, model: Path, *more: str) -> agentrl.RunConfig:
    return agentrl.load_config(
        None, *TINY, f"policy.path={model}", "policy.preset=scratch", f"run.folder={folder}", *more
    )


@pytest.fixture(scope="module")
def ran(
    examples: dict[str, ModuleType], tmp_path_factory: pytest.TempPathFactory
) -> tuple[agentrl.Run, list[str], list[Any]]:
    """A run of a GPT-2 with few positions, what it said, and the batches that it learned from."""
    folder = tmp_path_factory.mktemp("short")
    model = folder_of(folder / "model", GPT2Config, **GPT2)
    said: list[str] = []
    batches: list[Any] = []
    update = Learner.update

    def remembered(self: Learner, batch: Any, *given: Any) -> dict[str, float]:
        batches.append(batch)
        return update(self, batch, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunLogger, "say", lambda self, text: said.append(text))
        patch.setattr(Learner, "update", remembered)
        run = agentrl.train(config(folder, model), quiet=True)
    return run, said, batches


def rows(run: agentrl.Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]


def test_what_is_used_is_told_once_and_written_down(ran: tuple[agentrl.Run, list[str], list[Any]]) -> None:
    run, said, _ = ran
    told = [line for line in said if "policy.max_context=2048" in line]
    assert len(told) == 1
    assert f"GPT2LMHeadModel ({run.folder.parent / 'model'}) holds at most {SHORT} tokens" in told[0]
    assert run.config.policy.max_context == SHORT
    assert f"max_context: {SHORT}" in (run.folder / "config.yaml").read_text()


def test_no_sequence_is_longer_than_the_model_can_hold(ran: tuple[agentrl.Run, list[str], list[Any]]) -> None:
    run, _, batches = ran
    assert len(batches) == 2 + 2
    assert 0 < max(int(batch.lengths.max()) for batch in batches) <= SHORT
    assert sum(row.get(f"{row['stage']}/learner/updates", 0) for row in rows(run)) == 4


def test_demonstrations_that_could_not_be_played_are_counted_and_left_out(
    ran: tuple[agentrl.Run, list[str], list[Any]],
) -> None:
    _, said, _ = ran
    (told,) = [line for line in said if "demonstrations" in line and "warning" in line]
    count = int(told.split()[4])
    assert told == (
        f"warning: of 24 demonstrations {count} did not fit policy.max_context={SHORT} and are left out"
    )
    assert 0 < count < 24


def test_how_episodes_ended_is_logged_by_share(ran: tuple[agentrl.Run, list[str], list[Any]]) -> None:
    run, _, _ = ran
    trained = [row for row in rows(run) if row["stage"] == "train"]
    assert len(trained) == 2
    for row in trained:
        episodes = read_episodes(run.folder / "episodes" / f"train-{row['step']:06d}.parquet")
        assert len(episodes) == 8
        for reason in StopReason:
            assert (
                row[f"train/rollout/stop/{reason.value}"] == sum(each.stop is reason for each in episodes) / 8
            )
    assert any(row["train/rollout/stop/context_limit"] for row in trained)
    scores = json.loads((run.folder / "summary.json").read_text())["policies"]["trained"]
    assert all(sum(score["stop_reasons"].values()) == 6 for score in scores.values())


def test_full_contexts_are_warned_of_once_with_the_keys(
    ran: tuple[agentrl.Run, list[str], list[Any]],
) -> None:
    _, said, _ = ran
    told = [line for line in said if "ended by context_limit" in line]
    assert len(told) == 1
    assert told[0].startswith("warning: ")
    assert f"policy.max_context={SHORT} tokens, which is all that the model can do" in told[0]
    assert "policy.max_observation_tokens=96" in told[0]


def test_a_run_within_its_context_says_nothing_of_it(examples: dict[str, ModuleType], tmp_path: Path) -> None:
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunLogger, "say", lambda self, text: said.append(text))
        model = folder_of(tmp_path / "model", LlamaConfig, **WIDTHS)
        run = agentrl.train(config(tmp_path, model, "trainer.steps=1", "evaluation.tasks=2"), quiet=True)
    assert not [line for line in said if "max_context" in line]
    assert rows(run)[-1]["train/rollout/stop/context_limit"] == 0.0


def test_too_few_demonstrations_that_fit_are_refused_with_their_number(
    examples: dict[str, ModuleType], tmp_path: Path
) -> None:
    model = folder_of(tmp_path / "model", GPT2Config, **{**GPT2, "n_positions": 40})
    words = r"solved 0 of 24 tasks \(24 did not fit policy\.max_context=40\); wanted at least 4"
    with pytest.raises(ConfigError, match=words):
        agentrl.train(config(tmp_path, model), quiet=True)


def test_a_demonstration_needs_the_room_that_the_policy_would(
    examples: dict[str, ModuleType], tmp_path: Path
) -> None:
    """Free replies may take `engine.max_tokens`; a policy stops before a turn without room for them."""
    model = folder_of(tmp_path / "model", GPT2Config, **GPT2)
    wide = config(tmp_path, model, "rollout.constrained=false", f"engine.max_tokens={SHORT - 10}")
    with pytest.raises(ConfigError, match=rf"24 did not fit policy\.max_context={SHORT}"):
        agentrl.train(wide, quiet=True)


# Beyond a rotary switch.


def test_more_than_the_rotary_switch_is_refused_before_a_folder_is_made(
    examples: dict[str, ModuleType], tmp_path: Path
) -> None:
    model = folder_of(tmp_path / "model", Phi3Config, **LONGROPE)
    words = rf"policy\.max_context is 2048, wanted at most {SHORT}"
    with pytest.raises(ConfigError, match=words):
        agentrl.train(config(tmp_path, model), quiet=True)
    assert not (tmp_path / "tiny").exists()
    (missing,) = plan(config(tmp_path, model)).missing
    assert f"policy.max_context is 2048, wanted at most {SHORT}" in missing

    fitting = config(tmp_path, model, f"policy.max_context={SHORT}", "trainer.steps=1", "evaluation.tasks=2")
    assert rows(agentrl.train(fitting, quiet=True))[-1]["train/learner/updates"] == 1


def test_a_folder_that_nobody_configured_is_played_within_what_it_can(
    examples: dict[str, ModuleType], tmp_path: Path
) -> None:
    model = folder_of(tmp_path / "model", Phi3Config, **LONGROPE)
    _, used = open_player(str(model))
    assert used.policy.max_context == SHORT


# Plans.


def test_a_plan_says_how_long_a_sequence_may_be(examples: dict[str, ModuleType], tmp_path: Path) -> None:
    model = folder_of(tmp_path / "model", GPT2Config, **GPT2)
    (line,) = [line for line in plan(config(tmp_path, model)).lines if line.what == "tokens of a sequence"]
    assert (line.amount, line.unit) == (SHORT, "tokens")
    assert "policy.max_context=2048, but a sequence of GPT2LMHeadModel" in line.how


def test_a_plan_refuses_an_architecture_without_its_weights(
    examples: dict[str, ModuleType], tmp_path: Path
) -> None:
    model = folder_of(tmp_path / "model", GraniteConfig, **WIDTHS, logits_scaling=2.0)
    (model / "model.safetensors").unlink()
    missing = plan(config(tmp_path, model)).missing
    assert any("a scale on its logits (logits_scaling=2.0)" in line for line in missing)
    (model / "model.safetensors").write_bytes(b"")
    with pytest.raises(RequirementError, match=r"logits_scaling=2\.0"):
        load_policy(model, device="cpu")
