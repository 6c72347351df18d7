"""What a run takes is said before it starts, and is what it then takes; what is missing is told at once."""

import json
import re
import shutil
import socket
from collections import namedtuple
from pathlib import Path
from types import ModuleType

import psutil
import pytest
import torch
from ballast import BALLAST
from typer.testing import CliRunner

import agentrl
from agentrl.algorithms.methods.cloning import cloning
from agentrl.cli import app
from agentrl.data.storage import read_episodes
from agentrl.errors import CheckpointError, ConfigError, RequirementError
from agentrl.planning import plan as planning
from agentrl.planning import preflight
from agentrl.planning.env_probe import (
    EnvProfile,
    longest_sequence,
    profile_env,
    stored_episode_bytes,
    tokenize_play,
)
from agentrl.planning.memory import cache_bytes, checkpoint_bytes, sent_bytes, weight_bytes
from agentrl.planning.plan import Plan, plan
from agentrl.planning.preflight import check_run
from agentrl.policy.model import skeleton
from agentrl.scale import extras

pytestmark = pytest.mark.usefixtures("undrawn")

TINY = (
    "env.id=example/HotCold-v0",
    "evaluation.split=test",
    "evaluation.tasks=5",
    "evaluation.every=2",
    "warm_start.steps=4",
    "warm_start.demonstrations=24",
    "trainer.steps=3",
    "trainer.checkpoint_every=1",
    "trainer.save_episodes_every=2",
    "policy.tokenizer_episodes=4",
    "policy.device=cpu",
    "rollout.groups_per_step=4",
    "rollout.group_size=3",
    "rollout.max_active=6",
    "rollout.placement=inline",
    "learner.epochs=2",
)


@pytest.fixture(autouse=True)
def _threads() -> None:
    torch.set_num_threads(1)


def config(folder: Path, *more: str) -> agentrl.RunConfig:
    return agentrl.load_config(None, *TINY, f"run.folder={folder}", *more)


def amounts(found: Plan, section: str) -> dict[str, float | None]:
    return {line.what: line.amount for line in found.lines if line.section == section}


# A plan, and the run that follows.


