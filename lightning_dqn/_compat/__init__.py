"""All uses of private interfaces, state formats and message texts of other libraries, one file per library.

They change without notice between releases. `tests/test_compat*.py` contain a test of each function, which fails
with the function's name if a library has changed. These files import nothing else of this package.
"""
