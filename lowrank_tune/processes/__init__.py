"""Worker processes with limits on time and memory, for code that may hang: rewards and chat templates.

Main process: `worker_process.py` (a worker with its channel), `charged_time.py` and `process_tree.py` (its time limit).
Worker process: `child.py` (its script) and `limits.py` (limits within it).
"""
