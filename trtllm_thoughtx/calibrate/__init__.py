"""Quantization of a checkpoint on data: what is rounded to which grid, what that costs, and a checkpoint that holds the result.

Written by hand rather than with nvidia-modelopt, which wants the whole model in memory, no longer exports this checkpoint format for
Qwen, and takes its statistics from padded batches; here a layer is in memory at a time, rows are never padded, and the numbers that the
search rounds are those that the graph computes with.
"""
