"""How fast RedisGate is beside what one could use instead, in one run: `make bench`, docs/benchmarks.md."""
