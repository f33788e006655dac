"""The paper's six target data sets, from the archives as published to folders with train/ and test/.

`catalogue` says what there is and where; `prepare` makes the folder. Nothing is downloaded.
"""

from afds.data.published.catalogue import PublishedFile, PublishedSet, catalogue
from afds.data.published.plan import Options
from afds.data.published.preparing import Prepared, prepare

__all__ = ["Options", "Prepared", "PublishedFile", "PublishedSet", "catalogue", "prepare"]
