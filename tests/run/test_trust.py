"""A run's folder may come from someone else: nothing in it is started, imported, contacted or unlocked."""

import json
import os
import shlex
import shutil
import socket
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from locked_door import ENV, Door
from typer.testing import CliRunner

import agentrl
from agentrl.cli import app
from agentrl.config import key_of, read_yaml, to_yaml
from agentrl.env.panel import Panel
from agentrl.errors import AgentRLError, CheckpointError, ConfigError
from agentrl.evaluation.panel_lists import configured_panels
from agentrl.evaluation.report import write_report
from agentrl.policy.chat import check_arguments
from agentrl.policy.model import load_policy
from agentrl.run.settings import RunConfig, config_from_tree, config_tree, load_config
from agentrl.run.trust import CALLER_ONLY_KEYS, caller_only_values, check_confirmed, drop_caller_only_values
from agentrl.study.runs import StudyRun

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    config = load_config(
        None,
        *(f"env.id={ENV}", f"run.folder={folder}", "run.name=mine", "warm_start.steps=0", "trainer.steps=1"),
        *("rollout.groups_per_step=1", "rollout.group_size=2", "policy.tokenizer_episodes=2"),
        *("policy.hidden_size=32", "policy.heads=1", "policy.vocab_size=300", "evaluation.split=test"),
        *("evaluation.tasks=2", "evaluation.baselines=[]", "rollout.placement=inline"),
    )
    return agentrl.train(config, quiet=True).folder


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """Somebody's address, and who knocked there."""
    knocks: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def wait() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                knocks.append("knock")
                connection.close()

        threading.Thread(target=wait, daemon=True).start()
        yield f"127.0.0.1:{listening.getsockname()[1]}", knocks


@pytest.fixture
def program(tmp_path: Path) -> tuple[Path, Path]:
    """A program that leaves a mark, and the mark."""
    path, mark = tmp_path / "program", tmp_path / "started"
    path.write_text(f'#!/bin/sh\ntouch {mark}\nexec {sys.executable} "$@"\n')
    path.chmod(0o755)
    return path, mark


def altered(trained: Path, folder: Path, **blocks: Any) -> Path:
    """A copy of a run with other values: `rollout__workers__interpreter=...`."""
    shutil.copytree(trained, folder)
    tree = read_yaml(folder / "config.yaml")
    for key, value in blocks.items():
        *path, name = key.split("__")
        block = tree
        for part in path:
            block = block.setdefault(part, {})
        block[name] = value
    (folder / "config.yaml").write_text(to_yaml(tree))
    return folder


def opened_in_every_way(run: Path) -> None:
    """All that plays or continues a run; what is refused must be refused with a message."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        for call in (
            lambda: agentrl.evaluate(str(run), tasks=1, split="test"),
            lambda: agentrl.evaluate(agentrl.open_run(run)),
            lambda: agentrl.resume(run, quiet=True),
        ):
            with suppress(AgentRLError):
                call()
        result = CliRunner().invoke(app, ["play", ENV, "--policy", str(run)])
    assert isinstance(result.exception, SystemExit | None)


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take their time, and read nothing but numbers."""
    monkeypatch.setattr("agentrl.training.trainer.write_report", lambda folder: None)


def test_a_program_is_not_started(trained: Path, tmp_path: Path, program: tuple[Path, Path]) -> None:
    path, mark = program
    run = altered(
        trained,
        tmp_path / "run",
        rollout__workers__interpreter=str(path),
        rollout__placement="process",
        rollout__workers__count=1,
        rollout__workers__environments=1,
    )
    with pytest.raises(ConfigError, match=r"rollout\.workers\.interpreter.* repeat them"):
        agentrl.resume(run, quiet=True)
    with pytest.warns(RuntimeWarning, match=r"run sets rollout\.workers\.interpreter: not used"):
        agentrl.evaluate(run, tasks=1)
    assert not mark.exists()


def test_the_callers_own_program_is(trained: Path, tmp_path: Path, program: tuple[Path, Path]) -> None:
    path, mark = program
    words = ["evaluate", "--policy", "random", "--env", "agentrl/Reasoning-v0", "--split", "test"]
    result = CliRunner().invoke(app, [*words, "--tasks", "1", "--interpreter", str(path)])
    assert mark.exists(), result.output


