"""How fast the engine is on this machine: workloads, what they cost, other programs on the same work, a report."""
