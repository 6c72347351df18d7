"""A model on a chat server: prompts, concurrency, failures, and where the key and the URL go."""

import gc
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from chat_servers import Call, ChatServer, chat_server
from typer.testing import CliRunner

pytest.importorskip("openai")

import agentrl
from agentrl.cli import app
from agentrl.data.trajectory import Episode, StopReason
from agentrl.errors import AgentRLError, ConfigError, MissingDependencyError, TooManyAbortedError
from agentrl.evaluation.scores import Evaluation
from agentrl.run.settings import RunConfig, load_config
from agentrl.scale import chat_client

pytestmark = pytest.mark.usefixtures("examples")
KEY = "sk-secret-of-the-test-0123456789"
PANEL = {"env": "example/HotCold-v0", "split": "test"}


@pytest.fixture(autouse=True)
def _caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_client, "_FIRST_WAIT", 0.002)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def guess(call: Call) -> str:
    """Return the next number of a search by halves, from the messages of a dialogue."""
    low, high = 0, 0
    for message in call.body["messages"]:
        words = message["content"].split()
        if "from" in words:
            low, high = int(words[-3]), int(words[-1])
        elif message["role"] == "assistant":
            said = int(words[0])
        elif words == ["higher"]:
            low = said + 1
        elif words == ["lower"]:
            high = said - 1
    return str((low + high) // 2)


def play_well(call: Call) -> None:
    call.say("ready" if call.number == 0 else guess(call))


def evaluated(
    server: ChatServer, *overrides: str, tasks: int = 4, **arguments: Any
) -> tuple[Evaluation, list[Episode]]:
    episodes: list[Episode] = []
    result = agentrl.evaluate(
        "openai:some-model",
        **PANEL,
        tasks=tasks,
        overrides=overrides,
        base_url=server.url,
        placement="inline",
        on_episode=episodes.append,
        **arguments,
    )
    return result, episodes


def test_a_model_on_a_server_plays_and_its_requests_and_tokens_are_counted() -> None:
    with chat_server(play_well) as server:
        result, episodes = evaluated(server)
    turns = [turn for episode in episodes for turn in episode.turns]
    assert (result.success.success_rate, result.aborted) == (1.0, 0)
    assert all(turn.valid and turn.temperature == 1.0 and turn.finish == "stop" for turn in turns)
    asked = len(turns) + 1  # and the first request
    assert result.usage == {
        "requests": asked,
        "retries": 0,
        "prompt_tokens": 10 * asked,
        "completion_tokens": 2 * asked,
        "uncounted": 0,
    }
    assert result.to_dict()["usage"] == result.usage
    assert "usage" not in agentrl.evaluate("random", **PANEL, tasks=1).to_dict()


def test_every_request_has_a_seed_of_its_own_which_the_next_evaluation_repeats() -> None:
    sent = []
    for seed in (0, 0, 1):
        with chat_server(play_well) as server:
            evaluated(server, seed=seed, temperature=0.0)
        assert {call.body["temperature"] for call in server.calls} == {0.0}
        sent.append(sorted(call.body["seed"] for call in server.calls[1:]))
    assert sent[0] == sent[1] != sent[2]
    assert len(set(sent[0])) == len(sent[0])


def test_the_keys_of_prompts_decide_the_messages() -> None:
    keys = ("policy.prompt=literature", "policy.system_message=Be brief.", "rollout.max_turns=2")
    with chat_server(lambda call: call.say("<action>no</action>")) as server:
        _, episodes = evaluated(server, *keys, "policy.reply=action_tags", tasks=1)
    first, second = server.calls[1].body["messages"], server.calls[2].body["messages"]
    assert [message["role"] for message in second] == ["system", "user"]
    assert first[0]["content"] == "Be brief."
    assert "Steps taken so far: 1 of at most 2" in second[1]["content"]
    assert "<action>" in second[1]["content"]
    assert [turn.action for turn in episodes[0].turns] == ["no", "no"]


def test_a_growing_dialogue_repeats_the_replies_as_they_were_given() -> None:
    with chat_server(lambda call: call.say(" no\n")) as server:
        evaluated(server, "rollout.max_turns=2", tasks=1)
    (user, assistant, answer) = server.calls[2].body["messages"]
    assert user["content"].startswith("You act in a text environment")
    assert assistant == {"role": "assistant", "content": " no\n"}
    assert answer == {"role": "user", "content": "say a number from 0 to 14"}


def test_a_command_that_is_not_admissible_is_an_invalid_turn_of_free_text(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with chat_server(lambda call: call.say("north")) as server, caplog.at_level("INFO", "agentrl"):
        result, (episode,) = evaluated(server, "rollout.constrained=true", tasks=1)
    assert "openai:some-model replies in free text" in caplog.text
    assert [turn.action for turn in episode.turns] == ["north"] * 4
    assert "say a number" in episode.turns[1].observation
    assert (result.success.success_rate, result.aborted) == (0.0, 0)


@pytest.mark.parametrize(
    ("content", "finish"), [("1", "length"), (None, "length"), (None, "stop"), ("", "stop")]
)
def test_a_reply_that_is_cut_off_or_empty_is_an_invalid_turn(content: str | None, finish: str) -> None:
    with chat_server(lambda call: call.say(content, finish)) as server:
        result, (episode,) = evaluated(server, tasks=1)
    assert [(turn.valid, turn.finish) for turn in episode.turns] == [(False, finish)] * 4
    assert [turn.action for turn in episode.turns] == [content or ""] * 4
    assert (result.success.success_rate, result.aborted) == (0.0, 0)


def test_requests_of_many_episodes_are_in_flight_at_once() -> None:
    together = threading.Barrier(6, timeout=20)

    def behave(call: Call) -> None:
        if call.number and len(call.body["messages"]) == 1:
            together.wait()  # passes only when six first turns have arrived
        play_well(call)

    with chat_server(behave) as server:
        result, _ = evaluated(server, "rollout.max_active=6", tasks=6)
    assert (result.success.success_rate, result.success.episodes) == (1.0, 6)


def test_an_episode_whose_request_hangs_does_not_hold_up_the_others() -> None:
    others = threading.Semaphore(0)

    def behave(call: Call) -> None:
        if call.number == 1:
            for _ in range(3):
                assert others.acquire(timeout=20)  # the three other episodes have ended
        play_well(call)

    with chat_server(behave) as server:
        episodes: list[str] = []

        def ended(episode: Episode) -> None:
            episodes.append(episode.id)
            others.release()

        agentrl.evaluate("openai:m", **PANEL, tasks=4, base_url=server.url, on_episode=ended)
    assert len(episodes) == 4


@pytest.mark.parametrize(
    ("misbehave", "error"),
    [
        (Call.hang, "no complete answer within 0.5 s"),
        (Call.break_off, "the connection failed"),
        (lambda call: call.send("garbage"), "no chat completion"),
        (lambda call: call.send('{"choices": []}'), "no chat completion (choices"),
        (lambda call: call.send(b" " * (chat_client.MAX_BODY_BYTES + 1)), "exceeds 4,194,304 bytes"),
        (lambda call: call.refuse(429, "slow down"), "429: slow down"),
        (lambda call: call.refuse(503, KEY), "503: [key]"),
        (lambda call: call.refuse(400, "no such thing"), "400: no such thing"),
    ],
)
def test_a_failure_that_outlasts_the_retries_aborts_its_episode_alone(misbehave: Any, error: str) -> None:
    seeds: set[int] = set()

    def behave(call: Call) -> None:
        if call.number == 1:
            seeds.add(call.body["seed"])
        misbehave(call) if call.body["seed"] in seeds else play_well(call)

    with chat_server(behave) as server:
        keys = ("engine.endpoint.retries=1", "engine.endpoint.timeout=0.5", "rollout.max_aborted_share=0.5")
        result, episodes = evaluated(server, *keys, "rollout.max_active=2", tasks=3)
    (aborted,) = (episode for episode in episodes if episode.stop.aborted)
    assert (aborted.stop, aborted.success, aborted.turns) == (StopReason.ENGINE_ERROR, False, ())
    assert error in str(aborted.error)
    assert KEY not in repr(episodes)
    assert (result.aborted, result.success.episodes, result.success.success_rate) == (1, 2, 1.0)


def test_above_the_failure_limit_the_evaluation_stops_and_names_the_reasons() -> None:
    with chat_server(lambda call: call.refuse(500, "broken") if call.number else call.say("ok")) as server:
        keys = ("engine.endpoint.retries=0", "rollout.max_aborted_share=0.25", "rollout.max_active=1")
        with pytest.raises(
            TooManyAbortedError, match=r"3 episodes .* more than 2 allowed:\n3 x .*500: broken"
        ):
            evaluated(server, *keys, tasks=8)
        assert len(server.calls) == 4


def test_a_full_context_is_the_policy_s_own_failure() -> None:
    def behave(call: Call) -> None:
        full = len(call.body["messages"]) > 1
        call.refuse(400, code="context_length_exceeded") if full else call.say("no")

    with chat_server(behave) as server:
        result, _ = evaluated(server, tasks=2)
    assert (result.stop_reasons, result.success.success_rate) == ({"context_limit": 2}, 0.0)


@pytest.mark.parametrize(
    ("status", "hint"),
    [(401, "is OPENAI_API_KEY right"), (403, "is OPENAI_API_KEY right"), (404, "ends in /v1"), (400, "no")],
)
def test_a_wrong_key_or_model_is_one_error_before_any_episode(status: int, hint: str) -> None:
    with chat_server(lambda call: call.refuse(status, f"not {KEY}")) as server:
        with pytest.raises(
            ConfigError, match=rf"openai:some-model at http://127\.0\.0\.1.*{status}: not .*"
        ) as e:
            evaluated(server)
        assert hint in str(e.value)
        assert KEY not in str(e.value)
        assert len(server.calls) == 1


def test_a_server_that_is_not_there_is_one_error_that_names_it() -> None:
    with pytest.raises(
        AgentRLError, match=r"openai:m at http://127.0.0.1:9: the connection failed .*2 requests"
    ):
        agentrl.evaluate(
            "openai:m", **PANEL, base_url="http://127.0.0.1:9/v1", overrides=["engine.endpoint.retries=1"]
        )


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (None, "names no server: give --base-url, or set OPENAI_BASE_URL"),
        ("http://user:hunter22@host/v1", "--base-url holds a user name or a password"),
        ("host:80", "--base-url is no address"),
        ("ftp://host/v1", "--base-url is no address"),
        ("http://host/v1?key=hunter22", "--base-url is no address"),
        ("http://host:port/v1", "--base-url is no URL"),
    ],
)
def test_an_address_is_wanted_and_never_repeated(
    url: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ConfigError) as caught:
        agentrl.evaluate("openai:m", **PANEL, base_url=url)
    assert message in str(caught.value)
    assert "hunter22" not in str(caught.value)


