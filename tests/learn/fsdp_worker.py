"""Measurements of an FSDP2 learner on two ranks, each compared with a single-process learner."""

import json
import multiprocessing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from feature_readers import reading_features, wander
from remembering import ReturnModel, VisitBonus
from torch import Tensor, nn
from torch.multiprocessing.spawn import start_processes
from toy_policy import VOCABULARY, ToyPolicy, answered, make_groups, sampled_at, toy_forward
from toy_views import toy_perturb
from transformers import Qwen2Config, Qwen2ForCausalLM

from agentrl.algorithms.algorithm import Algorithm, keep_all
from agentrl.algorithms.branching import RolloutPlan
from agentrl.algorithms.credit import prepare
from agentrl.algorithms.hooks import (
    Context,
    GroupTerm,
    GroupValues,
    MiniBatch,
    Outputs,
    Term,
    requires,
    token_statistic,
)
from agentrl.algorithms.importance import with_importance_correction
from agentrl.algorithms.recipe import build_recipe, recipe_names
from agentrl.algorithms.token_statistics import reads_teacher
from agentrl.data import Group, StopReason
from agentrl.data.batch import collate
from agentrl.data.trajectory import BranchPoint
from agentrl.errors import CheckpointError, NonFiniteError
from agentrl.learn.forward import Forward
from agentrl.learn.learner import Learner
from agentrl.learn.ranks import ALONE, Ranks
from agentrl.learn.settings import LearnerConfig, LoraConfig
from agentrl.learn.sharding import full_tensor, local_tensor, stored_shards
from agentrl.policy.attention import PACKED
from agentrl.policy.precision import non_finite

Figures = dict[str, Any]
CONTEXT = Context(total_steps=10, vocabulary=VOCABULARY, tokenizer="toy")


def measured(folder: Path, *names: str) -> Figures:
    """Run the named functions of this file on two ranks; return the results of rank 0 by name."""
    (folder / "meet").unlink(missing_ok=True)
    # One process loads torch and transformers for the ranks of all tests: that takes longer than most tests.
    multiprocessing.set_forkserver_preload(["agentrl.learn.learner", "transformers.modeling_utils"])
    start_processes(_rank, (str(folder), names), nprocs=2, start_method="forkserver")
    return dict(json.loads((folder / "figures.json").read_text()))


