"""Makes jobs/checks/schemas/*.json from what KubeRay, botocore and Google publish; the README there says more.

    python scripts/vendor_schemas.py KUBERAY_CHECKOUT BOTOCORE_WHEEL GOOGLE_API_PYTHON_CLIENT_WHEEL

The first is a clone of github.com/ray-project/kuberay at the tag ``KUBERAY``; the others come from ``pip download
--no-deps botocore google-api-python-client``. What is kept: the structure of what people write into manifests and node
types. What is not: descriptions, the status that an operator writes, rules in CEL.
"""

from __future__ import annotations

import gzip
import json
import sys
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

KUBERAY = "v1.7.0"
OUTPUT = Path(__file__).resolve().parents[1] / "jobs" / "checks" / "schemas"
_KEPT = {"type", "properties", "items", "required", "enum", "pattern", "minimum", "maximum", "minItems", "maxItems"}
_KEPT |= {"minLength", "maxLength", "additionalProperties", "anyOf"}
_SHARED = 160
"""Characters above which a schema that occurs twice is written once."""


def main(kuberay: str, botocore: str, google: str) -> None:
    kinds = {"RayCluster": "rayclusters", "RayJob": "rayjobs", "RayService": "rayservices"}
    roots = {kind: _custom_resource(Path(kuberay), plural) for kind, plural in kinds.items()}
    _write("kuberay.json", KUBERAY, {kind: _closed(root) for kind, root in roots.items()})
    with zipfile.ZipFile(botocore) as wheel:
        model = json.loads(gzip.decompress(wheel.read("botocore/data/ec2/2016-11-15/service-2.json.gz")))
    request = {"RunInstances": _from_botocore(model["shapes"], "RunInstancesRequest")}
    _write("aws.json", Path(botocore).name.split("-py3")[0], request)
    with zipfile.ZipFile(google) as wheel:
        document = json.loads(wheel.read("googleapiclient/discovery_cache/documents/compute.v1.json"))
    instance = {"Instance": _from_discovery(document["schemas"], "Instance", ())}
    _write("gcp.json", f"compute v1, revision {document['revision']}", instance)


def _custom_resource(checkout: Path, plural: str) -> dict[str, Any]:
    path = checkout / "ray-operator" / "config" / "crd" / "bases" / f"ray.io_{plural}.yaml"
    versions = yaml.safe_load(path.read_text(encoding="utf-8"))["spec"]["versions"]
    (schema,) = (version["schema"]["openAPIV3Schema"] for version in versions if version["name"] == "v1")
    del schema["properties"]["status"]
    return dict(schema)


def _closed(schema: Any) -> Any:
    """The structure, with unknown keys refused, as ``kubectl apply`` does."""
    kept: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "properties":
            kept[key] = {name: _closed(child) for name, child in value.items()}
        elif key in ("items", "additionalProperties") and isinstance(value, dict):
            kept[key] = _closed(value)
        elif key == "anyOf":
            kept[key] = [_closed(child) for child in value]
        elif key in _KEPT:
            kept[key] = value
    if "properties" in kept and not schema.get("x-kubernetes-preserve-unknown-fields"):
        kept.setdefault("additionalProperties", False)
    return kept


def _from_botocore(shapes: dict[str, Any], name: str) -> dict[str, Any]:
    shape = shapes[name]
    kind = shape["type"]
    if kind == "structure":
        members = {key: _from_botocore(shapes, member["shape"]) for key, member in shape["members"].items()}
        required = {"required": shape["required"]} if shape.get("required") and name != "RunInstancesRequest" else {}
        return {"type": "object", "properties": members, "additionalProperties": False, **required}
    if kind == "list":
        return {"type": "array", "items": _from_botocore(shapes, shape["member"]["shape"])}
    plain = {"string": "string", "blob": "string", "timestamp": "string", "boolean": "boolean"}
    plain |= {"integer": "integer", "long": "integer", "double": "number", "float": "number"}
    # Choices of hundreds (instance types) grow monthly: an old list would refuse what is new.
    few = {"enum": shape["enum"]} if 0 < len(shape.get("enum", ())) <= 20 else {}
    return {"type": plain[kind], **few}


def _from_discovery(schemas: dict[str, Any], name: str, above: tuple[str, ...]) -> dict[str, Any]:
    def convert(schema: dict[str, Any]) -> dict[str, Any]:
        if "$ref" in schema:
            inner = schema["$ref"]
            return {"type": "object"} if inner in above else _from_discovery(schemas, inner, (*above, inner))
        if schema["type"] == "array":
            return {"type": "array", "items": convert(schema["items"])}
        if schema["type"] == "object":
            if "properties" not in schema:
                return {"type": "object", "additionalProperties": convert(schema["additionalProperties"])}
            # What Google writes itself is no part of a request.
            written = {k: v for k, v in schema["properties"].items() if "Output only" not in v.get("description", "")}
            return {
                "type": "object",
                "properties": {key: convert(child) for key, child in written.items()},
                "additionalProperties": False,
            }
        if schema.get("format") in ("int64", "uint64"):
            return {"type": ["string", "integer"]}
        few = {"enum": schema["enum"]} if 0 < len(schema.get("enum", ())) <= 20 else {}
        return {"type": [schema["type"]] if schema["type"] != "any" else ["string", "object"], **few}

    return convert(schemas[name])


def _write(name: str, source: str, roots: dict[str, Any]) -> None:
    """One definition a line; a schema that occurs more than once is written once."""
    counts: Counter[str] = Counter()

    def count(node: Any) -> None:
        if isinstance(node, dict):
            if "type" in node or "properties" in node:
                counts[json.dumps(node, sort_keys=True)] += 1
            for child in node.values():
                count(child)
        elif isinstance(node, list):
            for child in node:
                count(child)

    count(roots)
    definitions: dict[str, Any] = {}
    names: dict[str, str] = {}

    def share(node: Any, top: bool = False) -> Any:
        if isinstance(node, list):
            return [share(child) for child in node]
        if not isinstance(node, dict):
            return node
        text = json.dumps(node, sort_keys=True)
        if not top and counts[text] > 1 and len(text) > _SHARED and ("type" in node or "properties" in node):
            if text not in names:
                names[text] = f"d{len(names)}"
                definitions[names[text]] = {key: share(child) for key, child in node.items()}
            return {"$ref": f"#/$defs/{names[text]}"}
        return {key: share(child) for key, child in node.items()}

    shared = {kind: share(root, top=True) for kind, root in roots.items()}
    lines = [f'"source": {json.dumps(source)}', '"$defs": {\n']
    entries = {**shared, **dict(sorted(definitions.items(), key=lambda item: int(item[0][1:])))}
    body = ",\n".join(f"{json.dumps(key)}:{json.dumps(value, separators=(',', ':'))}" for key, value in entries.items())
    OUTPUT.mkdir(exist_ok=True)
    (OUTPUT / name).write_text("{" + ",\n".join(lines) + body + "\n}}\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
