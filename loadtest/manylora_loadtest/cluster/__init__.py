"""A simulated cluster, to compare ways of choosing a request's server: `python -m manylora_loadtest.cluster`."""
