"""Forms of the operator for TensorRT."""
