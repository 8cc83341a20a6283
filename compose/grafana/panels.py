"""A dashboard as a table of rows and panels, made into Grafana's JSON by Grafana's own library (grafana-foundation-sdk)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal

from grafana_foundation_sdk.builders import common as common_builders
from grafana_foundation_sdk.builders import dashboard as board
from grafana_foundation_sdk.builders import heatmap, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common
from grafana_foundation_sdk.models import heatmap as heatmap_models
from grafana_foundation_sdk.models.dashboard import DataSourceRef, VariableOption, VariableRefresh
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
PanelBuilder = timeseries.Panel | stat.Panel | heatmap.Panel


@dataclass(frozen=True, slots=True)
class Panel:
    """`queries` are (legend, PromQL); a heatmap's one query gives buckets by `le`. Width is of 24 columns."""

    title: str
    kind: Literal["lines", "stacked", "number", "heatmap"]
    unit: str
    queries: tuple[tuple[str, str], ...]
    width: int = 8
    about: str = ""
    height: int = 8


@dataclass(frozen=True, slots=True)
class Row:
    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True, slots=True)
class Dashboard:
    uid: str
    title: str
    about: str
    rows: tuple[Row, ...]


def _lines(panel: Panel) -> timeseries.Panel:
    legend = common_builders.VizLegendOptions().show_legend(True).placement(common.LegendPlacement.BOTTOM)
    made = timeseries.Panel().legend(legend).fill_opacity(10)
    made.tooltip(common_builders.VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI))
    return made.min(0)


def _stacked(panel: Panel) -> timeseries.Panel:
    stacking = common_builders.StackingConfig().mode(common.StackingMode.NORMAL).group("A")
    return _lines(panel).stacking(stacking).fill_opacity(60).line_width(0)


def _number(panel: Panel) -> stat.Panel:
    reduced = common_builders.ReduceDataOptions().calcs(["lastNotNull"])
    return stat.Panel().reduce_options(reduced).graph_mode(common.BigValueGraphMode.AREA)


def _heatmap(panel: Panel) -> heatmap.Panel:
    colour = heatmap.HeatmapColorOptions().mode(heatmap_models.HeatmapColorMode.SCHEME).scheme("Spectral").steps(64)
    return heatmap.Panel().calculate(False).color(colour).y_axis(heatmap.YAxisConfig().unit(panel.unit))


_KINDS = {"lines": _lines, "stacked": _stacked, "number": _number, "heatmap": _heatmap}


def _panel(panel: Panel) -> PanelBuilder:
    made = _KINDS[panel.kind](panel).title(panel.title).description(panel.about).datasource(SOURCE)
    made.unit(panel.unit).span(panel.width).height(panel.height)
    for number, (legend, expr) in enumerate(panel.queries):
        query = prometheus.Dataquery().ref_id(chr(ord("A") + number)).expr(expr).legend_format(legend).range()
        if panel.kind == "heatmap":
            query.format(PromQueryFormat.HEATMAP)
        made.with_target(query)
    return made


def _variables(made: board.Dashboard) -> None:
    made.with_variable(
        board.DatasourceVariable("datasource")
        .label("Prometheus")
        .type("prometheus")
        .current(VariableOption(text="Prometheus", value="prometheus", selected=True))
    )
    made.with_variable(
        board.QueryVariable("model")
        .label("Model")
        .datasource(SOURCE)
        .query("label_values(vllm:generation_tokens_total, model_name)")
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .include_all(True)
        .all_value(".*")
        .multi(True)
        .current(VariableOption(text="All", value="$__all", selected=True))
    )


def as_json(dashboard: Dashboard) -> str:
    """The dashboard as Grafana 11.6 reads it."""
    made = board.Dashboard(dashboard.title).uid(dashboard.uid).description(dashboard.about)
    made.tags(["splitserve"]).time("now-30m", "now").refresh("10s").readonly()
    _variables(made)
    for row in dashboard.rows:
        made.with_row(board.Row(row.title))
        for panel in row.panels:
            made.with_panel(_panel(panel))
    plain = json.loads(json.dumps(made.build(), cls=JSONEncoder))
    for number, panel in enumerate(plain["panels"], start=1):
        panel["id"] = number
    return json.dumps(plain, indent=2) + "\n"
