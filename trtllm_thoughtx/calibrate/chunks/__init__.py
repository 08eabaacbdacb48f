"""What chunked attention keeps of a model: attention mass, outputs, right answers; and the settings that follow from it."""
