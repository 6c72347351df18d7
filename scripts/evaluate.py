"""`agentrl evaluate` for people who work from scripts: python scripts/evaluate.py --help."""

import sys

from agentrl.cli import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
