"""Load test for OpenAI-compatible servers with many adapters: open-loop arrivals, honest latencies, a report.

`manylora_loadtest.popularity` and `manylora_loadtest.lengths` define which adapter a request names and how long it
is; benchmarks and tests draw from them too. `manylora_loadtest.runner.run_scenario` does a run;
`python -m manylora_loadtest` is the command.
"""
