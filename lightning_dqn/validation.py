"""Checks of constructor arguments."""


def check_positive(**arguments: float | None) -> None:
    """Check that numbers are positive; None stands for no number.

    Args:
        arguments: by name.

    Raises:
        ValueError: naming the argument and its value.
    """
    for name, value in arguments.items():
        # also false for NaN
        if value is not None and not value > 0:
            raise ValueError(f"model.{name}={value}: must be positive")
