"""Diagnostics: what training added to what a policy solves, and what its replies depend on."""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import log
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from shell import ROOT, blocks
from typer.testing import CliRunner

import agentrl
from agentrl.cli import app
from agentrl.data.storage import read_episodes, write_episodes
from agentrl.data.trajectory import Episode, StopReason, Turn
from agentrl.errors import CheckpointError, ConfigError
from agentrl.evaluation.diagnostics.expert_entropy import measure_expert_entropy, spread, summarise_curves
from agentrl.evaluation.diagnostics.information import align, entropy_reduction, prompt_information
from agentrl.evaluation.diagnostics.leash import Play, compare_plays, measure_leash
from agentrl.evaluation.diagnostics.support import Support, answer_entropy, visible_probability
from agentrl.evaluation.diagnostics.teacher_forcing import TextScore, prompts_of, score_texts
from agentrl.evaluation.diagnostics.template_collapse import (
    Pair,
    measure_template_collapse,
    score_pairs,
    thoughts_of,
)
from agentrl.evaluation.report import write_report
from agentrl.evaluation.statistics import pass_at_k
from agentrl.policy.thinking import Ending, Thinking
from agentrl.run.policies import open_saved
from agentrl.run.weights import find_policy

pytestmark = pytest.mark.usefixtures("undrawn")

TINY = (
    "env.id=example/HotCold-v0",
    "evaluation.split=test",
    "evaluation.tasks=4",
    "evaluation.baselines=[]",
    "warm_start.steps=2",
    "warm_start.batch_size=2",
    "warm_start.demonstrations=4",
    "trainer.steps=3",
    "trainer.checkpoint_every=1",
    "trainer.keep_checkpoints=null",
    "trainer.save_episodes_every=2",
    "policy.hidden_size=16",
    "policy.layers=1",
    "policy.heads=1",
    "policy.tokenizer_episodes=2",
    "rollout.groups_per_step=2",
    "rollout.group_size=3",
    "rollout.placement=inline",
)


@pytest.fixture(scope="module")
def finished(examples: dict[str, ModuleType], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    config = agentrl.load_config(None, *TINY, f"run.folder={folder}", "run.name=tiny")
    return agentrl.train(config, quiet=True).folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "tiny"))


def command(*words: object) -> str:
    done = CliRunner().invoke(app, list(map(str, words)), prog_name="agentrl")
    assert done.exit_code == 0, done.output
    return done.output


def refused(*words: object) -> str:
    done = CliRunner().invoke(app, list(map(str, words)), prog_name="agentrl")
    assert done.exit_code == 2, done.output
    assert len(done.stderr.splitlines()) == 1 or "differ in" in done.stderr
    return done.stderr


# The formulas, on the numbers of the reference.


def test_support_has_the_rates_of_the_reference() -> None:
    found = Support(kept=2400, gained=36, lost=163).to_dict()
    rates = {name: round(found[name], 6) for name in ("SRR", "NDR", "SDS", "NSCR")}
    assert rates == {"SRR": 0.936403, "NDR": 0.014778, "SDS": 0.029097, "NSCR": -0.048865}
    assert round(visible_probability(4096), 6) == 0.000731
    assert [round(pass_at_k(16, 3, k), 6) for k in (1, 2, 4, 8, 16)] == [0.1875, 0.35, 0.607143, 0.9, 1.0]


def test_support_of_nothing_has_no_rates_and_disjoint_support_is_all_new() -> None:
    assert set(Support(0, 0, 0).to_dict().values()) == {0, None}
    apart = Support(0, 2, 3)
    assert (apart.retention, apart.discovery, apart.balance, apart.change) == (0, 1, 0, pytest.approx(-0.2))
    assert Support(0, 0, 3).balance is None


def test_the_entropy_of_answers_is_that_of_their_shares() -> None:
    assert answer_entropy(["a"] * 4) == 0.0
    assert answer_entropy(list("abcd")) == pytest.approx(log(4))


def test_the_reduction_of_entropy_is_that_of_the_reference() -> None:
    found = entropy_reduction([2.5, 2.1, 1.5, 0.8, 0.3])
    assert found.gains == pytest.approx((0.4, 0.6, 0.7, 0.5))
    assert (found.slope, found.decreasing, found.total) == (pytest.approx(-0.57), 1.0, pytest.approx(2.2))
    with pytest.raises(ValueError, match="wanted at least 2"):
        entropy_reduction([1.0])


