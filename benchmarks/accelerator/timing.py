"""Times of repeated steps, and a device's ceilings: matmul throughput and memory bandwidth."""

from collections.abc import Callable, Iterator
import itertools
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

Times = dict[str, float]


def steady(run: Callable[[], Any], wait: Callable[[Any], Any], *, seconds: float) -> Times:
    """Times `run`, which may return before the device is done; `wait` blocks on its result.

    Calls are timed in rounds of about a quarter of a second without synchronisation inside a round, as in training.

    Args:
      seconds: approximate measuring time, at least five rounds; 0: three short rounds, to see that it runs.

    Returns:
      median_s, min_s, max_s (seconds per call, over the rounds), rounds, calls_a_round.
    """
    warm_up, rounds = (3, 5) if seconds else (1, 3)
    for _ in range(warm_up):
        wait(run())
    started = time.perf_counter()
    wait(run())
    calls = max(1, round(min(0.25, seconds / rounds) / max(time.perf_counter() - started, 1e-6)))
    found, started = [], time.perf_counter()
    while len(found) < rounds or time.perf_counter() - started < seconds:
        begun = time.perf_counter()
        for _ in range(calls - 1):
            run()
        wait(run())
        found.append((time.perf_counter() - begun) / calls)
    return {
        "median_s": statistics.median(found),
        "min_s": min(found),
        "max_s": max(found),
        "rounds": len(found),
        "calls_a_round": calls,
    }


def in_turn(items: list[Any]) -> Callable[[], Any]:
    """A function that cycles through the items, so no step finds its inputs in a cache."""
    endless: Iterator[Any] = itertools.cycle(items)
    return lambda: next(endless)


def ceilings(*, seconds: float, quick: bool) -> dict[str, Any]:
    """Throughput of a square matmul in both dtypes and of a copy, on random data.

    matmul_bfloat16, matmul_float32: FLOP/s, 2 n^3 per matmul (float32 with JAX's default precision: TF32 or bfloat16
    passes if the device has them). copy: bytes/s read and written.
    """
    side = 512 if quick or jax.default_backend() == "cpu" else 8192
    found: dict[str, Any] = {"side": side}
    for dtype in ("bfloat16", "float32"):
        following, other = in_turn(_random(3, (side, side), dtype)), _random(1, (side, side), dtype)[0]
        times = _of_function(jnp.matmul, lambda take=following, with_=other: (take(), with_), seconds)
        found[f"matmul_{dtype}"] = 2 * side**3 / times["median_s"]
    following = in_turn(_random(3, (4 * side, side), "float32"))
    times = _of_function(jnp.negative, lambda: (following(),), seconds)
    found["copy"] = 2 * 4 * 4 * side**2 / times["median_s"]
    return found


def _random(count: int, shape: tuple[int, int], dtype: str) -> list[jax.Array]:
    return [jax.random.normal(key, shape, dtype) for key in jax.random.split(jax.random.key(0), count)]


def _of_function(function: Callable[..., jax.Array], arguments: Callable[[], tuple[Any, ...]], seconds: float) -> Times:
    jitted = jax.jit(function)
    return steady(lambda: jitted(*arguments()), jax.block_until_ready, seconds=seconds)
