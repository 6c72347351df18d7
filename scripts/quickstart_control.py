"""The quickstart's rival: clone for about as many CPU seconds as cloning and reinforcement learning took.

python scripts/quickstart_control.py --seed 0        # against the newest finished quickstart of that seed
python scripts/quickstart_control.py --run RUN
"""

import argparse
from dataclasses import replace
from pathlib import Path

import agentrl


def newest_quickstart(seed: int) -> agentrl.Run:
    wanted = agentrl.load_config("quickstart.yaml", f"seed={seed}")
    for folder in sorted(
        Path(wanted.run.folder).glob("*"), key=lambda path: path.stat().st_mtime, reverse=True
    ):
        if not (folder / "summary.json").exists():
            continue
        run = agentrl.open_run(folder)
        # A run's own file holds the placement that it settled on.
        if replace(wanted, rollout=run.config.rollout) == run.config:
            return run
    raise SystemExit(
        f"no finished quickstart of seed {seed} in {wanted.run.folder}/; make it: make quickstart SEED={seed}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="of the quickstart to compare with")
    parser.add_argument("--run", help="that quickstart's run, instead of the newest of the seed")
    given = parser.parse_args()
    run = agentrl.open_run(given.run) if given.run else newest_quickstart(given.seed)
    times, warm = run.summary["times"], run.config.warm_start
    budget = sum(times[f"{name}.cpu"] for name in ("demonstrations", "cloning", "rollout", "learning"))
    demonstrations = 4 * warm.demonstrations
    per_demonstration = times["demonstrations.cpu"] / warm.demonstrations
    steps = int((budget - demonstrations * per_demonstration) / (times["cloning.cpu"] / warm.steps))
    config = agentrl.load_config(
        run.folder / "config.yaml",
        f"warm_start.steps={steps}",
        f"warm_start.demonstrations={demonstrations}",
        "trainer.steps=0",
        f"run.name={run.folder.name}-control",
    )
    print(
        f"{run.folder} took {budget:.0f} CPU seconds to clone and train: {steps} steps of cloning in as many"
    )
    spent = agentrl.train(config).summary["times"]
    print(f"the control took {spent['demonstrations.cpu'] + spent['cloning.cpu']:.0f} CPU seconds to clone")


if __name__ == "__main__":
    main()
