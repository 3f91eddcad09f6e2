"""What verifiers do inside a worker process: each module has `load(job)`, which gives the function that judges one
completion."""
