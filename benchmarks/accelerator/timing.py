"""Times of steady steps, and the ceilings of a device: its matrix products and its memory."""

from collections.abc import Callable, Iterator
import itertools
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

Times = dict[str, float]


def steady(run: Callable[[], Any], wait: Callable[[Any], Any], *, seconds: float) -> Times:
    """Times `run`, whose work on the device may go on after it returns; `wait` takes its result and returns when done.

    Steps are timed in rounds of about a quarter of a second, within which nothing waits, as in training.

    Args:
      seconds: how long it measures, about, and at least five rounds; 0: three calls, to see that it runs.

    Returns:
      median_s, min_s and max_s: seconds of one call, over the rounds; rounds, calls_a_round.
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
    """A function that returns one after the other, for ever: no step finds its inputs in a cache."""
    endless: Iterator[Any] = itertools.cycle(items)
    return lambda: next(endless)


def ceilings(*, seconds: float, quick: bool) -> dict[str, Any]:
    """What the device does at best, on random data: a square matrix product in both dtypes, a copy.

    matmul_bfloat16, matmul_float32: operations/s, 2 n^3 a product (float32 as JAX multiplies it by default: TF32 or
    bfloat16 passes where the device has such). copy: bytes/s read and written.
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
