"""Results in Markdown: measurements for the terminal, predictions for docs/benchmarks.md."""

import textwrap
from typing import Any

from benchmarks.report import BUSY

# figures of the comparison; the others follow from them
CHECKED = {
    "env_steps_per_s": "env steps/s",
    "update_ms": "an update, ms",
    "update_p99_ms": "99 of 100 below",
    "compute_ms": "an iteration: computes, ms",
    "messages_ms": "messages",
    "waiting_ms": "waits for the other",
}
# numbers of ranks whose update times are shown
UPDATES_OF = (1, 8, 64)
MOST = 64
PAGE_WIDTH = 120


def messages_table(found: dict[str, Any]) -> str:
    """The cost of messages on this machine."""
    lines = [f"\nA hop over loopback takes {found['hop_us']:.0f} us; on top of it:\n"]
    lines += ["| call | fixed, us | MB/s | two ranks, median us by bytes |", "|---|---|---|---|"]
    for kind, cost in found["messages"].items():
        medians = ", ".join(f"{int(size):,}: {at['median']:.0f}" for size, at in cost["measured_us"].items())
        speed = f"{cost['mb_per_s']:,.0f}" if cost["mb_per_s"] else "-"
        lines.append(f"| {kind} | {cost['fixed_us']:.0f} | {speed} | {medians} |")
    return "\n".join(lines) + "\n"


def check_table(found: dict[str, Any]) -> str:
    """Two ranks, predicted and measured."""
    lines = ["\nTwo ranks on this machine, predicted / measured (error):\n"]
    lines += ["| | " + " | ".join(CHECKED.values()) + " |", "|---" * (len(CHECKED) + 1) + "|"]
    lacking = []
    for workload in found["workloads"].values():
        compared = [workload["check"][name] for name in CHECKED]
        cells = [f"{at['predicted']:.4g} / {at['measured']:.4g} ({at['error']:+.0%})" for at in compared]
        lines.append(f"| {workload['title']} | " + " | ".join(cells) + " |")
        had = min(workload["core_shares"])
        if had < BUSY:
            lacking.append(f"\n{workload['title']}: a rank alone had {had:.0%} of its core's time.")
    return "\n".join(lines + lacking) + "\n"


def markdown(found: dict[str, Any]) -> str:
    """The table of docs/benchmarks.md, a line per run and network, and the error of the prediction for two ranks."""
    worlds = list(next(iter(found["workloads"].values()))["predicted"][found["networks"][0]["name"]]["ranks"])
    head = ["ranks", "interconnect", *map(str, worlds), "efficiency below 50%", "communication, waiting", "update, ms"]
    lines = [_row(head), "|---" * len(head) + "|"]
    for workload in found["workloads"].values():
        title = workload["title"]
        for network, predicted in workload["predicted"].items():
            lines.append(_row([title, network, *_cells(predicted)]))
            title = ""
    return "\n".join([*lines, "", *_checks(found)]) + "\n"


def _cells(predicted: dict[str, Any]) -> list[str]:
    """Rates by number of ranks, where half is lost, the causes at 64 ranks, and the time of an update."""
    ranks = {int(world): row for world, row in predicted["ranks"].items()}
    rates = [f"{row['env_steps_per_s']:,.0f} ({row['efficiency']:.0%})" for row in ranks.values()]
    halved = f"from {predicted['halved_at']}" if predicted["halved_at"] else "never"
    lost = ", ".join(f"{ranks[MOST][part] / ranks[MOST]['iteration_ms']:.0%}" for part in ("messages_ms", "waiting_ms"))
    return [*rates, halved, lost, " / ".join(f"{ranks[world]['update_ms']:.3g}" for world in UPDATES_OF)]


def _checks(found: dict[str, Any]) -> list[str]:
    """The measured two ranks by run, wrapped like the page."""
    checks = [workload["check"] for workload in found["workloads"].values()]
    parts = []
    for name, unit, style in (("env_steps_per_s", "env steps/s", ",.0f"), ("update_ms", "ms an update", ".3g")):
        compared = [check[name] for check in checks]
        measured = " / ".join(f"{at['measured']:{style}}" for at in compared)
        errors = " / ".join(f"{at['error']:+.0%}" for at in compared)
        parts.append(f"{measured} {unit} (predicted: {errors})")
    text = f"Two real ranks on two cores made {parts[0]}, at {parts[1]}."
    return textwrap.wrap(text, PAGE_WIDTH, break_on_hyphens=False)


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
