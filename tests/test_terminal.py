"""Output of the programs: what reaches a terminal, and streams that fail."""

import os
import subprocess
import sys

import pytest

from taskexpert_jax import terminal, text_table

PRINTS = """
import sys
from taskexpert_jax import command_line
def program():
    print("mIoU \\u2191 *")
    print("a\\x1b[2Jb \\udc80 \\x1b[1mbold\\x1b[0m\\rc")
    for _ in range(20_000):
        print("a line")
    open(sys.argv[1], "w").close()  # the results
sys.exit(command_line.ended(program))
"""


def run(tmp_path, shell, **environment):
    """Runs `shell`, in which PROGRAM is a program that prints much and then writes a file; returns the process."""
    script = tmp_path / "program.py"
    script.write_text(PRINTS)
    command = shell.replace("PROGRAM", f"{sys.executable} {script} {tmp_path}/results")
    env = {**os.environ, "PYTHONPATH": ".", **environment}
    done = subprocess.run(["bash", "-c", command], capture_output=True, env=env, check=False)
    assert (tmp_path / "results").exists()
    return done


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[2Jb", r"a\x1b[2Jb"),
        ("a\nb\r\tc", r"a\nb\r\tc"),
        ("\x9b31m", r"\x9b31m"),
        ("a\u202eb\u2028", r"a\u202eb\u2028"),
        (os.fsdecode(b"caf\xe9"), r"caf\udce9"),
        ("Küche 厨房 👩‍🍳", "Küche 厨房 👩‍🍳"),
    ],
)
def test_names_are_one_line_without_control_characters(text, shown):
    assert terminal.one_line(text) == shown
    assert text_table.lines([[text, "1"]], "<>") == [f"{shown}  1"]


def test_messages_keep_the_lines_of_their_lists_and_no_others():
    assert terminal.message("differs:\n  - a\n  + b\nerror: none") == "differs:\n  - a\n  + b\\nerror: none"


def test_an_encoding_without_arrows_writes_their_numbers(tmp_path):
    done = run(tmp_path, "PROGRAM", PYTHONIOENCODING="latin-1")
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith(rb"mIoU \u2191 *" + b"\n")


def test_control_characters_do_not_reach_the_terminal(tmp_path):
    done = run(tmp_path, "PROGRAM | head -2")
    assert done.stdout.decode().splitlines()[1] == "a\\x1b[2Jb \\udc80 \x1b[1mbold\x1b[0m\\rc"


@pytest.mark.parametrize(
    "shell", ["PROGRAM | head -1 >&2; exit ${PIPESTATUS[0]}", "PROGRAM >&-", "PROGRAM <&- >&- 2>&-"]
)
def test_a_reader_that_leaves_and_closed_streams_do_not_matter(tmp_path, shell):
    done = run(tmp_path, shell)
    assert done.returncode == 0
    assert done.stderr.decode() in ("", "mIoU ↑ *\n")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_output_that_is_cut_is_an_error_after_the_work(tmp_path):
    done = run(tmp_path, "PROGRAM > /dev/full")
    assert done.returncode == 1
    assert done.stderr == b"error: not everything could be printed: No space left on device\n"
