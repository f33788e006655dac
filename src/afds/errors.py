"""Mistakes of the user's: the message names the file or the value, and the way out."""


class AfdsError(Exception):
    """The command line prints its message without a traceback and exits with 2."""


class DataError(AfdsError):
    """The photos, or how they are laid out."""


class SourceError(AfdsError):
    """The pretrained network: its name, its weights or its architecture."""


class BudgetError(AfdsError):
    """A budget that cannot be read or cannot be met."""


class RunFolderError(AfdsError):
    """A run folder that is missing, incomplete, damaged or hostile."""


class TrainingError(AfdsError):
    """A training that diverged; what was saved before is intact."""


class ConfigError(AfdsError):
    """An option with a value that makes no sense."""


class ExportError(AfdsError):
    """A network that a format cannot hold, or an export that does not compute what the network does."""


class AfdsWarning(UserWarning):
    """What a user should know and can live with; the command line prints it as a note."""
