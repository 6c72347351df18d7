"""Memory of freed tensors goes back to the system, after every update."""

import platform

import psutil
import pytest
import torch
from toy_policy import ToyPolicy, make_groups, toy_forward

from agentrl.algorithms.hooks import Context
from agentrl.algorithms.recipe import build_recipe
from agentrl.data.batch import collate
from agentrl.learn import learner as learner_module
from agentrl.learn.allocator import return_freed_memory
from agentrl.learn.learner import Learner
from agentrl.learn.settings import LearnerConfig

MIB = 2**20


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps freed memory so")
def test_freed_tensors_between_living_ones_leave_the_process() -> None:
    large = torch.ones(31 * MIB, dtype=torch.uint8)
    del large  # from now on glibc serves smaller ones from its heap
    freed, kept = [], []
    for _ in range(200):
        freed.append(torch.ones(MIB, dtype=torch.uint8))
        kept.append(torch.ones(200_000, dtype=torch.uint8))
    freed.clear()
    before = psutil.Process().memory_info().rss
    return_freed_memory(above=2**40)
    assert psutil.Process().memory_info().rss > before - 100 * MIB
    return_freed_memory(above=100 * MIB)
    assert psutil.Process().memory_info().rss < before - 100 * MIB
    assert len(kept) == 200


def test_an_update_gives_its_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[None] = []
    monkeypatch.setattr(learner_module, "return_freed_memory", lambda: calls.append(None))
    learner = Learner(ToyPolicy(), LearnerConfig(optimizer="adamw"), forward=toy_forward())
    for step in range(2):
        learner.update(collate(make_groups(step)), build_recipe("grpo").build(), Context(step, 2))
    assert len(calls) == 2
