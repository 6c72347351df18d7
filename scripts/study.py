"""Compare methods from the same start; run it again to continue.

python scripts/study.py configs/studies/quickstart_methods.yaml --jobs 2
python scripts/study.py configs/studies/quickstart_methods.yaml --only grpo,gigpo
python scripts/study.py configs/studies/quickstart_methods.yaml --folder runs/short seeds=[0] trainer.steps=20
"""

import argparse
import sys
from pathlib import Path

from agentrl.errors import AgentRLError
from agentrl.run.settings import RunFolderConfig
from agentrl.study.config import load_study
from agentrl.study.study import run_study


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="the study's YAML file")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the study, or of every run")
    parser.add_argument(
        "--jobs", type=int, default=1, help="runs at a time; 0 only compares what has finished"
    )
    parser.add_argument("--only", metavar="NAME,NAME", help="the methods to run; else all")
    parser.add_argument("--folder", type=Path, help="that holds the runs; else runs/ and the file's name")
    given = parser.parse_intermixed_args()
    folder = given.folder or Path(RunFolderConfig().folder) / given.file.stem
    only = given.only and [name.strip() for name in given.only.split(",")]
    try:
        results = run_study(load_study(given.file, *given.overrides), folder, jobs=given.jobs, only=only)
    except KeyboardInterrupt as interrupt:
        print(f"\n{interrupt}", file=sys.stderr)
        return 130  # as a shell reports it
    except (AgentRLError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 1 if results["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