@pytest.fixture(scope="module")
def planned(
    examples: dict[str, ModuleType], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Plan, agentrl.Run]:
    settings = config(tmp_path_factory.mktemp("planned"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("agentrl.training.trainer.write_report", lambda *args, **kwargs: None)  # costs seconds
        return plan(settings), agentrl.train(settings, quiet=True)


@pytest.fixture(scope="module")
def profile(examples: dict[str, ModuleType], tmp_path_factory: pytest.TempPathFactory) -> EnvProfile:
    return profile_env(config(tmp_path_factory.mktemp("profile")))


@pytest.fixture
def profiled(profile: EnvProfile, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a worker would find is known: no process is started."""
    monkeypatch.setattr(planning, "profile_environments", lambda config: [profile])
    monkeypatch.setattr(planning, "check_expert", lambda config: [])
    monkeypatch.setattr(planning, "resolve_placements", lambda config: (config, []))


def test_a_run_does_what_was_planned(planned: tuple[Plan, agentrl.Run]) -> None:
    found, run = planned
    work = amounts(found, "work")
    assert found.missing == ()
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if row["stage"] == "train"]
    assert work["optimiser steps"] == sum(row["train/learner/updates"] for row in trained) == 6
    assert work["cloning steps"] == len(rows) - len(trained) == 4
    assert (work["episodes of a step"], work["episodes of training"]) == (12, 36)
    evaluations = json.loads((run.folder / "evaluations.json").read_text())
    played = sum(
        found["episodes"] + found["aborted"]
        for name, decodings in evaluations.items()
        if name != "instruction_check"
        for found in decodings.values()
    )
    # Random and expert once; untrained, cloned, trained and that after step 2 twice; 5 tasks each.
    assert work["episodes of evaluation"] == played == 50


def test_a_run_leaves_on_disk_what_was_planned(planned: tuple[Plan, agentrl.Run]) -> None:
    found, run = planned
    disk = amounts(found, "disk")
    sizes = [
        sum(file.stat().st_size for file in folder.iterdir() if file.suffix != ".json")
        for folder in (run.folder / "checkpoints").iterdir()
    ]
    assert 2 <= len(sizes) <= 3
    # The tokenizer found fewer merges than the vocabulary that was asked for and planned with.
    vocabulary = json.loads((run.model / "config.json").read_text())["vocab_size"]
    exact = config(run.folder, f"policy.vocab_size={vocabulary}")
    computed = checkpoint_bytes(exact, exact.algorithm.build(), exact.learner)
    assert max(sizes) == pytest.approx(computed, rel=0.05)
    stages = ((cloning(), run.config.warm_start.learner), (run.config.algorithm.build(), run.config.learner))
    assert disk["checkpoints"] == 4 * max(checkpoint_bytes(run.config, *stage) for stage in stages)
    assert disk["trained policy"] == weight_bytes(skeleton(run.config.policy))


def test_what_another_environment_adds_is_weighed(tmp_path: Path) -> None:
    profile = profile_env(config(tmp_path, f"env.id={BALLAST}"))
    assert 35e6 < profile.environment_bytes < 60e6
    assert profile.worker_bytes > 60e6
    assert profile.mean_turns == 1


def test_a_worker_is_weighed_and_leaves_nothing_behind(
    examples: dict[str, ModuleType], tmp_path: Path
) -> None:
    before = set(psutil.Process().children(recursive=True))
    profile = profile_env(config(tmp_path))
    assert set(psutil.Process().children(recursive=True)) == before
    assert 2e7 < profile.worker_bytes < 2e9  # a Python with this package
    assert profile.environment_bytes < profile.worker_bytes / 2
    assert (profile.tasks, profile.panel) == (len(examples["hotcold"].HotCold().tasks("train")), 5)
    assert profile.mean_turns > 0


def test_tokens_of_random_play_are_those_that_a_dialogue_would_have(
    profile: EnvProfile, tmp_path: Path
) -> None:
    chosen = tokenize_play(config(tmp_path), profile.episodes, 10_000)
    free = tokenize_play(config(tmp_path, "rollout.constrained=false"), profile.episodes, 10_000)
    assert [len(episode.turns) for episode in chosen] == [len(episode.turns) for episode in profile.episodes]
    turn = chosen[0].turns[0]
    assert len(turn.logprobs) == len(turn.entropies) == len(turn.action_ids) > 0
    assert {len(turn.action_ids) for episode in free for turn in episode.turns} == {64}
    # The first turn alone fits; the second would not.
    room = len(turn.prompt_ids) + len(turn.action_ids)
    assert [len(episode.turns) for episode in tokenize_play(config(tmp_path), profile.episodes, room)][
        :1
    ] == [1]
    assert stored_episode_bytes(free) > stored_episode_bytes(profile.episodes) > 0


def test_tokens_of_a_step_are_near_those_that_are_played(planned: tuple[Plan, agentrl.Run]) -> None:
    found, run = planned
    played = read_episodes(run.folder / "episodes" / "train-000002.parquet")
    tokens = sum(len(turn.prompt_ids) + len(turn.action_ids) for episode in played for turn in episode.turns)
    planned_tokens = amounts(found, "work")["tokens of a step"]
    assert planned_tokens == pytest.approx(tokens, rel=0.5)


def test_processes_are_counted_for_training_and_for_the_panel(
    profiled: None, profile: EnvProfile, tmp_path: Path
) -> None:
    more = ("rollout.placement=process", "rollout.workers.count=3", "rollout.workers.environments=1")
    found = plan(config(tmp_path, *more))
    counted = amounts(found, "processes")
    # Six episodes at a time would need two environments in each of three workers.
    assert (counted["trainer"], counted["environment workers"]) == (1, 6)
    assert amounts(found, "memory")["environments"] == 6 * profile.worker_bytes
    shared = plan(config(tmp_path, *more, "learner.backend=fsdp"), processes=2)
    assert amounts(shared, "processes")["environment workers"] == 12
    assert amounts(shared, "processes")["trainer"] == 2
    assert amounts(shared, "memory")["environments"] == 12 * profile.worker_bytes


def test_environments_in_the_process_that_learns_share_what_the_first_loads(
    profiled: None, profile: EnvProfile, tmp_path: Path
) -> None:
    memory = amounts(plan(config(tmp_path)), "memory")
    assert memory["environments"] == profile.worker_bytes + 11 * profile.environment_bytes


CLUSTER = (
    "rollout.placement=process",
    "rollout.backend=ray",
    "rollout.ray.actors=2",
    "rollout.workers.count=2",
    "learner.backend=fsdp",
)


def test_actors_of_all_processes_are_dealt_out_to_the_machines(
    profiled: None, profile: EnvProfile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: object())
    found = plan(config(tmp_path, *CLUSTER, "engine.actors=3"), processes=4, nodes=2)
    counted = amounts(found, "processes")
    # Four processes have two actors each, for training and for the panel: sixteen on two machines.
    assert (counted["trainer"], counted["environment actors"], counted["environment workers"]) == (2, 8, 16)
    assert counted["engine actors"] == 6
    assert counted["Ray's own"] is None
    weights = weight_bytes(skeleton(config(tmp_path).policy))
    memory = amounts(found, "memory")
    assert memory["weights of actors"] == 6 * weights
    assert memory["Ray's objects"] == 2 * 4 * weights
    # Six episodes, two to an actor, as long as random play had them and a quarter more.
    longest = longest_sequence(tokenize_play(config(tmp_path), profile.episodes, 1024)) * 5 // 4
    cache = cache_bytes(skeleton(config(tmp_path).policy), 2, longest)
    assert memory["keys and values"] == 6 * (cache + cache // 2)
    assert found.missing == ()
    launched = ("learner.launcher=ray", "learner.processes=4")
    again = plan(config(tmp_path, *CLUSTER, *launched, "engine.actors=3"), nodes=2)
    assert amounts(again, "processes") == counted | {"driver": 1}
    (lacking,) = again.missing
    assert lacking.startswith("rollout.ray.address is null")


def test_an_asynchronous_run_has_weights_of_its_own_to_learn_and_episodes_ahead(
    profiled: None, tmp_path: Path
) -> None:
    alone = plan(config(tmp_path, "warm_start.steps=0"))
    beside = plan(config(tmp_path, "warm_start.steps=0", "trainer.mode=async", "trainer.max_staleness=2"))
    assert "weights that generate" not in amounts(alone, "memory")
    memory = amounts(beside, "memory")
    assert memory["weights that generate"] == memory["weights"]
    assert amounts(beside, "work")["episodes ahead"] == 24


def test_a_second_rollout_is_among_the_episodes_and_named(profiled: None, tmp_path: Path) -> None:
    found = plan(config(tmp_path, "algorithm.name=arbitrary_entropy"))
    lines = {line.what: (line.amount, line.how) for line in found.lines if line.section == "work"}
    assert lines["episodes of a step"] == (32, "4 tasks x 8")
    assert lines["episodes of training"][0] == 96
    assert lines["at another temperature"] == (8, "of them: 4 tasks x 2")
    plain = amounts(plan(config(tmp_path, "rollout.group_size=8")), "work")
    assert plain["episodes of a step"] == 32
    assert "at another temperature" not in plain


def test_a_second_rollout_has_no_importance_weights_so_no_policy_that_is_ahead(
    profiled: None, tmp_path: Path
) -> None:
    ahead = ("trainer.mode=async", "trainer.max_staleness=2", "algorithm.name=arbitrary_entropy")
    (line,) = plan(config(tmp_path, *ahead)).missing
    assert "the second rollout is learned without importance correction" in line
    assert not plan(config(tmp_path, "trainer.mode=async", "algorithm.name=ettrl")).missing


@pytest.mark.parametrize("actors", [(), ("engine.actors=2",)])
def test_vllm_on_the_cpu_holds_its_weights_and_its_cache(
    actors: tuple[str, ...], profiled: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: object())
    memory = amounts(plan(config(tmp_path, "engine.name=vllm", *actors)), "memory")
    copies = 2 if actors else 1
    weights = weight_bytes(skeleton(config(tmp_path).policy))
    assert memory["keys and values"] == copies * 2**30
    assert memory["weights in vLLM"] == copies * weights


def test_what_only_the_run_can_tell_is_named_as_unknown(planned: tuple[Plan, agentrl.Run]) -> None:
    found, _ = planned
    (line,) = [line for line in found.lines if line.amount is None]
    assert (line.section, line.what) == ("time", "a step")
    assert "unknown" in line.how


# What is missing.


def test_everything_that_is_missing_is_told_at_once(
    examples: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taken").mkdir()
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        monkeypatch.setenv("MASTER_PORT", str(listener.getsockname()[1]))
        monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: None)
        found = plan(
            config(
                tmp_path,
                "run.name=taken",
                "evaluation.tasks=10000",
                "policy.device=cuda" if not torch.cuda.is_available() else "policy.device=mps",
                f"policy.path={tmp_path / 'nowhere'}",
                "rollout.placement=process",
                "rollout.backend=ray",
                "engine.name=vllm",
                "engine.vllm.url=http://127.0.0.1:9",
                f"engine.vllm.weights_folder={tmp_path / 'absent'}",
            ),
            processes=3,
        )
    wanted = (
        r"learner\.backend is single, wanted fsdp for 3 processes",
        r"rollout\.groups_per_step is 4, wanted a multiple of the 3 processes",
        r"run\.name is 'taken', but .*taken exists",
        r"engine\.vllm\.url needs httpx2: pip install httpx2",
        r"engine\.vllm\.weights_folder: .*absent is no folder on this machine",
        r"policy\.device is '(cuda|mps)', which this machine does not have",
        r"rollout\.backend=ray needs Ray: pip install -e '\.\[ray\]'",
        r"policy\.path is '.*nowhere', wanted a folder or \.gguf file \(there is none at .*nowhere\)",
        r"torchrun --master-port: \d+ is not available",
        r"split 'test' of example/HotCold-v0 has \d+ tasks, wanted 10000",
    )
    assert len(found.missing) == len(wanted), found.missing
    for pattern, line in zip(wanted, found.missing, strict=True):
        assert re.search(pattern, line), (pattern, line)


def test_fewer_tasks_to_measure_on_than_processes_are_named(profiled: None, tmp_path: Path) -> None:
    more = ("learner.backend=fsdp", "evaluation.tasks=1")
    (line,) = plan(config(tmp_path, *more), processes=2).missing
    assert line == "evaluation.tasks is 1, wanted at least one for each of the 2 processes"


def test_a_missing_extra_is_named(profiled: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentrl.scale.local_engine.importlib.util.find_spec", lambda name: None)
    (line,) = plan(config(tmp_path, "engine.name=vllm")).missing
    assert re.search(r"needs vLLM.*pip install -c constraints-vllm\.txt -e '\.\[vllm\]'", line)


def test_a_silent_server_is_named(profiled: None, tmp_path: Path) -> None:
    pytest.importorskip("httpx2", reason="httpx2 is not installed: pip install httpx2")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        more = ("engine.name=vllm", f"engine.vllm.url={url}", f"engine.vllm.weights_folder={tmp_path}")
        (line,) = plan(config(tmp_path, *more)).missing
    assert f"nothing answers at {url}" in line


def test_a_silent_cluster_is_named(profiled: None, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install -e '.[ray]'")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        silent = f"127.0.0.1:{closed.getsockname()[1]}"
        (line,) = plan(config(tmp_path, "engine.actors=1", f"rollout.ray.address={silent}")).missing
    assert f"nothing answers at {silent}" in line


@pytest.mark.parametrize(
    ("key", "words"), [("env.id=no/Such-v0", "no/Such-v0"), ("env.split=trian", "trian")]
)
def test_an_absent_environment_or_split_is_named(
    key: str, words: str, examples: dict[str, ModuleType], tmp_path: Path
) -> None:
    found = plan(config(tmp_path, key))
    assert any(words in line for line in found.missing), found.missing
    assert amounts(found, "memory")["weights"]


def test_more_cpus_and_gpus_than_a_machine_has_are_named(
    profiled: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    more = ("rollout.ray.cpus=1", "engine.actors=2", "engine.actor_gpus=1")
    found = plan(config(tmp_path, *CLUSTER, *more), processes=2)
    assert found.missing == (
        "CPUs: 8 wanted (8 x 1, rollout.ray.cpus), and 4 found on this machine",
        "GPUs: 4 wanted (4 x 1, engine.actor_gpus), and 0 found on this machine",
    )


def test_a_folder_that_cannot_hold_runs_is_named(profiled: None, tmp_path: Path) -> None:
    found = plan(config(tmp_path, "run.folder=/dev/null/runs"))
    words = "run.folder is '/dev/null/runs', which cannot hold runs: /dev/null is"
    assert any(words in line for line in found.missing), found.missing


def test_too_little_memory_and_disk_are_named(
    profiled: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = namedtuple("free", "available free")(1000, 1000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    memory, disk = plan(config(tmp_path)).missing
    assert re.match(r"memory: at most .* wanted, 1.0 kB free; .*rollout\.max_active", memory)
    assert re.match(r"disk: at most .* wanted, 1.0 kB free", disk)


def test_more_gpus_and_gpu_memory_than_there_are_is_named(
    profiled: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (1000, 2000))
    found = plan(config(tmp_path, "learner.backend=fsdp", "policy.device=cuda"), processes=2)
    gpus, memory = found.missing
    assert gpus == "GPUs: 2 wanted on this machine, one for each process, and 1 found"
    assert re.match(r"GPU memory: at most .* wanted, 1.0 kB free", memory)
    assert set(amounts(found, "memory")) == {"program", "environments"}
    assert amounts(found, "GPU memory")["weights"] == weight_bytes(skeleton(config(tmp_path).policy)) // 2


def test_a_share_of_the_gpu_that_holds_no_sequence_is_named(
    profiled: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (10**12, 3_000_000))
    share = "engine.vllm.gpu_memory_share=0.5"
    found = plan(config(tmp_path, "engine.name=vllm", "policy.device=cuda", share))
    assert amounts(found, "GPU memory")["vLLM"] == 1_500_000
    (line,) = found.missing
    assert re.match(r"engine\.vllm\.gpu_memory_share is 0\.5, wanted room for 1\.7 MB", line)


@pytest.mark.parametrize(
    ("more", "alone", "how"),
    [
        ((), False, "all weights"),
        (("learner.lora.rank=2",), True, r"adapters alone; .* go once: engine\.vllm\.lora=adapter"),
        (
            ("learner.lora.rank=2", "engine.vllm.lora=merged"),
            False,
            r"merged into them: engine\.vllm\.lora=m",
        ),
        (("learner.lora.rank=2", "engine.vllm.url=http://a:1"), False, "merged into them: they go by NCCL"),
    ],
)
def test_a_plan_says_what_vllm_is_sent(tmp_path: Path, more: tuple[str, ...], alone: bool, how: str) -> None:
    pytest.importorskip("peft")
    settings = config(tmp_path, "engine.name=vllm", "policy.dtype=bfloat16", *more)
    size, said = sent_bytes(settings)
    assert re.search(how, said), said
    model = skeleton(settings.policy)
    widths = [
        module.weight.shape for module in model.model.layers.modules() if isinstance(module, torch.nn.Linear)
    ]
    assert size == (2 * 2 * sum(map(sum, widths)) if alone else weight_bytes(model))


def test_processes_that_do_not_fit_the_machines_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="6 processes on 4 nodes: wanted as many on each"):
        plan(config(tmp_path), processes=6, nodes=4)


# The same problems at the start of training.


def test_a_single_problem_is_raised_as_its_own_error(
    examples: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_run(config(tmp_path), 1)
    monkeypatch.setattr(preflight, "provided", lambda **components: frozenset())
    with pytest.raises(RequirementError, match="requires old_logprobs"):
        check_run(config(tmp_path), 1)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"policy\.path is '/nowhere'"):
        check_run(config(tmp_path, "policy.path=/nowhere"), 1)


def test_several_problems_are_raised_together_and_are_those_of_the_plan(
    profiled: None, tmp_path: Path
) -> None:
    settings = config(tmp_path, "env.id=no/Such-v0", "policy.path=/nowhere", "rollout.groups_per_step=3")
    with pytest.raises(ConfigError) as caught:
        check_run(settings, 2)
    planned = plan(settings, processes=2).missing
    lines = str(caught.value).splitlines()
    assert len(lines) == 4
    assert [line for line in planned if not line.startswith("torchrun")] == lines


def test_a_run_that_is_resumed_does_not_complain_of_its_own_folder(
    examples: dict[str, ModuleType], tmp_path: Path
) -> None:
    (tmp_path / "taken").mkdir()
    settings = config(tmp_path, "run.name=taken")
    with pytest.raises(ConfigError, match=r"run\.name is 'taken', but .*taken exists; resume it"):
        check_run(settings, 1)
    check_run(settings, 1, new_folder=False)


# The command.


def test_the_command_prints_a_table_or_json_and_its_exit_code_says_whether_anything_is_missing(
    profiled: None, tmp_path: Path
) -> None:
    arguments = ["plan", *TINY, f"run.folder={tmp_path}"]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    assert "nothing is missing" in shown.output
    assert re.search(r"episodes of a step +12", shown.output)
    printed = CliRunner().invoke(app, [*arguments, "--json", "--processes", "2"])
    assert printed.exit_code == 1
    tree = json.loads(printed.stdout)
    assert tree["missing"] == ["learner.backend is single, wanted fsdp for 2 processes"]
    assert {"section", "what", "amount", "unit", "how"} == set(tree["lines"][0])
    assert list(tmp_path.iterdir()) == []
