"""Group rewards in OpenRLHF 0.11: this file, or one that imports its class, is the value of train.agent_func_path.

OpenRLHF asks for the reward of each sample alone, but generates all samples of a prompt in one call of one executor
(`RolloutRayActor.generate_responses`), so they can meet here. Settings: environment.py.
"""

import asyncio
import json
from dataclasses import dataclass

from openrlhf.utils.agent import SingleTurnAgentExecutor

from general_preference.errors import InputError
from general_preference.models.config import first_line
from general_preference.serving.environment import deadline_from_environment, group_scorer, reward_from_environment
from general_preference.serving.group_reward import AsyncGroupReward
from general_preference.serving.rendezvous import Rendezvous


@dataclass
class _Siblings:
    started: int = 0
    ended: int = 0


class AgentExecutor(SingleTurnAgentExecutor):
    """Generates as OpenRLHF does; the last of a prompt's samples has the whole group scored."""

    def __init__(self, reward: AsyncGroupReward | None = None):
        """reward: default what the environment variables name.

        Raises:
            InputError (a ValueError): environment variables that cannot be used.
        """
        super().__init__(remote_rm_url=None)
        self.reward = reward or reward_from_environment()
        self._rendezvous = Rendezvous(group_scorer(self.reward), deadline_from_environment())
        self._siblings: dict[str, _Siblings] = {}

    async def execute(self, prompt, label, sampling_params, max_length, hf_tokenizer, llm_engine, images=None):
        """OpenRLHF's output for one sample, with its reward in the group.

        label: a dict or JSON text, {"messages": the conversation, "reference": read by mode reference}.

        Raises:
            InputError (a ValueError): a label without messages, images, or a prompt with a single sample.
            RunError: another sample of the group failed, or did not come before the deadline.
        """
        # Ray unpickles the arguments of each call, so this object is that of one prompt's samples. It lives as long as
        # they do, and so no other has its id. All of them start before any goes on after its first `await`.
        key = f"{prompt[:60]!r} ({id(sampling_params):x})"
        siblings = self._siblings.setdefault(key, _Siblings())
        siblings.started += 1
        number = siblings.started
        try:
            await asyncio.sleep(0)
            size = 1 if self.reward.mode == "reference" else siblings.started
            try:
                messages, reference = self._read(label, size, images)
                arguments = (prompt, label, sampling_params, max_length, hf_tokenizer, llm_engine, images)
                output = await super().execute(*arguments)
                start, end = output["action_ranges"][-1]
                completion = hf_tokenizer.decode(output["observation_tokens"][start:end], skip_special_tokens=True)
            except BaseException as error:
                fault = f"{type(error).__name__}: {first_line(error)}"
                self._rendezvous.fail(key, size, f"sample {number} of {siblings.started} failed ({fault})")
                raise
            reward = await self._rendezvous.meet(key, size, (messages, completion, reference))
        finally:
            siblings.ended += 1
            if siblings.ended == siblings.started:
                del self._siblings[key]
        output.update(reward=reward, scores=reward)
        return output

    def _read(self, label: object, size: int, images: object) -> tuple[list, object]:
        """The messages and the reference of a label."""
        if size == 1 and self.reward.mode != "reference":
            cure = "rollout.n_samples_per_prompt and eval.n_samples_per_prompt must be at least 2"
            raise InputError(f"a prompt has one sample and nothing to be compared with: {cure}")
        if images is not None:
            raise InputError("a prompt has images, which the preference model would not see")
        try:
            read = json.loads(label) if isinstance(label, str) else label
        except ValueError:
            read = None
        if not isinstance(read, dict) or not read.get("messages"):
            raise InputError(
                f"the label {str(label)[:60]!r} has no messages: OpenRLHF's prompt is text in the policy's chat "
                'template, which no other model reads; write {"messages": [...]} as JSON into the column that '
                "data.label_key names"
            )
        return read["messages"], read.get("reference")
