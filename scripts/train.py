"""`agentrl train` for people who work from scripts: python scripts/train.py --help."""

import sys

from agentrl.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
