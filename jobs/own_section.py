"""Files that hold a section of their own beside changes of a checkpoint's settings: sweeps and evaluations.

    SECTION: {…}
    deliberation: {lag: 1}

``--set SECTION.key=value`` changes the section, any other ``--set`` the checkpoint's settings.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

from pydantic import create_model

from crsm.config import apply_override, parse_config, parse_settings, read_tree
from crsm.settings import AnySettings, Settings


def load_own_section(
    kind: type[AnySettings], section: str, path: str | Path | None = None, overrides: Iterable[str] = ()
) -> tuple[AnySettings, dict[str, Any], tuple[str, ...]]:
    """The section, the settings that replace the checkpoint's, and the overrides that go on top of them.

    Args:
        kind: what the section holds.
        section: its name.
        path: the file; None: defaults.
        overrides: of ``--set``.

    Raises:
        ValueError: naming the file or override, the key, the value and what is allowed.
    """
    # Faults are named by their whole path, ``ablation.seeds``.
    whole = create_model("OwnSection", __base__=Settings, **cast(Any, {section: (kind, kind())}))

    def parse(tree: Any, source: str) -> AnySettings:
        return cast(AnySettings, getattr(parse_settings(whole, {section: tree}, source), section))

    source = "defaults" if path is None else str(path)
    stated = {} if path is None else read_tree(path)
    tree = stated.pop(section, {})
    if not isinstance(tree, dict):
        raise ValueError(f"{source}: {section} = {tree!r}; allowed: a mapping")
    parse_config(stated, source)
    settings = parse(tree, source)
    own: list[str] = []
    others: list[str] = []
    for override in overrides:
        (own if override.startswith(f"{section}.") else others).append(override)
    if own:
        changed = {section: settings.model_dump(mode="json")}
        for override in own:
            apply_override(changed, override)
        settings = parse(changed[section], f"--set {' '.join(own)}")
    return settings, stated, tuple(others)
