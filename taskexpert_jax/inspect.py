"""The old name of `taskexpert_jax.gates`."""

import sys

if __name__ == "__main__":
    print("error: taskexpert_jax.inspect is now taskexpert_jax.gates, with the same flags", file=sys.stderr)
    sys.exit(2)