def test_a_key_that_no_header_may_hold_is_refused_unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk secret")
    with pytest.raises(ConfigError, match="OPENAI_API_KEY holds a character") as caught:
        agentrl.evaluate("openai:m", **PANEL, base_url="http://127.0.0.1:9/v1")
    assert "secret" not in str(caught.value)


def test_the_environment_names_the_server_too(monkeypatch: pytest.MonkeyPatch) -> None:
    with chat_server(play_well) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        monkeypatch.delenv("OPENAI_API_KEY")
        assert agentrl.evaluate("openai:m", **PANEL, tasks=1).success.success_rate == 1.0
    assert {call.headers["Authorization"] for call in server.calls} == {"Bearer none"}


@pytest.mark.parametrize("key", ["policy.revision=main", "policy.chat_template=x.jinja"])
def test_what_the_server_decides_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key.split('=')[0]} is .* the server of openai:m decides it"):
        agentrl.evaluate("openai:m", **PANEL, base_url="http://127.0.0.1:9/v1", overrides=[key])


def test_tool_calls_are_refused_before_the_server_is_asked() -> None:
    with chat_server(play_well) as server:
        with pytest.raises(
            ConfigError, match=r"policy\.reply is 'tool_call', wanted one of plain, .* chat server"
        ):
            evaluated(server, "policy.reply=tool_call")
        assert server.calls == []