def _rank(index: int, folder: str, names: tuple[str, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=index, world_size=2)
    try:
        here: Mapping[str, Callable[[Ranks, Path], Any]] = globals()
        found = {name: here[name](Ranks(index, 2), Path(folder)) for name in names}
        if index == 0:
            (Path(folder) / "figures.json").write_text(json.dumps(found))
    finally:
        dist.destroy_process_group()


def qwen(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Qwen2Config(
        vocab_size=VOCABULARY, num_key_value_heads=1, tie_word_embeddings=True, initializer_range=0.2, **shape
    )
    model = Qwen2ForCausalLM(config)
    model.set_attn_implementation(PACKED)
    return model.eval()


def learner_of(
    make: Callable[[int], nn.Module], algorithm: Algorithm, ranks: Ranks, backend: str, **settings: Any
) -> Learner:
    defaults = {"optimizer": "adamw", "warmup_steps": 0, "mini_batches": 2, "micro_batch_tokens": 60}
    return Learner(
        make(0),
        LearnerConfig(**{"backend": backend, **defaults, **settings}),
        reference=make(1).requires_grad_(False) if "reference" in algorithm.requires else None,
        teacher=make(2) if reads_teacher(algorithm.requires) else None,
        critic="values" in algorithm.requires,
        reward_model=None if algorithm.reward_model is None else make(1),
        forward=toy_forward() if make is ToyPolicy else Forward(),
        ranks=ranks,
        perturb=toy_perturb,
    )


def taught(
    learner: Learner,
    algorithm: Algorithm,
    steps: Iterable[int],
    prepare_groups: Callable[[list[Group]], list[Group]] = list,
) -> tuple[list[Tensor], Figures]:
    """Return the gradients of the first optimiser step that had any, and the logged numbers."""
    gradients: list[Tensor] = []
    clip = nn.utils.clip_grad_norm_

    def look(parameters: list[nn.Parameter], limit: float) -> Tensor:
        if not any(value.any() for value in gradients):
            gradients[:] = (
                torch.zeros(value.shape) if value.grad is None else full_tensor(value.grad).clone()
                for value in parameters
            )
        return clip(parameters, limit)

    history: dict[str, list[float]] = {}
    with patch.object(nn.utils, "clip_grad_norm_", look):
        for step in steps:
            context = replace(CONTEXT, step=step, history=history)
            groups = prepare_groups(played(algorithm, step))
            batch = prepare(algorithm, groups, context, selected=True)
            for name, value in learner.update(batch, algorithm, context).items():
                history.setdefault(f"train/{name}", []).append(value)
    return gradients, history


def played(algorithm: Algorithm, seed: int) -> list[Group]:
    """Return groups, one truncated by a limit; if the algorithm branches, episodes branch off their first."""
    groups = answered(make_groups(seed))
    cut = tuple(replace(episode, stop=StopReason.CONTEXT_LIMIT) for episode in groups[0].episodes)
    groups[0] = replace(groups[0], episodes=cut)
    if algorithm.rollout.reply_temperature is not None:
        groups = sampled_at(groups, 0.6, 1.0, 1.5, by_token=True)
    if algorithm.rollout.branch_policy is None:
        return groups
    return [
        Group(task, (first, *(replace(other, parent=BranchPoint(first.id, 0)) for other in others)))
        for task, (first, *others) in ((group.task, group.episodes) for group in groups)
    ]


def weights(learner: Learner) -> list[Tensor]:
    modules = (learner.policy, learner.value_head, learner.reward_model)
    own = [value for module in modules if module is not None for value in module.parameters()]
    return [full_tensor(value.detach()).clone() for value in own]


def distance(one: list[Tensor], other: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


def relative(one: list[Tensor], other: list[Tensor]) -> float:
    """Return the norm of the difference over the norm of `other`, over all tensors together."""
    flat = [torch.cat([value.double().flatten() for value in values]) for values in (one, other)]
    return float((flat[0] - flat[1]).norm() / flat[1].norm())


def compared(
    make: Callable[[int], nn.Module],
    name: str | Algorithm,
    ranks: Ranks,
    cap: float | None = None,
    prepare_groups: Callable[[list[Group]], list[Group]] = list,
    **settings: Any,
) -> Figures:
    """Return how far a learner on all ranks is from a single-process learner."""
    results = []
    for backend, who in (("single", ALONE), ("fsdp", ranks)):
        algorithm = build_recipe(name).build() if isinstance(name, str) else name
        algorithm = algorithm if cap is None else with_importance_correction(algorithm, cap)
        learner = learner_of(make, algorithm, who, backend, **settings)
        before = weights(learner)
        results.append((*taught(learner, algorithm, range(5), prepare_groups), weights(learner), before))
    (own, own_log, own_weights, before), (shared, shared_log, shared_weights, _) = results
    return {
        "gradient": relative(shared, own),
        "weights": distance(shared_weights, own_weights),
        "moved": distance(own_weights, before),
        "unequal numbers": [
            key
            for key in own_log.keys() | shared_log.keys()
            if not torch.allclose(
                torch.tensor(own_log.get(key, []), dtype=torch.float64),
                torch.tensor(shared_log.get(key, []), dtype=torch.float64),
                rtol=1e-3,
                atol=1e-5,
            )
        ],
    }


def every_recipe(ranks: Ranks, folder: Path) -> Figures:
    return {name: compared(ToyPolicy, name, ranks) for name in recipe_names()}


@requires("current", "topk:3", "entropy_change:grad")
def _weight_by_statistics(mini: MiniBatch, context: Context) -> Tensor:
    assert mini.current is not None
    scored, current = token_statistic(mini.batch, "topk:3")[..., 0], mini.current
    return scored + token_statistic(current, "entropy_change")


@requires("entropy_change:grad", "sequence_logprob:grad")
def _statistics_loss(outputs: Outputs, mini: MiniBatch, context: Context) -> Tensor:
    return token_statistic(outputs, "entropy_change") + token_statistic(outputs, "sequence_logprob") / 10


def token_statistics(ranks: Ranks, folder: Path) -> Figures:
    """Compare an algorithm that reads statistics of the scoring pass, of `current` and with gradient."""
    algorithm = replace(
        build_recipe("grpo").build(),
        weights=(_weight_by_statistics,),
        terms=(Term("statistics", _statistics_loss, 0.1),),
    )
    found: Figures = {}
    ends = []
    for backend, who in (("single", ALONE), ("fsdp", ranks)):
        learner = learner_of(ToyPolicy, algorithm, who, backend, micro_batch_tokens=20)
        asked = algorithm.requires | {"sequence_logprob:trajectory"}
        scored = learner.score(collate(make_groups()), asked).extras
        found["names"] = sorted(scored)
        ends.append(([*scored.values()], *taught(learner, algorithm, range(2)), weights(learner)))
    (own_extras, own, own_log, own_weights), (extras, shared, log, shared_weights) = ends
    return found | {
        "scores": distance(extras, own_extras),
        "gradient": relative(shared, own),
        "weights": distance(shared_weights, own_weights),
        "term": abs(log["train/learner/term/statistics"][-1] - own_log["train/learner/term/statistics"][-1]),
    }


def shared_features(ranks: Ranks, folder: Path) -> Figures:
    """Compare an algorithm that reads every kind of feature of the batch and of the mini-batch."""
    return compared(ToyPolicy, reading_features(), ranks, prepare_groups=wander, epochs=2)


def off_policy(ranks: Ranks, folder: Path) -> Figures:
    return {name: compared(ToyPolicy, name, ranks, cap=1.5, epochs=2) for name in ("ppo", "gspo", "spear")}


def double_qwen(seed: int) -> nn.Module:
    return qwen(seed).double()


def a_transformer(ranks: Ranks, folder: Path) -> Figures:
    names = ("grpo", "ppo", "epo", "vogue", "prime")
    return {name: compared(double_qwen, name, ranks) for name in names}


def adapters(ranks: Ranks, folder: Path) -> Figures:
    return compared(double_qwen, "grpo", ranks, lora=LoraConfig(rank=3, targets=("q_proj", "down_proj")))


def tempered(ranks: Ranks, folder: Path) -> Figures:
    """Compare on tokens of different temperatures, with a value head."""
    plan = RolloutPlan(reply_temperature=lambda state, context: 1.0)
    algorithm = replace(build_recipe("ppo").build(), rollout=plan)
    return compared(ToyPolicy, algorithm, ranks, micro_batch_tokens=20)


def distilled(ranks: Ranks, folder: Path) -> Figures:
    """Compare with a sharded teacher, whose output embedding the backward pass reads again."""
    settings: Figures = {
        "advantage": {"discount": 0.5},
        "loss": {"mode": "loss", "interpolation": 0.5, "reward_coefficient": 0.5},
    }
    return {
        name: compared(
            double_qwen, build_recipe("distill", block).build(), ranks, micro_batch_tokens=20, epochs=2
        )
        for name, block in settings.items()
    }


def muon(ranks: Ranks, folder: Path) -> Figures:
    return compared(ToyPolicy, "grpo", ranks, optimizer="muon")


def in_float32(ranks: Ranks, folder: Path) -> Figures:
    """Compare both optimisers, and one process with itself at other micro-batches."""
    return {name: _in_float32(name, ranks) for name in ("adamw", "muon")}


def _in_float32(optimizer: str, ranks: Ranks) -> Figures:
    ends = []
    for tokens in (60, 40):
        algorithm = build_recipe("grpo").build()
        learner = learner_of(qwen, algorithm, ALONE, "single", optimizer=optimizer, micro_batch_tokens=tokens)
        gradient, _ = taught(learner, algorithm, range(5))
        ends.append((gradient, weights(learner)))
    (one, one_weights), (other, other_weights) = ends
    return compared(qwen, "grpo", ranks, optimizer=optimizer) | {
        "gradient of one": relative(one, other),
        "weights of one": distance(one_weights, other_weights),
    }


def recomputed(ranks: Ranks, folder: Path) -> Figures:
    """Compare with one row per micro-batch, so that one rank often needs a filler."""
    return compared(double_qwen, "grpo", ranks, recompute_activations=True, micro_batch_tokens=1)


def in_bfloat16(ranks: Ranks, folder: Path) -> Figures:
    algorithm = build_recipe("grpo").build()
    learner = learner_of(qwen, algorithm, ranks, "fsdp", compute_dtype="bfloat16")
    single = learner_of(qwen, algorithm, ALONE, "single")
    (rounded, log), (exact, exact_log) = taught(learner, algorithm, [0]), taught(single, algorithm, [0])
    return {
        "gradient": relative(rounded, exact),
        "dtypes": sorted({str(value.dtype) for value in (*rounded, *weights(learner))}),
        "entropy": abs(log["train/learner/entropy/token"][0] - exact_log["train/learner/entropy/token"][0]),
    }


# A learner with a value head, one with a reference, and one with a model of its own; with two optimisers.
CHECKPOINTED: dict[str, tuple[str, Figures]] = {
    "values": ("ppo", {}),
    "reference": ("grpo", {"kl_coefficient": 0.1}),
    "reward model": ("prime", {}),
}


def checkpointed_learner(kind: str, ranks: Ranks) -> tuple[Learner, Algorithm]:
    name, options = CHECKPOINTED[kind]
    algorithm = build_recipe(name, options).build()
    return learner_of(ToyPolicy, algorithm, ranks, "fsdp", optimizer="muon"), algorithm


def saved(ranks: Ranks, folder: Path) -> Figures:
    """Take two updates, write a checkpoint, and return the weights after three more updates."""
    return {kind: _saved(kind, ranks, folder) for kind in CHECKPOINTED}


def _saved(kind: str, ranks: Ranks, folder: Path) -> list[float]:
    learner, algorithm = checkpointed_learner(kind, ranks)
    taught(learner, algorithm, [0, 1])
    save(learner, folder / f"{kind}-two", ranks)
    taught(learner, algorithm, [2, 3, 4])
    return flat(learner)


def save(learner: Learner, folder: Path, ranks: Ranks) -> None:
    learner.write_shards(folder)
    if learner.reward_model is not None:
        learner.write_reward_model(folder / "reward_model")
    if ranks.first:
        torch.save(learner.state_dict(), folder / "state.pt")


def restore(kind: str, folder: Path, ranks: Ranks) -> tuple[Learner, Algorithm]:
    learner, algorithm = checkpointed_learner(kind, ranks)
    learner.score(collate(make_groups()))  # whatever it has done before
    state = torch.load(folder / "state.pt")
    learner.read_shards(folder, state)
    if learner.reward_model is not None:
        learner.read_reward_model(folder / "reward_model", state)
    return learner, algorithm


def restored(ranks: Ranks, folder: Path) -> Figures:
    """Return the weights after two updates from the checkpoint that one process wrote."""
    ends = {}
    for kind in CHECKPOINTED:
        learner, algorithm = restore(kind, folder / f"{kind}-one", ranks)
        taught(learner, algorithm, [3, 4])
        ends[kind] = flat(learner)
    return ends


def flat(learner: Learner) -> list[float]:
    return torch.cat([value.flatten() for value in weights(learner)]).tolist()


def exported(ranks: Ranks, folder: Path) -> Figures:
    """Return how far an exported model is from the weights that rank 0 started with."""
    algorithm = build_recipe("grpo").build()
    model, other = qwen(), qwen(seed=2 + ranks.index)  # every rank begins elsewhere
    learner = learner_of(lambda seed: other, algorithm, ranks, "fsdp")
    learner.export(model)
    return {"apart": distance(list(model.parameters()), list(qwen(seed=2).parameters()))}


def lost_numbers(ranks: Ranks, folder: Path) -> Figures:
    """Return what all ranks report about an inf in a shard that only one of them holds."""
    algorithm = build_recipe("grpo").build()
    learner = learner_of(qwen, algorithm, ranks, "fsdp")
    taught(learner, algorithm, [0])
    found = {"before": learner.non_finite()}
    norm = dict(learner.policy.named_parameters())["model.norm.weight"]

    def spoil(*_: object) -> None:
        if not ranks.first:
            local_tensor(norm.detach())[0] = torch.inf

    learner._state.optimizers[0].register_step_post_hook(spoil)
    try:
        taught(learner, algorithm, [1])
    except NonFiniteError as error:
        found["told"] = ranks.gather(str(error))
    found["after"] = ranks.gather(learner.non_finite())
    learner.write_shards(folder / "lost")  # as no checkpoint is written
    ranks.raise_on_any_rank(lambda: None)
    found["stored"] = [name for tensor in stored_shards(folder / "lost") for name in non_finite([tensor])]
    return found


def widened(ranks: Ranks, folder: Path) -> Figures:
    """Load weights that two ranks wrote in bfloat16 into learners of float32."""
    algorithm = build_recipe("grpo").build()
    old = learner_of(lambda seed: qwen(seed).bfloat16(), algorithm, ranks, "fsdp")
    taught(old, algorithm, [0])
    old.write_shards(folder / "old")
    learner = learner_of(lambda seed: qwen(5), algorithm, ranks, "fsdp", compute_dtype="bfloat16")
    learner.read_shards(folder / "old", old.state_dict())
    found = {
        "apart": distance([value.float() for value in weights(old)], weights(learner)),
        "dtypes": sorted({str(value.dtype) for _, value in learner._state.local_tensors()}),
    }
    _, log = taught(learner, algorithm, [1])
    return found | {"moved": log["train/learner/weights_moved"][0]}


def an_error(ranks: Ranks, folder: Path) -> Figures:
    """Return what every rank raises if only the last one fails, and items that were split and merged."""

    def work() -> None:
        if not ranks.first:
            raise CheckpointError("the disk of the last rank")

    try:
        ranks.raise_on_any_rank(work)
    except CheckpointError as error:
        told = str(error)
    return {"told": ranks.gather(told), "dealt": ranks.merge(ranks.split(range(5)))}


def remembered(ranks: Ranks, folder: Path) -> Figures:
    """Return how far components that remember are from those of one process, and after a restored state."""
    ends = []
    for backend, who in (("single", ALONE), ("fsdp", ranks)):
        model, counts = ReturnModel(), VisitBonus()
        algorithm = Algorithm(transforms=(model,), shape_reward=(counts.bonus,))
        learner = learner_of(ToyPolicy, algorithm, who, backend)
        before = model.flat()
        taught(learner, algorithm, range(3))
        ends.append((model, weights(learner), counts, before))
    (own, own_weights, _, before), (shared, shared_weights, counts, _) = ends
    torch.save(shared.state_dict(), folder / f"remembered-{ranks.index}")
    ranks.raise_on_any_rank(lambda: None)
    again = ReturnModel(seed=5)
    again.load_state_dict(torch.load(folder / f"remembered-{1 - ranks.index}"), CONTEXT)
    states = ranks.gather((shared.flat(), counts.state_dict()))
    return {
        "ranks equal": [torch.equal(flat, states[0][0]) and seen == states[0][1] for flat, seen in states],
        "apart": distance([shared.flat()], [own.flat()]),
        "weights": distance(shared_weights, own_weights),
        "moved": distance([own.flat()], [before]),
        "restored": distance([again.flat()], [shared.flat()]),
    }


def listwise(values: GroupValues, context: Context) -> Tensor:
    """Return the cross-entropy of the returns and of the mean log-probabilities, each as a distribution."""
    return -(values.returns.softmax(0) * (values.logprobs / values.tokens).log_softmax(0)).sum()


GROUPED = Algorithm(
    select=keep_all,
    surrogate=lambda outputs, mini, bounds: torch.zeros_like(outputs.logprobs),
    clip=None,
    group_terms=(GroupTerm("listwise", listwise),),
)


def grouped(ranks: Ranks, folder: Path) -> Figures:
    return compared(ToyPolicy, GROUPED, ranks)
