"""Finds out in a moment what Ray takes minutes to say: no cluster at an address, or not with this token."""

from __future__ import annotations

import json
import re
from typing import Any

_TOKEN_HELP = (
    "allowed: RAY_AUTH_MODE=token and the cluster's token in ~/.ray/auth_token, in the file that RAY_AUTH_TOKEN_PATH "
    "names, or in RAY_AUTH_TOKEN"
)


def check_address(address: str, timeout: float = 5.0) -> None:
    """Asks the head for its name.

    Args:
        address: as ``RAY_ADDRESS``: ``HOST:PORT``; ``auto`` and Ray Client's addresses are left to Ray.
        timeout: seconds.

    Raises:
        ValueError: it is no address, nobody answers there, or the token is refused; one line, with what is allowed.
    """
    if address == "auto" or address.startswith("ray://"):
        return
    if address.startswith(("http://", "https://")):
        raise ValueError(
            f"Ray address = {address!r} is that of the dashboard, for `ray job submit --address`; "
            "allowed: HOST:PORT of the head (6379 by default)"
        )
    if not re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[\w.-]+):\d{1,5}", address):
        raise ValueError(f"Ray address = {address!r}; allowed: HOST:PORT of the head (6379 by default), auto, local")
    problem = ask(address, timeout)
    if problem:
        raise ValueError(f"Ray address = {address!r}: {problem}")


def ask(address: str, timeout: float) -> str | None:
    """Why a head does not let us in; None: it does."""
    import grpc  # type: ignore[import-untyped]
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc
    from ray.exceptions import AuthenticationError

    try:
        channel = init_grpc_channel(address)
        try:
            stub = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
            stub.GetClusterId(gcs_service_pb2.GetClusterIdRequest(), timeout=timeout)
            return _version_problem(_metadata(channel, timeout))
        finally:
            channel.close()
    except AuthenticationError:
        return f"RAY_AUTH_MODE is token and there is none; {_TOKEN_HELP}"
    except grpc.RpcError as error:
        return _explain(error.code().name, error.details() or "")


def _metadata(channel: Any, timeout: float) -> dict[str, Any]:
    """What a head says of its cluster; empty if it says nothing yet."""
    from ray._common.usage.usage_constants import CLUSTER_METADATA_KEY
    from ray._private.ray_constants import KV_NAMESPACE_CLUSTER
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    stub = gcs_service_pb2_grpc.InternalKVGcsServiceStub(channel)
    asked = gcs_service_pb2.InternalKVGetRequest(namespace=KV_NAMESPACE_CLUSTER, key=CLUSTER_METADATA_KEY)
    reply = stub.InternalKVGet(asked, timeout=timeout)
    return dict(json.loads(reply.value)) if reply.value else {}


def _version_problem(metadata: dict[str, Any]) -> str | None:
    """What Ray would refuse after joining; None: the versions fit."""
    from ray._private.utils import check_version_info, compute_version_info

    if not {"ray_version", "python_version"} <= set(metadata):
        return None
    try:
        check_version_info(metadata, "")
    except RuntimeError:
        ray_version, python_version = compute_version_info()
        return (
            f"the cluster runs Ray {metadata['ray_version']} and Python {metadata['python_version']}, this is Ray "
            f"{ray_version} and Python {python_version}; allowed: the same versions"
        )
    return None


def _explain(code: str, details: str) -> str:
    if code == "UNAUTHENTICATED":
        return f"the cluster refuses the token, or asks for one and was shown none; {_TOKEN_HELP}"
    if "HTTP/2" in details or code == "UNIMPLEMENTED":
        return "what answers there is no head of a Ray cluster; allowed: HOST:PORT of the head (6379 by default)"
    if code in ("UNAVAILABLE", "DEADLINE_EXCEEDED"):
        return "no Ray cluster answers there; allowed: the address that `ray start --head` printed, or local"
    return " ".join(f"{code}: {details}".split())


def living_nodes(address: str, timeout: float = 5.0) -> list[tuple[str, dict[str, float]]]:
    """Address and resources of the nodes that live, without joining the cluster.

    Args:
        address: ``HOST:PORT`` of the head.
        timeout: seconds.

    Raises:
        OSError: the head did not say.
    """
    import grpc
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated import gcs_pb2, gcs_service_pb2, gcs_service_pb2_grpc

    channel = init_grpc_channel(address)
    try:
        stub = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
        reply = stub.GetAllNodeInfo(gcs_service_pb2.GetAllNodeInfoRequest(), timeout=timeout)
    except grpc.RpcError as error:
        raise OSError(f"Ray address = {address!r}: {_explain(error.code().name, error.details() or '')}") from None
    finally:
        channel.close()
    alive = [node for node in reply.node_info_list if node.state == gcs_pb2.GcsNodeInfo.GcsNodeState.ALIVE]
    return [(node.node_manager_address, dict(node.resources_total)) for node in alive]
