"""Serves a page on which a run predicts images: taskexpert serve RUN [--port=7860] [--checkpoint=best].

The page takes an image and shows the results of all tasks, the value under the cursor, and the gate maps. It works
offline, and on this machine only unless --host says otherwise. docs/serve.md describes it.
"""

import argparse
from collections.abc import Sequence
import errno
import functools
import math
import socket
import sys
from typing import TYPE_CHECKING, Any

from absl import logging

from taskexpert_jax import command_line, compilation_cache, paths, terminal
from taskexpert_jax.errors import UserError, shown

if TYPE_CHECKING:
    import uvicorn

PORT = 7860  # Gradio's and that of Hugging Face Spaces


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on an address; port 0: any free one.

    Raises:
      UserError: the port is in use or reserved, or the host is not an address of this machine.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, UnicodeError) as error:
        raise UserError(f"--host={host}: no such host; give an address of this machine, such as 0.0.0.0") from error
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(128)
    except OSError as error:
        sock.close()
        reasons = {
            errno.EADDRINUSE: f"--port={port} is in use on {host}; give another, or --port=0 for any free one",
            errno.EACCES: f"--port={port} needs permissions of the system; give one from 1024 on",
            errno.EADDRNOTAVAIL: f"--host={host}: not an address of this machine; 0.0.0.0 is all of them",
        }
        raise UserError(reasons.get(error.errno or 0, f"{host}:{port}: {error.strerror}")) from error
    return sock


def address_of(sock: socket.socket) -> str:
    """The page's address in a browser."""
    host, port = sock.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = socket.gethostname()
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def configuration(app: Any) -> "uvicorn.Config":
    """Uvicorn's settings: HTTP alone, and no lines but ours."""
    import uvicorn

    return uvicorn.Config(
        app,
        loop="asyncio",  # uvloop, which Orbax brings, takes the signals that `interruption` waits for
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="error",  # its warnings are of malformed requests: whoever sends them would fill the terminal
        access_log=False,
        timeout_graceful_shutdown=1,
    )


def serve(run_path: str, checkpoint: str, host: str, port: int, megabytes: float) -> None:
    """Loads a run and serves the page until the program is ended.

    Args:
      run_path: what `load_run` takes: a run's directory or a released folder.
      checkpoint: best, latest or a step.
      host: address to listen on.
      port: port to listen on; 0: any free one.
      megabytes: largest file that is accepted.

    Raises:
      UserError: no such run or checkpoint, no such address, or packages of the extra `app` are not installed.
    """
    try:
        import uvicorn

        from taskexpert_jax.app import answers, server
    except ModuleNotFoundError as error:
        if error.name not in ("uvicorn", "starlette"):
            raise
        raise UserError(f'the page needs {error.name}: pip install "taskexpert-jax[app]"') from error
    from taskexpert_jax.run import load_run

    with listen(host, port) as sock:
        run = load_run(run_path, checkpoint=checkpoint)
        hosts = server.LOOPBACK | {host} if server.is_loopback(host) else None
        logging.info(f"loaded {run.path} at {run.checkpoint}; compiling the model")
        answers.warm_up(run)
        predict = functools.partial(answers.answer, run)
        app = server.build(predict, answers.about(run), server.Limits(megabytes), hosts)
        if hosts is None:
            logging.warning("whoever reaches this machine can use the page: it has no password")
        print(f"serving at {address_of(sock)} (Ctrl-C ends it)", flush=True)
        uvicorn.Server(configuration(app)).run(sockets=[sock])


def _port(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text[:6]) < 65536):
        raise argparse.ArgumentTypeError(f"{shown(text)}: must be a whole number from 0 to 65535")
    return int(text)


def _megabytes(text: str) -> float:
    try:
        megabytes = float(text)
    except ValueError:
        megabytes = math.nan
    if not 0 < megabytes <= 1000:
        raise argparse.ArgumentTypeError(f"{shown(text)}: must be a number of MB above 0, up to 1000")
    return megabytes


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; returns its exit status."""
    parser = command_line.Parser("taskexpert_jax.serve", __doc__)
    parser.add_argument("run", metavar="RUN", help=paths.MODEL_FORM)
    parser.add_argument("--checkpoint", default="best", help="best, latest or a step (default: best)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: all (default: 127.0.0.1)")
    parser.add_argument("--port", type=_port, default=PORT, help=f"0: any free one (default: {PORT})")
    parser.add_argument(
        "--max_upload", type=_megabytes, default=20.0, metavar="MB", help="largest image file, in MB (default: 20)"
    )
    parser.add_argument(f"--{compilation_cache.FLAG}", help=compilation_cache.HELP)
    terminal.guard()
    args = parser.parse_args(arguments)
    command_line.configure_logging()

    def program() -> None:
        compilation_cache.enable(args.compilation_cache)
        serve(args.run, args.checkpoint, args.host, args.port, args.max_upload)

    return command_line.ended(program, interrupted="stopped")


if __name__ == "__main__":
    sys.exit(main())
