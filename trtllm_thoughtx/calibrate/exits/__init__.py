"""Calibration of early exits: traces, what they show at each step, and the head and adapters fitted to it."""
