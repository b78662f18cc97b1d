"""The one exception for mistakes that the user can mend."""


class InputError(ValueError):
    """A wrong config value, file or folder. The message is one line: which field or file, and the remedy."""
