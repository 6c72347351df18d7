"""`agentrl train` for people who work from scripts: python scripts/train.py --help.

On several processes: torchrun --nproc-per-node 2 scripts/train.py quickstart.yaml learner.backend=fsdp
"""

import os
import sys
from contextlib import nullcontext, redirect_stdout

from agentrl.cli import main

if __name__ == "__main__":
    first = os.environ.get("RANK", "0") == "0"  # the others would say the same again
    with open(os.devnull, "w") as nowhere, nullcontext() if first else redirect_stdout(nowhere):
        main(["train", *sys.argv[1:]])