def test_no_address_is_contacted(trained: Path, tmp_path: Path, server: tuple[str, list[str]]) -> None:
    address, knocks = server
    run = altered(
        trained,
        tmp_path / "run",
        rollout__ray__address=address,
        rollout__backend="ray",
        rollout__placement="process",
        rollout__workers={"count": 1, "environments": 1},
        engine__name="vllm",
        engine__vllm={"url": f"http://{address}", "weights_folder": str(tmp_path)},
        learner={"backend": "fsdp", "launcher": "ray", "processes": 1},
    )
    with pytest.raises(ConfigError, match=r"rollout\.ray\.address.* repeat them"):
        agentrl.resume(run, quiet=True)
    with pytest.warns(RuntimeWarning, match=r"sets rollout\.ray\.address, engine\.vllm\.weights_folder"):
        agentrl.evaluate(run, tasks=1)
    assert knocks == []


@pytest.mark.parametrize("key", ["data", "data.0", "from"])
def test_data_is_not_read(key: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    for module in ("training.own_demonstrations", "planning.preflight"):
        monkeypatch.setattr(f"agentrl.{module}.read_own_data", lambda *_: opened.append("read"))
    monkeypatch.setattr(
        "agentrl.training.own_demonstrations.check_unchanged", lambda *_: opened.append("hash")
    )
    name, _, listed = key.partition(".")
    value = [str(trained)] if listed else str(trained)
    run = altered(trained, tmp_path / "run", warm_start__steps=2, **{f"warm_start__{name}": value})
    shutil.rmtree(run / "checkpoints")
    for file in ("summary.json", "metrics.jsonl"):
        (run / file).unlink()
    opened_in_every_way(run)
    with pytest.raises(ConfigError, match=rf"sets values that .*read.*: warm_start\.{name}\. .*repeat"):
        agentrl.resume(run, quiet=True)
    assert drop_caller_only_values(agentrl.open_run(run).config).warm_start.own_data == ""
    assert opened == []


def test_a_teacher_is_not_loaded(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    for module, name in (("training.setup", "load_teacher"), ("planning.preflight", "check_teacher")):
        monkeypatch.setattr(f"agentrl.{module}.{name}", lambda config: opened.append(config.learner.teacher))
    for place in ("learner", "warm_start__learner"):
        run = altered(
            trained,
            tmp_path / place,
            algorithm={"name": "distill"},
            **{f"{place}__teacher": str(trained), "trainer__steps": 2},
        )
        opened_in_every_way(run)
    with pytest.raises(ConfigError, match=r"sets values that .*read.*: learner\.teacher\. .*repeat"):
        agentrl.resume(tmp_path / "learner", quiet=True)
    with pytest.raises(ConfigError, match=r"warm_start\.learner\.teacher is .*, wanted null"):
        agentrl.open_run(tmp_path / "warm_start__learner")
    assert opened == [None] * len(opened)
    dropped = drop_caller_only_values(agentrl.open_run(tmp_path / "learner").config)
    assert dropped.learner.teacher is None


def test_a_run_does_not_play_on_the_callers_chat_server(
    trained: Path, tmp_path: Path, server: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, knocks = server
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://{address}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-the-caller")
    run = altered(trained, tmp_path / "run", policy__path="openai:expensive")
    opened_in_every_way(run)
    assert knocks == []


def test_a_module_is_not_imported_for_an_id(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "imported"
    (tmp_path / "trust_marker.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(tmp_path)
    for number, id in enumerate(
        ("trust_marker:Door-v0", "trust_marker:Door", "trust_marker:trust-tests/Door-v0")
    ):
        opened_in_every_way(altered(trained, tmp_path / f"run{number}", env__id=id))
        opened_in_every_way(altered(trained, tmp_path / f"recipe{number}", algorithm__name=id))
        panel = Panel(id, "test", ("test/0",), ("0" * 64,))
        panel.save(tmp_path / f"panel{number}.json")
        run = altered(
            trained, tmp_path / f"panelled{number}", evaluation__panel=str(tmp_path / f"panel{number}.json")
        )
        opened_in_every_way(run)
    assert not mark.exists()
    assert "trust_marker" not in sys.modules


def test_a_yaml_tag_makes_no_object(trained: Path, tmp_path: Path) -> None:
    mark = tmp_path / "made"
    run = altered(trained, tmp_path / "run")
    for tag in (
        f"!!python/object/apply:os.system ['touch {mark}']",
        f"!!python/object/new:os.system ['touch {mark}']",
        "!!python/name:os.system",
        "!!python/module:antigravity",
    ):
        (run / "config.yaml").write_text(f"seed: {tag}\n")
        opened_in_every_way(run)
        with pytest.raises(AgentRLError):
            agentrl.open_run(run)
        with pytest.raises(AgentRLError):
            load_config(None, f"seed={tag}")
    assert not mark.exists()


@pytest.fixture
def model(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained / "model", tmp_path / "model"))


def _changed(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_code_in_a_model_folder_is_not_run(model: Path, tmp_path: Path) -> None:
    mark = tmp_path / "run"
    code = f"open({str(mark)!r}, 'w').close()\nclass Own:\n    pass\n"
    for name in ("own", "modeling_own", "tokenization_own", "custom_generate/generate"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / f"{name}.py").write_text(code)
    own = {
        "AutoConfig": "own.Own",
        "AutoModelForCausalLM": "own.Own",
        "AutoTokenizer": ["own.Own", "own.Own"],
    }
    _changed(model / "config.json", auto_map=own, trust_remote_code=True, architectures=["Own"])
    _changed(model / "tokenizer_config.json", auto_map=own, trust_remote_code=True)
    for kind in ("llama", "own"):
        _changed(model / "config.json", model_type=kind)
        for name in ("PreTrainedTokenizerFast", "OwnTokenizer", "os.system"):
            _changed(model / "tokenizer_config.json", tokenizer_class=name)
            with suppress(AgentRLError):
                load_policy(model)
    assert not mark.exists()


class _Mark:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_a_pickle_in_a_run_or_model_folder_is_not_opened(trained: Path, model: Path, tmp_path: Path) -> None:
    import torch

    mark = tmp_path / "opened"
    for name in ("pytorch_model.bin", "adapter_model.bin", "training_args.bin", "optimizer.pt"):
        torch.save({"weight": _Mark(mark)}, model / name)
    load_policy(model)
    for weights in model.glob("*.safetensors"):
        weights.unlink()
    with pytest.raises(CheckpointError, match="can contain code and are not read"):
        load_policy(model)
    run = altered(trained, tmp_path / "run", trainer__steps=2)
    (run / "summary.json").unlink()
    for state in run.rglob("learner.pt"):
        torch.save({"weight": _Mark(mark)}, state)
    opened_in_every_way(run)
    assert not mark.exists()


def test_an_adapter_of_another_model_is_refused(model: Path) -> None:
    (model / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "somebody/model"}))
    with pytest.raises(CheckpointError, match=r"adapter_config\.json says that it is an adapter"):
        load_policy(model)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__[-1].__subclasses__() }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ cycler.__init__.__globals__['os'].mkdir('MARK') }}",
        "{{ messages.append(0) }}",
    ],
)
def test_a_chat_template_cannot_leave_its_sandbox(template: str, trained: Path, tmp_path: Path) -> None:
    mark = tmp_path / "left"
    run = altered(trained, tmp_path / "run")
    text = template.replace("MARK", str(mark))
    check_arguments(text, {})
    (run / "model" / "chat_template.jinja").write_text(text + "{{ messages[0]['content'] }}")
    opened_in_every_way(run)
    assert not mark.exists()


