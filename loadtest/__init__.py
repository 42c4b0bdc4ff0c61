"""Load test for OpenAI-compatible servers with many adapters: open-loop arrivals, honest latencies, a report.

`loadtest.popularity` and `loadtest.lengths` define which adapter a request names and how long it is; benchmarks
and tests draw from them too. `loadtest.runner.run_scenario` does a run; `python -m loadtest` is the command.
"""
