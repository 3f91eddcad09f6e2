"""`python_tests`: runs unit tests on the code of a completion in the sandbox; and the code fences of completions."""
