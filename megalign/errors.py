"""The one exception for mistakes a user can mend; the command line prints it as one line and exits with 2."""


class UserError(ValueError):
    """States the value, the rule it breaks and the way out, in one line."""
