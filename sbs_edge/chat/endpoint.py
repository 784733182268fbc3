"""An HTTP endpoint of the OpenAI protocol: its address, its headers, and the secrets in them.

Everything that a person may see (errors, logs, the journal, saved configurations) goes through
:func:`redacted_url` or :meth:`Endpoint.clean`. Headers are checked here, before a library sees them, because a
library that rejects a header quotes its value.
"""

from __future__ import annotations

import base64
import json
import os
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit, urlunsplit

from sbs_edge.errors import UsageError

__all__ = [
    "HIDDEN",
    "Endpoint",
    "one_line",
    "redacted_fields",
    "redacted_headers",
    "redacted_url",
    "secret_values",
]

HIDDEN = "***"
"""The text that replaces a secret."""

_OPEN_QUERY = {"api-version", "api_version", "version"}  # query fields whose values are shown
_ROUTES = ("/chat/completions", "/completions")
_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_RESERVED = {"host", "content-length", "content-type", "transfer-encoding", "connection"}


def one_line(text: str, limit: int = 300) -> str:
    """Return the beginning of ``text`` on one line, without control and format characters."""
    plain = "".join(c if unicodedata.category(c)[0] != "C" else " " for c in text[: 8 * limit])
    plain = " ".join(plain.split())
    return plain if len(plain) <= limit else plain[: limit - 1] + "…"


def redacted_url(url: str) -> str:
    """Return ``url`` without user, password and the values of its query, except ``api-version``."""
    try:
        parts = urlsplit(url.strip())
    except ValueError:
        return HIDDEN
    host = parts.netloc.rpartition("@")[2]
    netloc = f"{HIDDEN}@{host}" if "@" in parts.netloc else host
    fields = [
        f"{quote(name)}={quote(value, safe='-.') if name.casefold() in _OPEN_QUERY else HIDDEN}"
        for name, value in parse_qsl(parts.query, keep_blank_values=True)
    ]
    return urlunsplit((parts.scheme, netloc, parts.path, "&".join(fields), ""))


def redacted_headers(headers: list[str]) -> list[str]:
    """Return ``NAME=VALUE`` texts with each value hidden, unless it names an environment variable."""
    shown = []
    for header in headers:
        name, equals, value = header.partition("=")
        shown.append(header if not equals or value.startswith("env:") else f"{name}={HIDDEN}")
    return shown


_SECRET_FIELD = re.compile(
    r"(?:^|_)(?:auth|authorization|secret|password|passwd|credentials?|cookie|signature)(?:$|_)"
    r"|(?:^|_)(?:api|access|private|secret|subscription|account|auth|session|refresh|bearer|id|hub|hf)_?(?:key|token)s?$"
    r"|^(?:key|token)$"
)
_SECRET_VALUE = re.compile(r"\A(?:Bearer\s+\S+|(?:sk|hf|ghp|xox[a-z])[-_][\w-]{8,})\Z")


def _is_secret(name: str, value: str) -> bool:
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[^A-Za-z0-9]+", "_", name).casefold()
    return bool(value) and (_SECRET_FIELD.search(words) or _SECRET_VALUE.match(value)) is not None


