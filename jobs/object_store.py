"""The servers of object stores: which options a path may state, how to connect, and what their errors mean.

Connections and attempts are bounded. What is not in the path comes from the environment.
"""

from __future__ import annotations

import errno
import functools
import os
import re
import urllib.parse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow.fs

SCHEMES = ("s3", "gs")
OPTIONS = ("endpoint_override", "region", "scheme")
"""What may stand behind the ``?`` of a path."""
PATIENCE = 30.0
"""Seconds after which a storage that does not answer is given up when it is checked."""
ATTEMPTS = 4
"""Of every request, with growing pauses: a second or two together."""
CONNECT_TIMEOUT = 5.0
REQUEST_TIMEOUT = 60.0


def normal_query(scheme: str, query: str, text: str) -> str:
    """The options in one order, with those of the environment: they have to be the same on every machine."""
    try:
        options = dict(urllib.parse.parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query)))
    except ValueError:
        options = {query: ""}
    unknown = [name for name, value in options.items() if name not in OPTIONS or not value]
    if unknown:
        raise ValueError(
            f"storage = {text!r}: {unknown[0]!r}; allowed behind the ?: {', '.join(OPTIONS)}, with a value"
        )
    if scheme == "s3" and "endpoint_override" not in options:
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        if endpoint:
            options["endpoint_override"] = endpoint
    if scheme == "s3" and "region" not in options and "endpoint_override" in options:
        options["region"] = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    return urllib.parse.urlencode(sorted(options.items()), safe=":/")


@functools.cache
def connect(scheme: str, query: str, bucket: str) -> pyarrow.fs.FileSystem:
    from datetime import timedelta

    from pyarrow import fs

    options = dict(urllib.parse.parse_qsl(query))
    endpoint, region = options.get("endpoint_override"), options.get("region")
    if scheme == "gs":
        where = {"endpoint_override": endpoint, "scheme": options.get("scheme")}
        return fs.GcsFileSystem(
            retry_time_limit=timedelta(seconds=PATIENCE), **{name: value for name, value in where.items() if value}
        )
    if region is None:
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return fs.S3FileSystem(
        region=region or fs.resolve_s3_region(bucket),
        endpoint_override=endpoint,
        scheme=options.get("scheme", "https"),
        connect_timeout=CONNECT_TIMEOUT,
        request_timeout=REQUEST_TIMEOUT,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
        allow_delayed_open=True,  # a small file is one put
    )


_REASONS = (
    (r"NO_SUCH_BUCKET|bucket .* (does not exist|not found)", errno.ENOENT, "no such bucket"),
    (r"INVALID_ACCESS_KEY_ID|SIGNATURE_DOES_NOT_MATCH|UNRECOGNIZED_CLIENT|INVALID_CLIENT_TOKEN_ID|InvalidAccessKeyId",
     errno.EACCES, "the credentials are refused"),
    (r"EXPIRED_TOKEN|ExpiredToken|RequestExpired", errno.EACCES, "the credentials have expired"),
    (r"MISSING_AUTHENTICATION_TOKEN|UNAUTHENTICATED|[Cc]ould not find .*credentials|NoCredentials", errno.EACCES,
     "there are no credentials"),
    (r"ACCESS_DENIED|HTTP status 403|PERMISSION_DENIED|AccessDenied", errno.EACCES, "the credentials may not do this"),
    (r"NETWORK_CONNECTION|curlCode|UNAVAILABLE|REQUEST_TIMEOUT|[Cc]onnection refused", errno.EHOSTUNREACH,
     "no server answers"),
)  # fmt: skip


def reason(error: OSError) -> tuple[int, str]:
    """What pyarrow's error comes down to: an error number and a few words."""
    text = " ".join(str(error).split())
    for pattern, number, words in _REASONS:
        if re.search(pattern, text):
            return number, words
    if isinstance(error, FileNotFoundError):
        return errno.ENOENT, os.strerror(errno.ENOENT)
    if error.errno is not None:
        return error.errno, error.strerror or os.strerror(error.errno)
    return errno.EIO, text.removeprefix("AWS Error ")
