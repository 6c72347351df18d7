"""The tables of the diagnostics, made of the numbers that their files hold."""

from collections.abc import Mapping
from typing import Any

from agentrl.evaluation.diagnostics.findings import Findings, Numbers, number


def leash_findings(numbers: Numbers) -> Findings:
    """Return the table of a comparison."""
    names = {numbers["base"]: "base", numbers["trained"]: "trained"}
    rows, notes = [], [f"{kind}: {name}" for name, kind in names.items()]
    for label, panel in numbers["panels"].items():
        columns = panel["policies"].values()
        title = f"{label}: " if len(numbers["panels"]) > 1 else ""
        for k in next(iter(columns))["pass_at"]:
            rows.append((f"{title}pass@{k} %", *(_percent(own["pass_at"][k]) for own in columns)))
        for name in ("token_entropy", "answer_entropy"):
            rows.append((f"{title}{name.replace('_', ' ')}, nats", *(number(own[name]) for own in columns)))
        for what, support in panel["support"].items():
            counts = ", ".join(f"{support[name]} {name}" for name in ("kept", "gained", "lost"))
            rates = ", ".join(f"{name} {number(support[name])}" for name in ("SRR", "NDR", "SDS", "NSCR"))
            notes.append(f"{title}support in {what}: {counts}; {rates}")
        if panel["left_out"]:
            notes.append(f"{title}{panel['left_out']} tasks are left out: they have fewer plays than k")
    notes.append(
        f"within {numbers['k']} plays, a solution of probability {numbers['eps']:.3g} is missed with a "
        f"chance of {numbers['delta']:g}; one is a task with all actions of an episode that succeeded"
    )
    title = f"Support of the trained policy and its base, {numbers['k']} plays of each task"
    return Findings(title, ("", *names.values()), tuple(rows), tuple(notes))


def template_collapse_findings(numbers: Numbers) -> Findings:
    """Return the table of the numbers."""
    names = {
        "mutual_information": "MI",
        "most": "log N",
        "conditional_entropy": "H(Z|X)",
        "marginal_entropy": "H(Z)",
        "per_token": "MI / token",
        "z_score": "z",
    }
    rows = [
        (
            found["checkpoint"],
            *(number(found[key]) for key in names),
            f"{100 * found['retrieval_accuracy']:.1f} ({100 * found['chance']:.1f})",
        )
        for found in numbers["policies"]
    ]
    notes = [
        f"{found['checkpoint']}: {found['pairs']} replies to {found['prompts']} different prompts of "
        f"{found['episodes']}; Z is {_what(found)}"
        for found in numbers["policies"]
    ]
    notes.append("in nats of whole replies at temperature 1, over the whole vocabulary; MI is at most log N")
    columns = ("policy", *names.values(), "retrieval % (chance)")
    return Findings("Mutual information of prompts X and replies Z", columns, tuple(rows), tuple(notes))


def expert_entropy_findings(numbers: Numbers) -> Findings:
    """Return the table of the numbers."""
    names = {
        "first": "h_0, nats",
        "last": "h_K, nats",
        "total": "h_0 - h_K",
        "slope": "slope per turn",
        "decreasing": "decreasing steps",
    }
    outcomes: Mapping[str, Any] = numbers["outcomes"]
    rows = [
        ("episodes", *(str(own["episodes"]) for own in outcomes.values())),
        *((label, *(number(own[key]) for own in outcomes.values())) for key, label in names.items()),
    ]
    notes = [
        f"by {numbers['checkpoint']}, along {numbers['episodes']}; Y is the last action of the expert on the "
        "same task and seed; entropies are over the whole vocabulary"
    ]
    if numbers["left_out"]:
        notes.append(
            f"{numbers['left_out']} episodes are left out: the expert does not solve the task, or the "
            "context does not hold its last action"
        )
    title = "Entropy of the expert's last action along the turns of an episode"
    return Findings(title, ("mean over episodes", *outcomes), tuple(rows), tuple(notes))


def _percent(rate: Mapping[str, Any]) -> str:
    if rate["mean"] is None:
        return "–"
    low, high = rate["interval"]
    return f"{100 * rate['mean']:.1f} [{100 * low:.0f}, {100 * high:.0f}]"


def _what(found: Numbers) -> str:
    thoughts, pairs = found["with_thoughts"], found["pairs"]
    if not thoughts:
        return "the whole reply, since no reply holds thoughts"
    return (
        "the thoughts" if thoughts == pairs else f"the thoughts of {thoughts} replies, else the whole reply"
    )
