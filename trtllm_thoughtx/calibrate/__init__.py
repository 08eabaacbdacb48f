"""Quantization of a checkpoint on data: what is rounded to which grid, what that costs, and a checkpoint that holds the result.

Written by hand rather than with nvidia-modelopt (0.47), which quantizes a model that is loaded whole, simulates each candidate in every
forward pass of it, and calibrates layers with the same input apart, to be reconciled when it exports. Here a layer is in memory at a time,
the statistics are gathered in one pass, layers that an engine fuses are searched together, and the numbers that the search rounds are
those that the graph computes with. bench/beside_modelopt.py compares the two on the same rows.
"""
