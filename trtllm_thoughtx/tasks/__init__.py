"""Generated reasoning tasks whose chains, and the point at which each suffices, are known exactly."""
