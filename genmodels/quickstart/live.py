"""The stream that a quickstart writes to: it never falls silent for long."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from genmodels.metrics import duration


class Live:
  """A text stream that says what is going on whenever nothing else was written for a while.

  Compilation, evaluation and sampling have no progress of their own; after `every` seconds of silence
  (1 on a terminal, where the line is rewritten in place, and never over a line that somebody else is
  rewriting) a line names the stage and its age.

  Args:
    out: the stream underneath; default stderr.
    every: seconds of silence before a line.
    clock: monotonic seconds.
  """

  def __init__(self, out: Any = None, every: float = 10.0, clock: Callable[[], float] = time.monotonic):
    self._out = sys.stderr if out is None else out
    self._terminal = self._out.isatty()
    self._every, self._clock = (1.0 if self._terminal else every), clock
    self._lock, self._stop = threading.Lock(), threading.Event()
    self._what, self._since, self._last, self._open, self._others = "", clock(), clock(), False, False
    self._thread = threading.Thread(target=self._watch, daemon=True)

  def __enter__(self) -> Live:
    self._thread.start()
    return self

  def __exit__(self, *error) -> None:
    self._stop.set()
    self._thread.join()
    with self._lock:
      self._clear()

  def stage(self, what: str, title: str = "") -> None:
    """What goes on from now on; a title is printed at once."""
    self._what, self._since = what, self._clock()
    if title:
      self.write(title + "\n")

  def isatty(self) -> bool:
    return self._terminal

  def write(self, text: str) -> int:
    with self._lock:
      self._clear()
      self._out.write(text)
      self._out.flush()
      self._last, self._others = self._clock(), self._terminal and not text.endswith("\n")
    return len(text)

  def flush(self) -> None:
    self._out.flush()

  def beat(self) -> None:
    """Writes the line if it is due."""
    with self._lock:
      now = self._clock()
      if now - self._last < self._every or not self._what or self._others:
        return
      line = f"  … {self._what}, {duration(now - self._since)}"
      self._out.write(f"\r{line}\x1b[K" if self._terminal else line + "\n")
      self._out.flush()
      self._open = self._terminal
      if not self._terminal:
        self._last = now

  def _clear(self) -> None:
    if self._open:
      self._out.write("\r\x1b[K")
      self._open = False

  def _watch(self) -> None:
    while not self._stop.wait(0.5):
      self.beat()
