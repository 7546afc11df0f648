"""Markdown tables of a scoring race."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.results import format_rate, format_ratio, median_of, other_labels
from benchmarks.scoring.measurement import Row
from benchmarks.scoring.peers import PEERS, Peer

PHOTOS = 1000
"""Number of photos in the column of whole jobs."""


class Results:
    """Rows of all rounds by competitor, with its fastest setting."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        self.peers = [peer for peer in PEERS.values() if any(row.peer == peer.name for row in rows)]

    def settings(self, peer: str) -> dict[str, list[Row]]:
        """Rows of a competitor by setting."""
        rows: dict[str, list[Row]] = {}
        for row in self.rows:
            if row.peer == peer:
                rows.setdefault(row.setting, []).append(row)
        return rows

    def fastest(self, peer: str) -> str:
        """The setting with the highest median rate."""
        settings = self.settings(peer)
        return max(settings, key=lambda name: median_of(settings[name], lambda row: row.rate))

    def of(self, peer: str) -> list[Row]:
        """Rows of a competitor in its fastest setting."""
        return self.settings(peer)[self.fastest(peer)]


def markdown(rows: Sequence[Row], fastest: str) -> str:
    """All tables of the rows so far. `fastest`: the precision that `default` stands for."""
    results = Results(rows)
    parts = []
    for group, heading in (
        ("fp32", "fp32, the same network on all sides:"),
        ("default", f"Fledge's default, here {fastest}; no competitor has it:"),
    ):
        peers = [peer for peer in results.peers if peer.precision == group]
        if peers:
            parts.append(f"{heading}\n\n{_table(results, peers)}")
    parts.append("Medians of the rounds.")
    parts.append(_settings(results, fastest))
    parts += [_comparison(results, name, fastest) for name in ("fledge-fp32", "fledge")]
    return "\n\n".join(part for part in parts if part)


def _table(results: Results, peers: Sequence[Peer]) -> str:
    lines = [
        "| | rounds | images/s | start, s | 1,000 photos, s | CPU ms per image | peak MB "
        "| other labels |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for peer in peers:
        rows = results.of(peer.name)
        cells = [
            *(peer.title, str(len(rows))),
            format_rate(median_of(rows, lambda row: row.rate)),
            f"{median_of(rows, lambda row: row.start):.1f}",
            f"{median_of(rows, lambda row: row.start + PHOTOS / row.rate):.1f}",
            f"{median_of(rows, lambda row: row.cpu_ms):.2f}",
            f"{max(row.peak for row in rows):.0f}",
            other_labels(rows),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _settings(results: Results, fastest: str) -> str:
    """The rate of every setting, for competitors with several."""
    lines = []
    for peer in results.peers:
        tried, best = results.settings(peer.name), results.fastest(peer.name)
        if len(tried) > 1:
            line = "; ".join(
                f"{'**' * (name == best)}{name}: "
                f"{format_rate(median_of(rows, lambda row: row.rate))}{'**' * (name == best)}"
                for name, rows in tried.items()
            )
            lines.append(f"- {_title(peer, fastest)}: {line}")
    heading = "Settings tried, images/s; the fastest is in the table:"
    return "\n".join([heading, "", *lines]) if lines else ""


def _comparison(results: Results, name: str, fastest: str) -> str:
    """Ratios of Fledge to each competitor within a round: median and range."""
    here = [peer.name for peer in results.peers]
    others = [
        peer
        for peer in results.peers
        if not peer.name.startswith("fledge")
        # The default precision is compared with all competitors, a limit with its own precision.
        and (peer.precision == PEERS[name].precision or (name == "fledge" and not peer.limit))
    ]
    if name not in here or not others:
        return ""
    ours = results.of(name)
    lines = [
        f"Ratios of Fledge {'in fp32' if name == 'fledge-fp32' else 'by default'} to each within a "
        "round, median (range):",
        "",
        "| to | images/s | 1,000 photos, s | CPU per image | peak memory |",
        "|---|---:|---:|---:|---:|",
    ]
    for peer in others:
        theirs = results.of(peer.name)
        cells = [
            format_ratio(
                {row.round: value(row) for row in ours}, {row.round: value(row) for row in theirs}
            )
            for value in (
                lambda row: row.rate,
                lambda row: row.start + PHOTOS / row.rate,
                lambda row: row.cpu_ms,
                lambda row: row.peak,
            )
        ]
        lines.append(f"| {_title(peer, fastest)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _title(peer: Peer, fastest: str) -> str:
    return f"{peer.title}, {fastest if peer.precision == 'default' else 'fp32'}"
