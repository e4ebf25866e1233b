"""Parses command lines of `taskexpert` without running them: one a line on stdin; prints those that are wrong."""

import argparse
import os
import shlex
import sys

from taskexpert_jax import cli, config, installation, modes


def parsed(self, args=None, namespace=None):
    """Parses as argparse does, and exits."""
    unknown = argparse.ArgumentParser.parse_known_args(self, args, namespace)[1]
    if unknown:
        self.error(f"unrecognized arguments: {unknown}")
    sys.exit()


def main() -> None:
    """Parses each command in a process of its own: a program's flags are parsed once."""
    installation.enable()
    argparse.ArgumentParser.parse_args = parsed
    modes._program = lambda: None
    modes._own_config = lambda: config.base("vit_ti16", "nyud")
    for line in sys.stdin:
        if os.fork():
            _, status = os.wait()
            if status:
                print(line.strip())
            continue
        sys.argv = shlex.split(line)
        os._exit(_status())


def _status() -> int:
    try:
        return cli.main()
    except SystemExit as ended:
        return int(bool(ended.code))


if __name__ == "__main__":
    main()
