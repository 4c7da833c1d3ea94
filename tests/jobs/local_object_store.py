"""An object store on this machine, for tests: moto's S3, without a bucket but those that are asked for."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_EC2_METADATA_DISABLED": "true"}


@dataclass(frozen=True, slots=True)
class ObjectStore:
    endpoint: str

    def bucket(self, name: str) -> str:
        """Makes a bucket; its URI."""
        import boto3

        keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test"}
        boto3.client("s3", endpoint_url=self.endpoint, region_name="us-east-1", **keys).create_bucket(Bucket=name)
        return f"s3://{name}"

    def uri(self, path: str) -> str:
        """``bucket/prefix`` with the endpoint in it."""
        return f"s3://{path}?endpoint_override={self.endpoint}&region=us-east-1"


@contextlib.contextmanager
def start_object_store() -> Iterator[ObjectStore]:
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield ObjectStore(f"http://{host}:{port}")
    finally:
        server.stop()
