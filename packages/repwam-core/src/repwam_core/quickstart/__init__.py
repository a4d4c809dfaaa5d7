"""One command from simulator (or data set) to policy and report: the stages, cached and resumable."""
