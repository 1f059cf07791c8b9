"""One try of an HTTP request to a teacher's server: its JSON, or what went wrong."""

import asyncio
import json
import os
import ssl
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp

from smolpost.errors import UserError, Wrong

CONNECT = 10.0  # seconds to open a connection
KEEP_ALIVE = 4.0  # seconds that an unused connection is kept; uvicorn closes its own after 5
OVERLOAD = {408, 429, 503, 504, 529}
RETRIED = {408, 409, 425, 429}  # and 5xx
HOPELESS = {401, 402, 403, 404, 405, 407}  # and 3xx: no request can succeed
LONGEST = 300  # characters of what a server says that are shown


class Fault(NamedTuple):
    """Why a try gave no reply.

    Attributes:
        name: For a list of attempts: a status, an exception, or what is wrong with the body.
        said: By the server, or by the exception, in one line.
        status: Of the answer; None without one.
        unreached: No connection could be opened.
        timed_out: The server took longer than one try may.
        wait: Seconds that the server asks to wait.
    """

    name: str
    said: str = ""
    status: int | None = None
    unreached: bool = False
    timed_out: bool = False
    wait: float = 0.0

    @property
    def useless(self) -> bool:
        """The server worked on the request, and what it sent is no reply: to ask again costs as much again."""
        return self.status in (200, 500)

    @property
    def overload(self) -> bool:
        return self.timed_out or self.status in OVERLOAD

    @property
    def hopeless(self) -> bool:
        return self.status in HOPELESS or (self.status is not None and 300 <= self.status < 400)

    @property
    def retried(self) -> bool:
        return self.status is None or self.status == 200 or self.status in RETRIED or self.status >= 500

    def __str__(self) -> str:
        return f"{self.name}: {self.said}" if self.said else self.name


class Connection:
    """Pooled connections to a server, as a context.

    Proxies are taken from the environment (HTTPS_PROXY, NO_PROXY), but not for a server on this machine.

    Args:
        url: Of the API, with its version.
        api_key_env: Environment variable that holds the key; None: no key is sent. Its value is read when the context
            is entered. It is in no message, and what a server says is shown without it.
        key: Of the teacher in the recipe.
    Raises:
        UserError: It cannot be a server's URL, or holds a password; the variable is not set.
    """

    def __init__(self, url: str, api_key_env: str | None, *, key: str):
        self.url, self.api_key_env, self.key = checked_url(url, key), api_key_env, key
        self._secret, self._session = "", None

    @property
    def shown(self) -> str:
        return f"{self.key}.url={self.url}"

    async def __aenter__(self) -> "Connection":
        self._secret = secret(self.api_key_env, self.key) if self.api_key_env else ""
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"Authorization": f"Bearer {self._secret}"} if self._secret else {},
            proxy=proxy_for(self.url, self.key),
        )
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._session.close()

    async def send(self, method: str, url: str, timeout: float, body: bytes | None = None) -> dict[str, Any] | Fault:
        """One try.

        Args:
            url: All of it.
            timeout: Seconds until the last byte of the answer.
            body: JSON.
        Returns:
            The object of an answer with status 200, or the fault.
        Raises:
            UserError: The server's certificate is not trusted.
        """
        limits = aiohttp.ClientTimeout(total=timeout, sock_connect=CONNECT)
        headers = {"Content-Type": "application/json"} if body is not None else None
        try:
            async with self._session.request(
                method, url, data=body, headers=headers, timeout=limits, allow_redirects=False
            ) as response:
                return self._content(response.status, response.headers, await response.read())
        except aiohttp.ClientConnectorCertificateError as error:
            raise UserError(
                f"{self.shown} has a certificate that is not trusted here ({self._line(error.certificate_error)}); "
                "point SSL_CERT_FILE to the certificates of its authority"
            ) from None
        except (aiohttp.ClientConnectorError, aiohttp.ClientHttpProxyError, aiohttp.ConnectionTimeoutError) as error:
            return Fault(self._line(reason_of(error)), unreached=True)
        except TimeoutError:
            return Fault("time-out", f"no reply within {timeout:g} s", timed_out=True)
        except (aiohttp.ClientError, OSError, asyncio.IncompleteReadError) as error:
            return Fault(type(error).__name__, self._line(error))

    def _content(self, status: int, headers: Mapping[str, str], data: bytes) -> dict[str, Any] | Fault:
        text = data.decode("utf-8", "replace")
        try:
            content = json.loads(text)
        except (ValueError, RecursionError):
            content = None
        if status != 200:
            where = headers.get("Location", "")
            said = self._line(f"it points to {where}" if where else message_of(content) or text)
            return Fault(str(status), said, status, wait=asked_wait(headers))
        if not isinstance(content, dict):
            return Fault("no JSON object", self._line(text), status)
        return whole_text(content) if "\\ud" in text.lower() else content

    def _line(self, said: object) -> str:
        line = " ".join(str(said).split())
        return (line.replace(self._secret, f"${self.api_key_env}") if self._secret else line)[:LONGEST]


