"""Overlays our stand-ins on the flat `tests/` folder of the transformers sdist.

The sdist ships `tests/test_*.py` (the mixins) and none of the packages and support modules they import. A module is
looked up first beside this file, then in the sdist; so no file of Transformers is copied into this repository.
"""

import os

__path__.append(os.environ["TRANSFORMERS_SDIST_TESTS"])
