"""Progress of long work: lines now and then, a bar on a terminal that other output does not break, and silence."""

import contextlib
import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
import types

import pytest

from taskexpert_jax import command_line, progress


@pytest.fixture
def clock(monkeypatch):
    """The time in seconds, as a list of one number that a test changes."""
    now = [1000.0]
    monkeypatch.setattr(progress, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    return now


def work(clock, seconds, total=654, count=8, **options):
    """Does all of the work, in batches of `count` that take as many seconds as given; the first one takes a minute."""
    with progress.Progress("evaluating", total, "examples", **options) as shown:
        for batch in range(-(-total // count)):
            clock[0] += seconds if batch else 60.0
            shown.add(count)
    return shown.done


def test_a_line_now_and_then_has_the_rate_and_the_time_left(clock, capsys):
    assert work(clock, 2.5) == 654  # the last batch has 2 examples of padding, which count nowhere
    lines = capsys.readouterr().err.splitlines()
    assert lines[:3] == [
        "evaluating: 8 of 654 examples",  # a rate that includes compilation would mislead
        "evaluating: 104 of 654 examples, 3.2/s, 02:51 left",
        "evaluating: 200 of 654 examples, 3.2/s, 02:21 left",
    ]
    assert len(lines) == 7  # in 60 + 81 * 2.5 seconds


def test_short_work_and_work_of_other_processes_show_nothing(clock, capsys):
    work(clock, 2.5, total=16, count=16)
    work(clock, 2.5, active=False)
    with progress.Progress("extracting", None, "files") as shown:
        for _ in range(29):
            clock[0] += 1.0
            shown.add()
    assert capsys.readouterr().err == ""


def test_work_without_a_known_total_has_no_end(clock, capsys):
    with progress.Progress("evaluating", None, "examples") as shown:
        for _ in range(31):
            clock[0] += 1.0
            shown.add(4)
    assert capsys.readouterr().err == "evaluating: 120 examples, 4/s\n"


@pytest.mark.parametrize(("verbosity", "lines"), [(-1, 0), (0, 7)])
def test_verbosity_silences_it(clock, capsys, verbosity, lines):
    command_line.configure_logging(verbosity)
    work(clock, 2.5)
    assert len(capsys.readouterr().err.splitlines()) == lines


ON_A_TERMINAL = """
import sys, time
from absl import logging
from taskexpert_jax import command_line, progress, terminal
progress.SECONDS_TO_BAR = 0.05
def program():
    command_line.configure_logging()
    with progress.Progress("predicting", 40) as shown:
        for index in range(40):
            time.sleep(0.03)
            if index == 20:
                terminal.print_written("out/a")
                logging.warning("b has a NaN")
            shown.add()
            if index == 30 and sys.argv[1:]:
                print("ready", flush=True)
                time.sleep(60)
    print("a table")
sys.exit(command_line.ended(program))
"""


class Terminal:
    """A program on a pseudo-terminal; `screen` is what a user sees in the end, `raw` all that was written."""

    def __init__(self, *arguments, columns=100):
        reader, writer = pty.openpty()
        fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-c", ON_A_TERMINAL, *arguments], stdin=writer, stdout=writer, stderr=writer
        )
        os.close(writer)
        self._reader, self.raw = reader, ""

    def read(self, until=None):
        with contextlib.suppress(OSError):  # the program has ended
            while until is None or until not in self.raw:
                self.raw += os.read(self._reader, 4096).decode()

    def ended(self):
        """Reads to the end; the exit status."""
        self.read()
        os.close(self._reader)
        return self.process.wait()

    def screen(self):
        lines = [""]
        column = 0
        for part in re.split(r"(\r|\n|\x1b\[K)", self.raw):
            if part == "\n":
                lines.append("")
            elif part == "\r":
                column = 0
                continue
            elif part == "\x1b[K":
                lines[-1] = lines[-1][:column]
            else:
                lines[-1] = lines[-1][:column].ljust(column) + part + lines[-1][column + len(part) :]
                column += len(part)
        return [line.rstrip() for line in lines]


@pytest.mark.parametrize("columns", [100, 30, 0])  # 0: of unknown size, as in some containers
def test_a_bar_fits_leaves_lines_whole_and_is_gone_at_the_end(columns):
    terminal = Terminal(columns=columns)
    assert terminal.ended() == 0
    assert terminal.screen() == ["written: out/a", "warning: b has a NaN", "a table", ""]
    bars = [part.rstrip() for part in re.split(r"[\r\n]", terminal.raw) if "% |" in part]
    assert len(bars) >= 2 and max(map(len, bars)) <= (columns or 80)
    whole = re.compile(r" *(\d+)% \|.{20}\| predicting: (\d+) of 40 images, [\d.]+/s, 00:0\d left")
    shown = [found for bar in bars if (found := whole.fullmatch(bar))]
    assert all(int(found[1]) == round(100 * int(found[2]) / 40) for found in shown)
    assert bool(shown) == (columns != 30)


def test_ctrl_c_leaves_one_line():
    terminal = Terminal("wait")
    terminal.read(until="ready")
    time.sleep(0.2)
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.ended() == 130
    assert terminal.screen()[-3:] == ["ready", "interrupted", ""]