def checked_url(url: str | None, key: str) -> str:
    """The URL without a slash at its end.

    Raises:
        Wrong: It is not the URL of a server's API.
    """
    remedy = "; give the address of the API with its version, such as http://localhost:8000/v1"
    if not url:
        raise Wrong(f"{key}.url", f" is not set{remedy}")
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        usable = False
    if usable and (parts.username or parts.password):
        raise Wrong(
            f"{key}.url",
            f" holds a name or a password for {parts.hostname}; put it into an environment variable and name that in "
            f"{key}.api_key_env",
        )
    if not usable or parts.query or parts.fragment or url.split() != [url]:
        raise Wrong(f"{key}.url", f"={url} is not the address of a server{remedy}")
    if url.rstrip("/").endswith("/chat/completions"):
        raise Wrong(f"{key}.url", f"={url} is the address of one service; leave /chat/completions out")
    return url.rstrip("/")


def secret(name: str, key: str) -> str:
    """The value of the environment variable that holds a teacher's API key.

    Raises:
        UserError: It is not set, or is not one word.
    """
    value = os.environ.get(name, "").strip()
    if not value:
        raise UserError(f"{key}.api_key_env={name} is not set in the environment; export {name}=... and run again")
    if not value.isascii() or not value.isprintable() or " " in value:
        raise UserError(
            f"{key}.api_key_env={name} holds characters that no key has; export {name} again, from a plain text"
        )
    return value


def proxy_for(url: str, key: str) -> str | None:
    """The proxy that the environment names for a URL; None for this machine.

    Raises:
        UserError: It is not an HTTP proxy.
    """
    parts = urlsplit(url)
    if parts.hostname in ("localhost", "::1") or parts.hostname.startswith("127.") or proxy_bypass(parts.hostname):
        return None
    proxy = getproxies().get(parts.scheme)
    if proxy and "://" not in proxy:
        proxy = f"http://{proxy}"
    if proxy and not proxy.startswith(("http://", "https://")):
        raise UserError(
            f"{key}.url={url} goes through {parts.scheme}_proxy of the environment, which is a {proxy.split(':')[0]} "
            f"proxy; name an HTTP proxy there, or add {parts.hostname} to no_proxy"
        )
    return proxy or None


def reason_of(error: aiohttp.ClientError) -> str:
    """Why no connection could be opened, in the words of the operating system where it has some."""
    cause = getattr(error, "os_error", error)
    code = getattr(cause, "errno", None)
    known = code and code > 0 and not isinstance(cause, ssl.SSLError)
    return os.strerror(code) if known else getattr(cause, "strerror", None) or str(cause)


def message_of(content: Any) -> str:
    """The text of an error body, in the forms that servers have: error.message, error, message, detail."""
    if isinstance(content, dict):
        for name in ("error", "message", "detail"):
            found = content.get(name)
            if isinstance(found, dict):
                found = found.get("message")
            if found:
                return found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)
    return ""


def asked_wait(headers: Mapping[str, str]) -> float:
    """Seconds of a Retry-After header, which is a number or a date; 0 without a usable one.

    A date counts from the server's own Date, so that clocks may differ.
    """
    value = headers.get("Retry-After", "").strip()
    try:
        return max(0.0, float(value)) if value.replace(".", "", 1).isdigit() else _until(value, headers.get("Date"))
    except (TypeError, ValueError):
        return 0.0


def _until(date: str, now: str | None) -> float:
    begin = parsedate_to_datetime(now) if now else datetime.now(UTC)
    return max(0.0, (parsedate_to_datetime(date) - begin).total_seconds())


def whole_text(content: dict[str, Any]) -> dict[str, Any]:
    """The content with U+FFFD for each half of a surrogate pair: a reply can be cut in the middle of one."""
    text = json.dumps(content, ensure_ascii=False)
    return json.loads(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
