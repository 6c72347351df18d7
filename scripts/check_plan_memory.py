"""Compare the memory that `agentrl plan` names with the peak of a real run, for a model of any size.

    python scripts/check_plan_memory.py CONFIG [key=value ...]

Each case (all weights or LoRA, float32 or bfloat16) is planned, then run for one cloning step, if the
configuration clones, and two training steps in a process of its own, whose largest resident size the kernel
reports. Prints a row for each case, and exits with 1 if one is further than --tolerance from its plan.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile

from rich.filesize import decimal

CASES = {
    "full float32": ("policy.dtype=float32",),
    "full bfloat16": ("policy.dtype=bfloat16",),
    "LoRA float32": ("policy.dtype=float32", "learner.lora={rank: 16}", "warm_start.steps=0"),
    "LoRA bfloat16": ("policy.dtype=bfloat16", "learner.lora={rank: 16}", "warm_start.steps=0"),
}
SHORT = ("trainer.steps=2", "evaluation.baselines=[]", "evaluation.instruction_check=false")


def planned(arguments: list[str]) -> int:
    """Return the bytes of memory that the plan names."""
    command = [sys.executable, "-m", "agentrl", "plan", *arguments, "--json"]
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    lines = json.loads(found)["lines"]
    return int(sum(line["amount"] or 0 for line in lines if line["section"] == "memory"))


def measured(arguments: list[str]) -> int:
    """Return the largest resident size of a run's process, in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "agentrl", "train", *arguments, f"run.folder={folder}"]
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed with status {status}")
    return usage.ru_maxrss * 1024


def main() -> None:
    """Plan and run every case, and print a row for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("arguments", nargs="+", metavar="CONFIG [key=value]")
    parser.add_argument("--case", action="append", choices=CASES, help="only this case; may be repeated")
    parser.add_argument("--tolerance", type=float, default=0.15)
    options = parser.parse_args()
    far = []
    for case in options.case or CASES:
        arguments = [*options.arguments, *SHORT, *CASES[case]]
        plan, peak = planned(arguments), measured(arguments)
        print(
            f"{case}: planned {decimal(plan)}, measured {decimal(peak)}, ratio {plan / peak:.2f}", flush=True
        )
        far += [case] * (abs(plan / peak - 1) > options.tolerance)
    if far:
        raise SystemExit(f"further than {options.tolerance:.0%} from the plan: {', '.join(far)}")


if __name__ == "__main__":
    main()
