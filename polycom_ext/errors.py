"""The one exception that the command line turns into a sentence and exit status 2."""


class PolycomError(Exception):
    """A mistake of the user's that the message names, together with the way out."""


class MissingDependencyError(PolycomError, ImportError):
    """An optional package that an adapter needs is not installed."""
