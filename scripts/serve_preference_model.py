#!/usr/bin/env python3
"""Serve a preference model over HTTP: comparisons, rewards of groups, reranking. Routes and sizing: docs/serving.md.

    python scripts/serve_preference_model.py --model MODEL [--port 8000] [--devices cuda:0,cuda:1]

Needs the extra "serve". With GPM_API_KEY set, requests need it as a bearer token. Exit codes: 0 ended by SIGTERM or
SIGINT after answering what was accepted, 1 a worker process died, 2 unusable input or the port is taken.
"""

import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # importing takes seconds, in which Ctrl-C should print no traceback
    from general_preference.cpu_settings import restart_with_cpu_settings

    restart_with_cpu_settings()

from general_preference.cli import exit_code, parse_flags, quiet_other_libraries
from general_preference.serving.arguments import ServingArguments


def main(argv: list[str] | None = None) -> int:
    """Parse, serve, and turn what can go wrong into one line and an exit code."""
    (arguments,) = parse_flags((ServingArguments,), argv, "Serve a preference model over HTTP.")
    quiet_other_libraries()
    return exit_code(lambda: serve(arguments), kept="nothing was being answered")


def serve(arguments: ServingArguments) -> None:
    """See `server.run`, whose libraries the worker processes need not import."""
    from general_preference.serving.server import run

    run(arguments)


if __name__ == "__main__":
    sys.exit(main())
