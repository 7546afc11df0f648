"""Rows -> markdown and a picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from benchmarks import rows as rows_of
from benchmarks.rows import middle
from benchmarks.serving.peers import ALL, Peer
from benchmarks.serving.run import Row

OURS: Final = "#1f5a85"
THEIRS: Final = "#7a7a7a"
LIMIT: Final = "#c9c2ae"


class Results:
    """Rows of all rounds, asked for by competitor; of each its fastest setting counts."""

    def __init__(self, rows: Sequence[Row]) -> None:
        """`rows`: of any rounds; what is only half there is not asked for."""
        self.rows = rows
        self.callers = sorted({row.callers for row in rows})
        self.many = self.callers[-1]
        self.peers = [p for p in ALL.values() if any(row.peer == p.name for row in rows)]

    def of(self, peer: str, callers: int, setting: str | None = None) -> list[Row]:
        """Of the fastest setting, or of the one that is named."""
        wanted = setting or self.fastest(peer)
        return [
            row
            for row in self.rows
            if (row.peer, row.setting, row.callers) == (peer, wanted, callers)
        ]

    def fastest(self, peer: str) -> str:
        """The setting with the most answers a second for many callers, by its median."""
        settings = dict.fromkeys(row.setting for row in self.rows if row.peer == peer)
        return max(
            settings, key=lambda name: middle(self.of(peer, self.many, name), lambda r: r.rps)
        )

    def settings(self, peer: str) -> dict[str, float]:
        """Answers a second for many callers, of every setting."""
        names = dict.fromkeys(row.setting for row in self.rows if row.peer == peer)
        return {name: middle(self.of(peer, self.many, name), lambda r: r.rps) for name in names}


def markdown(rows: Sequence[Row], precision: str) -> str:
    """Everything that can be said of the rows so far. `precision`: what `default` stands for."""
    results = Results(rows)
    parts = []
    for group, heading in (
        ("fp32", "fp32, the same network on all sides:"),
        ("default", f"Fledge's default, here {precision}; no competitor has it:"),
    ):
        peers = [peer for peer in results.peers if peer.precision == group]
        if peers:
            parts.append(f"{heading}\n\n{_table(results, peers)}")
    parts.append(_callers_cost(results))
    parts.append(_settings(results))
    parts += [_against(results, name, precision) for name in ("fledge-fp32", "fledge")]
    return "\n\n".join(part for part in parts if part)


def _table(results: Results, peers: Sequence[Peer]) -> str:
    heads = [f"{_callers(n)}: rps | p50 ms | p99 ms" for n in results.callers]
    tail = "CPU ms a request | MB at rest, peak | ready after s | errors | other labels"
    columns = 3 * len(heads) + 5
    lines = [f"| | {' | '.join(heads)} | {tail} |", f"|---|{'---:|' * columns}"]
    for peer in peers:
        cells = [peer.title]
        for callers in results.callers:
            mine = results.of(peer.name, callers)
            cells += [
                f"{middle(mine, lambda r: r.rps):.0f}",
                f"{middle(mine, lambda r: r.p50):.1f}",
                f"{middle(mine, lambda r: r.p99):.1f}",
            ]
        both = [row for callers in results.callers for row in results.of(peer.name, callers)]
        most = results.of(peer.name, results.many)
        cells.append(f"{middle(most, lambda r: r.cpu):.2f}")
        if peer.limit:
            cells += ["", "", "", ""]
        else:
            peak = max(row.peak for row in both)
            answers = sum(row.answers for row in both)
            others = sum(row.others for row in both)
            cells += [
                f"{middle(most, lambda r: r.rest):.0f}, {peak:.0f}",
                f"{middle(most, lambda r: r.start):.1f}",
                str(sum(row.errors for row in both)),
                f"{100 * others / max(1, answers):.1f} %" if others else "0",
            ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _callers(count: int) -> str:
    return "1 caller" if count == 1 else f"{count} callers"


def _callers_cost(results: Results) -> str:
    """What the load generator itself took."""
    peers = [peer.name for peer in results.peers if not peer.limit]
    costs = sorted(middle(results.of(name, results.many), lambda r: r.own_cpu) for name in peers)
    rounds = len({row.round for row in results.rows})
    told = f"Medians of {rounds} rounds." if rounds > 1 else "One round."
    if costs:
        told += (
            f" The callers themselves took {costs[0]:.2f} to {costs[-1]:.2f} ms of the processor "
            f"a request where there were {results.many}, on the same cores."
        )
    return told


def _settings(results: Results) -> str:
    """Where there was a choice: all that was tried."""
    lines = []
    for peer in results.peers:
        tried = results.settings(peer.name)
        if len(tried) > 1:
            best = results.fastest(peer.name)
            told = "; ".join(
                f"{'**' * (name == best)}{name}: {rps:.0f}{'**' * (name == best)}"
                for name, rps in tried.items()
            )
            lines.append(f"- {peer.title}: {told}")
    if not lines:
        return ""
    heading = (
        f"Settings tried, requests/s of {_callers(results.many)}; the fastest is in the table:"
    )
    return "\n".join([heading, "", *lines])


def _against(results: Results, name: str, precision: str) -> str:
    """Ratios within each round: median and range."""
    here = [peer.name for peer in results.peers]
    # What is compared with the like of it: the default with everybody, fp32 with fp32.
    others = [
        peer
        for peer in results.peers
        if not peer.name.startswith("fledge") and (peer.precision == "fp32" or name == "fledge")
    ]
    if name not in here or not others:
        return ""
    used = "fp32" if name == "fledge-fp32" else f"its default, {precision},"
    heads = " | ".join(f"rps, {_callers(n)}" for n in results.callers)
    many = _callers(results.many)
    lines = [
        f"Fledge in {used} to each, ratios within a round, median (range):",
        "",
        f"| to | {heads} | p99, {many} | CPU a request, {many} |",
        f"|---|{'---:|' * (len(results.callers) + 2)}",
    ]
    for peer in others:
        cells = [_told(peer, precision)]
        cells += [ratio(results, name, peer.name, n, lambda r: r.rps) for n in results.callers]
        # A turn of a loop is no latency of a service.
        late = "" if peer.limit else ratio(results, name, peer.name, results.many, lambda r: r.p99)
        cells.append(late)
        cells.append(ratio(results, name, peer.name, results.many, lambda r: r.cpu))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _told(peer: Peer, precision: str) -> str:
    return f"{peer.title}, {precision if peer.precision == 'default' else 'fp32'}"


def ratio(
    results: Results, ours: str, theirs: str, callers: int, what: Callable[[Row], float]
) -> str:
    """Ours over theirs in the rounds that have both: the median, and the range of several."""
    mine = {row.round: what(row) for row in results.of(ours, callers)}
    other = {row.round: what(row) for row in results.of(theirs, callers)}
    return rows_of.ratio(mine, other)


def picture(rows: Sequence[Row], path: Path, title: str, precision: str) -> None:
    """Requests a second and the 99th percentile for many callers, a bar each. PNG or SVG."""
    import matplotlib
    from matplotlib.figure import Figure

    results = Results(rows)
    peers = results.peers[::-1]
    names = [_told(peer, precision).replace("*", "") for peer in peers]
    colours = [
        LIMIT if peer.limit else OURS if peer.name.startswith("fledge") else THEIRS
        for peer in peers
    ]
    with matplotlib.rc_context({"font.size": 13, "svg.hashsalt": "fledge"}):
        figure = Figure(figsize=(10, 1.4 + 0.42 * len(peers)), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        for axes, what, label in (
            (left, lambda r: r.rps, f"requests/s, {_callers(results.many)}"),
            (right, lambda r: r.p99, "99th percentile, ms"),
        ):
            values = [
                0.0
                if peer.limit and axes is right
                else middle(results.of(peer.name, results.many), what)
                for peer in peers
            ]
            bars = axes.barh(names, values, color=colours)
            told = [f"{value:.0f}" if value else "" for value in values]
            axes.bar_label(bars, told, padding=3, fontsize=11)
            axes.set_xlim(0, 1.25 * max(values))
            axes.set_xlabel(label)
            axes.spines[["top", "right"]].set_visible(False)
        figure.suptitle(title, x=0.01, ha="left", fontsize=13)
        figure.savefig(path, dpi=110)
