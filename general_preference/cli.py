"""What the command-line scripts share: flags from dataclasses, quiet logs, tables, and errors as exit codes."""

import argparse
import contextlib
import functools
import json
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import field
from pathlib import Path
from typing import NoReturn

import yaml
from transformers.hf_argparser import HfArgumentParser, string_to_bool

from general_preference.distributed import is_main_process
from general_preference.errors import InputError, RunError, Stopped

# {key of an evaluation's results: title of its column}
EVALUATION = {name: name for name in ("n", "accuracy", "interval", "ties", "loss", "probability", "margin")}
EVALUATION |= {"calibration_error": "calibration", "cyclic_share": "cyclic share"}

PATIENCE = 10.0  # seconds that the other processes leave the main one to print why all of them end


def flag(default, text: str, **metadata):
    """A dataclass field that is a flag: its default, its help text, and `choices` or `aliases`."""
    return field(default=default, metadata={"help": text, **metadata})


def parse_flags(
    groups: tuple[type, ...],
    argv: list[str] | None,
    description: str,
    replaced=lambda flags: (),
    presets=lambda flags: {},
    files: str = "",
) -> list:
    """One filled dataclass per group. Unknown flags and values of the wrong type exit with code 2, as argparse does.

    replaced: from the Namespace of the command line alone, keys of the --config file that it makes meaningless.
    presets: from that Namespace, values of flags that neither the command line nor the --config file gives.
    files: help text of one or more paths without a flag; their list is returned after the groups.
    """
    parser = HfArgumentParser(groups, allow_abbrev=False, description=description)
    parser.error = functools.partial(_refuse, parser)
    for action in parser._actions:
        if action.type is string_to_bool:  # also where the default is None a bare flag means true
            action.nargs, action.const = "?", True
    parser.add_argument("--config", help="YAML or JSON file of flags, such as a run's arguments.json; flags here win")
    if files:
        parser.add_argument("files", nargs="+", metavar="FILE", help=files)
    argv = sys.argv[1:] if argv is None else argv
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(f"unknown flags: {' '.join(unknown)}")
    if given.config is not None:
        try:
            argv = _config_flags(given.config, {action.dest for action in parser._actions}, replaced(given)) + argv
            given = parser.parse_known_args(argv)[0]
        except InputError as error:
            parser.error(str(error))
    argv = _as_flags(presets(given)) + argv
    *filled, others = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    for group in filled:  # a shell leaves the "~" of --flag=~/path to the program
        vars(group).update({n: os.path.expanduser(value) for n, value in vars(group).items() if isinstance(value, str)})
    return [*filled, others.files] if files else filled


def _config_flags(path: str, known: set[str], replaced: tuple[str, ...]) -> list[str]:
    """The keys of a config file as command-line flags; null means the default, and `resolved` is no flag."""
    try:
        text = Path(os.path.expanduser(path)).read_text(encoding="utf-8")
        values = json.loads(text) if path.endswith(".json") else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"config {path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise InputError(f"config {path} is not a mapping of flags to values")
    values.pop("resolved", None)
    unknown = sorted(str(key) for key in values if key not in known - {"config", "files", "help"})
    if unknown:
        raise InputError(f"config {path} has unknown keys: {', '.join(unknown)}")
    return _as_flags({name: value for name, value in values.items() if name not in replaced})


def _as_flags(values: dict) -> list[str]:
    flags = []
    for name, value in values.items():
        if isinstance(value, list) and value:
            flags += [f"--{name}", *map(str, value)]
        elif value is not None and value != []:
            flags.append(f"--{name}={value}")
    return flags


