"""Fine-tuning beside serving: files of data, the queue of jobs, workers that train, and publication of results."""
