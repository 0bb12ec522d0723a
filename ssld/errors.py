"""Every error a user can cause, and the exit code that the command line ends with.

    SsldError
    ├── RecipeError      2   a recipe, an option or the stage graph is wrong; nothing was spent
    ├── DataError       65   images, shards, labels or classes are not what was expected
    │   ├── CheckpointError  a checkpoint or a weights file is damaged or does not fit
    │   │   └── UnreadableError  or cannot be read, which says nothing against it
    │   ├── LabelError       a file of soft labels is missing, damaged, or not the one it should be
    │   └── TeacherError     what a teacher returned, or how good it is, cannot be trusted
    ├── StallError      69   what a run waits for has not come in time
    ├── ProcessError    71   one of the processes of a run is gone
    │   └── RankError        one of those that train together
    ├── PluginError     70   a plug-in is named twice, fails to import or breaks its contract
    ├── OutputError     73   a directory cannot be created or written
    ├── StorageError    74   writing failed: no space left, an input/output error
    ├── BusyError       75   another process works in the same run directory
    ├── ChangedError    78   the recipe or its data changed since the run began
    └── Interrupted    129, 130 or 143, by signal, after the state was saved where there is any

A message says what was wanted, what came instead, where, and what to do.
"""


class SsldError(Exception):
    """Base of all errors that are shown as one message, without a traceback."""

    exit_code = 70


class RecipeError(SsldError):
    """A recipe, an option or the stage graph is wrong; nothing was spent."""

    exit_code = 2


class DataError(SsldError):
    """Images, shards, labels or classes are not what was expected."""

    exit_code = 65


class CheckpointError(DataError):
    """A checkpoint or a weights file is damaged, or does not fit the network."""


class UnreadableError(CheckpointError):
    """What a run has written cannot be read, which says nothing against it: the next time it may be."""


class LabelError(DataError):
    """A file of soft labels is missing, damaged, or not the one it should be."""


class TeacherError(DataError):
    """What a teacher returned, or how good it is, cannot be trusted."""


class PluginError(SsldError):
    """A plug-in is named twice, fails to import or breaks its contract."""


class StallError(SsldError):
    """What a run waits for has not come in time; where it is met, the process ends."""

    exit_code = 69


class ProcessError(SsldError):
    """One of the processes of a run is gone."""

    exit_code = 71


class RankError(ProcessError):
    """One of the processes that train a stage together is gone."""


class OutputError(SsldError):
    """A directory cannot be created or written."""

    exit_code = 73


class StorageError(SsldError):
    """Writing failed: no space left on the device, or an input/output error."""

    exit_code = 74


class BusyError(SsldError):
    """Another process works in the same run directory."""

    exit_code = 75


class ChangedError(SsldError):
    """The recipe, or the data that it names, changed since the run began."""

    exit_code = 78


class Interrupted(SsldError):
    """A signal ended the run after its state was saved."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
