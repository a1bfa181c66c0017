"""A package, so that the factories in it, which benchmarks use too, are found before those of another `tests`."""
