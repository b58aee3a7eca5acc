"""Why a request is not answered with numbers: what the HTTP status and the line of the reply come from."""


class Refused(Exception):
    """A request that is answered with `status` and the message; `retry_after` in seconds where waiting helps."""

    def __init__(self, status: int, message: str, retry_after: int | None = None):
        super().__init__(message)
        self.status, self.retry_after = status, retry_after
