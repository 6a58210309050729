"""What a person sees of a run: a live display on a terminal, plain lines everywhere else."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from rich.console import Console as RichConsole
from rich.console import Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from ember_ray.tracking.console_text import final_lines, live_line, one_line, round_header, round_line
from ember_ray.tracking.samples import ChangedSample

_PLAIN_EVERY_S = 10.0


class Activity:
    """What runs right now: a stage of the set-up or a phase of a round.

    Attributes:
        name: what it is called.
        seconds: how long it took; final once its block is left.
    """

    def __init__(self, name: str, total: int | None) -> None:
        self.name = name
        self.total = total
        self.done = 0
        self.remark = ""
        self.seconds = 0.0
        self.started = time.monotonic()
        self.told = self.started

    def note(self, text: str) -> None:
        """A remark for the line that stays when the activity is over, e.g. a size or an address."""
        self.remark = text


class Console:
    """Shows a run; use it as a context manager, so that the terminal is left in order whatever happens.

    On a terminal: finished steps stay as lines, below them a bar over the rounds, the running phase with
    its own progress, and a line of the newest numbers. Elsewhere (a pipe, a file, a dumb terminal):
    one plain line an event, and one every ten seconds from a long phase.

    Methods may be called from any thread. ``seconds`` holds the time of every activity by its name.
    """

    def __init__(self, file: IO[str] | None = None, interactive: bool | None = None) -> None:
        """Args:
        file: where to write; None is standard output.
        interactive: None finds out whether it is a terminal.
        """
        out = file or sys.stdout
        dumb = RichConsole(file=out).is_dumb_terminal
        self.interactive = (out.isatty() and not dumb) if interactive is None else interactive
        # A pipe has no width: lines stay whole, so that they can be searched.
        self._rich = RichConsole(
            file=out,
            highlight=False,
            markup=False,
            emoji=False,
            force_terminal=self.interactive or None,
            width=None if self.interactive else 100,
            soft_wrap=not self.interactive,
        )
        unicode = (getattr(out, "encoding", None) or "ascii").lower().startswith("utf")
        self._tick = "✓" if unicode else "*"
        self.seconds: dict[str, float] = {}
        self._lock = threading.RLock()
        self._stack: list[tuple[Activity, TaskID | None]] = []
        self._numbers: dict[str, Any] = {}
        self._rounds_total = 0
        self._rounds_done = 0
        self._live: Live | None = None
        self._rounds: Progress | None = None
        self._phases = Progress(
            TextColumn(" "),
            SpinnerColumn("dots" if unicode else "line"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(),
            console=self._rich,
        )

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Takes the live display down; what is printed stays."""
        with self._lock:
            if self._live is not None:
                self._live.stop()
                self._live = None

    def title(self, text: str, detail: str = "") -> None:
        """The first line."""
        with self._lock:
            self._print(Text.assemble((text, "bold"), ("  " + detail if detail else "", "dim")))

    def info(self, text: str) -> None:
        """A line that stays."""
        with self._lock:
            self._print(Text("  " + text))

    @contextmanager
    def stage(self, name: str) -> Iterator[Activity]:
        """A step of the set-up or the end: a spinner while it runs, then a line with its seconds that stays."""
        with self._activity(name, None) as activity:
            yield activity
        self._finished(activity)

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[Activity]:
        """What a round is doing now (evaluating, rollout, learning, publishing); a line stays outside rounds only.

        Args:
            name: as people should read it; ``seconds`` adds up under it.
            total: steps that ``advance`` counts, None when they cannot be told.
        """
        with self._activity(name, total) as activity:
            yield activity
        if not self._in_rounds:
            self._finished(activity)

    def advance(self, count: int = 1) -> None:
        """So many more steps of the running phase are done."""
        with self._lock:
            if not self._stack:
                return
            activity, task = self._stack[-1]
            activity.done += count
            if task is not None:
                self._phases.update(task, advance=count, count=self._count(activity))
            elif activity.total and time.monotonic() - activity.told >= _PLAIN_EVERY_S:
                activity.told = time.monotonic()
                self._print(Text(f"  {self._label(activity.name)} {self._count(activity)}"))

    def update(self, numbers: Mapping[str, Any]) -> None:
        """Newest numbers for the live line; see ``round_done`` for the names."""
        with self._lock:
            self._numbers.update(numbers)
            self._refresh()

    def start_rounds(self, total: int, done: int = 0) -> None:
        """Begins the bar over the rounds, of which some may be done already."""
        with self._lock:
            self._rounds_total, self._rounds_done = total, done
            self._print(Text(round_header(), "bold"))
            if self.interactive:
                self._rounds = Progress(
                    TextColumn("   rounds"),
                    BarColumn(bar_width=32),
                    MofNCompleteColumn(),
                    TimeElapsedColumn(),
                    TextColumn("left"),
                    TimeRemainingColumn(),
                    console=self._rich,
                )
                self._rounds.add_task("rounds", total=total, completed=done)
                self._refresh()

    def round_done(self, numbers: Mapping[str, Any]) -> None:
        """A round is over: its line stays.

        Args:
            numbers: of ``reward``, ``exact_match``, ``tokens_per_second``, ``prefix_hit_rate``,
                ``policy_version``, ``pairs``, ``seconds/round`` those that there are; others are left alone.
        """
        with self._lock:
            self._rounds_done += 1
            self._numbers.update(numbers)
            self._print(Text(round_line(self._rounds_done, self._rounds_total, numbers)))
            if self._rounds is not None:
                self._rounds.advance(self._rounds.task_ids[0])
            if self._rounds_done >= self._rounds_total:
                self._rounds = None
            self._refresh()

    def final(
        self,
        summary: Mapping[str, Any],
        changed: Sequence[ChangedSample],
        run_dir: str | Path,
        files: Mapping[str, str],
    ) -> None:
        """The end of a run: before and after, three samples that changed, and where everything is.

        Args:
            summary: what ``summary.build_summary`` made.
            changed: samples to show (see ``samples.draw``).
            run_dir: the run folder.
            files: from ``RunFolder.files``.
        """
        self.close()
        width = min(self._rich.width, 100)
        for line in final_lines(summary, changed, Path(run_dir), files, width):
            self._rich.print(line)

    @property
    def _in_rounds(self) -> bool:
        return 0 < self._rounds_total and self._rounds_done < self._rounds_total

    @contextmanager
    def _activity(self, name: str, total: int | None) -> Iterator[Activity]:
        activity = Activity(name, total)
        with self._lock:
            task = None
            if self.interactive:
                task = self._phases.add_task(self._label(name), total=total, count=self._count(activity))
            else:
                self._print(Text(f"  {self._label(name)} ..."))
            self._stack.append((activity, task))
            self._refresh()
        try:
            yield activity
        finally:
            with self._lock:
                activity.seconds = time.monotonic() - activity.started
                self.seconds[name] = self.seconds.get(name, 0.0) + activity.seconds
                self._stack.remove((activity, task))
                if task is not None:
                    self._phases.remove_task(task)
                self._refresh()

    def _finished(self, activity: Activity) -> None:
        with self._lock:
            line = Text.assemble(
                (f"  {self._tick} ", "green"), f"{one_line(activity.name):<26} {activity.seconds:6.1f} s"
            )
            if activity.remark:
                line.append(f"  {one_line(activity.remark)}", "dim")
            self._print(line)

    def _label(self, name: str) -> str:
        return f"round {self._rounds_done + 1}/{self._rounds_total}: {name}" if self._in_rounds else name

    @staticmethod
    def _count(activity: Activity) -> str:
        return f"{activity.done:,}/{activity.total:,}" if activity.total else ""

    def _print(self, line: Text) -> None:
        self._rich.print(line)

    def _refresh(self) -> None:
        """Draws the live part anew; starts it with the first activity."""
        if not self.interactive:
            return
        parts: list[Any] = [] if self._rounds is None else [self._rounds]
        if self._stack:
            parts.append(self._phases)
        if self._rounds is not None and self._numbers:
            parts.append(Text("    " + live_line(self._numbers), "cyan", no_wrap=True, overflow="ellipsis"))
        if self._live is None:
            self._live = Live(Group(*parts), console=self._rich, refresh_per_second=8, transient=True)
            self._live.start()
        else:
            self._live.update(Group(*parts))
