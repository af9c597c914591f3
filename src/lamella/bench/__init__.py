"""Speed and memory as ratios: every arm in one interleaved run on one machine, its results compared first."""

from lamella.bench.forms import bench_forms
from lamella.bench.mola import bench_mola
from lamella.bench.mole import bench_mole
from lamella.bench.molex import bench_molex
from lamella.bench.results import BenchResult, load_result, write_result
from lamella.bench.settings import FormsSettings, MolaSettings, MoleSettings, MolexSettings, SimilaritySettings
from lamella.bench.similarity import bench_similarity
from lamella.bench.tables import render_result, render_table

__all__ = [
    "BenchResult",
    "FormsSettings",
    "MolaSettings",
    "MoleSettings",
    "MolexSettings",
    "SimilaritySettings",
    "bench_forms",
    "bench_mola",
    "bench_mole",
    "bench_molex",
    "bench_similarity",
    "load_result",
    "render_result",
    "render_table",
    "write_result",
]
