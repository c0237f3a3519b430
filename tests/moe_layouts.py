"""Layouts for models with experts, beside those of tests.layouts: experts over ranks, their matrices over ranks."""

from __future__ import annotations

from tests.layouts import ONE_RANK, Layout

MOE_LAYOUTS = [
    ONE_RANK,
    Layout(tp=2, sp=True, etp=1),
    Layout(pp=2),
    Layout(pp=2, vpp=2),
    Layout(cp=2),
    Layout(dp=2, ep=2),
    Layout(pp=2, first=1),
    Layout(tp=2, sp=True, ep=2, etp=1),
    Layout(tp=2, sp=True, etp=2),
    Layout(dp=2, etp=2),
    Layout(tp=2, sp=True, pp=2, etp=1),
    Layout(dp=2, ep=2, pp=2),
    Layout(tp=2, sp=True, dp=2, ep=2, etp=2),
]
