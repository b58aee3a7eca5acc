"""The flags of the preference server."""

from dataclasses import dataclass, field

from general_preference.cli import check_at_least, flag
from general_preference.errors import InputError
from general_preference.models.kernels import CHOICES
from general_preference.serving.protocol import MODES

END_TEXTS = "end tokens of policies, such as '<|im_end|>', which are removed behind the responses of samples"


@dataclass
class ServingArguments:
    """Which model is served, where, and what one request may ask for."""

    model: str | None = flag(None, "folder or hub name of a trained model: full, sharded or a LoRA adapter")
    host: str = flag("127.0.0.1", "address to listen on; 0.0.0.0 for every one, then set GPM_API_KEY")
    port: int = flag(8000, "port to listen on; 0 for any free one")
    devices: str = flag("auto", "one worker process for each, such as cuda:0,cuda:1; auto: all GPUs, else mps or cpu")
    mode: str = flag("win_rate", "reward of a response in its group, where a request names none", choices=MODES)
    group_size: int | None = flag(None, "responses of a group, for samples of /verify that name no group_size")
    end_texts: list[str] = field(default_factory=list, metadata={"help": END_TEXTS})
    max_wait_ms: float = flag(5.0, "time that a request waits for others to share a model call with")
    batch_tokens: int | None = flag(None, "tokens in one call at most, padding included; default fits the device")
    max_queue: int = flag(1024, "requests that wait at most; the next is answered with status 429")
    max_body_mb: float = flag(8.0, "size of a request at most")
    max_responses: int = flag(256, "responses in a request at most")
    max_tokens: int = flag(262144, "tokens of a prompt and its responses at most")
    group_timeout: float = flag(600.0, "seconds after a group's first sample in which the others must come")
    max_groups: int = flag(4096, "groups that wait for samples at most, and finished ones that are remembered")
    drain_timeout: float = flag(300.0, "seconds after SIGTERM in which accepted requests are answered")
    max_length: int | None = flag(None, "tokens of prompt and response together; default as trained")
    general_preference_tau: float | None = flag(None, "temperature of published weights (0.1)", aliases=["--tau"])
    bf16: bool | None = flag(None, "bfloat16 backbone; default on GPUs that compute it fast")
    attn_implementation: str = flag("auto", "attention kernel; auto: the fastest that is exact here", choices=CHOICES)
    trust_remote_code: bool = flag(False, "run code that comes with the model")

    def check(self) -> None:
        """InputError for what cannot work, before anything is loaded."""
        if self.model is None:
            raise InputError("--model names no model: give a folder or hub name")
        if not 0 <= self.port < 65536:
            raise InputError(f"--port {self.port} must be from 0 to 65535")
        check_at_least(self, 0, "max_wait_ms")
        check_at_least(self, 1, "batch_tokens", "max_queue", "max_responses", "max_tokens", "max_groups")
        check_at_least(self, 1e-9, "max_body_mb", "group_timeout", "drain_timeout")
        if self.group_size is not None and self.group_size < 2:
            raise InputError(f"--group_size {self.group_size} must be at least 2: one response has no other to beat")
        if self.group_size is not None and self.group_size > self.max_responses:
            raise InputError(f"--group_size {self.group_size} exceeds --max_responses {self.max_responses}: raise that")
