"""The dashboard and the reference of metrics agree with what is exported."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from tprt.messages import QUEUE_BOUNDS_S, EngineStats
from tprt.server.metrics import ServerMetrics
from tprt.transport.heartbeat import HeartbeatReader
from tprt.transport.heartbeat_file import create_heartbeats

DOCS = Path(__file__).parents[3] / "docs"
_NAME = re.compile(r"\b(?:vllm:|tprt_|process_)[a-z0-9_]+")
_LABELS = {"model_name", "engine", "rank", "phase", "le", "finished_reason"}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> list[Metric]:
    """Return every family that there can be."""
    path = tmp_path_factory.mktemp("ranks") / "heartbeats"
    create_heartbeats(path, 2)
    metrics = ServerMetrics("m", [lambda: HeartbeatReader.open(path)])
    queue_counts = (0,) * (len(QUEUE_BOUNDS_S) + 1)
    metrics.set_engine(0, EngineStats(0, True, 0, 0, 0.0, 1, 1, 0, 0, 0, 0, 0, 0.0, queue_counts))
    return list(text_string_to_metric_families(metrics.render().decode()))


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((DOCS / "grafana/tprt-dashboard.json").read_text(encoding="utf-8"))
    return loaded


def expressions(node: object) -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            if key in ("expr", "query") and isinstance(value, str):
                yield value
            yield from expressions(value)
    elif isinstance(node, list):
        for value in node:
            yield from expressions(value)


def sample_names(families: list[Metric]) -> set[str]:
    suffixes = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
    return {family.name + suffix for family in families for suffix in suffixes[family.type]}


def test_every_metric_of_the_dashboard_is_exported(exported: list[Metric], dashboard: dict[str, Any]) -> None:
    asked = {name for text in expressions(dashboard) for name in _NAME.findall(text)}
    assert len(asked) > 20
    assert asked - sample_names(exported) == set()


def test_every_panel_asks_for_something_by_labels_that_there_are(dashboard: dict[str, Any]) -> None:
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    assert len(panels) > 20
    for panel in panels:
        assert panel["targets"], panel["title"]
        for target in panel["targets"]:
            assert _NAME.search(target["expr"]), panel["title"]
            grouped = re.findall(r"by \(([a-z_, ]+)\)", target["expr"])
            used = {
                *re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]),
                *re.findall(r"(\w+)=", target["expr"]),
            }
            assert {name.strip() for names in grouped for name in names.split(",")} | used <= _LABELS
            assert target["datasource"]["uid"] == "${datasource}"


def test_panels_have_ids_of_their_own_and_do_not_overlap(dashboard: dict[str, Any]) -> None:
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    taken = [
        (x, y)
        for place in (panel["gridPos"] for panel in dashboard["panels"])
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(taken)) == len(taken)
    assert max(x for x, _ in taken) < 24


def test_the_reference_names_every_metric_and_no_other(exported: list[Metric]) -> None:
    reference = (DOCS / "metrics.md").read_text(encoding="utf-8")
    types = dict(re.findall(r"^\| `([a-z0-9_:]+)` \| (\w+) \|", reference, re.MULTILINE))
    expected = {
        family.name + ("_total" if family.type == "counter" else ""): family.type
        for family in exported
        if not family.name.startswith("process_")
    }
    assert types == expected
    for family in exported:
        assert family.name in reference
