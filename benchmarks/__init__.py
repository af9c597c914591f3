"""Speed and memory of the methods as ratios to their peers, each pair in one interleaved run on one machine.

Nothing is timed that does not compute the same. Run them by `make bench` or `python -m benchmarks NAME`.
"""