def test_aligned_curves_keep_their_ends_and_never_leave_their_range() -> None:
    steep = align([5.0, 0.0, 0.0, 4.0, 0.0], 101)
    assert (steep[0], steep[-1], len(steep)) == (5.0, 0.0, 101)
    assert steep.min() >= 0.0
    assert steep.max() <= 5.0
    assert align([1.0, 2.0, 4.0], 3).tolist() == pytest.approx([1.0, 2.0, 4.0])


def test_the_information_of_prompts_is_that_of_the_reference() -> None:
    found = prompt_information(np.array([[-4.0, -10.0], [-12.0, -6.0]]), [4, 4])
    assert found.mutual_information == pytest.approx(0.690671, abs=1e-6)
    assert found.conditional_entropy == pytest.approx(5)
    assert found.marginal_entropy == pytest.approx(5.690671, abs=1e-6)
    assert found.per_token_released == pytest.approx(0.491734, abs=1e-6)
    assert found.per_token == pytest.approx(0.172668, abs=1e-6)
    assert found.z_score == pytest.approx(1.959099, abs=1e-6)
    assert (found.retrieval_accuracy, found.chance) == (1.0, 0.5)


def test_a_template_says_nothing_about_its_prompt_and_a_copy_says_all() -> None:
    template = prompt_information(np.full((8, 8), -6.0), [3] * 8)
    assert template.mutual_information == pytest.approx(0.0, abs=1e-12)
    assert template.conditional_entropy == 6.0
    copy = prompt_information(np.where(np.eye(8) > 0, -1.0, -500.0), [3] * 8)
    assert copy.mutual_information == pytest.approx(log(8))


def test_identical_prompts_count_as_one_in_the_retrieval() -> None:
    scores = np.array([[-1.0, -1.0, -9.0], [-2.0, -2.0, -9.0], [-9.0, -9.0, -1.0]])
    assert prompt_information(scores, [1, 1, 1]).retrieval_accuracy == pytest.approx(2 / 3)
    merged = prompt_information(scores, [1, 1, 1], [0, 0, 1])
    assert (merged.retrieval_accuracy, merged.chance) == (1.0, pytest.approx(5 / 9))
    with pytest.raises(ValueError, match="for 2 replies"):
        prompt_information(scores, [1, 1])


# Scores of texts.


def test_a_text_is_scored_as_one_forward_pass_after_another_would(finished: Path) -> None:
    saved = find_policy(finished)
    assert saved is not None
    model = open_saved(saved, saved.run.config).model.requires_grad_(False)
    pairs = [((1, 2, 3), (4, 5)), ((7,), (8, 9, 10)), ((3, 3, 3, 3), (1,))]
    for tokens in (1, 9, 1000):
        for (prompt, text), score in zip(pairs, score_texts(model, pairs, tokens), strict=True):
            for place, token in enumerate(text):
                read = torch.tensor([[*prompt, *text[:place]]])
                states = model.base_model(input_ids=read[0][None], **_plain(read)).last_hidden_state
                logprobs = (states[0, -1] @ model.get_output_embeddings().weight.T).log_softmax(-1)
                assert score.logprobs[place] == pytest.approx(float(logprobs[token]), abs=1e-5)
                entropy = float(-(logprobs.exp() * logprobs).sum())
                assert score.entropies[place] == pytest.approx(entropy, abs=1e-5)


def _plain(read: torch.Tensor) -> Mapping[str, Any]:
    from agentrl.policy.attention import packed_layout

    return {
        "position_ids": torch.arange(read.shape[1])[None],
        "attention_mask": read.new_empty(0, dtype=torch.bool).view(1, 1, 0, 0),
        "use_cache": False,
        "layout": packed_layout(torch.tensor([read.shape[1]]), read.device),
    }


def episode(*turns: Turn, name: str = "e", success: bool = False) -> Episode:
    return Episode(name, "env", "task", 0, turns, StopReason.TERMINATED, success=success)


def test_a_prompt_is_all_that_was_read_before_the_reply() -> None:
    first = Turn("", "", prompt_ids=(1, 2), action_ids=(3,), new_sequence=True)
    second = Turn("", "", prompt_ids=(4,), action_ids=(5, 6))
    anew = Turn("", "", prompt_ids=(7, 8), action_ids=(9,), new_sequence=True)
    assert prompts_of(episode(first, second, anew)) == [(1, 2), (1, 2, 3, 4), (7, 8)]


def test_thoughts_end_where_their_ending_does() -> None:
    thinking = Thinking((), Ending("</t>", {1: "</", 2: "t>"}), (1, 2), {"": ()})
    assert thoughts_of((5, 6, 1, 2, 9), thinking) == (5, 6, 1, 2)
    assert thoughts_of((5, 6, 9), thinking) == ()
    assert thoughts_of((5, 6, 9), None) == ()


