"""What a run will need, counted before it runs: memory, traffic, time and money; torch stays out, but for a trial."""
