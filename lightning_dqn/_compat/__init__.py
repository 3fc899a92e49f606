"""All use of private parts, state schemas and message texts of other libraries, one file a library.

They change without notice between releases. `tests/test_compat*.py` have a test for each function here, which fails
with the function's name when a library has changed. These files import nothing else of this package.
"""
