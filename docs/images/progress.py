#!/usr/bin/env python
"""Run a command in a terminal and keep a picture of its screen, as progress.svg was made:

    python docs/images/progress.py docs/images/progress.svg -- deepspeed launch/train.py --config RECIPE.yaml

The picture is the screen at a share of the run's steps (--at). Everything is shown as usual meanwhile.
"""

import argparse
import os
import pty
import re
import subprocess
import sys
import time

from rich.console import Console
from rich.text import Text

MOVES = re.compile(r"\x1b\[(\d*)([ABJK])|\x1b\[\?\d+[hl]|(\r\n|\r|\n)|((?:\x1b\[[\d;]*m|[^\x1b\r\n])+)|\x1b[^\[]?")


def screen(output: str) -> list[str]:
    """Lines on the screen after a program has written `output`; colours stay as escape codes.

    Understood is what rich's live displays write: up, down, erase line, carriage return and new line.
    """
    lines, row, fresh = [""], 0, True
    for count, move, new, text in (m.groups() for m in MOVES.finditer(output)):
        if move == "A":
            row = max(0, row - int(count or 1))
        elif move == "B":
            row += int(count or 1)
        elif move in ("J", "K"):
            lines[row] = ""
        elif new:
            row, fresh = row + ("\n" in new), True
            lines += [""] * (row + 1 - len(lines))
        elif text:
            lines[row] = text if fresh else lines[row] + text
            fresh = False
    return lines


def run(command: list[str], columns: int, rows: int) -> tuple[str, int]:
    """Output and exit code of a command in a terminal of that size."""
    master, slave = pty.openpty()
    os.environ.update(COLUMNS=str(columns), LINES=str(rows), TERM="xterm-256color", COLORTERM="truecolor")
    child = subprocess.Popen(command, stdout=slave, stderr=slave, stdin=slave)
    os.close(slave)
    data = b""
    while True:
        try:
            part = os.read(master, 1 << 16)
        except OSError:  # Linux's way to say that the other end is closed
            part = b""
        if not part:
            return data.decode(errors="replace"), child.wait()
        data += part
        sys.stdout.buffer.write(part)
        sys.stdout.flush()
        time.sleep(0.01)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", help="SVG file to write")
    parser.add_argument("--at", type=float, default=0.8, help="share of the steps done in the picture (0.8)")
    parser.add_argument("--columns", type=int, default=118)
    parser.add_argument("--title", default="ds_llm")
    parser.add_argument("--skip", default=r"\[WARNING\]|\[INFO\]|\*{8}", help="lines to leave out, as a pattern")
    parser.add_argument("command", nargs="+")
    arguments = parser.parse_args()
    output, code = run(arguments.command, arguments.columns, 50)
    steps = [(int(m[1]) / int(m[2]), m.end()) for m in re.finditer(r"(\d+)/(\d+) steps", output)]
    if code or not steps:
        sys.exit(f"error: the command ended with {code} and showed {len(steps)} times how far it was")
    at = next((end for share, end in steps if share >= arguments.at), steps[-1][1])
    end = output.find("\x1b[2K", at)  # the frame is whole when the next one begins
    lines = screen(output[: end if end > 0 else len(output)])
    lines = [line for line in lines if not re.search(arguments.skip, line)]
    console = Console(record=True, width=arguments.columns, file=open(os.devnull, "w"))  # noqa: SIM115
    for line in lines:
        console.print(Text.from_ansi(line), soft_wrap=False)
    svg = console.export_svg(title=arguments.title)
    svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)  # its fonts would come from the network
    with open(arguments.picture, "w", encoding="utf-8") as file:
        file.write(svg)


if __name__ == "__main__":
    main()