# The leash.


def plays(outcomes: str, answers: str) -> list[Play]:
    return [Play(outcome == "+", answer) for outcome, answer in zip(outcomes, answers, strict=True)]


def test_the_first_k_plays_say_what_is_kept_gained_and_lost() -> None:
    base = {"a": plays("+-+", "xyz"), "b": plays("--+", "xyx"), "c": plays("-+", "xy")}
    trained = {"a": plays("++-", "xxy"), "b": plays("-+-", "xwx"), "c": plays("+++", "xyz")}
    found = compare_plays({"base": base, "trained": trained}, {"base": 0.5, "trained": None}, 2)
    assert (found["tasks"], found["left_out"]) == (3, 0)
    tasks, solutions = found["support"]["tasks"], found["support"]["solutions"]
    assert [tasks[name] for name in ("kept", "gained", "lost")] == [2, 1, 0]
    assert [solutions[name] for name in ("kept", "gained", "lost")] == [2, 2, 0]  # a-x and c-y; b-w and c-x
    expected = (pass_at_k(3, 2, 2) + pass_at_k(3, 1, 2) + pass_at_k(2, 1, 2)) / 3
    assert found["policies"]["base"]["pass_at"]["2"]["mean"] == pytest.approx(expected)
    assert found["policies"]["trained"]["answer_entropy"] == pytest.approx(2 * log(2) / 3)
    three = compare_plays({"base": base, "trained": trained}, {"base": 0.5, "trained": None}, 3)
    assert (three["tasks"], three["left_out"]) == (2, 1)  # aborted plays are missed
    assert list(three["policies"]["base"]["pass_at"]) == ["1", "2", "3"]
    nothing = compare_plays({"base": {}, "trained": {}}, {"base": None, "trained": None}, 2)
    assert nothing["policies"]["base"]["answer_entropy"] is None


def leash(run: Path, output: Path | None = None, **options: Any) -> tuple[Any, dict[str, Any]]:
    base = run / "checkpoints" / "train-000002"
    given = {"repeats": 4, "tasks": 3, "envs": ["example/HotCold-v0"], "split": "test"} | options
    return measure_leash(run, base, output=output, **given)


def test_a_leash_goes_on_and_its_figure_is_in_the_report(run: Path) -> None:
    stopped: list[Episode] = []

    def stop(found: Episode) -> None:
        stopped.append(found)
        if len(stopped) == 7:
            raise KeyboardInterrupt

    folder = run / "leash"
    with pytest.raises(KeyboardInterrupt):
        leash(run, folder, on_episode=stop)
    again: list[Episode] = []
    results, numbers = leash(run, folder, on_episode=again.append)
    assert 12 <= len(again) < 24
    _, whole = leash(run)
    for name, own in whole["panels"]["example/HotCold-v0"]["policies"].items():
        # Floating-point sums depend on which episodes are played side by side.
        mine = numbers["panels"]["example/HotCold-v0"]["policies"][name]
        assert mine["token_entropy"] == pytest.approx(own.pop("token_entropy"), abs=1e-5)
        assert {**mine, "token_entropy": None} == {**own, "token_entropy": None}
    panel = numbers["panels"]["example/HotCold-v0"]
    assert panel["support"] == whole["panels"]["example/HotCold-v0"]["support"]
    assert json.loads((folder / "leash.json").read_text()) == json.loads(json.dumps(numbers))
    for name, own in panel["policies"].items():
        scores = results.scores[name][0].evaluation
        assert own["pass_at"]["1"]["mean"] == pytest.approx(scores.success.success_rate)
        assert own["token_entropy"] == scores.entropy.token
        assert own["answer_entropy"] > 0
    assert (folder / "leash.svg").read_text().startswith("<?xml")
    assert "| pass@4 % |" in (folder / "leash.md").read_text()
    page = write_report(run).read_text()
    assert "Support of the trained policy and its base, 4 plays of each task" in page
    solved = read_episodes(next(folder.glob("episodes/*/*.parquet")))
    assert len(solved) == 12


def test_a_policy_is_compared_with_itself_and_nothing_is_gained_or_lost(run: Path) -> None:
    copy = shutil.copytree(run, run.parent / "copy")
    base, same = copy / "checkpoints/train-000003", run / "checkpoints/train-000003"
    _, numbers = measure_leash(same, base, repeats=4, tasks=4)
    (panel,) = numbers["panels"].values()
    for support in panel["support"].values():
        assert (support["gained"], support["lost"]) == (0, 0)
    one, other = panel["policies"].values()
    assert one == other


