"""Distillation in three stages, on transformers and TRL; the `[distill]` extra. Nothing outside this package imports it."""
