"""Entry point of `python -m taskexpert_jax COMMAND ...`, see `cli`."""

import sys

from taskexpert_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