def test_a_base_url_is_for_no_other_policy() -> None:
    with pytest.raises(ConfigError, match="--base-url is for a policy openai:MODEL, not for random"):
        agentrl.evaluate("random", **PANEL, base_url="http://127.0.0.1:9/v1")


def test_a_model_on_a_server_is_not_trained() -> None:
    from agentrl.policy.sources import resolve

    config = load_config(None, "policy.path=openai:org/name")
    assert config.policy.max_observation_tokens is None
    assert not config.rollout.constrained
    assert (config.policy.dtype, config.learner) == (RunConfig().policy.dtype, RunConfig().learner)
    assert load_config(None, "policy.path=openai:m", "policy.reply=think_action").engine.max_tokens == 512
    with pytest.raises(
        ConfigError, match=r"can only be evaluated: agentrl evaluate --policy openai:org/name"
    ):
        resolve("openai:org/name")


def test_without_the_client_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentrl.scale.endpoint.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"openai:m needs the openai client: .*\[openai\]"):
        agentrl.evaluate("openai:m", **PANEL, base_url="http://127.0.0.1:9/v1")


def test_several_policies_and_panels_share_a_server_and_count_apart(tmp_path: Path) -> None:
    policies, again = ["random", "openai:m"], {"envs": [PANEL["env"]], "split": "test", "tasks": 2}
    keys = {"overrides": ["rollout.constrained=true"], "placement": "inline", "output": tmp_path / "out"}
    with chat_server(play_well) as server:
        found = agentrl.evaluate_panels(policies, **again, **keys, base_url=server.url)
        asked = len(server.calls)
        agentrl.evaluate_panels(policies, **again, **keys, base_url=server.url)
        assert len(server.calls) == asked  # nothing was left to play
    (played,) = found.scores["openai:m"]
    assert played.evaluation is not None
    assert played.evaluation.success.success_rate == 1.0
    assert played.evaluation.usage is not None
    assert played.evaluation.usage["requests"] == asked - 1  # but for the first request
    assert any("openai:m: server: " in note for note in found.notes)
    fingerprint = played.evaluation.fingerprint
    assert fingerprint is not None
    unknown = dict.fromkeys(("revision", "checkpoint", "weights"))
    assert fingerprint["policy"] == {"name": "openai:m", "model": "m"} | unknown
    assert (fingerprint["dtype"], fingerprint["decoding"]["constrained"]) == (None, False)
    assert len(fingerprint["prompt"]["wording"]) == 64
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or (KEY.encode() not in path.read_bytes())
        assert not path.is_file() or (server.url.encode() not in path.read_bytes())
    with pytest.raises(ConfigError, match="--base-url is for a policy openai:MODEL, not for random"):
        agentrl.evaluate_panels(["random"], **again, base_url=server.url)


