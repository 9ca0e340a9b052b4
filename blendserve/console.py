"""What a command shows a person: progress on stderr, results on stdout."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import rich.console
import rich.progress
import rich.table

from blendserve.doctor import Finding
from blendserve.engine_process import Progress
from blendserve.report.number_format import format_ratio

_SUMMARY_LABELS = {
    "num_requests": "requests to run",
    "num_duplicates": "answered by an equal request",
    "num_prompt_tokens": "prompt tokens",
    "estimated_output_tokens": "output tokens, estimated",
    "prefix_sharing_optimal": "prefix sharing possible",
    "prefix_sharing": "prefix sharing kept",
    "density": "compute density",
    "density_left": "density at the compute-heavy end",
    "density_right": "density at the memory-heavy end",
    "predicted_seconds": "predicted seconds, all devices together",
    "overlapped_seconds": "the same at perfect overlap",
    "real_seconds": "real seconds",
    "num_shards": "shards",
    "hardware": "hardware",
}
_COST_LABELS = {"device_hours": "device hours", "cost": "cost"}
_SHOWN_CHARACTERS = 160
_TABLE_WIDTH = 120
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f]")


@dataclass(frozen=True, slots=True)
class Console:
    """`is_quiet` leaves stdout to the command's JSON line."""

    is_quiet: bool = False

    @property
    def _out(self) -> rich.console.Console:
        return _plain_console(quiet=self.is_quiet, soft_wrap=True)

    @property
    def _err(self) -> rich.console.Console:
        return _plain_console(stderr=True, soft_wrap=True)

    def say(self, text: str) -> None:
        self._out.print(text)

    def error(self, text: str) -> None:
        self._err.print(text)

    def step(self, name: str, result: dict[str, Any]) -> None:
        """One line for a finished step; a table for the plan."""
        if name == "plan":
            self._out.print(plan_table(result))
            for warning in result.get("warnings", ()):
                self.error(f"warning: {warning}")
            return
        shown = ", ".join(f"{key} {value}" for key, value in result.items() if isinstance(value, (int, float, str)))
        self._err.print(f"{name}: {shown}")

    @contextmanager
    def progress(self) -> Iterator[Callable[[Progress], None]]:
        """A bar on stderr that the engine's progress messages move."""
        columns = (
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TextColumn("{task.fields[rate]}"),
            rich.progress.TimeElapsedColumn(),
        )
        with rich.progress.Progress(*columns, console=self._err, transient=True) as bar:
            task = bar.add_task("requests", total=None, rate="", visible=False)

            latest: dict[int, Progress] = {}  # by shard: several may run side by side

            def on_progress(message: Progress) -> None:
                latest[message["shard"]] = message
                running = [shard for shard in latest.values() if shard["done"] < shard["total"]] or [message]
                done, total = (sum(shard[name] for shard in running) for name in ("done", "total"))
                rate = sum(shard["tokens_per_second"] for shard in running)
                bar.update(task, visible=True, completed=done, total=total, rate=f"{rate:,.0f} tokens/s")

            yield on_progress

    def results(self, rows: list[dict[str, Any]]) -> None:
        """Some result rows, long texts cut."""
        table = rich.table.Table("request", "finish", "tokens in / cached / out", "completion", title="Results")
        for row in rows:
            tokens = [row[f"num_{name}_tokens"] for name in ("prompt", "cached", "completion")]
            text = " ".join((row["completion"] or row["error"] or "").split())
            text = text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"
            shown = [_without_controls(text) for text in (row["request_id"], text)]
            table.add_row(shown[0], row["finish_reason"], " / ".join(map(str, tokens)), shown[1])
        _plain_console(quiet=self.is_quiet, width=_TABLE_WIDTH).print(table)

    def finished(self, manifest: dict[str, Any], place: str) -> None:
        """Counts, tokens, and where everything is: in the folder or at the URL `place`."""
        counts = manifest["counts"]
        if manifest.get("already_done"):
            self.say("This job is finished already: nothing was run. Give --force to run it again.")
        table = rich.table.Table(title="Job finished", show_header=False)
        for label, value in counts.items():
            table.add_row(label.replace("_", " "), f"{value:,}")
        for label, value in manifest["tokens"].items():
            table.add_row(label.removeprefix("num_").replace("_", " "), f"{value:,}")
        self._out.print(table)
        for label, name in (("results", "results"), ("report", "report.html")):  # in the table they would be cut
            self.say(f"{label}: {place}/{name}")

    def simulation(self, found: dict[str, Any]) -> None:
        """What each policy takes, and the bound that none can beat."""
        columns = ["policy", "seconds", "tokens/s", "sharing", "preemptions"]
        costs = [name for name in _COST_LABELS if all(name in run for run in found["policies"].values())]
        table = rich.table.Table(*columns, *(_COST_LABELS[name] for name in costs), title="Simulation")
        for policy, run in found["policies"].items():
            sharing = f"{run['prefix_sharing']:.1%}"
            rate = f"{run['tokens_per_second']:,.0f}"
            shown = [format_ratio(run["seconds"]), rate, sharing, f"{run['num_preemptions']:,}"]
            table.add_row(policy, *shown, *(format_ratio(run[name]) for name in costs))
        table.add_row("bound", format_ratio(found["bound_seconds"]), "", f"{found['prefix_sharing_optimal']:.1%}", "")
        self._out.print(table)

    def findings(self, findings: list[Finding]) -> None:
        table = rich.table.Table("", "what", "found", "what to do")
        for finding in findings:
            mark = "ok" if finding.is_fine else ("missing" if finding.is_required else "optional")
            table.add_row(mark, finding.what, finding.found, "" if finding.is_fine else finding.remedy)
        self._out.print(table)


def _plain_console(**options: Any) -> rich.console.Console:
    """One that takes nothing in ids, texts and names of folders for marks of its own."""
    return rich.console.Console(markup=False, emoji=False, highlight=False, **options)


def _without_controls(text: str) -> str:
    """What of a row's text may go to a terminal, which would obey the rest."""
    return _CONTROLS.sub("\ufffd", text)


def plan_table(summary: dict[str, Any]) -> rich.table.Table:
    """The plan's summary, one quantity a row."""
    table = rich.table.Table(title="Plan", show_header=False)
    for key, label in _SUMMARY_LABELS.items():
        if key in summary:
            table.add_row(label, _shown(key, summary[key]))
    return table


def _shown(key: str, value: object) -> str:
    if isinstance(value, float):
        return f"{value:.1%}" if key.startswith("prefix_sharing") else format_ratio(value)
    return f"{value:,}" if isinstance(value, int) else str(value)
