"""`agentrl play` for people who work from scripts: python scripts/play.py --help."""

import sys

from agentrl.cli import main

if __name__ == "__main__":
    main(["play", *sys.argv[1:]])
