"""`agentrl report` for people who work from scripts: python scripts/report.py --help."""

import sys

from agentrl.cli import main

if __name__ == "__main__":
    main(["report", *sys.argv[1:]])
