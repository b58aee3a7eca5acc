"""Asking a server over HTTP: what every client shares, and each way in which an answer can fail, as one line.

Called by head_server.py and serving/client.py. Needs httpx, which is imported only when a server is asked, since a
model that is loaded needs none.
"""

import functools
import random
import time

from general_preference.errors import InputError, RunError
from general_preference.models.config import first_line

RETRY_AFTER = (0.5, 2.0)  # seconds, where nothing listens or the server is not ready (503)
_MOST_SAID = 200  # characters of the server's own words in a message
_CURES = {
    429: "ask again later, or send less at once",
    401: "pass its api_key, or set GPM_API_KEY",
    503: "ask again when it has loaded its model, or send less at once",
}


def check_address(url: str, api_key: str | None) -> str:
    """The url without a slash at its end.

    Raises:
        InputError: no httpx, an api_key that no header can hold, or an url that is none.
    """
    if api_key is not None and not (api_key.strip().isascii() and api_key.strip().isprintable()):
        raise InputError("api_key holds characters that no HTTP header can: copy it again")
    httpx = _httpx()
    try:
        parsed = httpx.URL(url)
        fits = parsed.scheme in ("http", "https") and parsed.host
    except (httpx.InvalidURL, TypeError):
        fits = False
    if not fits:
        raise InputError(f'url {url!r} is no address of a server, such as "http://localhost:8000"')
    return url.rstrip("/")


def connect(url: str, api_key: str | None, timeout: float, connections: int = 10):
    """An httpx.Client for that server; `timeout` is seconds of silence while an answer is awaited."""
    httpx = _httpx()
    headers = {"Authorization": f"Bearer {api_key.strip()}"} if api_key else {}
    waits, limits = httpx.Timeout(timeout, connect=min(timeout, 10.0)), httpx.Limits(max_connections=connections)
    return httpx.Client(base_url=url, headers=headers, timeout=waits, verify=_tls(), limits=limits)


def ask(client, method: str, url: str, route: str, timeout: float, cures: dict, kind: str, less: str, **options):
    """The JSON of the answer to one request.

    Args:
        client: of `connect`. url, timeout: what that was made with.
        cures: {status: what to do about it}. kind: of server, that the url should be of. less: what shortens an answer.
        options: of `httpx.Client.request`.

    Raises:
        RunError: no server there, silence, a connection that breaks, another status than 200, or no JSON. A server
            whose queue is full (429) is asked again for `timeout` seconds.
    """
    httpx, place = _httpx(), url + route
    waits, ends = list(RETRY_AFTER), time.monotonic() + timeout
    while True:
        try:
            response = client.request(method, route, **options)
            if response.status_code == 429 and time.monotonic() < ends:
                wait = random.uniform(0.1, 1.0)  # those who were refused together should not come together again
            elif response.status_code == 503 and waits:
                wait = waits.pop(0)
            else:
                break
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            if not waits:
                cure = "start the server, or correct the url"
                raise RunError(f"nothing answers at {url} ({first_line(error)}): {cure}") from error
            wait = waits.pop(0)
        except httpx.TimeoutException as error:
            raise RunError(f"{place} has said nothing for {timeout} seconds: raise timeout, or {less}") from error
        except httpx.HTTPError as error:
            cure = "look at the server's log"
            raise RunError(f"{place} broke the connection off ({first_line(error)}): {cure}") from error
        time.sleep(wait)
    said = " ".join(response.text.split())[:_MOST_SAID] or "without a word"
    if response.status_code != 200:
        cure = (_CURES | cures).get(response.status_code, "look at the server's log")
        raise RunError(f"{place} answered with status {response.status_code} ({said}): {cure}")
    try:
        return response.json()
    except ValueError as error:
        raise RunError(f"{place} answered no JSON ({said}): is the url that of {kind}?") from error


def _httpx():
    try:
        import httpx
    except ImportError as error:
        raise InputError("asking a server needs the package httpx: pip install httpx") from error
    return httpx


@functools.cache
def _tls():
    """Certificates for https, read once."""
    return _httpx().create_ssl_context()
