"""Train LLM agents on multi-turn text tasks by reinforcement learning.

    config = agentrl.load_config("configs/quickstart.yaml", "seed=1")
    run = agentrl.train(config)
    print(agentrl.evaluate(run))

The names below are imported on first use, so importing this package loads neither torch nor transformers.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if sys.platform == "win32":  # a traceback would hide the one line that helps
    sys.stderr.write(
        "agentrl runs on Linux and macOS; on Windows use it inside WSL (https://learn.microsoft.com/windows/wsl)\n"
    )
    raise SystemExit(2)

if TYPE_CHECKING:
    from agentrl.env.panel import Panel, load_panel, make_panel
    from agentrl.env.registry import make
    from agentrl.evaluation.comparison import compare
    from agentrl.evaluation.evaluate import evaluate
    from agentrl.evaluation.suite import evaluate_panels
    from agentrl.plugins import load_imports
    from agentrl.run.folder import Run, open_run
    from agentrl.run.settings import RunConfig, load_config
    from agentrl.training.launch import resume, train

_HOME = {
    "Panel": "agentrl.env.panel",
    "Run": "agentrl.run.folder",
    "RunConfig": "agentrl.run.settings",
    "compare": "agentrl.evaluation.comparison",
    "evaluate": "agentrl.evaluation.evaluate",
    "evaluate_panels": "agentrl.evaluation.suite",
    "load_config": "agentrl.run.settings",
    "load_imports": "agentrl.plugins",
    "load_panel": "agentrl.env.panel",
    "make": "agentrl.env.registry",
    "make_panel": "agentrl.env.panel",
    "open_run": "agentrl.run.folder",
    "resume": "agentrl.training.launch",
    "train": "agentrl.training.launch",
}

__all__ = [
    "Panel",
    "Run",
    "RunConfig",
    "compare",
    "evaluate",
    "evaluate_panels",
    "load_config",
    "load_imports",
    "load_panel",
    "make",
    "make_panel",
    "open_run",
    "resume",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'agentrl' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