def test_arguments_that_are_the_callers_are_left_out(trained: Path, tmp_path: Path) -> None:
    run = altered(trained, tmp_path / "run", env__kwargs={"lock": "open", "hue": "blue"})
    Door.locks.clear()
    opened_in_every_way(run)
    assert set(Door.locks) == {"shut"}
    assert drop_caller_only_values(agentrl.open_run(run).config).env.kwargs == {"hue": "blue"}
    with pytest.warns(RuntimeWarning, match=r"sets env\.kwargs\.lock: not used"):
        agentrl.evaluate(run, tasks=1, env_kwargs={"lock": "mine"}, split="test")
    assert set(Door.locks) == {"shut", "mine"}


def test_neither_does_a_runs_panel_say_them(trained: Path, tmp_path: Path) -> None:
    panel = Panel(ENV, "test", ("test/0",), (f"{0:064x}",), {"lock": "open"})
    panel.save(tmp_path / "panel.json")
    run = altered(trained, tmp_path / "run", evaluation__panel=str(tmp_path / "panel.json"))
    Door.locks.clear()
    with pytest.raises(ConfigError, match=r"the argument lock of trust-tests/Door-v0, which"):
        agentrl.evaluate(run)
    assert set(Door.locks) <= {"shut"}
    agentrl.evaluate(run, tmp_path / "panel.json")  # the caller's own words
    assert "open" in Door.locks


