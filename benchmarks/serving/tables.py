"""Markdown tables and the picture of a serving race."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from benchmarks.results import format_rate, format_ratio, median_of, other_labels
from benchmarks.serving.measurement import Row
from benchmarks.serving.peers import PEERS, Peer

OURS: Final = "#1f5a85"
THEIRS: Final = "#7a7a7a"
LIMIT: Final = "#c9c2ae"


class Results:
    """Rows of all rounds by competitor, with its fastest setting."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        self.callers = sorted({row.callers for row in rows})
        self.most_callers = self.callers[-1]
        self.peers = [p for p in PEERS.values() if any(row.peer == p.name for row in rows)]

    def of(self, peer: str, callers: int, setting: str | None = None) -> list[Row]:
        """Rows of a competitor in `setting`, or in its fastest one."""
        name = setting or self.fastest(peer)
        return [
            row
            for row in self.rows
            if (row.peer, row.setting, row.callers) == (peer, name, callers)
        ]

    def fastest(self, peer: str) -> str:
        """The setting with the highest median of rps, with the most callers."""
        settings = dict.fromkeys(row.setting for row in self.rows if row.peer == peer)
        return max(
            settings,
            key=lambda name: median_of(self.of(peer, self.most_callers, name), lambda r: r.rps),
        )

    def settings(self, peer: str) -> dict[str, float]:
        """Median of rps with the most callers, by setting."""
        names = dict.fromkeys(row.setting for row in self.rows if row.peer == peer)
        return {
            name: median_of(self.of(peer, self.most_callers, name), lambda r: r.rps)
            for name in names
        }


def markdown(rows: Sequence[Row], precision: str) -> str:
    """All tables of the rows so far. `precision`: what `default` stands for."""
    results = Results(rows)
    parts = []
    for group, heading in (
        ("fp32", "fp32, the same network on all sides:"),
        ("default", f"Fledge's default, here {precision}; no competitor has it:"),
    ):
        peers = [peer for peer in results.peers if peer.precision == group]
        if peers:
            parts.append(f"{heading}\n\n{_table(results, peers)}")
    parts.append(_load_generator_cost(results))
    parts.append(_settings(results))
    parts += [_comparison(results, name, precision) for name in ("fledge-fp32", "fledge")]
    return "\n\n".join(part for part in parts if part)


