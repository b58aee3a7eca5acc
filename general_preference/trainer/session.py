"""A training run from its arguments to its end: processes that start alike, and folders that no other run writes to."""

import functools
import os
from collections.abc import Callable
from contextlib import ExitStack, nullcontext

from general_preference.errors import InputError, RunError, Stopped
from general_preference.files import lock_folder
from general_preference.trainer.folders import check_folders, output_folders
from general_preference.trainer.run_arguments import RunArguments


def hold_run(arguments: RunArguments, work: Callable[[RunArguments, object], None]) -> None:
    """`work(arguments, engine)` with the processes joined and the run's folders held.

    Raises:
        InputError: folders in which something would be destroyed, that another run holds, or with checkpoints that a
            restart would continue. What `work` raises.
    """
    check_folders(arguments)
    # Imported late: help and refused flags should not wait for DeepSpeed.
    from general_preference.trainer.deepspeed_engine import DeepSpeedEngine

    engine = DeepSpeedEngine(arguments.engine, arguments.optimizer)
    context = engine.context
    # A node that joins late knows of no restart, and all must start alike.
    arguments.output.load_checkpoint = any(context.gather_objects(arguments.output.load_checkpoint))
    try:
        with ExitStack() as held:
            for folder, name in output_folders(arguments).items():
                lock = functools.partial(lock_folder, folder, f"--{name}")
                held.enter_context(context.main_process_first(lock, main_only=True) or nullcontext())
            context.main_process_first(lambda: check_restarts(arguments), main_only=True)
            work(arguments, engine)
    except (InputError, RunError, Stopped) as error:
        if error.everywhere:  # what one process alone fails of ends the others, which wait for it, by its silence
            context.close()
        raise
    context.close()


def check_restarts(arguments: RunArguments) -> None:
    """Refuse checkpoints of an earlier run, from which a restarted one would continue instead of starting over."""
    folder, restarts = arguments.output.checkpoint_folder, int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if restarts and not arguments.output.load_checkpoint and (folder / "latest").exists():
        found = f"ckpt_path {folder} holds checkpoints of an earlier run, which a restart would continue"
        raise InputError(f"{found}: remove them, add load_checkpoint, or allow no restarts")