def shown(arguments: list[str], *, code: int = 0) -> str:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == code, result.output
    return result.output


def test_nothing_that_the_command_writes_or_prints_holds_the_key_or_the_address(tmp_path: Path) -> None:
    def behave(call: Call) -> None:
        call.refuse(500, KEY) if call.number % 5 == 4 else call.say(f"{KEY} {call.headers['Authorization']}")

    with chat_server(behave) as server:
        scores = tmp_path / "scores.json"
        panel = ["--env", PANEL["env"], "--split", "test", "--tasks", "5"]
        keys = ["engine.endpoint.retries=1", "rollout.max_aborted_share=1", "-v"]
        options = [*panel, "--base-url", server.url, "--output", str(scores), *keys]
        output = shown(["evaluate", "--policy", "openai:m", *options])
        refused = shown(
            ["evaluate", "--policy", "openai:m", *options, "policy.revision=a", "--debug"], code=2
        )
        server.behave = lambda call: call.refuse(401, KEY)
        wrong = shown(["evaluate", "--policy", "openai:m", *options, "--debug"], code=2)
    assert "server: " in output
    assert "per episode" in output
    assert json.loads(scores.read_text())["usage"]["requests"] > 5
    assert "Traceback" in wrong
    for text in (
        output,
        refused,
        wrong,
        *(path.read_text() for path in tmp_path.rglob("*") if path.is_file()),
    ):
        assert KEY not in text
        assert server.url not in text


def test_the_thread_of_a_player_ends_with_it() -> None:
    def threads() -> int:
        return sum(thread.name == "endpoint" for thread in threading.enumerate())

    gc.collect()
    for thread in threading.enumerate():
        if thread.name == "endpoint":
            thread.join(10)
    assert threads() == 0
    with chat_server(play_well) as server:
        evaluated(server, tasks=1)
        gc.collect()
        for thread in threading.enumerate():
            if thread.name == "endpoint":
                thread.join(10)
    assert threads() == 0
