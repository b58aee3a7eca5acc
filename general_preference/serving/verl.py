"""Group rewards in verl 0.9: `GPMRewardManager` for reward.reward_manager with source importlib.

verl sends each sample to a random reward worker, with the `uid` of its group. With GPM_MODEL there must be one worker,
in which the samples of a group meet; with GPM_URL they meet at a preference server, whatever the number of workers.
Settings: environment.py.
"""

import asyncio
import math
import os
import random
import time
from typing import Any

from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase

from general_preference.errors import InputError, RunError
from general_preference.inference.asking import RETRY_AFTER
from general_preference.inference.inputs import plain
from general_preference.inference.remote import KEY_VARIABLE
from general_preference.models.config import first_line
from general_preference.serving.environment import deadline_from_environment, group_scorer, reward_from_environment
from general_preference.serving.rendezvous import Rendezvous

VALIDATION_SPLITS = ("test", "val", "validation", "eval")  # as verl's own recipes and others call them


class GPMRewardManager(RewardManagerBase):
    """The reward of a sample is that in its group: all samples of a prompt, `rollout.n` or `rollout.val_kwargs.n`."""

    def __init__(
        self, config: Any, tokenizer: Any, compute_score: Any, reward_router_address=None, reward_model_tokenizer=None
    ):
        """Check the settings; a model is loaded with the first group.

        Args:
            config: verl's. tokenizer: of the policy. The others are verl's for reward functions and its own servers,
                and are not read.

        Raises:
            InputError (a ValueError): environment variables or a config that cannot be used.
        """
        super().__init__(config, tokenizer, compute_score)
        self.reward, deadline = reward_from_environment(), deadline_from_environment()
        _check_in_use(config)
        self._rendezvous = Rendezvous(group_scorer(self.reward), deadline)
        self._server = None
        if self.reward.mode == "reference":
            self._sizes = 1, 1
            return
        self._sizes = _group_sizes(config)
        if self.reward.url is not None:
            self._server = _Server(self.reward.url, deadline)
        elif config.reward.num_workers > 1:
            cure = "set it to 1, or GPM_URL to a preference server, where groups meet"
            raise InputError(f"reward.num_workers is {config.reward.num_workers}, which splits groups: {cure}")

    async def run_single(self, data: Any) -> dict:
        """The reward of the last sequence of `data`, a DataProto with one sample.

        Raises:
            InputError (a ValueError): a sample that cannot be scored.
            RunError: another sample of the group failed, or did not come before the deadline.
        """
        item = data[-1:][0]
        fields = item.non_tensor_batch
        if "session_id" not in fields:
            raise InputError("the sample has no session_id, its number in the group: set trainer.use_v1 to true")
        uid, index = str(fields["uid"]), int(fields["session_id"])
        size = self._size(fields)
        try:
            member = self._read(item, size)
        except Exception as error:
            if self._server is None:
                fault = f"{type(error).__name__}: {first_line(error)}"
                self._rendezvous.fail(uid, size, f"sample {index} (from 0) of {size} failed ({fault})")
            raise
        if self._server is None:
            reward = await self._rendezvous.meet(uid, size, member)
        else:
            reward = await self._server.reward(member, {"id": uid, "size": size, "index": index, "attempt": 0})
        return {"reward_score": reward, "reward_extra_info": {}}

    def _size(self, fields: dict) -> int:
        """Samples in this one's group. verl does not say whether it trains or validates: the data has to."""
        train, validation = self._sizes
        if train == validation:
            return train
        split = (fields.get("extra_info") or {}).get("split")
        if split not in ("train", *VALIDATION_SPLITS):
            cure = f'set them equal, or extra_info.split of the data to "train" or "{VALIDATION_SPLITS[0]}"'
            found = f"rollout.n is {train} and rollout.val_kwargs.n {validation}, and this sample's split is {split!r}"
            raise InputError(f"{found}: {cure}")
        return train if split == "train" else validation

    def _read(self, item: Any, size: int) -> tuple:
        """Prompt, completion and reference of a sample."""
        fields = item.non_tensor_batch
        if size > 1 and fields["session_id"] >= size:
            cause = "does the data set have __rollout_n__, or another extra_info.split?"
            raise InputError(f"this is sample {fields['session_id']}, from 0, of a group of {size}: {cause}")
        if (turns := int(fields["__num_turns__"])) > 2:
            raise InputError(f"a sample has {turns} turns: only a single answer of the policy can be compared")
        ids = item.batch["responses"][: int(fields["response_len"])]
        completion = self.tokenizer.decode(ids, skip_special_tokens=True)
        reference = (fields.get("reward_model") or {}).get("ground_truth")
        return plain(fields["raw_prompt"]), completion, reference