def test_unlike_prompts_and_unlike_settings_are_refused_before_a_game(run: Path) -> None:
    copy = shutil.copytree(run, run.parent / "copy")
    config = (copy / "config.yaml").read_text()
    assert "max_observation_tokens:" in config
    (copy / "config.yaml").write_text(
        re.sub(r"max_observation_tokens: \w+", "max_observation_tokens: 7", config)
    )
    with pytest.raises(ConfigError, match=r"cannot be compared.*\n.*policy\.max_observation_tokens"):
        measure_leash(run, copy, repeats=2, tasks=2)


def test_an_unlike_panel_is_refused(run: Path) -> None:
    folder = run / "leash"
    leash(run, folder, repeats=2, tasks=2)
    with pytest.raises(ConfigError, match="other settings"):
        leash(run, folder, repeats=2, tasks=3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--against", "random", "--repeats", "4", "--k", "5"),
            "--k is 5, wanted at most --repeats, which is 4",
        ),
        (("--against", "random"), "--repeats is 1, wanted at least 2 with --against"),
        (("--against", "random", "--repeats", "4", "--greedy"), "wanted --sampled in place of --greedy"),
        (("--against", "random", "--policy", "expert", "--repeats", "4"), "wanted one --policy"),
        (("--repeats", "4", "--k", "2"), "--k: wanted with --against only"),
    ],
)
def test_what_cannot_be_compared_is_refused(run: Path, words: Sequence[str], message: str) -> None:
    assert message in refused("evaluate", "--policy", run, *words)


def test_a_checkpoint_that_is_not_there_is_refused_with_those_that_are(run: Path) -> None:
    said = refused("evaluate", "--policy", run, "--against", run / "checkpoints/train-000009", "--repeats", 2)
    assert "there is no train-000009; the run has kept warm_start-000001" in said


# The entropy of the expert's last action.


def test_the_entropy_of_the_last_action_falls_where_the_game_tells_it(run: Path) -> None:
    found = measure_expert_entropy(run, episodes=3)
    outcomes = found["outcomes"]
    measured = sum(own["episodes"] for own in outcomes.values())
    assert (found["checkpoint"], found["episodes"]) == ("trained", "trained-sampled.parquet")
    assert 0 < measured <= 3
    known = next(own for own in outcomes.values() if own["episodes"])
    assert known["total"] == pytest.approx(known["first"] - known["last"])
    assert (known["curve"][0], known["curve"][-1]) == (
        pytest.approx(known["first"]),
        pytest.approx(known["last"]),
    )
    assert 0 < known["first"] <= log(4096)
    other = measure_expert_entropy(run, episodes=3, checkpoint="2")
    assert other["checkpoint"] == "train-000002"


def test_curves_are_summed_up_by_their_means() -> None:
    found = summarise_curves([[2.0, 1.0], [4.0, 2.0, 1.0]])
    assert (found["episodes"], found["first"], found["last"], found["total"]) == (2, 3.0, 1.0, 2.0)
    assert (found["slope"], found["decreasing"]) == (-1.25, 1.0)
    assert (found["curve"][0], found["curve"][-1]) == (3.0, 1.0)
    assert found["band"][-1] == [1.0, 1.0]
    assert summarise_curves([])["curve"] == []
    assert [each.id for each in spread([episode(name=str(n)) for n in range(6)], 3)] == ["0", "2", "4"]


def test_an_environment_without_an_expert_is_refused(run: Path, examples: dict[str, ModuleType]) -> None:
    hotcold = examples["hotcold"].HotCold
    expert = hotcold.expert
    del hotcold.expert
    try:
        said = refused("report", run, "--expert-entropy")
    finally:
        hotcold.expert = expert
    assert "example/HotCold-v0: has no expert" in said


def test_episodes_of_one_turn_have_no_entropy_along_turns(run: Path) -> None:
    path = run / "episodes" / "trained-sampled.parquet"
    write_episodes(path, [replace(each, turns=each.turns[:1]) for each in read_episodes(path)])
    with pytest.raises(CheckpointError, match="no episode has two turns"):
        measure_expert_entropy(run)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"trained-sampled\.parquet: missing; a run stores"):
        measure_expert_entropy(run)


# Template collapse.


