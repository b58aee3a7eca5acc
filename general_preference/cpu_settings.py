"""What libraries must find in the environment on machines without a GPU, however a script is started.

The launchers evaluate what `python -P general_preference/cpu_settings.py` prints; the scripts themselves call
`restart_with_cpu_settings`, which has nothing to do then.
"""

import os
import sys

import torch

CPU_SETTINGS = {
    "DS_ACCELERATOR": "cpu",
    # glibc gives large temporaries back to the kernel after every operation; keeping them is several times faster.
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    # Threads that wait by spinning slow each other down tenfold as soon as something else runs on the machine. A few
    # microseconds of it, before they sleep, save more than they cost (about a tenth of a step; 4 % when busy).
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "5000",
}


def restart_with_cpu_settings() -> None:
    """Without a GPU, start this program again with the settings that are not set yet; the process keeps its id.

    For a script's first lines alone: libraries read the settings when they are loaded.
    """
    missing = {name: value for name, value in CPU_SETTINGS.items() if name not in os.environ}
    if missing and not torch.cuda.is_available():
        os.environ.update(missing)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


if __name__ == "__main__":
    gpus = torch.cuda.device_count()
    print(f"GPUS={gpus}", *(f"export {k}=${{{k}:-{v}}}" for k, v in CPU_SETTINGS.items() if not gpus), sep="\n")
