"""A place for code that a model wrote: no network, no files but Python's own, no processes, little memory and time.

`isolation` says what this machine offers and proves it, `launch` starts confined processes, `confine` is what these do
to themselves before they take in any code. A solver runs the code; a tester runs the tests of the data beside it. They
exchange plain values (`values`) in frames (`frames`) through the worker between them, so that what the tests expect is
never in the process that runs the code.

All of it is of the standard library: a confined process has no site-packages.
"""
