"""Worker processes that compute rewards.

Main process: `pool.py` (all workers), `worker_thread.py` (one worker), `process.py` (its process), `charged_time.py`
and `process_tree.py` (its time limit). Worker process: `worker.py` (its script) and `budget.py` (limits of a part of a
call). The `*_worker` module of a verifier has `load(spec)`, which returns the function that grades one completion.
"""