def test_neither_do_several_panels_of_a_run_say_them(trained: Path, tmp_path: Path) -> None:
    Panel(ENV, "test", ("test/0",), (f"{0:064x}",), {"lock": "open"}).save(tmp_path / "panel.json")
    block = {"env": ENV, "kwargs": {"lock": "open"}}
    run = altered(trained, tmp_path / "run", evaluation__panels=[block])
    with pytest.raises(ConfigError, match=r"evaluation\.panels.* repeat them"):
        agentrl.resume(run, quiet=True)
    assert (
        caller_only_values(agentrl.open_run(run).config)["evaluation.panels"][0]["kwargs"] == block["kwargs"]
    )
    assert drop_caller_only_values(agentrl.open_run(run).config).evaluation.panels == ()
    harmless = altered(
        trained, tmp_path / "other", evaluation__panels=[{"env": ENV, "kwargs": {"hue": "blue"}}]
    )
    assert caller_only_values(agentrl.open_run(harmless).config) == {}
    config = load_config(None, f"evaluation.panels=[{tmp_path / 'panel.json'}]")
    with pytest.raises(ConfigError, match=r"evaluation\.panels: .* the argument lock of trust-tests/Door-v0"):
        configured_panels(config)


@pytest.mark.parametrize("id", ["agentrl/MathTools-v0", "agentrl/WebShop-v0"])
def test_what_shuts_code_in_is_the_callers(id: str) -> None:
    names = {"isolation": "none", "require_isolation": False, "tagger": "a", "cache": "/b", "max_steps": 3}
    config = replace(RunConfig(), env=replace(RunConfig().env, id=id, kwargs=names))
    kept = drop_caller_only_values(config).env.kwargs
    if id == "agentrl/MathTools-v0":
        assert kept == {"tagger": "a", "cache": "/b", "max_steps": 3}
    else:
        assert kept == {"isolation": "none", "require_isolation": False, "max_steps": 3}


NAMED = {
    "rollout.workers.interpreter": "/x/py thon",
    "rollout.ray.address": "a:1",
    "learner.teacher": "/x/teacher",
    "engine.vllm.weights_folder": "/w",
    "engine.vllm.url": "http://a:1",
    "warm_start.data": ["/x/own data.jsonl"],
    "warm_start.from": "/x/run",
}


def test_a_resumed_run_uses_what_is_named_again(tmp_path: Path) -> None:
    assert tuple(sorted(NAMED)) == tuple(sorted(CALLER_ONLY_KEYS))
    config = load_config(
        None,
        "rollout.backend=ray",
        "engine.name=vllm",
        f"env.id={ENV}",
        "env.kwargs.lock=open",
        *(f"{key}={json.dumps(value)}" for key, value in NAMED.items()),
    )
    assert caller_only_values(config) == NAMED | {"env.kwargs.lock": "open"}
    with pytest.raises(ConfigError) as caught:
        check_confirmed("runs/my run", config, ["rollout.ray.address=b:2"])
    message, command = str(caught.value).splitlines()
    assert "if you trust them, repeat them" in message
    words = shlex.split(command)
    assert words[:5] == ["agentrl", "train", "--resume", "runs/my run", "rollout.ray.address=b:2"]
    assert len(words) == 5 + len(NAMED)
    check_confirmed("runs/my run", config, words[4:])
    whole = ["rollout={workers: {}, ray: {}}", "engine.vllm={}", "env.kwargs={lock: open}", "warm_start={}"]
    whole.append("learner.teacher=null")
    check_confirmed("runs/my run", config, whole)
    check_confirmed("runs/mine", RunConfig(), [])
    run = StudyRun("grpo", replace(config, run=replace(config.run, folder=str(tmp_path))))
    run.folder.mkdir()
    check_confirmed(str(run.folder), config, run.arguments[3:])  # a study's own file names them