def _refuse(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    """One line, from the main process; argparse itself would print the usage, a page long, before it."""
    if not is_main_process():
        time.sleep(PATIENCE)
        parser.exit(2)
    parser.exit(2, f"error: {message} (--help lists all flags)\n")


def check_at_least(arguments: object, least: float, *names: str) -> None:
    """InputError for a flag whose value is below `least` or no finite number; None is no value."""
    for name in names:
        value = getattr(arguments, name)
        if value is not None and not least <= value < float("inf"):
            raise InputError(f"--{name} {value} must be {f'at least {least}' if least in (0, 1, 8) else 'above 0'}")


def check_seed(seed: int) -> None:
    """InputError for a seed that the generators of random numbers do not take."""
    if not 0 <= seed < 2**32:
        raise InputError(f"--seed {seed} must be from 0 to {2**32 - 1}")


def exit_code(work: Callable[[], None], kept: str) -> int:
    """Run `work`; 0 done, 1 the run failed, 2 what was given cannot be used, 130 SIGINT, 143 SIGTERM.

    One line says why; with GPM_DEBUG=1 the traceback comes before it. Any other exception is a fault and is raised.

    Args:
        kept: what a signal leaves intact.
    """
    try:
        with signals_raise():
            work()
        return 0
    except (InputError, RunError) as error:
        ended, everywhere = error, error.everywhere
        message, code = f"error: {error}", 2 if isinstance(error, InputError) else 1
    except (KeyboardInterrupt, Stopped) as stop:
        ended, everywhere = stop, True
        number = getattr(stop, "signal_number", signal.SIGINT)
        how = "interrupted" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}"
        message, code = f"\n{how}; {getattr(stop, 'said', '') or kept}", 128 + number
    if os.environ.get("GPM_DEBUG") == "1":
        traceback.print_exception(ended)
    if is_main_process() or not everywhere:
        sys.stderr.write(message + "\n")
        sys.stderr.flush()
    elif code < 3:  # a launcher ends all processes as soon as one has failed
        time.sleep(PATIENCE)
    return code


@contextlib.contextmanager
def signals_raise() -> Iterator[None]:
    """SIGTERM and SIGINT raise `Stopped` where they arrive; one of several processes, which wait for it, just ends."""

    def stop(number, _frame):
        raise Stopped(number)

    handler = stop if os.environ.get("WORLD_SIZE", "1") == "1" else signal.SIG_DFL
    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def quiet_other_libraries() -> None:
    """Log to the terminal from the main process; progress bars of loading and tokenizing there alone."""
    import datasets
    import transformers

    main_process = is_main_process()
    for stream in (sys.stdout, sys.stderr):  # a terminal that cannot show a name must not end a run
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    logging.basicConfig(level=logging.INFO if main_process else logging.ERROR, format="%(message)s", stream=sys.stderr)
    for name in ("httpx", "accelerate", "DeepSpeed", "torch", "datasets", "fsspec", "filelock"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if not main_process or not sys.stderr.isatty():
        datasets.disable_progress_bars()
        transformers.logging.disable_progress_bar()


def format_table(rows: dict[str, dict], title: str = "set", columns: dict[str, str] | None = EVALUATION) -> str:
    """{row: {key: value}} as an aligned text table: floats with four digits, "-" where there is no value.

    Args:
        title: of the rows' names. columns: {key: title} of what is shown, in order; None for everything.
    """
    import pandas  # only here: the package does without

    rows = {name: dict(row) for name, row in rows.items()}
    for row in rows.values():
        if "accuracy_low" in row:
            row["interval"] = f"{row['accuracy_low']:.3f}-{row['accuracy_high']:.3f}"
    found = list(dict.fromkeys(key for row in rows.values() for key in row))
    columns = {key: key for key in found} if columns is None else {key: columns[key] for key in columns if key in found}
    values = ([row.get(key) for key in columns] for row in rows.values())
    cells = [["-" if v is None else f"{v:.4f}" if isinstance(v, float) else f" {v}" for v in row] for row in values]
    frame = pandas.DataFrame(cells, index=list(rows), columns=[f" {name}" for name in columns.values()])
    return frame.rename_axis(columns=title).to_string()
