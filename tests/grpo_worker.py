"""One process of runs of GRPO with a group reward, for tests: writes what each logged or why it was refused."""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from general_preference.errors import InputError
from general_preference.serving import GroupReward
from tests.test_group_reward import train

if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    found = []
    for batch, size in job["runs"]:
        options = {"per_device_train_batch_size": batch, "num_generations": 4, "max_completion_length": 8}
        try:
            rows = train("GRPO", job["policy"], GroupReward(job["model"], group_size=size), job["folder"], **options)
            found.append([round(row["rewards/preference_win_rate/mean"], 4) for row in rows])
        except InputError as error:
            found.append(str(error))
    Path(job["folder"], f"found_{os.environ['RANK']}.json").write_text(json.dumps(found))
