from __future__ import annotations

from hypothesis import settings

# no test may depend on the speed of the machine, and the first example of one may compile
settings.register_profile("streamrec", deadline=None)
settings.load_profile("streamrec")
