"""The one grammar of index URLs: which are accepted, and how one is shown without its passwords."""

from __future__ import annotations

import re
from collections.abc import Mapping
from urllib.parse import parse_qs, urlencode, urlsplit

from celery_goalstate.display import did_you_mean
from celery_goalstate.exceptions import ImproperlyConfigured

_OF_SENTINELS = ("sentinel", "rediss+sentinel")
_OF_SEVERAL = (*_OF_SENTINELS, "redis+cluster", "rediss+cluster")  # may be reached by several servers
_SCHEMES = ("redis", "rediss", "unix", *_OF_SEVERAL, "memory")
EXAMPLE = 'e.g. goalstate_index_url="redis://localhost:6379/1", or "memory://" within one process'

#: The options behind the "?" of an index's URL: those of redis-py's that can be written as text.
_URL_OPTIONS = frozenset(
    {
        *("username", "password", "db", "client_name", "protocol", "max_connections"),
        *("health_check_interval", "socket_timeout", "socket_connect_timeout", "socket_read_size"),
        "credential_provider",  # the dotted path of a class, as in kombu's URLs
        "retry_on_timeout",  # which changes nothing here, but URLs of Celery's result backends have it
    }
)
_TLS_OPTIONS = frozenset(
    {
        *("ssl_ca_certs", "ssl_ca_data", "ssl_ca_path", "ssl_certfile", "ssl_keyfile", "ssl_password"),
        *("ssl_cert_reqs", "ssl_check_hostname", "ssl_ciphers", "ssl_min_version"),
        *("ssl_include_verify_flags", "ssl_exclude_verify_flags"),
    }
)

# Celery and kombu accept these spellings, redis-py does not.
_CERT_REQS = {"cert_required": "required", "cert_optional": "optional", "cert_none": "none"}


def safe_url(url: str) -> str:
    """The URL (or several, separated by ";") without its passwords: for messages and logs."""
    # Split only where another URL begins: a password that should have been quoted may hold a ";".
    return ";".join(_without_password(part) for part in re.split(r";(?=[A-Za-z0-9+.-]+://)", url))


def _without_password(url: str) -> str:
    scheme, separator, rest = url.partition("://") if "://" in url else ("", "", url)
    # The last "@": an unquoted password may hold others. Rather hide too much than too little.
    user_info, at, host = rest.rpartition("@")
    user, colon, _ = user_info.partition(":")
    rest = f"{user}{colon}{'**' if colon else ''}{at}{host}"
    return scheme + separator + re.sub(r"([?&][^=&;]*password=)[^&;]*", r"\1**", rest, flags=re.IGNORECASE)


def scheme_of(url: str) -> str:
    """The URL's scheme, in lower case."""
    return url.partition("://")[0].lower()


def checked_url(setting: str, url: str) -> str:
    """The URL as the index takes it. Raises `ImproperlyConfigured`, naming the setting that has it."""
    scheme = scheme_of(url)
    if scheme == "redis+socket":
        scheme, url = "unix", url.replace("redis+socket://", "unix://", 1).replace("virtual_host=", "db=")
    if (
        "://" not in url
        or any(scheme_of(part) != scheme for part in url.split(";"))
        or scheme not in _SCHEMES
    ):
        raise ImproperlyConfigured(
            f"{setting} is {safe_url(url)!r}; accepted are the schemes {', '.join(_SCHEMES)}; {EXAMPLE}"
        )
    if scheme == "memory":
        return "memory://"
    if scheme not in _OF_SEVERAL and ";" in url:
        raise ImproperlyConfigured(
            f"{setting} is {safe_url(url)!r}; several URLs, separated by ';', are taken only by"
            f" {', '.join(_OF_SEVERAL)}"
        )
    for part in url.split(";"):
        try:
            _ = urlsplit(part).port
        except ValueError:  # its text would show a part of an unquoted password
            raise _no_valid_url(setting, url) from None
    _refuse_unknown_options(setting, url, scheme)
    if scheme in _OF_SENTINELS and "master_name" not in query_of(url):
        raise ImproperlyConfigured(
            f"{setting} is {safe_url(url)!r}, which does not name its master;"
            " append ?master_name=... or set the transport option master_name"
        )
    return re.sub(
        r"(?<=[?&]ssl_cert_reqs=)\w+",
        lambda found: _CERT_REQS.get(found[0].lower(), found[0]),
        url,
        flags=re.IGNORECASE,
    )


def _no_valid_url(setting: str, url: str) -> ImproperlyConfigured:
    return ImproperlyConfigured(
        f"{setting} is {safe_url(url)!r}, which is no valid URL; quote special characters in it"
    )


def _refuse_unknown_options(setting: str, url: str, scheme: str) -> None:
    accepted = set(_URL_OPTIONS)
    if scheme != "unix":
        accepted.add("socket_keepalive")
    if scheme.startswith("rediss"):
        accepted |= _TLS_OPTIONS
    if scheme in _OF_SENTINELS:
        accepted |= {"master_name", "sentinel_password"}
    if scheme.endswith("+cluster"):  # which has but one database; the others redis-py drops without a word
        accepted -= {"db", "health_check_interval", "ssl_ciphers", "ssl_min_version"}
    for name in query_of(url):
        if name not in accepted:
            if any("@" in urlsplit(part).query for part in url.split(";")):  # an unquoted password?
                raise _no_valid_url(setting, url)
            raise ImproperlyConfigured(
                f"{setting} is {safe_url(url)!r}; {scheme}:// has no option {name!r}."
                f"{did_you_mean(name, accepted)} Accepted: {', '.join(sorted(accepted))}"
            )


def query_of(url: str) -> dict[str, list[str]]:
    """The options behind the "?", of all URLs where there are several."""
    return parse_qs("&".join(urlsplit(part).query for part in url.split(";")))


def without_credentials(url: str) -> str:
    """The URL without its users and passwords."""
    return re.sub(r"(?<=://)[^/;?]*@", "", url)


def without_option(url: str, name: str) -> tuple[str, str | None]:
    """The URL without an option, and the option's value; None: it has none."""
    value = query_of(url).get(name, [None])[0]
    return re.sub(rf"(?<=[?&]){name}=[^&;]*&?", "", url).replace("?;", ";").rstrip("?&"), value


def with_query(url: str, parameters: Mapping[str, str]) -> str:
    """The URL with more options."""
    if not parameters:
        return url
    last = url.rpartition(";")[2]
    return f"{url}{'&' if urlsplit(last).query else '?'}{urlencode(parameters)}"
