"""Rewards as reinforcement learning frameworks ask for them: sample by sample, or NeMo Gym's groups."""

import asyncio
from functools import partial

from fastapi import FastAPI, Request, Response

from general_preference.errors import InputError
from general_preference.inference import ranking
from general_preference.serving.barrier import Place
from general_preference.serving.middleware import EchoedResponse
from general_preference.serving.protocol import GymCompareRequest, SampleRequest, SamplesRequest, VerifyRequest
from general_preference.serving.refusal import Refused
from general_preference.serving.samples import Sample, read_input, read_output, read_sample, split_query, without_end
from general_preference.serving.service import PreferenceService


def add_samples(app: FastAPI, service: PreferenceService) -> None:
    """The routes /get_reward (OpenRLHF), / and /reward (slime) and /verify (NeMo Gym)."""
    ends = tuple(service.arguments.end_texts)

    @app.post("/get_reward", tags=["samples"])
    async def get_reward(body: SamplesRequest) -> dict:
        """As OpenRLHF's remote reward model; each label says with what its sample is compared."""
        count, (prompts, labels) = len(body.query), (body.prompts or [], body.labels or [])
        if len(labels) != count or len(prompts) != count:
            found = f"{count} queries, {len(prompts)} prompts, {len(labels)} labels"
            raise InputError(f"{found}: give one of each for every sample")
        samples = []
        for index, (query, prompt, label) in enumerate(zip(body.query, prompts, labels, strict=True)):
            response = partial(split_query, query, prompt, ends)
            samples.append(read_sample(label, prompt, response, f"labels[{index}]"))
        if count > service.arguments.max_queue:
            raise Refused(413, f"{count} samples, this server takes {service.arguments.max_queue} at once: send fewer")
        tasks = [asyncio.ensure_future(service.sample_reward(sample)) for sample in samples]
        try:
            rewards = list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:  # where one has failed, the others have no one to go to
                task.cancel()
        return {"rewards": rewards, "scores": rewards, "extra_logs": {}}

    @app.post("/", tags=["samples"])
    @app.post("/reward", tags=["samples"])
    async def reward(body: SampleRequest) -> dict:
        """As slime's remote reward model (there with the reward key "reward"); the label says what is compared."""
        sample = read_sample(body.label, body.prompt, partial(without_end, body.response, ends))
        return {"reward": await service.sample_reward(sample)}

    @app.post("/verify", tags=["samples"])
    async def verify(body: VerifyRequest, request: Request) -> Response:
        """As NeMo Gym's resources server: waits for the siblings, and answers the request with its `reward`."""
        _check_principle(body.principle)
        if (size := service.arguments.group_size if body.group_size is None else body.group_size) is None:
            raise InputError("group_size: how many samples has a group? Name it, or start the server with it")
        place = Place(body.group, body.attempt, size, body.index)
        sample = Sample(read_input(body.responses_create_params), read_output(body.response, "response"), place)
        return EchoedResponse(await request.json() | {"reward": await service.sample_reward(sample)})

    @app.post("/seed_session", tags=["samples"])
    async def seed_session() -> dict:
        """What agents of NeMo Gym ask for before their samples; there is nothing to set up."""
        return {}


async def compare_as_gym(service: PreferenceService, body: GymCompareRequest) -> dict:
    """The answer of NeMo Gym's /compare: a pairwise model needs no list of judged pairs."""
    _check_principle(body.principle)
    responses = [read_output(one, f"response_objs[{index}]") for index, one in enumerate(body.response_objs)]
    embedded = await service.embed(body.conversation_history, responses, "response_objs")
    metrics = {"cyclic_share": ranking.hodge(embedded.scores()).cyclic_share}
    return {"rewards": await service.rewards(embedded), "comparison_results": [], "metrics": metrics}


def _check_principle(principle: str | None) -> None:
    if principle:
        raise InputError("principle is not read by this model: put it into the conversation as a system message")
