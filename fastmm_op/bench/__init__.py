"""The benchmark: cases, who runs them, how they are checked and timed, what a results file says."""