class _Server:
    """POST /reward of a preference server, which answers when the whole group has come."""

    def __init__(self, url: str, deadline: float):
        if os.environ.get("GPM_MODE"):
            raise InputError("GPM_MODE is set, but the preference server has a mode of its own: drop it")
        try:
            import httpx
        except ImportError as error:
            raise InputError("asking a server needs the package httpx: pip install httpx") from error
        key = os.environ.get(KEY_VARIABLE)
        self.url, self.deadline, self._httpx = url.rstrip("/") + "/reward", deadline, httpx
        self._client = httpx.AsyncClient(
            timeout=httpx.Timeout(deadline, connect=10.0),
            limits=httpx.Limits(max_connections=None),  # each sample that waits for its group holds one
            headers={"Authorization": f"Bearer {key.strip()}"} if key else {},
        )

    async def reward(self, member: tuple, group: dict) -> float:
        """group: id, size, index and attempt, by which the server knows a sample that is sent again."""
        prompt, completion, _ = member
        # The label's response is taken as it is; from the other one the server would remove end tokens.
        body = {"prompt": prompt, "response": completion, "label": {"response": completion, "group": group}}
        waits, ends = list(RETRY_AFTER), time.monotonic() + self.deadline
        while True:
            try:
                answer = await self._client.post(self.url, json=body)
                if answer.status_code == 429 and time.monotonic() < ends:
                    wait = random.uniform(0.1, 1.0)
                elif answer.status_code == 503 and waits:
                    wait = waits.pop(0)
                else:
                    break
            except self._httpx.ReadTimeout as error:
                waited = f"has said nothing for {self.deadline:g} seconds about group {group['id']}"
                raise RunError(f"{self.url} {waited}: did all {group['size']} samples come?") from error
            except self._httpx.TransportError as error:
                if not waits:
                    cure = "start the server, or correct GPM_URL"
                    raise RunError(f"nothing answers at {self.url} ({first_line(error)}): {cure}") from error
                wait = waits.pop(0)
            await asyncio.sleep(wait)
        try:
            reward = float(answer.raise_for_status().json()["reward"])
        except (self._httpx.HTTPStatusError, ValueError, KeyError, TypeError) as error:
            said = " ".join(answer.text.split())[:200] or "without a word"
            raise RunError(f"{self.url} answered with status {answer.status_code} and no reward: {said}") from error
        if not math.isfinite(reward):
            raise RunError(f"{self.url} answered the reward {reward} for group {group['id']}")
        return reward


def _group_sizes(config: Any) -> tuple[int, int]:
    """Samples of a prompt in training and in validation."""
    rollout, trainer = config.actor_rollout_ref.rollout, config.trainer
    train, validation = rollout.n, rollout.val_kwargs.n
    if not trainer.val_before_train and trainer.test_freq <= 0:
        validation = train
    for name, size in (("n", train), ("val_kwargs.n", validation)):
        if size < 2:
            cure = "raise it"
            if name != "n":
                cure += ", or turn validation off (trainer.val_before_train=False, trainer.test_freq=-1)"
            raise InputError(f"rollout.{name} is {size}, which leaves a sample nothing to be compared with: {cure}")
    return train, validation


def _check_in_use(config: Any) -> None:
    """InputError where verl would take its rewards from elsewhere, or a function would not be called."""
    if (path := config.reward.custom_reward_function.path) is not None:
        raise InputError(f"reward.custom_reward_function.path is {path!r}, which this manager does not call: drop it")
    if config.reward.reward_model.enable:
        raise InputError("with reward.reward_model.enable verl asks no reward manager: set it to False")
