"""A sandbox for code that a model wrote: no network, no files except Python's own, no processes, limits on memory and
time.

Trusted side, in the worker process of `python_tests`: `isolation` tests which level this machine supports, `launch`
starts confined processes, `ipc` exchanges messages with them, and `check` runs the code and the tests of a row.

Confined side: `child` is the start, and `confine` (with `namespaces`, `mounts`, `landlock`, `seccomp`, `syscalls`)
restricts the process before it receives any code. A `solver` process runs the code, and a `tester` process the tests of
the data. They exchange plain `values` in `frames` through the worker between them, so that what the tests expect is
never in the process that runs the code.

Only the standard library is imported: a confined process has no site-packages.
"""
