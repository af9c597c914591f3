"""Speed and memory as ratios: every arm in one interleaved run on one machine, its results compared first."""

from lamella.lab.bench.forms import bench_forms
from lamella.lab.bench.mola import bench_mola
from lamella.lab.bench.mole import bench_mole
from lamella.lab.bench.molex import bench_molex
from lamella.lab.bench.results import BenchResult, load_result, write_result
from lamella.lab.bench.settings import FormsSettings, MolaSettings, MoleSettings, MolexSettings, SimilaritySettings
from lamella.lab.bench.similarity import bench_similarity
from lamella.lab.bench.tables import render_result, render_table

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