def test_every_checkpoint_is_measured_and_the_report_shows_it(run: Path) -> None:
    said = command("report", run, "--template-collapse", "--expert-entropy", "--sample", 6)
    assert "retrieval %" in said
    assert "decreasing steps" in said
    tree = json.loads((run / "diagnostics" / "template_collapse.json").read_text())
    assert [(each["checkpoint"], each["step"], each["episodes"]) for each in tree["policies"]] == [
        ("train-000001", 1, "train-000002.parquet"),
        ("train-000002", 2, "train-000002.parquet"),
        ("train-000003", 3, "train-000002.parquet"),
    ]
    for each in tree["policies"]:
        difference = each["marginal_entropy"] - each["conditional_entropy"]
        assert each["mutual_information"] == pytest.approx(difference)
        assert each["mutual_information"] <= each["most"] == pytest.approx(log(each["pairs"]))
        assert each["pairs"] == 6
        assert each["with_thoughts"] == 0
    assert "Z is the whole reply, since no reply holds thoughts" in said.replace("\n", " ")
    page = (run / "report.html").read_text()
    assert "Mutual information of prompts X and replies Z" in page
    assert "Entropy of the expert&#39;s last action along the turns" in page
    for name in ("template_collapse", "expert_entropy"):
        assert (run / "diagnostics" / f"{name}.svg").is_file()
        assert (run / "diagnostics" / f"{name}.md").is_file()


def test_scores_are_those_of_the_replies_after_every_prompt(run: Path) -> None:
    found = measure_template_collapse(run, pairs=5, checkpoint="3")
    (numbers,) = found["policies"]
    again = measure_template_collapse(run, pairs=5, checkpoint="train-000003")
    assert again == found  # drawn by the seed alone
    assert measure_template_collapse(run, pairs=5, checkpoint="3", seed=1) != found
    assert 0 < numbers["conditional_entropy"] < 100


def test_a_row_is_a_reply_and_a_column_a_prompt(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = find_policy(finished)
    assert saved is not None
    policy = open_saved(saved, saved.run.config)
    table = {((1,), (5,)): -4.0, ((2,), (5,)): -10.0, ((1,), (6, 7)): -12.0, ((2,), (6, 7)): -6.0}

    def look_up(model: Any, pairs: Any) -> Any:
        return (TextScore((table[pair] / 2,) * 2, ()) for pair in pairs)

    monkeypatch.setattr("agentrl.evaluation.diagnostics.template_collapse.score_texts", look_up)
    first, second = Pair((1,), (5,), False), Pair((2,), (6, 7), True)
    found = score_pairs(policy, [first, second])
    assert found["mutual_information"] == pytest.approx(0.690671, abs=1e-6)
    assert (found["pairs"], found["prompts"], found["with_thoughts"]) == (2, 2, 1)
    assert found["most"] == pytest.approx(log(2))
    both = score_pairs(policy, [first, second, first])
    assert (both["prompts"], both["retrieval_accuracy"]) == (2, 1.0)


def test_runs_that_have_nothing_to_measure_are_refused(run: Path) -> None:
    assert "wanted with --template-collapse or" in refused("report", run, "--checkpoint", "3")
    assert "there is no train-000009" in refused("report", run, "--template-collapse", "--checkpoint", 9)
    shutil.rmtree(run / "model")
    shutil.rmtree(run / "checkpoints")
    for option in ("--template-collapse", "--expert-entropy"):
        assert "has no checkpoint yet" in refused("report", run, option)


def test_a_run_without_episodes_is_refused(run: Path) -> None:
    for path in (run / "episodes").glob("*.parquet"):
        path.unlink()
    assert "holds no episodes of training" in refused("report", run, "--template-collapse")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"policies": [{"step": "x"}]}'])
def test_a_damaged_file_is_named_by_the_report(run: Path, text: str) -> None:
    path = run / "diagnostics" / "template_collapse.json"
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(CheckpointError, match=r"template_collapse\.json: damaged"):
        write_report(run)


# The document.


DOCUMENTED = [
    line
    for line in (line for block in blocks((ROOT / "docs" / "evaluation.md").read_text()) for line in block)
    if "--against" in line or line.startswith("agentrl report")
]


def test_the_document_names_each_diagnostic() -> None:
    text = "\n".join(DOCUMENTED)
    assert all(option in text for option in ("--against", "--template-collapse", "--expert-entropy"))


@pytest.mark.parametrize("line", DOCUMENTED)
def test_a_command_of_the_document_runs_as_it_is_written(
    line: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.parent)
    (run.parent / "runs").mkdir()
    run.rename(run.parent / "runs" / "NAME")
    smaller = line.replace("--repeats 256", "--repeats 2").replace("train-000100", "train-000002")
    command(*smaller.replace("--checkpoint 100", "--checkpoint 2").split()[1:])
