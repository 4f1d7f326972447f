"""Every error that unmerge raises on purpose.

A message is one line that says what was given, what was expected and what to do. The command line prints it
after ``error:`` and exits with code 2.
"""


class UnmergeError(Exception):
    """Something that was given to unmerge cannot be used; the message is for the user."""


class CheckpointError(UnmergeError):
    """A file or folder is not a readable checkpoint or adapter."""


class SourceError(UnmergeError):
    """A reference could not be resolved to local files: missing path, gated repository, offline."""


class AlignmentError(UnmergeError):
    """Two models do not have the same architecture, or not the same base."""


class DictionaryError(UnmergeError):
    """A dictionary is damaged, holds two atoms of one name, or was built on another base."""


class TargetError(UnmergeError):
    """The target cannot be attributed: it equals the base, or holds values that are not finite."""


class RecipeError(UnmergeError):
    """A merge recipe cannot be read, or says something that no merge can be made of."""


class MissingExtraError(UnmergeError):
    """An optional dependency is needed and not installed."""


class ClusterError(UnmergeError):
    """A cluster cannot be reached, or lost what it was given too often."""


class StateError(UnmergeError):
    """What an earlier run left to go on from is not of this one."""