def _table(results: Results, peers: Sequence[Peer]) -> str:
    heads = [f"{_callers(n)}: rps | p50 ms | p99 ms" for n in results.callers]
    tail = "CPU ms per request | MB at rest, peak | ready after s | errors | other labels"
    columns = 3 * len(heads) + 5
    lines = [f"| | {' | '.join(heads)} | {tail} |", f"|---|{'---:|' * columns}"]
    for peer in peers:
        cells = [peer.title]
        for callers in results.callers:
            rows = results.of(peer.name, callers)
            cells += [
                format_rate(median_of(rows, lambda r: r.rps)),
                f"{median_of(rows, lambda r: r.p50):.1f}",
                f"{median_of(rows, lambda r: r.p99):.1f}",
            ]
        all_rows = [row for callers in results.callers for row in results.of(peer.name, callers)]
        busiest = results.of(peer.name, results.most_callers)
        cells.append(f"{median_of(busiest, lambda r: r.cpu):.2f}")
        if peer.limit:
            cells += ["", "", "", ""]
        else:
            peak = max(row.peak for row in all_rows)
            cells += [
                f"{median_of(busiest, lambda r: r.rest):.0f}, {peak:.0f}",
                f"{median_of(busiest, lambda r: r.start):.1f}",
                str(sum(row.errors for row in all_rows)),
                other_labels(all_rows),
            ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _callers(count: int) -> str:
    return "1 caller" if count == 1 else f"{count} callers"


def _load_generator_cost(results: Results) -> str:
    """CPU time of the load generator itself."""
    peers = [peer.name for peer in results.peers if not peer.limit]
    costs = sorted(
        median_of(results.of(name, results.most_callers), lambda r: r.own_cpu) for name in peers
    )
    rounds = len({row.round for row in results.rows})
    text = f"Medians of {rounds} rounds." if rounds > 1 else "One round."
    if costs:
        text += (
            f" The load generator took {costs[0]:.2f} to {costs[-1]:.2f} ms of CPU time "
            f"per request with {_callers(results.most_callers)}, on the same cores."
        )
    return text


def _settings(results: Results) -> str:
    """The rps of every setting, for competitors with several."""
    lines = []
    for peer in results.peers:
        tried = results.settings(peer.name)
        if len(tried) > 1:
            best = results.fastest(peer.name)
            line = "; ".join(
                f"{'**' * (name == best)}{name}: {format_rate(rps)}{'**' * (name == best)}"
                for name, rps in tried.items()
            )
            lines.append(f"- {peer.title}: {line}")
    if not lines:
        return ""
    callers = _callers(results.most_callers)
    heading = f"Settings tried, requests/s with {callers}; the fastest is in the table:"
    return "\n".join([heading, "", *lines])


def _comparison(results: Results, name: str, precision: str) -> str:
    """Ratios of Fledge to each competitor within a round: median and range."""
    here = [peer.name for peer in results.peers]
    # The default precision is compared with all competitors, fp32 with those in fp32.
    others = [
        peer
        for peer in results.peers
        if not peer.name.startswith("fledge") and (peer.precision == "fp32" or name == "fledge")
    ]
    if name not in here or not others:
        return ""
    used = "fp32" if name == "fledge-fp32" else f"its default, {precision},"
    heads = " | ".join(f"rps, {_callers(n)}" for n in results.callers)
    many = _callers(results.most_callers)
    lines = [
        f"Ratios of Fledge in {used} to each within a round, median (range):",
        "",
        f"| to | {heads} | p99, {many} | CPU per request, {many} |",
        f"|---|{'---:|' * (len(results.callers) + 2)}",
    ]
    for peer in others:
        cells = [_title(peer, precision)]
        cells += [ratio(results, name, peer.name, n, lambda r: r.rps) for n in results.callers]
        # The seconds of a loop iteration are not a service's latency.
        p99 = (
            ""
            if peer.limit
            else ratio(results, name, peer.name, results.most_callers, lambda r: r.p99)
        )
        cells.append(p99)
        cells.append(ratio(results, name, peer.name, results.most_callers, lambda r: r.cpu))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _title(peer: Peer, precision: str) -> str:
    return f"{peer.title}, {precision if peer.precision == 'default' else 'fp32'}"


def ratio(
    results: Results, ours: str, theirs: str, callers: int, value: Callable[[Row], float]
) -> str:
    """Ours over theirs in the rounds that have both: the median, and the range of several."""
    own = {row.round: value(row) for row in results.of(ours, callers)}
    other = {row.round: value(row) for row in results.of(theirs, callers)}
    return format_ratio(own, other)


def picture(rows: Sequence[Row], path: Path, title: str, precision: str) -> None:
    """Draw rps and p99 with the most callers as bars. PNG or SVG."""
    import matplotlib
    from matplotlib.figure import Figure

    results = Results(rows)
    peers = results.peers[::-1]
    names = [_title(peer, precision).replace("*", "") for peer in peers]
    colours = [
        LIMIT if peer.limit else OURS if peer.name.startswith("fledge") else THEIRS
        for peer in peers
    ]
    with matplotlib.rc_context({"font.size": 13, "svg.hashsalt": "fledge"}):
        figure = Figure(figsize=(10, 1.4 + 0.42 * len(peers)), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        for axes, value_of, label in (
            (left, lambda r: r.rps, f"requests/s, {_callers(results.most_callers)}"),
            (right, lambda r: r.p99, "99th percentile, ms"),
        ):
            values = [
                0.0
                if peer.limit and axes is right
                else median_of(results.of(peer.name, results.most_callers), value_of)
                for peer in peers
            ]
            bars = axes.barh(names, values, color=colours)
            texts = [f"{value:.0f}" if value else "" for value in values]
            axes.bar_label(bars, texts, padding=3, fontsize=11)
            axes.set_xlim(0, 1.25 * max(values))
            axes.set_xlabel(label)
            axes.spines[["top", "right"]].set_visible(False)
        figure.suptitle(title, x=0.01, ha="left", fontsize=13)
        figure.savefig(path, dpi=110)
