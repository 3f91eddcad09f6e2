"""Worker processes that compute rewards.

Main process: `pool.py` (all workers), `worker_thread.py` (one worker) and `process.py` (its process). Worker process:
`worker.py` (its graders) and `budget.py` (limits of a part of a call). The package `processes` has what they share with
other workers. The `*_worker` module of a verifier has `load(spec)`, which returns the function that grades one
completion.
"""
