"""How well a system answers: questions, records, statistics, comparisons, and lm-eval on this project's engines."""
