"""Which benchmarks there are."""

from benchmarks.decode import DECODE
from benchmarks.forms import FORMS
from benchmarks.library import LIBRARY
from benchmarks.mola import MOLA
from benchmarks.mole import MOLE
from benchmarks.molex import MOLEX
from benchmarks.record import Benchmark
from benchmarks.serving import SERVING
from benchmarks.similarity import SIMILARITY

BENCHMARKS: dict[str, Benchmark] = {
    "mola": MOLA,
    "molex": MOLEX,
    "mole": MOLE,
    "decode": DECODE,
    "library": LIBRARY,
    "similarity": SIMILARITY,
    "serving": SERVING,
    "forms": FORMS,
}
