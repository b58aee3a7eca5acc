"""One process of GRPO with a group reward; started by tests/test_group_reward.py with torchrun."""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from general_preference.serving import GroupReward
from tests.test_group_reward import train

if __name__ == "__main__":
    settings = json.loads(sys.argv[1])
    reward = GroupReward(settings["model"], group_size=settings["size"])
    options = {"per_device_train_batch_size": settings["batch"], "num_generations": 4, "max_completion_length": 8}
    rows = train("GRPO", settings["policy"], reward, settings["folder"], **options)
    if os.environ["RANK"] == "0":  # two processes at once would write into each other's line
        print("REWARDS", [round(row["rewards/preference_win_rate/mean"], 4) for row in rows], flush=True)
