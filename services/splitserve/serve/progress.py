"""What a person sees while things start: a spinner on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Protocol, TextIO

if TYPE_CHECKING:
    from rich.status import Status


class Progress(Protocol):
    """Steps are named by a key, so that several can be under way."""

    def doing(self, key: str, text: str) -> None:
        """A step began, or moved on."""
        ...

    def done(self, key: str, text: str) -> None:
        """A step ended well."""
        ...

    def say(self, text: str) -> None:
        """A line that stays."""
        ...

    def close(self) -> None:
        """The end of the start, good or bad; `say` goes on to work."""
        ...


class PlainProgress:
    """One line an event, with the seconds since the start."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._began = time.monotonic()
        self._last: dict[str, str] = {}

    def doing(self, key: str, text: str) -> None:
        if self._last.get(key) != text:
            self._last[key] = text
            self.say(f"[{time.monotonic() - self._began:5.1f} s] {text}")

    def done(self, key: str, text: str) -> None:
        self.doing(key, text)

    def say(self, text: str) -> None:
        print(text, file=self._out, flush=True)

    def close(self) -> None:
        pass


class TerminalProgress:
    """Finished steps stay as lines; those under way stand behind one spinner below them."""

    def __init__(self, out: TextIO, *, force: bool = False) -> None:
        from rich.console import Console

        self._console = Console(file=out, force_terminal=force or None, highlight=False)
        self._doing: dict[str, tuple[str, float]] = {}
        self._status: Status | None = None

    def doing(self, key: str, text: str) -> None:
        began = self._doing[key][1] if key in self._doing else time.monotonic()
        self._doing[key] = (text, began)
        self._show()

    def done(self, key: str, text: str) -> None:
        began = self._doing.pop(key, ("", time.monotonic()))[1]
        self._console.print(f"[green]✓[/green] {text} [dim]{time.monotonic() - began:.1f} s[/dim]")
        self._show()

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    def close(self) -> None:
        self._doing.clear()
        self._show()

    def _show(self) -> None:
        if not self._doing:
            if self._status:
                self._status.stop()
            self._status = None
            return
        text = ", ".join(text for text, _ in self._doing.values())
        if self._status:
            self._status.update(text)
        else:
            self._status = self._console.status(text)
            self._status.start()


def progress_on(out: TextIO) -> Progress:
    """Rich on a terminal, plain lines elsewhere."""
    return TerminalProgress(out) if out.isatty() else PlainProgress(out)
