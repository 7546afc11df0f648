"""Rows -> markdown."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks import rows as rows_of
from benchmarks.rows import middle
from benchmarks.scoring.peers import ALL, Peer
from benchmarks.scoring.run import Row

SOME = 1000


class Results:
    """Rows of all rounds, asked for by competitor; of each its fastest setting counts."""

    def __init__(self, rows: Sequence[Row]) -> None:
        """`rows`: of any rounds."""
        self.rows = rows
        self.peers = [peer for peer in ALL.values() if any(row.peer == peer.name for row in rows)]

    def settings(self, peer: str) -> dict[str, list[Row]]:
        """Rows of every setting."""
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            if row.peer == peer:
                found.setdefault(row.setting, []).append(row)
        return found

    def fastest(self, peer: str) -> str:
        """The setting with the most images a second, by its median."""
        settings = self.settings(peer)
        return max(settings, key=lambda name: middle(settings[name], lambda row: row.rate))

    def of(self, peer: str) -> list[Row]:
        """Of the fastest setting."""
        return self.settings(peer)[self.fastest(peer)]


def markdown(rows: Sequence[Row], fastest: str) -> str:
    """Everything that can be said of the rows so far. `fastest`: what `default` stands for."""
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
    parts += [_against(results, name, fastest) for name in ("fledge-fp32", "fledge")]
    return "\n\n".join(part for part in parts if part)


def _table(results: Results, peers: Sequence[Peer]) -> str:
    lines = [
        "| | rounds | images/s | start, s | 1,000 photos, s | CPU ms an image | peak MB "
        "| other labels |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for peer in peers:
        mine = results.of(peer.name)
        others, answers = sum(row.others for row in mine), sum(row.images for row in mine)
        cells = [
            *(peer.title, str(len(mine))),
            f"{middle(mine, lambda row: row.rate):.0f}",
            f"{middle(mine, lambda row: row.start):.1f}",
            f"{middle(mine, lambda row: row.start + SOME / row.rate):.1f}",
            f"{middle(mine, lambda row: row.cpu_ms):.2f}",
            f"{max(row.peak for row in mine):.0f}",
            f"{100 * others / answers:.1f} %" if others else "0",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _settings(results: Results, fastest: str) -> str:
    """Where there was a choice: all that was tried."""
    lines = []
    for peer in results.peers:
        tried, best = results.settings(peer.name), results.fastest(peer.name)
        if len(tried) > 1:
            told = "; ".join(
                f"{'**' * (name == best)}{name}: {middle(rows, lambda row: row.rate):.0f}"
                f"{'**' * (name == best)}"
                for name, rows in tried.items()
            )
            lines.append(f"- {_told(peer, fastest)}: {told}")
    heading = "Settings tried, images/s; the fastest is in the table:"
    return "\n".join([heading, "", *lines]) if lines else ""


def _against(results: Results, name: str, fastest: str) -> str:
    """Ratios within each round: median and range."""
    here = [peer.name for peer in results.peers]
    others = [
        peer
        for peer in results.peers
        if not peer.name.startswith("fledge")
        # What is compared with the like of it: the default with everybody, a limit with its own.
        and (peer.precision == ALL[name].precision or (name == "fledge" and not peer.limit))
    ]
    if name not in here or not others:
        return ""
    mine = results.of(name)
    lines = [
        f"Fledge{' in fp32' if name == 'fledge-fp32' else ' by default'} to each, ratios within a "
        "round, median (range):",
        "",
        "| to | images/s | 1,000 photos, s | CPU an image | peak memory |",
        "|---|---:|---:|---:|---:|",
    ]
    for peer in others:
        theirs = results.of(peer.name)
        cells = [
            rows_of.ratio(
                {row.round: what(row) for row in mine}, {r.round: what(r) for r in theirs}
            )
            for what in (
                lambda row: row.rate,
                lambda row: row.start + SOME / row.rate,
                lambda row: row.cpu_ms,
                lambda row: row.peak,
            )
        ]
        lines.append(f"| {_told(peer, fastest)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _told(peer: Peer, fastest: str) -> str:
    return f"{peer.title}, {fastest if peer.precision == 'default' else 'fp32'}"