def redacted_fields(value: object, name: str = "") -> Any:
    """Return the fields of a request with every text hidden whose name or form marks it as a secret.

    Lists and objects are searched to any depth. A secret name covers every text below it. Numbers are never hidden.

    Example:
        >>> redacted_fields({"api_key": "abc", "max_tokens": 5})
        {'api_key': '***', 'max_tokens': 5}

    """
    if isinstance(value, Mapping):
        return {
            key: redacted_fields(item, name if _is_secret(name, "x") else str(key))
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [redacted_fields(item, name) for item in value]
    return HIDDEN if isinstance(value, str) and _is_secret(name, value) else value


def secret_values(value: object) -> tuple[str, ...]:
    """Return the texts that :func:`redacted_fields` hides, longest first."""
    found: set[str] = set()

    def search(item: object, name: str) -> None:
        if isinstance(item, Mapping):
            for key, inner in item.items():
                search(inner, name if _is_secret(name, "x") else str(key))
        elif isinstance(item, list | tuple):
            for inner in item:
                search(inner, name)
        elif isinstance(item, str) and _is_secret(name, item):
            found.update((item, item.removeprefix("Bearer ")))

    search(value, "")
    return tuple(sorted((text for text in found if len(text) > 3), key=len, reverse=True))


def holds_hidden(value: object) -> bool:
    """Return whether a value from a saved configuration contains the text that replaces a secret."""
    if isinstance(value, Mapping):
        return any(map(holds_hidden, value.values()))
    if isinstance(value, list | tuple):
        return any(map(holds_hidden, value))
    return value == HIDDEN


def header_value(value: str, origin: str) -> str:
    """Return ``value`` without surrounding white space, checked to be a valid HTTP header value.

    Raises:
        UsageError: it has anything but visible ASCII and spaces; the message names ``origin`` and
            never the value.

    """
    plain = value.strip()
    if plain == HIDDEN:
        raise UsageError(
            f"{origin} is {HIDDEN}, because saved configurations leave secrets out. Give the value again."
        )
    bad = next((c for c in plain if not (c == "\t" or " " <= c <= "~")), None)
    if bad is not None:
        kind = "a line break" if bad in "\r\n" else f"the character U+{ord(bad):04X}"
        raise UsageError(
            f"{origin} contains {kind}, which an HTTP header cannot have. Set it to the bare value: one line, "
            "without quotation marks."
        )
    return plain


@dataclass(frozen=True, slots=True, repr=False)
class Endpoint:
    """A server; create it with :meth:`of`.

    Attributes:
        base: scheme, host and path, without a trailing slash, user, password or query.
        query: kept in the address of every request.
        headers: sent with every request.
        secrets: texts that must never be shown.

    """

    base: str
    query: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    secrets: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        url: str,
        *,
        origin: str = "--base-url",
        key: str | None = None,
        key_origin: str = "OPENAI_API_KEY",
        key_header: str = "Authorization",
        headers: Mapping[str, str] | None = None,
    ) -> Endpoint:
        """Check an address, a key and further headers.

        Args:
            url: up to and including ``/v1``; a user, a password and a query are kept.
            origin: the option or variable that ``url`` comes from, for messages.
            key: sent as ``Bearer`` token, or bare in another header.
            key_origin: the variable that ``key`` comes from, for messages.
            key_header: the header that carries the key.
            headers: name -> value; ``env:NAME`` is read from the environment.

        Raises:
            UsageError: the address or a header cannot be used; no secret is in the message.

        """
        base, query, user = _address(url, origin)
        sent: dict[str, str] = {}
        secrets = [value for name, value in parse_qsl(query) if name.casefold() not in _OPEN_QUERY]
        token = header_value(key, f"The environment variable {key_origin}") if key else ""
        if token:
            sent[key_header] = f"Bearer {token}" if key_header == "Authorization" else token
            secrets.append(token)
        if user is not None:
            sent["Authorization"] = "Basic " + base64.b64encode(user.encode()).decode()
            secrets += [user, sent["Authorization"].removeprefix("Basic "), user.partition(":")[2]]
        for name, value in (headers or {}).items():
            checked = _header(name, value)
            sent = {other: text for other, text in sent.items() if other.casefold() != name.casefold()}
            sent[name] = checked
            secrets += [checked, checked.removeprefix("Bearer ")]
        return cls(
            base, query, sent, tuple(sorted({s for s in secrets if len(s) > 3}, key=len, reverse=True))
        )

    @property
    def shown(self) -> str:
        """Return the address in a form that may be shown."""
        return redacted_url(self.base + (f"?{self.query}" if self.query else ""))

    @property
    def identity(self) -> str:
        """Return the address and the names of the headers, which identify a server in a journal without a secret."""
        names = ",".join(
            sorted(name.casefold() for name in self.headers if name.casefold() != "authorization")
        )
        return self.shown + (f" [{names}]" if names else "")

    def url(self, route: str) -> str:
        """Return the address of ``route``, such as ``/chat/completions``, with the query."""
        return f"{self.base}{route}" + (f"?{self.query}" if self.query else "")

    def hiding(self, secrets: tuple[str, ...]) -> Endpoint:
        """Return the endpoint with further texts that must never be shown."""
        return replace(self, secrets=(*secrets, *self.secrets)) if secrets else self

    def hide(self, text: str) -> str:
        """Return ``text`` without this endpoint's secrets."""
        for secret in self.secrets:
            # Errors quote a secret as it is, on one line, in an address or in JSON.
            for plain in {secret, " ".join(secret.split())} - {""}:
                for spelled in {plain, quote(plain), quote(plain, safe=""), json.dumps(plain)[1:-1]}:
                    text = text.replace(spelled, HIDDEN)
        return text

    def clean(self, text: str, limit: int = 300) -> str:
        """Return ``text`` in a form that may be shown: short, on one line, without this endpoint's secrets."""
        return one_line(self.hide(text), limit)


def _address(url: str, origin: str) -> tuple[str, str, str | None]:
    plain = url.strip()
    try:
        parts = urlsplit(plain)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise UsageError(f"{origin} is not an address: its host or port cannot be read.") from None
    if any(c.isspace() or not c.isprintable() for c in plain):
        raise UsageError(f"{origin} has white space or a control character inside the address; remove it.")
    if parts.scheme.lower() not in ("http", "https") or not host:
        raise UsageError(
            f"{origin} must be a full address such as http://localhost:8000/v1; {redacted_url(plain)!r} does not "
            "begin with http:// or https:// and a host."
        )
    if HIDDEN in parts.netloc or HIDDEN in parts.query:
        raise UsageError(
            f"{origin} contains {HIDDEN}, because saved configurations leave secrets out. Give the full address again."
        )
    path = parts.path.rstrip("/")
    for route in _ROUTES:  # the full address of a route works too
        path = path.removesuffix(route)
    user, at, netloc = parts.netloc.rpartition("@")
    return (
        urlunsplit((parts.scheme, netloc, path.rstrip("/"), "", "")),
        parts.query,
        unquote(user) if at else None,
    )


def _header(name: str, value: str) -> str:
    if not _NAME.fullmatch(name) or name.casefold() in _RESERVED:
        raise UsageError(
            f"The header {name!r} cannot be set. A header is NAME=VALUE with a name of letters, digits and dashes; "
            f"{', '.join(sorted(_RESERVED))} are set by the client."
        )
    if value.startswith("env:"):
        variable = value.removeprefix("env:")
        found = os.environ.get(variable)
        if not found:
            raise UsageError(
                f"The header {name} names the environment variable {variable!r}, which is not set."
            )
        return header_value(found, f"The environment variable {variable}, sent as the header {name},")
    return header_value(value, f"The header {name}")