def test_dropping_caller_only_values_keeps_all_the_rest() -> None:
    config = load_config(
        None, "engine.name=vllm", "engine.vllm.url=http://a:1", "seed=3", "learner.backend=fsdp"
    )
    kept = drop_caller_only_values(config)
    assert kept.engine.name == "torch"
    assert kept == replace(config, engine=replace(config.engine, name="torch", vllm=kept.engine.vllm))
    for name in ("quickstart.yaml", "math_tools.yaml", "webshop.yaml"):
        try:
            plain = load_config(name)
        except ConfigError:
            continue
        assert drop_caller_only_values(plain) == plain


# Keys whose text names nothing that runs, is contacted or is written to, once somebody else opens the run.
HARMLESS = {
    "env.id": "among those that are registered",
    "env.split": "a name",
    "env.name": "a name",
    "env.kwargs": "but for those that the environment declares to be its caller's",
    "policy.template_arguments": "values for a template in its sandbox",
    "rollout.backend": "a choice",
    "rollout.placement": "a choice",
    "engine.name": "a choice",
    "policy.path": "tensors and a tokenizer, read without their code, from this machine or the caller's hub; "
    "a chat server is opened for a policy that the caller names, at the caller's address",
    "policy.revision": "a commit of the same",
    "policy.chat_template": "a template, rendered in its sandbox",
    "policy.device": "a choice",
    "policy.preset": "a choice",
    "policy.prompt": "a template, rendered in its sandbox",
    "policy.system_message": "a text",
    "policy.dtype": "a choice",
    "policy.reply": "a choice",
    "warm_start.noise_prefers": "a text",
    "evaluation.split": "a name",
    "evaluation.panel": "JSON that is read",
    "evaluation.panels": "files like evaluation.panel",
    "evaluation.panels.": "names; the arguments like env.kwargs",
    "run.imports": "withheld until the caller names it, see agentrl.plugins",
    "run.name": "of a new run",
    "run.folder": "of a new run",
    "algorithm.": "checked by its recipe",
    "learner.": "choices",
    "warm_start.learner.": "choices",
    "trainer.": "choices",
}


def test_every_key_that_holds_text_has_been_thought_about() -> None:
    from typing import get_args, get_type_hints

    def parts(hint: Any) -> Iterator[Any]:
        yield hint
        for part in get_args(hint):
            yield from parts(part)

    def texts(kind: Any, path: str) -> Iterator[str]:
        for name, hint in get_type_hints(kind).items():
            for part in parts(hint):
                if hasattr(part, "__dataclass_fields__"):
                    yield from texts(part, f"{path}{name}.")
                elif part is str:
                    yield f"{path}{key_of(name)}"

    known = set(texts(RunConfig, ""))
    assert known >= set(CALLER_ONLY_KEYS)
    unthought = [
        key
        for key in known - set(CALLER_ONLY_KEYS)
        if not any(key == name or (name.endswith(".") and key.startswith(name)) for name in HARMLESS)
    ]
    assert unthought == []
    assert config_from_tree(config_tree(RunConfig())) == RunConfig()


def test_a_report_of_someone_elses_run_starts_nothing(
    trained: Path, tmp_path: Path, program: tuple[Path, Path], server: tuple[str, list[str]]
) -> None:
    names = {"rollout__workers__interpreter": str(program[0]), "rollout__ray__address": server[0]}
    run = altered(trained, tmp_path / "run", **names)
    write_report(run)
    assert CliRunner().invoke(app, ["train", "--resume", str(run)]).exit_code == 2
    assert not program[1].exists()
    assert server[1] == []
